"""Matrices of weights in the order that the compiled products read, and such products."""

from functools import lru_cache
from typing import Any

import numpy as np

from .compiled import compiled
from .threads import split

SOURCE = """\
from numba import njit
from gru_any.backend import tile

flags = dict(cache=CACHE, nogil=True, error_model="numpy")


@njit(**flags)
def fill(x, P, base, y, first, last):
    tile.product1(x, P, base, y, first, last, 0, y.shape[1])


@njit(**flags)
def pack(M, P, gates):
    tile.pack(M, P, gates, 0, len(P))
"""


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return compiled(SOURCE)


class Packed:
    """A matrix of weights, and the copies of its parts as panels, each made when first needed.

    The matrix must not change as long as this is in use.
    """

    def __init__(self, matrix: Any) -> None:
        self.matrix, self.made = matrix, {}  # type: ignore[var-annotated]

    def panels(self, rows: slice, transposed: bool, gates: int) -> Any:
        """Those of matrix[rows].T or matrix[rows], the columns of so many gates side by side."""
        key = rows.start, rows.stop, transposed, gates
        if key not in self.made:
            part = self.matrix[rows] if transposed else self.matrix[rows].T
            self.made[key] = _panels(part, gates)
        return self.made[key]


def _panels(M: Any, gates: int) -> Any:
    """M^T as panels."""
    from .tile import panels

    M = M.view(np.ndarray)
    M = M if M.flags.writeable and M.flags.forc else M.copy()
    P = panels(*M.shape, gates, M.dtype)
    _compiled().pack(M, P, gates)
    return P


def product(x: Any, P: Any, base: Any, y: Any) -> None:
    """Fill y = base + x M, the rows of y split over threads; P: the panels of M."""
    x = (x if x.flags.writeable else x.copy())[:, :]
    base = repeated(np.zeros(y.shape[1], y.dtype) if base is None else base, len(y))
    fill = _compiled().fill
    split(lambda first, last: fill(x, P, base, y, first, last), len(y), y.size * x.shape[1])


def repeated(row: Any, count: int) -> Any:
    """The same row so many times or twice, in the memory of one."""
    count = max(count, 2)  # one row alone is contiguous: for Numba another type
    return np.ndarray((count, len(row)), row.dtype, own(row), 0, (0, row.itemsize))


def own(v: Any) -> Any:
    """The array as the code was compiled for: contiguous, and not marked as read-only."""
    v = v.view(np.ndarray)
    return v if v.flags.carray else np.require(v, requirements=("C", "W"))
