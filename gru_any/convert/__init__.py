"""Weights from other libraries and back: a module for each, imported on first use.

`gru_any.convert.NAME.load(path)` and `save(path, model)` read and write files, where the library
has files of weights; `from_arrays` and `to_arrays` do the same with arrays at hand. Of the other
libraries nothing is imported.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*"))


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"gru_any.convert has no {name!r}, only {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
