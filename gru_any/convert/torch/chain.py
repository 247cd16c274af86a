"""A model of ours as a module of PyTorch."""

from collections.abc import Iterable

import torch

from ...backend import Backend
from ...nn import cell, gru
from ...nn.chain import Chain
from ...nn.layers import Dropout, Embedding, Linear
from ...nn.params import Layer
from ...typing import Array, Lengths
from ..cells import refuse_options
from .call import to_tensor
from .module import GRU, GRUCell

OURS = "weight_dropout", "recurrent_dropout", "zoneout", "layer_norm"  # what modules lack


def as_module(model: object) -> "GRU | GRUCell | ChainModule":
    """Return the module over a GRU, a GRUCell or a Chain; TypeError for anything else."""
    if isinstance(model, gru.GRU | cell.GRUCell):
        return _recurrent(model)
    if isinstance(model, Chain):
        return ChainModule(model)
    found = model.__name__ if isinstance(model, type) else type(model).__name__
    raise TypeError(f"as_module got {found}, expected a GRU, a GRUCell or a Chain of gru_any")


def _recurrent(layer: gru.GRU | cell.GRUCell) -> GRU | GRUCell:
    """Return a module that shares the memory of the parameters, where that can be."""
    if layer.dtype == "complex128":
        raise TypeError("the model has dtype complex128, expected a real floating dtype")
    layer.over(layer.backend, layer.dtype, ())  # refused by a frozen model
    if lost := [f"{name}={layer.settings[name]!r}" for name in OURS if name in layer.settings]:
        raise ValueError(
            f"{', '.join(lost)} of the model has no counterpart in the module of as_module, which "
            "would train otherwise: make a gru_any.convert.torch.GRU with it, or train it here"
        )
    kind = GRU if isinstance(layer, gru.GRU) else GRUCell
    if kind is GRUCell:
        refuse_options(layer)
    module: GRU | GRUCell = kind(**layer.settings, device="meta")
    for name, array in layer.params.items():
        setattr(module, name, _parameter(array, layer.backend))
    return module


class ChainModule(torch.nn.ModuleList):
    """A `torch.nn.Module` over a Chain.

    `y, state = module(x, state=None, lengths=None, resets=None)`. Its parts are a `GRU` of
    gru_any.convert.torch for each GRU and PyTorch's own Linear, Embedding and Dropout, over the
    memory of the Chain's parameters; the names in its state_dict are the Chain's. Dropout acts in
    training mode.
    """

    def __init__(self, chain: Chain) -> None:
        super().__init__(_part(layer) for layer in chain.layers)
        # an array that stands in two layers is one parameter
        made: dict[int, torch.nn.Parameter] = {}
        for part, layer in zip(self, chain.layers, strict=True):
            for name, array in layer.params.items():
                setattr(part, name, made.setdefault(id(array), getattr(part, name)))

    def forward(
        self,
        x: torch.Tensor,
        state: Iterable[torch.Tensor | None] | None = None,
        lengths: Lengths | None = None,
        resets: Array | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Tensors shaped as in `gru_any.Chain` -> y, the new state of each GRU."""
        count = sum(isinstance(part, GRU) for part in self)
        states = [None] * count if state is None else list(state)
        if len(states) != count:
            raise ValueError(f"state holds {len(states)}, expected {count}, one for each GRU")
        new: list[torch.Tensor] = []
        for part in self:
            if isinstance(part, GRU):
                x, h = part(x, states[len(new)], lengths, resets)
                new.append(h)
            else:
                x = part(x)
        return x, new


def _part(layer: Layer) -> torch.nn.Module:
    """Return a layer of a Chain as a module."""
    part: torch.nn.Module
    if isinstance(layer, gru.GRU):
        return _recurrent(layer)
    if isinstance(layer, Dropout):
        return torch.nn.Dropout(layer.p)
    if isinstance(layer, Linear):
        sizes = (layer.in_features, layer.out_features)
        part = torch.nn.Linear(*sizes, bias=layer.bias, device="meta")
    elif isinstance(layer, Embedding):
        part = torch.nn.Embedding(layer.n, layer.size, device="meta")
    else:
        raise TypeError(f"a {type(layer).__name__} has no counterpart in a torch.nn.Module")
    for name, array in layer.params.items():
        setattr(part, name, _parameter(array, layer.backend))
    return part


def _parameter(array: Array, backend: Backend) -> torch.nn.Parameter:
    return torch.nn.Parameter(to_tensor(array, backend))
