"""The parts of benchmark.py, and comparisons that run on their own."""
