"""HTML report of a detector on test images: a single self-contained file."""
