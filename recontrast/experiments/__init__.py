"""Experiments of the paper: its tables, the published numbers, and a comparison with our own runs."""
