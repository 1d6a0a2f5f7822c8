"""Bytes and transactions of the adapter store: what a backend is, and the embedded one."""
