"""Recipes, baselines and training."""
