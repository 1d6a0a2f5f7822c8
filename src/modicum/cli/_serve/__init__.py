"""The commands of `modicum serve`."""
