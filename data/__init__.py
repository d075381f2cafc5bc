"""Datasets as folders of real images, their transforms and loaders."""
