"""Preparation of data, campaigns over many runs, tables and figures for the documents."""
