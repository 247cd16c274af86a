"""Trained models for where they are used: weights that never change again, and C.

`freeze` and `gru_any.deploy.c` are imported on first use: neither needs the other.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .frozen import freeze

__all__ = ["freeze"]


def __getattr__(name: str) -> Any:
    if name == "c":
        return import_module(".c", __name__)
    if name == "freeze":
        return import_module(".frozen", __name__).freeze
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
