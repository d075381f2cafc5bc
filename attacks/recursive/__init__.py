"""Attacks that invert a network layer by layer."""
