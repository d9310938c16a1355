"""Applications on top of the engine: the command line, prediction, the demo."""
