"""Products with a single row, compiled: BLAS would wake its threads, and NumPy is slow at them."""

from functools import lru_cache
from typing import Any

from ...codegen.numba_source import HEAD
from ...typing import DType, HostArray
from .jit_cache import compiled
from .packed import ascarray

SOURCE = """
@njit("void({0}[::1], {0}[::1], {0}[:, ::1])", cache=CACHE, **flags)
def outer(x, y, A):
    for i in range(len(x)):
        for j in range(len(y)):
            A[i, j] = x[i] * y[j]


@njit("void({0}[::1], {0}[:, ::1], {0}[::1])", cache=CACHE, **flags)
def stored(x, M, y):
    gemv_t(x, M, y)


@njit("void({0}[:, ::1], {0}[:, ::1], {0}[:, ::1])", cache=CACHE, **flags)
def transposed(x, M, y):
    gemv(x, 0, M, y)
"""


@lru_cache(maxsize=4)
def _compiled(dtype: DType) -> Any:
    return compiled(HEAD.format(dtype=dtype) + SOURCE.format(dtype))


def ger(x: HostArray, y: HostArray, A: HostArray) -> None:
    """Fill A (M, N) with the outer product of x (M,) and y (N,)."""
    _compiled(A.dtype).outer(ascarray(x), ascarray(y), A)


def gemv(x: HostArray, M: HostArray, y: HostArray) -> None:
    """Fill y (N,) with x (K,) M (K, N); M may be a transpose."""
    code = _compiled(y.dtype)
    if M.flags.c_contiguous:
        code.stored(ascarray(x), ascarray(M), y)
    else:
        code.transposed(ascarray(x)[None], ascarray(M.T), y[None])
