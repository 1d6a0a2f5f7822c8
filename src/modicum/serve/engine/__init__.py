"""Engines: one interface, Transformers' continuous batching behind it, or vLLM."""
