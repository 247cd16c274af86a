"""A GRU from the weights of its layers and directions, and back."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..backend import to_numpy
from ..errors import ShapeError
from ..gru import GRU
from ..weights import parameter_shapes
from .table import Arrays, Table, read, write


def gru_of(table: Table, cells: Any, bidirectional: bool = False, batch_first: bool = False) -> GRU:
    """A GRU from the arrays of each layer and direction, forward before reverse.

    cells : a mapping of one layer, or a list of mappings
    """
    cells = [cells] if isinstance(cells, Mapping) else list(cells)
    found = [read(table, cell) for cell in cells]
    return assemble(found, table.reset_after, bidirectional, batch_first)


def assemble(cells: list[Any], reset_after: bool, bidirectional: bool, batch_first: bool) -> GRU:
    """A GRU from our arrays for each layer and direction, forward before reverse."""
    dtypes = {str(a.dtype) for cell in cells for a in cell.values()}
    if len(dtypes) != 1:
        raise TypeError(f"the arrays are {' and '.join(sorted(dtypes)) or 'none'}: make them one")
    suffixes = ("", "_reverse") if bidirectional else ("",)
    layers, rest = divmod(len(cells), len(suffixes))
    if rest:
        raise ValueError(f"{len(cells)} cells, expected a forward and a reverse one for each layer")
    H, I = cells[0]["weight_hh"].shape[1], cells[0]["weight_ih"].shape[1]
    bias, named = "bias_ih" in cells[0], {}
    for i, cell in enumerate(cells):
        at = f"_l{i // len(suffixes)}{suffixes[i % len(suffixes)]}"
        width = I if i < len(suffixes) else H * len(suffixes)
        _check(at, cell, parameter_shapes(width, H, bias, reset_after))
        named.update({name + at: array for name, array in cell.items()})
    gru = GRU(
        I,
        H,
        layers,
        bias=bias,
        batch_first=batch_first,
        bidirectional=bidirectional,
        reset_after=reset_after,
        backend="numpy",
        dtype=dtypes.pop(),
        seed=0,
    )
    gru.load_params(named)
    return gru


def _check(at: str, cell: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise where the arrays of a layer do not fit the first one, before anything is made."""
    if set(cell) != set(shapes):
        raise KeyError(f"layer {at} has {sorted(cell)}, expected {sorted(shapes)} as the first has")
    for name, shape in shapes.items():
        if cell[name].shape != shape:
            raise ShapeError(
                f"{name}{at} is {cell[name].shape}, expected {shape} after the layers before"
            )


def cells_of(table: Table, gru: Any) -> list[dict[str, np.ndarray]]:
    """The arrays of each layer and direction, forward before reverse."""
    return [write(table, cell, gru.reset_after) for cell in ours(gru)]


def ours(gru: Any) -> list[dict[str, np.ndarray]]:
    """Our arrays of each layer and direction, forward before reverse."""
    check_gru(gru)
    layers = [f"_l{i}{suffix}" for i in range(gru.num_layers) for suffix in gru.suffixes]
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [
        {name: to_numpy(gru.params[name + at]) for name in names if name + at in gru.params}
        for at in layers
    ]


def check_gru(model: Any) -> None:
    """Raise where the model is no GRU that reads forward."""
    if not isinstance(model, GRU):
        raise TypeError(f"the model is a {type(model).__name__}, expected a GRU")
    if model.suffixes == ["_reverse"]:
        raise ValueError(
            "a GRU with reverse=True alone has no home in the other library: load its weights into "
            "one that reads forward, and turn x and y round"
        )


def under(arrays: Arrays, prefix: str) -> dict[str, Any]:
    """The arrays whose names begin with `prefix`, without it; KeyError where there are none."""
    found = {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}
    if not found:
        raise KeyError(f"no name begins with {prefix!r}; there are {shown(arrays)}")
    return found


def shown(names: Iterable[str]) -> str:
    """The first few names, for an error."""
    names = sorted(map(str, names))
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
