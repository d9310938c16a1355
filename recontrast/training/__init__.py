"""Training: the loop, its state, and what makes it fast."""
