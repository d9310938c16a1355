"""From a detector and labelled images to metrics."""
