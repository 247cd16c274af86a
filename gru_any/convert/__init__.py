"""Weights from other libraries and back: a module for each, imported on first use.

`gru_any.convert.NAME.load(path)` and `save(path, model)` read and write files, where the library
has files of weights; `from_arrays` and `to_arrays` do the same with arrays in memory. No converter
imports the library whose weights it converts, unless it says so.
"""

from importlib import import_module
from typing import Any

LIBRARIES = ("chainer", "equinox", "flax", "haiku", "haste", "keras", "mlx", "onnx", "torch")


def __getattr__(name: str) -> Any:
    if name in LIBRARIES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"gru_any.convert has no {name!r}, only {', '.join(LIBRARIES)}")


def __dir__() -> list[str]:
    return list(LIBRARIES)
