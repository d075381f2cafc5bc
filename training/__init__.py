"""Training: the loop, its recipe and what it shows."""
