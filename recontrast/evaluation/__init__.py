"""Metrics of a model on labelled images."""
