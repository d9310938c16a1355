"""From images to maps, scores and decisions."""
