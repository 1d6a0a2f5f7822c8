"""Pure tensor functions: no modules, no files, no global state."""
