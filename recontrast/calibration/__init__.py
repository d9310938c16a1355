"""Decisions from good images alone: conformal thresholds, and tests of whether they still hold."""
