"""Trained models for where they are used: weights that never change again."""

from .frozen import freeze

__all__ = ["freeze"]
