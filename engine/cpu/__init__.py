"""What runs a step of drawing on a CPU: C++, or few of PyTorch's operations."""
