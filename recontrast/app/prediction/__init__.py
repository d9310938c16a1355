"""Prediction over many files: output files, Parquet and Ray."""
