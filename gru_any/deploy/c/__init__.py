"""A model as C99: source for any machine, or a library for this one."""

from .compiler import build
from .folder import write
from .library import CStream, load

__all__ = ["CStream", "build", "load", "write"]
