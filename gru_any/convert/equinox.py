"""Equinox: `equinox.nn.GRUCell`. Reset after, gates in order r, z, n, one bias b, and c_n.

Arrays are `weight_ih`, `weight_hh`, `bias` and `bias_n` of a cell (https://docs.kidger.site).
"""

import io

import numpy as np

from ..files import read_whole, write_atomically
from ..nn.gru import GRU
from ..typing import HostArray, Path
from .cells import Cells, cells_of, gru_of
from .files import naming, read_npy
from .table import Table

TABLE = Table(
    "Equinox",
    reset_after=True,
    rows={
        "weight_ih": "W_r W_z W_n",
        "weight_hh": "U_r U_z U_n",
        "bias": "b_r+c_r b_z+c_z b_n",
        "bias_n": "c_n",
    },
    bias_optional=True,
)


def from_arrays(cells: Cells, *, bidirectional: bool = False, batch_first: bool = False) -> GRU:
    """A GRU from the arrays of its cells.

    Parameters
    ----------
    cells : a mapping name -> array of one cell, or a list of them, layer by layer
        `weight_ih` (3H, I), `weight_hh` (3H, H), `bias` (3H,), `bias_n` (H,); the last two None or
        absent without bias. With `bidirectional`, forward before reverse.

    Raises
    ------
    KeyError, ValueError, TypeError
        A name is missing or unused; a shape or dtype does not fit.
    """
    return gru_of(TABLE, cells, bidirectional, batch_first)


def to_arrays(gru: GRU) -> list[dict[str, HostArray]]:
    """The arrays of each cell, in the order `from_arrays` takes; ValueError for reset before."""
    return cells_of(TABLE, gru)


def load(path: Path, *, bidirectional: bool = False, batch_first: bool = False) -> GRU:
    """A GRU from a file that `equinox.tree_serialise_leaves` wrote of a cell, or a list of cells.

    The file has no names: a matrix, a matrix, and with bias two vectors, for each cell.
    """
    arrays = _arrays(path)
    count = 4 if len(arrays) > 2 and arrays[2].ndim == 1 else 2
    if not arrays or len(arrays) % count:
        raise ValueError(f"{path} holds {len(arrays)} arrays, expected 2 or 4 for each cell")
    names = list(TABLE.rows)[:count]
    groups = [arrays[i : i + count] for i in range(0, len(arrays), count)]
    cells = [dict(zip(names, group, strict=True)) for group in groups]
    with naming(path):
        return from_arrays(cells, bidirectional=bidirectional, batch_first=batch_first)


def _arrays(path: Path) -> list[HostArray]:
    """Return the arrays of a file, one after the other."""
    arrays: list[HostArray] = []
    content = read_whole(path)
    file, size = io.BytesIO(content), len(content)
    while file.tell() < size:
        arrays.append(read_npy(file, f"{path}, array {len(arrays)}", size - file.tell()))
    return arrays


def save(path: Path, gru: GRU) -> None:
    """Write a file for `equinox.tree_deserialise_leaves(path, like)`.

    like : a GRUCell for one layer and direction, else a list of cells
    """
    buffer = io.BytesIO()
    for cell in to_arrays(gru):
        for array in cell.values():
            np.save(buffer, array)
    write_atomically(path, buffer.getvalue())
