"""Small helpers every package may use: errors, files, run folders, processes. Imports nothing of ours."""
