"""The commands of `modicum fleet`."""
