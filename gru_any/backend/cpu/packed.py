"""Matrices of weights in the order that the compiled products read, and such products."""

from functools import lru_cache
from typing import Any

import numpy as np

from .jit_cache import compiled
from .threads import split

COPY = 8  # multiply-adds in the time that it takes to copy one number
SOURCE = """\
import numpy as np
from numba import cfunc, float{bits}, intp, njit, void
from gru_any.backend.cpu import gemm as tile

fill1, fill2, fill3 = (tile.products(gates, {bits}) for gates in (1, 2, 3))


@njit(cache=CACHE, nogil=True, error_model="numpy")
def pack(M, P, gates, low, high):
    tile.pack({bits}, M, P, gates, low, high)


vector, matrix, panels = float{bits}[::1], float{bits}[:, ::1], float{bits}[:, :, ::1]


@njit(void({numbers}, panels, vector, matrix, intp, intp), cache=CACHE, nogil=True)
def product(function, x, xr, xc, K, P, base, y, first, last):
    of, N = base.ctypes.data, y.shape[1]
    tile.call(function, x, xr, xc, P.ctypes.data, K, of, y.ctypes.data, N, first, last, 0, N)
"""
PRODUCT = """

@cfunc("void({types})", cache=CACHE)
def product{gates}({names}):
    fill{gates}({names})
"""
NAMES = "x, xr, xc, P, K, base, y, H, first, last, left, right"


@lru_cache(maxsize=4)
def _compiled(dtype: Any) -> Any:
    bits, types = 8 * dtype.itemsize, ", ".join(["intp"] * 12)
    products = [PRODUCT.format(types=types, gates=gates, names=NAMES) for gates in (1, 2, 3)]
    numbers = ", ".join(["intp"] * 5)
    return compiled(SOURCE.format(bits=bits, numbers=numbers) + "".join(products))


@lru_cache(maxsize=4)
def addresses(dtype: Any) -> Any:
    """Where the compiled products for 1, 2 and 3 gates stand in memory."""
    code = _compiled(dtype)
    return np.array([code.product1.address, code.product2.address, code.product3.address])


class Packed:
    """A matrix of weights, and the copies of its parts as panels, each made when first needed.

    The matrix must not change as long as this is in use.
    """

    def __init__(self, matrix: Any) -> None:
        self.matrix, self.shape, self.made = own(matrix), matrix.shape, {}  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return len(self.matrix)

    @property
    def arrays(self) -> list[Any]:
        """The matrix and the copies of it."""
        return [self.matrix, *self.made.values()]

    def panels(self, rows: slice, transposed: bool, gates: int) -> Any:
        """Those of matrix[rows].T or matrix[rows], the columns of so many gates side by side."""
        key = rows.start, rows.stop, transposed, gates
        if key not in self.made:
            source, P = self.source(rows, transposed), self.room(rows, transposed, gates)
            pack = _compiled(P.dtype).pack
            split(lambda low, high: pack(source, P, gates, low, high), len(P), COPY * P.size)
            self.made[key] = P
        return self.made[key]

    def source(self, rows: slice, transposed: bool) -> Any:
        """What panels are copied from, which are its transpose."""
        return self.matrix[rows] if transposed else self.matrix[rows].T

    def room(self, rows: slice, transposed: bool, gates: int) -> Any:
        """Panels that are yet to be filled."""
        from .gemm import panels

        N, K = rows.stop - rows.start, self.shape[1]
        return panels(*((N, K) if transposed else (K, N)), gates, self.matrix.dtype)


def product(x: Any, P: Any, base: Any, y: Any) -> None:
    """Fill y = base + x M, the rows of y split over threads; P: the panels of M (K, N)."""
    (R, K), N, code = x.shape, y.shape[1], _compiled(y.dtype)
    base = np.zeros(N, y.dtype) if base is None else own(base)
    if any(stride % x.itemsize for stride in x.strides):  # a field of records
        x = x.copy()
    xr, xc = (stride // x.itemsize for stride in x.strides)
    left, function = (x.ctypes.data, xr, xc, K), addresses(y.dtype)[0]

    def rows(first: int, last: int) -> None:
        code.product(function, *left, P, base, y, first, last)

    split(rows, R, R * K * N)


def own(v: Any) -> Any:
    """Return an array of the layout that the compiled code takes, a copy where v has another.

    That is contiguous, aligned and not read-only. To let Numba find out takes 0.2 ms.
    """
    v = v if type(v) is np.ndarray else v.view(np.ndarray)
    return v if v.flags.carray else v.copy("C")
