"""Training data: the embedded world, token caches, packing."""
