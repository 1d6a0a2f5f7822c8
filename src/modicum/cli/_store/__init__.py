"""The commands of `modicum store`, by topic."""
