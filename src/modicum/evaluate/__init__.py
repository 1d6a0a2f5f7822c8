"""Metrics, intervals and evaluation runs."""
