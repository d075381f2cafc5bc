"""Optimizers and least squares over many problems side by side."""
