"""Weights from and to `torch.nn.GRU` and `torch.nn.GRUCell`, as arrays and as files."""

import io
import pathlib
import re
from collections.abc import Sequence
from itertools import combinations
from types import ModuleType

from ... import arguments
from ...backend import overlap
from ...errors import ShapeError
from ...files import read_whole, write_atomically
from ...nn.cell import GRUCell
from ...nn.chain import Chain
from ...nn.gru import GRU
from ...nn.layers import Embedding, Linear
from ...nn.params import Layer
from ...typing import Array, Arrays, HostArray, Path
from ..cells import assemble, assemble_cell, check_gru, layer_of, one_dtype, refuse_options, shown
from ..files import naming, read_safetensors, write_safetensors
from ..table import Cell, check_variant, floating
from .pickled import read_pt
from .state import part, refuse_others, weight

NAME = re.compile(r"(weight_ih|weight_hh|bias_ih|bias_hh)(?:_l(0|[1-9][0-9]{0,3})(_reverse)?)?")


def from_arrays(
    arrays: Arrays, prefix: str | Sequence[str] = "", *, batch_first: bool = False
) -> GRU | GRUCell | Chain:
    """A GRU or GRUCell from a state_dict, or a Chain from the parts of one.

    Weights under `weight_norm`, `spectral_norm` (as in eval mode) or pruning are computed from what
    the state_dict holds in their place.

    Parameters
    ----------
    arrays : mapping name -> array
        A `state_dict`, of tensors or of arrays.
    prefix : str, or a list of them
        What stands before the GRU's names in a larger model, such as "encoder.rnn."; the dot may
        be left out. A list makes a Chain of these layers in this order: each is a GRU, a Linear,
        or, where there is a lone matrix `weight` in front, an Embedding. Tensors that are one in
        memory become tied parameters of the Chain.
    batch_first : bool
        As the torch.nn.GRU was made.

    Raises
    ------
    KeyError, ValueError, TypeError
        A name is missing or unused; a shape or dtype does not fit.
    """
    batch_first = arguments.flag("batch_first", batch_first)
    if isinstance(prefix, str):
        return _gru(part(arrays, prefix), batch_first)
    if not isinstance(prefix, list | tuple):
        raise TypeError(f"prefix is {prefix!r}, expected a string such as 'rnn.', or a list")
    parts = [part(arrays, p) for p in prefix]
    layers = [_layer(found, i, batch_first) for i, found in enumerate(parts)]
    named = {f"{i}.{name}": array for i, found in enumerate(parts) for name, array in found.items()}
    return Chain(*layers, tied=_one_in_memory(named))


def _one_in_memory(arrays: dict[str, Array]) -> dict[str, str]:
    """Return the first name of each array that has several, by the later ones."""
    tied: dict[str, str] = {}
    for (first, x), (name, y) in combinations(arrays.items(), 2):
        if first not in tied and tuple(x.shape) == tuple(y.shape) and overlap(x, y):
            tied[name] = first
    return tied


def to_arrays(model: GRU | GRUCell | Chain) -> dict[str, HostArray]:
    """The arrays of a state_dict: of torch.nn.GRU or GRUCell, or of a Sequential like the Chain.

    Raises
    ------
    ValueError
        The reset gate acts before the product, which PyTorch does not have.
    TypeError
        The model is something else.
    """
    if not isinstance(model, Chain):
        return _state_dict(model)
    model.params.refuse_untied()
    return {
        f"{i}.{name}": array
        for i, layer in enumerate(model.layers)
        for name, array in _state_dict(layer).items()
    }


def load(
    path: Path, prefix: str | Sequence[str] = "", *, batch_first: bool = False
) -> GRU | GRUCell | Chain:
    """A model from a file of weights: safetensors, or with any other ending one of `torch.save`.

    Both are read as data, without PyTorch. prefix and batch_first are those of `from_arrays`.

    Raises
    ------
    ValueError, KeyError, TypeError
        The file is damaged, holds more than tensors, or not the weights of a GRU.
    OSError
        The file cannot be read.
    """
    with naming(path):
        if pathlib.Path(path).suffix == ".safetensors":
            arrays: Arrays = read_safetensors(path)
        else:
            arrays = read_pt(path, read_whole(path))
        return from_arrays(arrays, prefix, batch_first=batch_first)


def save(path: Path, model: GRU | GRUCell | Chain) -> None:
    """Write what `load_state_dict` takes: safetensors, or with another ending by `torch.save`."""
    arrays = to_arrays(model)
    if pathlib.Path(path).suffix == ".safetensors":
        write_safetensors(path, arrays, {"format": "pt"})
        return
    torch = import_torch(path)
    content = io.BytesIO()
    torch.save({name: torch.from_numpy(a.copy()) for name, a in arrays.items()}, content)
    write_atomically(path, content.getvalue())


def _gru(arrays: Arrays, batch_first: bool) -> GRU | GRUCell:
    refuse_others(arrays, [name for name in arrays if not NAME.fullmatch(name)])
    cells: dict[tuple[int, bool] | None, Cell] = {}
    for name, array in arrays.items():
        ((kind, layer, reverse),) = NAME.findall(name)
        at = (int(layer), bool(reverse)) if layer else None
        cells.setdefault(at, {})[kind] = weight(name, array)
    if None in cells and len(cells) > 1:
        raise KeyError(f"names of a GRU and of a GRUCell in one; there are {shown(arrays)}")
    for at, cell in cells.items():
        if missing := {"weight_ih", "weight_hh"} - set(cell):
            where = "the cell" if at is None else f"layer {at[0]}{' reverse' * at[1]}"
            raise KeyError(f"{where} lacks {sorted(missing)}")
    if None in cells:
        if batch_first:
            raise ValueError("batch_first is True, but a GRUCell has no axis of time")
        return assemble_cell(cells[None])
    order = sorted(at for at in cells if at is not None)
    two, layers = order[-1][1], order[-1][0] + 1
    if order != [(i, d) for i in range(layers) for d in ((False, True) if two else (False,))]:
        raise KeyError(f"layers or directions are missing; there are {shown(arrays)}")
    return assemble([cells[at] for at in order], True, two, batch_first)


def _layer(arrays: Arrays, number: int, batch_first: bool) -> Layer:
    """Make the layer to which these arrays belong."""
    if not set(arrays) <= {"weight", "bias"}:
        return _gru(arrays, batch_first)
    host = {name: weight(name, a) for name, a in arrays.items()}
    if "weight" not in host or host["weight"].ndim != 2:
        shapes = {name: a.shape for name, a in host.items()}
        raise ShapeError(f"layer {number} is {shapes}, expected a matrix, 'weight'")
    rows, columns = host["weight"].shape
    dtype = one_dtype([host])
    if number == 0 and set(host) == {"weight"}:
        return layer_of(Embedding, {"n": rows, "size": columns}, host, dtype)
    settings = {"in_features": columns, "out_features": rows, "bias": "bias" in host}
    return layer_of(Linear, settings, host, dtype)


def _state_dict(layer: object) -> dict[str, HostArray]:
    if not isinstance(layer, Layer):
        raise TypeError(f"the model is a {type(layer).__name__}, expected a GRU, GRUCell or Chain")
    if isinstance(layer, GRU):
        check_gru(layer)
    if isinstance(layer, GRU | GRUCell):
        refuse_options(layer)
        check_variant("PyTorch", True, layer.reset_after)
    return {name: floating(name, a) for name, a in layer.params.items()}


def import_torch(purpose: Path) -> ModuleType:
    """Return PyTorch; the ImportError names what needs it."""
    try:
        import torch
    except ImportError as e:
        raise ImportError(f"{purpose} needs PyTorch: pip install torch") from e
    module: ModuleType = torch
    return module
