"""Scores. This package must keep its __init__.py: without it `from eval.mse import mse` would find the script eval.py."""
