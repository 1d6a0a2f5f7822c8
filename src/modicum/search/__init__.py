"""Search spaces, what sub-networks cost, and strategies that find good ones."""
