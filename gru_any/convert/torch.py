"""PyTorch: `torch.nn.GRU`. Reset after, z keeps, gates r, z, n: the names and shapes are ours.

Files are safetensors, or what `torch.save` writes, read with `weights_only` (this alone needs
PyTorch). `as_module` puts a GRU of ours into a PyTorch model.
"""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..chain import Chain
from ..checkpoint import write_atomically
from ..gru import GRU
from ..layers import Embedding, Linear
from .cells import assemble, check_gru, shown, under
from .files import read_safetensors, write_safetensors
from .table import check_variant, floating

NAME = re.compile(r"(weight_ih|weight_hh|bias_ih|bias_hh)_l(\d{1,4})(_reverse)?")


def from_arrays(arrays: Any, prefix: Any = "", *, batch_first: bool = False) -> Any:
    """A GRU from a state_dict, or a Chain from the parts of one.

    Parameters
    ----------
    arrays : mapping name -> array
        A `state_dict`, of tensors or of arrays.
    prefix : str, or a list of them
        What stands before the GRU's names in a larger model, such as "encoder.rnn.". A list makes
        a Chain of these layers in this order: each is a GRU, a Linear, or, where there is a lone
        matrix `weight` in front, an Embedding.
    batch_first : bool
        As the torch.nn.GRU was made.

    Raises
    ------
    KeyError, ValueError, TypeError
        A name is missing or unused; a shape or dtype does not fit.
    """
    if isinstance(prefix, str):
        return _gru(under(arrays, prefix), batch_first)
    return Chain(*(_layer(under(arrays, p), i, batch_first) for i, p in enumerate(prefix)))


def to_arrays(model: Any) -> dict[str, np.ndarray]:
    """The arrays of a state_dict: of torch.nn.GRU, or of a Sequential like the Chain.

    Raises
    ------
    ValueError
        A GRU has the reset gate before the product, which PyTorch has not.
    """
    if not isinstance(model, Chain):
        return _state_dict(model)
    return {
        f"{i}.{name}": array
        for i, layer in enumerate(model.layers)
        for name, array in _state_dict(layer).items()
    }


def load(path: Any, prefix: Any = "", *, batch_first: bool = False) -> Any:
    """A model from a file of weights: safetensors, or any other ending through `torch.load`.

    prefix and batch_first are those of `from_arrays`.

    Raises
    ------
    ValueError, KeyError, TypeError
        The file is damaged, holds more than tensors, or not the weights of a GRU.
    ImportError
        It is a file of `torch.save`, and PyTorch is not installed.
    """
    safe = Path(path).suffix == ".safetensors"
    arrays = read_safetensors(path) if safe else _read_pt(path)
    return from_arrays(arrays, prefix, batch_first=batch_first)


def save(path: Any, model: Any) -> None:
    """Write what `load_state_dict` takes: safetensors, or with another ending by `torch.save`."""
    arrays = to_arrays(model)
    if Path(path).suffix == ".safetensors":
        write_safetensors(path, arrays, {"format": "pt"})
        return
    torch = _import(path)
    content = io.BytesIO()
    torch.save({name: torch.from_numpy(a.copy()) for name, a in arrays.items()}, content)
    write_atomically(path, content.getvalue())


def as_module(model: Any) -> Any:
    """A `torch.nn.Module` that runs this model, forward and backward, inside a PyTorch model.

    Parameters
    ----------
    model : GRU, GRUCell or Chain
        See `gru_any.convert.torch_module`: `Module`, `CellModule` and `ChainModule`.

    Raises
    ------
    TypeError
        The model is something else.
    """
    _import("as_module")
    from .torch_module import as_module

    return as_module(model)


def _gru(arrays: Any, batch_first: bool) -> GRU:
    cells: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, array in arrays.items():
        if not (match := NAME.fullmatch(name)):
            raise KeyError(
                f"{name!r} is no name of torch.nn.GRU; there are {shown(arrays)}. Of a larger "
                'model take one layer with prefix="..."'
            )
        at = (int(match[2]), bool(match[3]))
        cells.setdefault(at, {})[match[1]] = floating(name, array)
    order = sorted(cells)
    two, layers = order[-1][1], order[-1][0] + 1
    if order != [(i, d) for i in range(layers) for d in ((False, True) if two else (False,))]:
        raise KeyError(f"layers or directions are missing; there are {shown(arrays)}")
    for (i, reverse), cell in cells.items():
        if missing := {"weight_ih", "weight_hh"} - set(cell):
            raise KeyError(f"layer {i}{' reverse' * reverse} lacks {sorted(missing)}")
    return assemble([cells[at] for at in order], True, two, batch_first)


def _layer(arrays: Any, number: int, batch_first: bool) -> Any:
    """The layer these arrays belong to."""
    if not set(arrays) <= {"weight", "bias"}:
        return _gru(arrays, batch_first)
    host = {name: floating(name, a) for name, a in arrays.items()}
    rows, columns = host["weight"].shape if "weight" in host else (0, 0)
    settings: Any = {"dtype": str(host["weight"].dtype), "backend": "numpy"}
    layer: Any
    if number == 0 and set(host) == {"weight"}:
        layer = Embedding(rows, columns, **settings)
    else:
        layer = Linear(columns, rows, bias="bias" in host, **settings)
    layer.load_params(host)
    return layer


def _state_dict(layer: Any) -> dict[str, np.ndarray]:
    if isinstance(layer, GRU):
        check_gru(layer)
        check_variant("PyTorch", True, layer.reset_after)
    return {name: floating(name, a) for name, a in layer.params.items()}


def _read_pt(path: Any) -> dict[str, Any]:
    """The tensors of a file of torch.save, nothing else; no code in it is run."""
    torch = _import(path)
    content = io.BytesIO(Path(path).read_bytes())
    try:
        found = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever PyTorch's reader stumbles over
        raise ValueError(f"{path} is damaged, or holds more than tensors: {e}") from e
    if not isinstance(found, Mapping) or not all(torch.is_tensor(t) for t in found.values()):
        raise ValueError(
            f"{path} holds no flat state_dict; save model.state_dict() alone, or take it out of "
            "the checkpoint and give it to from_arrays"
        )
    for name, tensor in found.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} promises {tuple(tensor.shape)}, more than the file holds")
    return {k: t for k, t in found.items() if t.is_floating_point()}


def _import(path: Any) -> Any:
    try:
        import torch
    except ImportError as e:
        raise ImportError(f"{path} needs PyTorch: pip install torch") from e
    return torch
