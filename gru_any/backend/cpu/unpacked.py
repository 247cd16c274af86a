"""A compiled product of unpacked matrices, whose rows are split over threads."""

from functools import lru_cache
from typing import Any

import numpy as np

from ...typing import DType, HostArray
from . import tuning
from .jit_cache import compiled
from .packed import as_arguments, ascarray
from .threads import parallel_for

SOURCE = """\
import numpy as np
from numba import boolean, cfunc, {dtype}, int64, njit, types
from gru_any.backend.cpu import barrier, gemm, handoff, stored

transposed, plain = stored.products("{dtype}")


@cfunc("void({types})", cache=CACHE)
def dots({names}):
    transposed(stored.Stored({names}))


@cfunc("void({types})", cache=CACHE)
def strips({names}):
    plain(stored.Stored({names}))


@barrier.inner
def some_rows(first, last, me, functions, transposed, x, M, y):
    if x.shape[1] != 1:
        stored.multiply(functions, transposed, x, 0, M, y, first, last, 0, y.shape[1])
        return
    for i in range(first, last):
        for j in range(y.shape[1]):
            y[i, j] = x[i, 0] * (M[j, 0] if transposed else M[0, j])


rows_entry = handoff.entry_of(some_rows)
line, matrix = int64[::1], {dtype}[:, ::1]
hands, pair = (int64[:, ::1], line, line, line, int64), types.UniTuple(int64, 2)
operands = line, boolean, {dtype}[:, :], matrix, matrix


@njit(types.void(*operands), cache=CACHE, nogil=True)
def alone(functions, transposed, x, M, y):
    some_rows(0, y.shape[0], 0, functions, transposed, x, M, y)


@njit(pair(*hands, *operands), cache=CACHE, nogil=True)
def shared(boxes, hired, edges, sync, polls, functions, transposed, x, M, y):
    entry = rows_entry((functions, transposed, x, M, y))
    return handoff.share(boxes, hired, edges, sync, polls, *entry)
"""


@lru_cache(maxsize=4)
def _compiled(dtype: DType) -> tuple[Any, HostArray]:
    from .stored import Stored

    code = compiled(SOURCE.format(dtype=dtype, **as_arguments(Stored)))
    return code, np.array([code.strips.address, code.dots.address])


def addresses(dtype: DType) -> HostArray:
    """Return the addresses of the products by an unpacked matrix, and by its transpose."""
    return _compiled(dtype)[1]


def gemm(x: HostArray, M: HostArray, y: HostArray) -> None:
    """Fill y (R, N) with x (R, K) M (K, N), of which x and M may be transposes."""
    (R, K), N, (code, functions) = x.shape, y.shape[1], _compiled(y.dtype)
    transposed = not M.flags.c_contiguous
    M = M.T if transposed else M
    M = M if M.flags.carray else ascarray(M)
    x = ascarray(x) if transposed or not x.flags.behaved else x  # dots read rows of x
    given = functions, transposed, x, M, y
    if tuning.shared(R * K * N):
        parallel_for(lambda hands: code.shared(*hands, *given), R, R * K * N)
    else:
        code.alone(*given)
