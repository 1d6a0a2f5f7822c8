"""Comparisons: methods × ranks × compressions × seeds on one task, every learning rate swept."""
