"""Training: the loop, its data, optimisers and schedules, and runs that can be resumed."""

from .loop import evaluate, fit, spread

__all__ = ["evaluate", "fit", "spread"]
