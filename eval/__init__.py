"""Scores. This file must stay: without it `from eval.mse import mse` would find the script eval.py instead."""
