"""CuPy on a CUDA device: whether it can be used, and how it runs a block of steps."""
