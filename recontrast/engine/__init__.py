"""The engine: recipes, training, evaluation, checkpoints; functions over the model of `recontrast.model`."""
