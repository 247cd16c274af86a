"""What benchmark.py measures with, and comparisons that are run on their own."""
