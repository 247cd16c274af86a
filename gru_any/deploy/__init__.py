"""Trained models for where they are used: weights that never change again, and C.

`gru_any.deploy.c` is imported on first use.
"""

from importlib import import_module
from typing import Any

from .frozen import freeze

__all__ = ["freeze"]


def __getattr__(name: str) -> Any:
    if name == "c":
        return import_module(".c", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
