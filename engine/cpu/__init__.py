"""The steps of drawing on a CPU: in C++, or in few PyTorch operations."""
