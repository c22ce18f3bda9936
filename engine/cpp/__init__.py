"""The transformer in C++ for a CPU, and what compiles and loads it."""
