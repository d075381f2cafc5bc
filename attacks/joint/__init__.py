"""The joint attack: batches, and images masked by MJP, from one generalised eigenvalue problem."""
