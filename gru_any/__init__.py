"""A gated recurrent unit to read, trust, and run on any array library."""

from . import convert as convert
from .backend import asarray, to_numpy
from .cell import GRUCell
from .chain import Chain
from .checkpoint import load, save
from .checks import gradcheck
from .explain import explain
from .gru import GRU
from .layers import Dropout, Embedding, Last, Linear
from .losses import sigmoid_cross_entropy, softmax_cross_entropy, squared_error
from .optim import SGD, Adam, AdamW, RMSprop, clip_by_global_norm, clip_by_value

__version__ = "0.1.0"

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
    "load",
    "save",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "squared_error",
    "to_numpy",
]
