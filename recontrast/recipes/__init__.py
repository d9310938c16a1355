"""Recipes: the settings of training runs, including those of the paper's scripts."""
