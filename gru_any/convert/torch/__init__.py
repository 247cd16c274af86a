"""PyTorch: `torch.nn.GRU` and `GRUCell`. Reset after, with the names and shapes of this library.

Files are safetensors, or what `torch.save` writes. `GRU` and `GRUCell` are modules that are called
like PyTorch's and compute with this library, `accelerate` puts them into a model, and `as_module`
makes a module of a model of this library. Only these, and writing `.pt` files, import PyTorch.
"""

from __future__ import annotations  # PyTorch's classes are known to a type checker alone

from importlib import import_module
from typing import TYPE_CHECKING, Any, overload

from ... import nn
from ...nn.chain import Chain
from .weights import from_arrays, import_torch, load, save, to_arrays

if TYPE_CHECKING:
    from .chain import ChainModule
    from .module import GRU, GRUCell
    from .replace import Accelerated, accelerate, restore

# what is imported on first use, since it needs PyTorch
HOMES = {
    "Accelerated": "replace",
    "ChainModule": "chain",
    "GRU": "module",
    "GRUCell": "module",
    "accelerate": "replace",
    "restore": "replace",
}
__all__ = [
    "GRU",
    "Accelerated",
    "ChainModule",
    "GRUCell",
    "accelerate",
    "as_module",
    "from_arrays",
    "load",
    "restore",
    "save",
    "to_arrays",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"gru_any.convert.torch has no {name!r}, only {', '.join(__all__)}")
    import_torch(name)
    return getattr(import_module(f".{HOMES[name]}", __name__), name)


@overload
def as_module(model: nn.gru.GRU) -> GRU: ...
@overload
def as_module(model: nn.cell.GRUCell) -> GRUCell: ...
@overload
def as_module(model: Chain) -> ChainModule: ...
def as_module(model: nn.gru.GRU | nn.cell.GRUCell | Chain) -> GRU | GRUCell | ChainModule:
    """A `torch.nn.Module` over a model of ours, to be used inside a PyTorch model.

    Parameters
    ----------
    model : GRU, GRUCell or Chain of gru_any
        Its parameters are shared in memory with those of the module, where it is on NumPy or
        PyTorch: a step of a PyTorch optimiser changes both.

    Returns
    -------
    GRU, GRUCell or ChainModule of gru_any.convert.torch

    Raises
    ------
    TypeError
        The model is something else, or a frozen one, or of dtype complex128.
    """
    import_torch("as_module")
    from .chain import as_module

    return as_module(model)
