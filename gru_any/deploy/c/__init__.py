"""A model as C99: source for any machine, or a library for this one.

What `load` does not need is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .library import CStream, load

if TYPE_CHECKING:
    from .compiler import build
    from .folder import write

__all__ = ["CStream", "build", "load", "write"]
_HOMES = {"build": ".compiler", "write": ".folder"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
