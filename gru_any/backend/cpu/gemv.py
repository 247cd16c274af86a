"""Products with a single row, compiled: BLAS would wake its threads, and NumPy is slow at them."""

from functools import lru_cache
from typing import Any

from ...codegen.numba_source import HEAD
from .jit_cache import compiled
from .packed import own

SOURCE = """
@njit("void({0}[::1], {0}[::1], {0}[:, ::1])", cache=CACHE, **flags)
def outer(x, y, out):
    for i in range(len(x)):
        for j in range(len(y)):
            out[i, j] = x[i] * y[j]


@njit("void({0}[::1], {0}[:, ::1], {0}[::1])", cache=CACHE, **flags)
def plain(x, M, y):
    sums(x, M, y)


@njit("void({0}[:, ::1], {0}[:, ::1], {0}[:, ::1])", cache=CACHE, **flags)
def transposed(x, M, y):
    dots(x, 0, M, y)
"""


@lru_cache(maxsize=4)
def _compiled(dtype: Any) -> Any:
    return compiled(HEAD.format(dtype=dtype) + SOURCE.format(dtype))


def outer(x: Any, y: Any, out: Any) -> None:
    """Fill out (M, N) with x (M,) times y (N,)."""
    _compiled(out.dtype).outer(own(x), own(y), out)


def times(x: Any, M: Any, out: Any) -> None:
    """Fill out (N,) with x (K,) M (K, N)."""
    code = _compiled(out.dtype)
    if M.flags.c_contiguous:
        code.plain(own(x), own(M), out)
    else:
        code.transposed(own(x)[None], own(M.T), out[None])
