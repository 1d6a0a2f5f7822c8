"""What we know of architectures: loading, targets, shapes, bases, plans."""
