"""Speed of the kernels, of the engine and of training."""
