"""Attacks that solve linear equations between the parts of a gradient."""
