"""Training: the loop, its data, optimisers and schedules, and runs that can be resumed."""

from .loop import evaluate, fit

__all__ = ["evaluate", "fit"]
