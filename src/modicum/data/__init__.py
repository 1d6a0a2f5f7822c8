"""Datasets, prompt templates and collation."""
