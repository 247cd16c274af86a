"""A gated recurrent unit to read, trust, and run on any array library.

What is named here is imported on first use, so that a program that only runs a frozen or a compiled
model loads nothing else.
"""

from importlib import import_module as _import
from typing import TYPE_CHECKING

from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import convert as convert
    from . import deploy as deploy
    from . import stream as stream
    from .backend import asarray, to_numpy
    from .checkpoint import load, save
    from .inspect.explain import explain
    from .inspect.gradcheck import gradcheck
    from .nn.cell import GRUCell
    from .nn.chain import Chain
    from .nn.gru import GRU
    from .nn.layers import Dropout, Embedding, Last, Linear
    from .nn.losses import sigmoid_cross_entropy, softmax_cross_entropy, squared_error
    from .nn.tangents import hvp
    from .train.optim import SGD, Adam, AdamW, RMSprop, clip_by_global_norm, clip_by_value

__all__ = [
    "GRU",
    "SGD",
    "Adam",
    "AdamW",
    "Chain",
    "Dropout",
    "Embedding",
    "GRUCell",
    "Last",
    "Linear",
    "RMSprop",
    "asarray",
    "clip_by_global_norm",
    "clip_by_value",
    "explain",
    "gradcheck",
    "hvp",
    "load",
    "save",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "squared_error",
    "to_numpy",
]
_MODULES = {
    "backend": ["asarray", "to_numpy"],
    "checkpoint": ["load", "save"],
    "inspect.explain": ["explain"],
    "inspect.gradcheck": ["gradcheck"],
    "nn.cell": ["GRUCell"],
    "nn.chain": ["Chain"],
    "nn.gru": ["GRU"],
    "nn.layers": ["Dropout", "Embedding", "Last", "Linear"],
    "nn.losses": ["sigmoid_cross_entropy", "softmax_cross_entropy", "squared_error"],
    "nn.tangents": ["hvp"],
    "train.optim": [
        "SGD", "Adam", "AdamW", "RMSprop", "clip_by_global_norm", "clip_by_value",
    ],
}  # fmt: skip
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
_SUBMODULES = (
    "activations", "backend", "checkpoint", "codegen", "convert", "deploy", "equations", "errors",
    "files", "inspect", "nn", "regularisation", "stream", "tensors", "train",
)  # fmt: skip


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return _import(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(_import(f".{_HOMES[name]}", __name__), name)
    globals()[name] = found  # the next time it is simply there
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
