"""Runners on the CPU, with their matrix products and threads."""
