"""The weights of one layer in one direction, from another library's names and back.

A table has a line for each of the other library's arrays: the blocks of which it is made, in the
letters of the equations,

    r = sigmoid(W_r x + b_r + U_r h + c_r)
    z = sigmoid(W_z x + b_z + U_z h + c_z)
    n = tanh(W_n x + b_n + r * (U_n h + c_n))    reset after
    n = tanh(W_n x + b_n + U_n (r * h))          reset before

`-W_z` is the block with its sign changed (sigmoid(-a) = 1 - sigmoid(a), so z and 1 - z change
places), `b_r+c_r` a bias that stands for both. Blocks are moved, transposed and negated bit for
bit. Where two biases must be added the sum is rounded once, which the logger `gru_any.convert`
reports at level INFO; written again, they are the sum and 0.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np

from ..backend import to_numpy
from ..errors import ShapeError
from ..typing import Array, Arrays, HostArray

EQUATIONS = {
    "r": "r = sigmoid(W_r x + b_r + U_r h + c_r)",
    "z": "z = sigmoid(W_z x + b_z + U_z h + c_z)",
    True: "n = tanh(W_n x + b_n + r * (U_n h + c_n))",
    False: "n = tanh(W_n x + b_n + U_n (r * h))",
}
NAMES = {"W": "weight_ih", "U": "weight_hh", "b": "bias_ih", "c": "bias_hh"}
Cell: TypeAlias = dict[str, HostArray]  # our arrays of one layer in one direction, by name


class Table(NamedTuple):
    """What a library calls the weights of one layer in one direction."""

    library: str  # its name, for errors
    reset_after: bool
    rows: dict[str, str]  # the name of an array -> its blocks, side by side
    transposed: bool = False  # whether its matrices are (in, out) in place of (out, in)
    bias_optional: bool = False  # whether arrays of biases are left out where there is no bias


def read(table: Table, arrays: Arrays) -> Cell:
    """Convert another library's arrays to ours: weight_ih, weight_hh, bias_ih, bias_hh, or fewer.

    Raises
    ------
    KeyError, ValueError, TypeError
        A name is missing or unused; a shape or dtype does not fit.
    """
    if not isinstance(arrays, Mapping):
        raise TypeError(f"a layer is a {type(arrays).__name__}, expected a mapping name -> array")
    arrays = {name: floating(name, a) for name, a in arrays.items() if a is not None}
    rows = _rows(table, bias=any(_is_bias(table.rows[k]) for k in arrays if k in table.rows))
    check_names(table.library, arrays, rows)
    blocks: dict[str, HostArray] = {}
    for name, row in rows.items():
        blocks.update(_blocks(name, arrays[name], row.split(), table.transposed))
    _check_shapes(rows, blocks)
    ours = {"weight_ih": _stack(blocks, "W"), "weight_hh": _stack(blocks, "U")}
    if "b_n" in blocks:
        none = {f"c_{gate}": np.zeros_like(blocks["b_n"]) for gate in "rzn"}
        b, c = _stack(blocks, "b"), _stack(none | blocks, "c")
        biases = {"bias_ih": b, "bias_hh": c}
        ours |= biases if table.reset_after else {"bias_ih": _add(table, b, c)}
    return ours


def _stack(blocks: dict[str, HostArray], letter: str) -> HostArray:
    thirds = [blocks[f"{letter}_{gate}"] for gate in "rzn"]
    rows = sum(len(third) for third in thirds)
    whole = np.empty((rows, *thirds[0].shape[1:]), np.result_type(*thirds))  # in C's order
    return np.concatenate(thirds, out=whole)


def write(table: Table, ours: Cell, reset_after: bool) -> dict[str, HostArray]:
    """Convert our arrays to another library's; ValueError names a term that would be lost."""
    check_variant(table.library, table.reset_after, reset_after)
    H = ours["weight_hh"].shape[1]
    none = np.zeros(3 * H, ours["weight_hh"].dtype)
    blocks: dict[str, HostArray] = {}
    for letter, name in NAMES.items():
        thirds = np.split(ours.get(name, none), 3)
        blocks.update({f"{letter}_{gate}": v for gate, v in zip("rzn", thirds, strict=True)})
    _refuse_unmatched(table, blocks)
    rows = _rows(table, bias="bias_ih" in ours)
    return {name: _join(table, row.split(), blocks) for name, row in rows.items()}


def check_variant(library: str, theirs: bool, ours: bool) -> None:
    """Raise ValueError where our reset gate does not act where the library's does."""
    if ours != theirs:
        term = "r * (U_n h + c_n)" if ours else "U_n (r * h)"
        raise ValueError(
            f"{term} of {EQUATIONS[ours]} has no counterpart in {library}, whose reset gate acts "
            f"{'after' if theirs else 'before'} the product with U_n"
        )


def _rows(table: Table, bias: bool) -> dict[str, str]:
    """Return the rows of a layer with bias or without."""
    keep = bias or not table.bias_optional
    return {name: row for name, row in table.rows.items() if keep or not _is_bias(row)}


def _is_bias(row: str) -> bool:
    return row.lstrip("-")[0] in "bc"


def check_names(library: str, found: Iterable[str], wanted: Iterable[str]) -> None:
    """Raise KeyError where a name is missing or unused."""
    missing, unused = set(wanted) - set(found), set(found) - set(wanted)
    if missing or unused:
        raise KeyError(
            f"these are not the weights of a GRU of {library}: missing {sorted(missing)}, "
            f"unused {sorted(unused)}"
        )


def _blocks(
    name: str, array: HostArray, row: list[str], transposed: bool
) -> Iterator[tuple[str, HostArray]]:
    """Yield the blocks of an array, by their names in the equations."""
    rank = 1 if _is_bias(row[0]) else 2
    if array.ndim != rank or array.shape[-1 if transposed else 0] % len(row):
        raise ShapeError(f"{name} is {array.shape}, expected {rank}-D, in {len(row)} equal parts")
    array = array.T if transposed else array
    for term, block in zip(row, np.split(array, len(row)), strict=True):
        yield term.lstrip("-").partition("+")[0], -block if term[0] == "-" else block


def _join(table: Table, row: list[str], blocks: dict[str, HostArray]) -> HostArray:
    """Return the array made of these blocks."""
    parts = []
    for term in row:
        first, _, second = term.lstrip("-").partition("+")
        part = _add(table, blocks[first], blocks[second]) if second else blocks[first]
        parts.append(-part if term[0] == "-" else part)
    whole = np.concatenate(parts)
    return np.ascontiguousarray(whole.T if table.transposed else whole)


def _terms(rows: str) -> list[str]:
    """Return the names of the blocks in these rows."""
    return rows.replace("+", " ").replace("-", " ").split()


def _check_shapes(rows: dict[str, str], blocks: dict[str, HostArray]) -> None:
    """Raise where the blocks are not those of one input and one hidden size."""
    H, I = blocks["W_r"].shape
    shapes = {"W": (H, I), "U": (H, H), "b": (H,), "c": (H,)}
    for term, block in blocks.items():
        if block.shape != shapes[term[0]]:
            name = next(name for name, row in rows.items() if term in _terms(row))
            raise ShapeError(
                f"{term} in {name} is {block.shape}, expected {shapes[term[0]]}, as W_r is {(H, I)}"
            )


def _refuse_unmatched(table: Table, blocks: dict[str, HostArray]) -> None:
    matched = _terms(" ".join(table.rows.values()))
    for term, block in blocks.items():
        if term not in matched and block.any():
            equation = EQUATIONS[table.reset_after if term[2] == "n" else term[2]]
            raise ValueError(
                f"{term} of {equation} is not 0 and has no counterpart in {table.library}"
            )


def _add(table: Table, b: HostArray, c: HostArray) -> HostArray:
    """Return b + c; where one is 0, the other bit for bit."""
    if b.any() and c.any():
        logging.getLogger("gru_any.convert").info(
            "%s: two biases are added and the sum is rounded once; it goes back as (sum, 0)",
            table.library,
        )
    return np.where(c == 0, b, np.where(b == 0, c, b + c))


def floating(name: str, array: Array) -> HostArray:
    """Return an array of any library on the host, in native byte order; bfloat16 as float32."""
    dtype = str(getattr(array, "dtype", type(array).__name__)).rpartition(".")[2]
    try:
        host = _on_host(array)
    except Exception as e:  # whatever its library says
        raise TypeError(f"{name} has dtype {dtype} and cannot be read as numbers: {e}") from e
    if host.dtype.name == "bfloat16":
        return host.astype(np.float32)
    if host.dtype.kind != "f":
        raise TypeError(f"{name} has dtype {dtype}, expected a real floating dtype")
    return host.astype(host.dtype.newbyteorder("="), copy=False)


def _on_host(array: Array) -> HostArray:
    try:
        return to_numpy(array)
    except (TypeError, AttributeError):  # of a library that is no backend here
        return np.asarray(array)
