"""A gated recurrent unit to read, trust, and run on any array library."""

from importlib import import_module as _import
from typing import TYPE_CHECKING

from . import convert as convert
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
from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import deploy as deploy
    from . import stream as stream

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


def __getattr__(name: str) -> object:
    if name in ("deploy", "stream"):  # on first use
        return _import(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
