"""Haiku: `haiku.GRU`. Reset before, gates in order z, r, n (called a there).

The equations are those of Chung et al. 2014, where z near 1 replaces the state, so the sign of z's
weights is changed (https://dm-haiku.readthedocs.io).
"""

from collections.abc import Mapping

from ..nn.gru import GRU
from ..typing import Arrays, HostArray
from .cells import Cells, cells_of, gru_of
from .table import Table

TABLE = Table(
    "Haiku",
    reset_after=False,
    rows={"w_i": "-W_z W_r W_n", "w_h": "-U_z U_r U_n", "b": "-b_z b_r b_n"},
    transposed=True,
)


def from_arrays(cells: Cells, *, bidirectional: bool = False, batch_first: bool = False) -> GRU:
    """A GRU from the parameters of its cores.

    Parameters
    ----------
    cells : a mapping of one core, or a list of them, layer by layer
        `w_i` (I, 3H), `w_h` (H, 3H), `b` (3H,), also as {module: {...}} with one module, as
        `init` returns it. With `bidirectional`, forward before reverse.

    Raises
    ------
    KeyError, ValueError, TypeError
        A name is missing or unused; a shape or dtype does not fit.
    """
    cells = [cells] if isinstance(cells, Mapping) else cells
    return gru_of(TABLE, [_inner(cell) for cell in cells], bidirectional, batch_first)


def to_arrays(gru: GRU) -> list[dict[str, HostArray]]:
    """The parameters of each core, in the order `from_arrays` takes; ValueError for reset after.

    Haiku always has a bias: without one here, it is written as zeros.
    """
    return cells_of(TABLE, gru)


def _inner(cell: Arrays) -> Arrays:
    """Return the arrays of a core, also where they stand under the name of its module."""
    values = list(cell.values())
    return values[0] if len(values) == 1 and isinstance(values[0], Mapping) else cell
