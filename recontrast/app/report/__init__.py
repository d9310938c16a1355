"""The report: one HTML file with what a detector does on test images; it needs no network and no other file."""
