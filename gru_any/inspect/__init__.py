"""Look inside a model: what its gates do, what it remembers, and what it computes."""

from .values import activity, fading, half_life, saturation, spectrum

__all__ = ["activity", "fading", "half_life", "saturation", "spectrum"]
