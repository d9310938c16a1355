"""Recipes: every setting of a training run, the paper's scripts among them."""
