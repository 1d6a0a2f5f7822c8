"""The commands of `modicum experiment`."""
