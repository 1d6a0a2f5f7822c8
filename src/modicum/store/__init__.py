"""Adapters on disk: the compact record, PEFT folders, export and import."""
