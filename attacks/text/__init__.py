"""Attacks on sentences."""
