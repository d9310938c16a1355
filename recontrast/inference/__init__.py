"""Anomaly maps, scores and decisions for images."""
