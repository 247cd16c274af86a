"""A CUDA device that the host plays, and CUDA source compiled for the CPU."""
