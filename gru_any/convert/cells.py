"""A GRU from the weights of its layers and directions, and back."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

from .. import arguments
from ..backend import select, to_numpy
from ..errors import ShapeError
from ..nn.cell import GRUCell
from ..nn.gru import GRU
from ..nn.options import DEFAULTS, MERGE, OUTPUTS
from ..nn.params import Layer, converted
from ..nn.weights import parameter_shapes
from ..typing import Array, Arrays, HostArray, Shape
from .table import Cell, Table, read, write

OPTIONS = {*DEFAULTS, *MERGE, *OUTPUTS, "layer_norm"}
Kind = TypeVar("Kind", bound=Layer)
Cells: TypeAlias = Arrays | Iterable[Arrays]  # of one layer, or of several


def gru_of(
    table: Table, cells: Cells, bidirectional: bool = False, batch_first: bool = False
) -> GRU:
    """Make a GRU from a library's arrays of each layer and direction, forward before reverse."""
    cells = [cells] if isinstance(cells, Mapping) else list(cells)
    found = [read(table, cell) for cell in cells]
    return assemble(found, table.reset_after, bidirectional, batch_first, copy=False)


def assemble(
    cells: list[Cell],
    reset_after: bool,
    bidirectional: bool,
    batch_first: bool,
    copy: bool = True,
    **options: Any,
) -> GRU:
    """Make a GRU from our arrays of each layer and direction, forward before reverse.

    options: further settings of the GRU.

    copy: False where the arrays are nobody else's, as a table makes them.
    """
    bidirectional = arguments.flag("bidirectional", bidirectional)
    batch_first = arguments.flag("batch_first", batch_first)
    dtype = one_dtype(cells)
    suffixes = ("", "_reverse") if bidirectional else ("",)
    layers, rest = divmod(len(cells), len(suffixes))
    if rest:
        raise ValueError(f"{len(cells)} cells, expected a forward and a reverse one for each layer")
    I, H = _sizes(cells[0])
    bias, named = "bias_ih" in cells[0], {}
    side_by_side = options.get("merge", "concat") in ("concat", None)
    for i, cell in enumerate(cells):
        at = f"_l{i // len(suffixes)}{suffixes[i % len(suffixes)]}"
        width = I if i < len(suffixes) else H * (len(suffixes) if side_by_side else 1)
        _check(at, cell, parameter_shapes(width, H, bias, reset_after))
        named.update({name + at: array for name, array in cell.items()})
    settings = {
        "input_size": I,
        "hidden_size": H,
        "num_layers": layers,
        "bias": bias,
        "batch_first": batch_first,
        "bidirectional": bidirectional,
        "reset_after": reset_after,
        **options,
    }
    return layer_of(GRU, settings, named, dtype, copy)


def assemble_cell(arrays: Cell) -> GRUCell:
    """Make a GRUCell with the reset gate after the product, from our arrays."""
    I, H = _sizes(arrays)
    bias = "bias_ih" in arrays
    _check("", arrays, parameter_shapes(I, H, bias, True))
    dtype = one_dtype([arrays])
    settings = {"input_size": I, "hidden_size": H, "bias": bias, "reset_after": True}
    return layer_of(GRUCell, settings, arrays, dtype)


def layer_of(
    kind: type[Kind], settings: dict[str, Any], arrays: Arrays, dtype: str, copy: bool = True
) -> Kind:
    """Make a layer on the host of its settings and its parameters, or copies of them."""
    backend = select("numpy")
    return kind.of(settings, converted(arrays, backend, dtype) if copy else arrays, backend, dtype)


def one_dtype(cells: list[Cell]) -> str:
    """Return the dtype that all arrays have; raise where they have several, or there are none."""
    dtypes = {str(a.dtype) for cell in cells for a in cell.values()}
    if not dtypes:
        raise ValueError("there are no arrays, expected those of one layer at least")
    if len(dtypes) != 1:
        raise TypeError(f"the arrays are {' and '.join(sorted(dtypes))}, expected one dtype")
    return dtypes.pop()


def _sizes(cell: Cell) -> tuple[int, int]:
    """Return I and H, from the matrices of the first cell."""
    for name in ("weight_ih", "weight_hh"):
        if cell[name].ndim != 2:
            raise ShapeError(f"{name} is {cell[name].shape}, expected a matrix, (3H, I) or (3H, H)")
    return cell["weight_ih"].shape[1], cell["weight_hh"].shape[1]


def _check(at: str, cell: Cell, shapes: dict[str, Shape]) -> None:
    """Raise where the arrays of a layer do not fit the first one, before anything is made."""
    if set(cell) != set(shapes):
        where = f"layer {at} has" if at else "the cell has"
        way = ""
        if set(shapes) - set(cell) == {"bias_hh"}:
            way = "; if gru_any.save wrote the file, read it by gru_any.load"
        raise KeyError(f"{where} {sorted(cell)}, expected {sorted(shapes)}{way}")
    for name, shape in shapes.items():
        if cell[name].shape != shape:
            after = " after the layers before" if at else ": H is from weight_hh"
            raise ShapeError(f"{name}{at} is {cell[name].shape}, expected {shape}{after}")


def cells_of(table: Table, gru: GRU) -> list[dict[str, HostArray]]:
    """Return a library's arrays of each layer and direction, forward before reverse."""
    held = ("zoneout",) if table.library == "haste" else ()  # whose layer takes it beside them
    return [write(table, cell, gru.reset_after) for cell in ours(gru, *held)]


def ours(gru: GRU, *held: str) -> list[Cell]:
    """Return our arrays of each layer and direction, forward before reverse.

    held: options of the model that the other library stores beside the weights.
    """
    check_gru(gru, *held)
    layers = [f"_l{i}{suffix}" for i in range(gru.num_layers) for suffix in gru.suffixes]
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [
        {name: to_numpy(gru.params[name + at]) for name in names if name + at in gru.params}
        for at in layers
    ]


def check_gru(model: object, *held: str) -> None:
    """Raise where the model is no GRU that reads forward, or has options that are not `held`."""
    if not isinstance(model, GRU):
        raise TypeError(f"the model is a {type(model).__name__}, expected a GRU")
    refuse_options(model, *held)
    if model.suffixes == ["_reverse"]:
        raise ValueError(
            "a GRU with reverse=True alone has no counterpart in the other library: load its "
            "weights, without _reverse in their names, into one that reads forward, and turn x and "
            "y round in time, each row within its length"
        )
    if "zoneout" not in held:
        refuse_zoneout(model)


def refuse_zoneout(gru: GRU) -> None:
    """Raise where each unit keeps a share of its state in inference, which only haste has."""
    if gru.zoneout:
        raise ValueError(
            f"zoneout={gru.zoneout:g} has no counterpart in the other library: in inference each "
            "unit keeps this share of its old state, so the results would differ. To convert the "
            "weights alone, load them into a GRU without it: other.load_params(gru.params)"
        )


def refuse_options(layer: GRU | GRUCell, *held: str) -> None:
    """Raise where a layer has options that would be lost with its weights alone.

    held: options that would not, as the other library stores them too. `settings` lists an option
    only where it differs from the default.
    """
    others = [f"{k}={v!r}" for k, v in layer.settings.items() if k in OPTIONS and k not in held]
    if others:
        raise ValueError(
            f"the model has {', '.join(others)}, which would be lost: what is written is for a GRU "
            "of sigmoid and tanh without layer normalisation, with its directions side by side and "
            "the outputs of its last layer. gru_any.save writes all of it"
        )


def under(arrays: Arrays, prefix: str) -> dict[str, Array]:
    """Return the arrays whose names begin with `prefix`, without it; KeyError if there are none."""
    if not isinstance(prefix, str):
        raise TypeError(f"prefix is {prefix!r}, expected a string such as 'encoder.rnn.'")
    found = {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}
    if not found:
        raise KeyError(f"no name begins with {prefix!r}; there are {shown(arrays) or 'no names'}")
    return found


def shown(names: Iterable[str]) -> str:
    """Return the first few names, for an error."""
    names = sorted(map(str, names))
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
