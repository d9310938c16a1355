"""Recipes: the settings of training runs, among them those of the paper's scripts."""
