"""Campaigns: many victims attacked one after another, from folders of images, sentences or leak files."""
