"""Decisions from good images alone: conformal thresholds, and tests that they still hold."""
