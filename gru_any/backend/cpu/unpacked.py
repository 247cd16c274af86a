"""A compiled product of unpacked matrices, whose rows are split over threads."""

from functools import cache, lru_cache
from typing import Any

import numpy as np

from ...typing import DType, HostArray
from . import tuning
from .jit_cache import compiled
from .packed import as_arguments, ascarray
from .threads import parallel_for

SOURCE = """\
import numpy as np
from numba import boolean, {dtype}, int64, njit, types
from gru_any.backend.cpu import barrier, gemm, handoff, stored


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


KERNEL = """\
from numba import cfunc
from gru_any.backend.cpu import stored

fill = stored.product("{dtype}", {transposed})


@cfunc("void({types})", cache=CACHE)
def product({names}):
    fill(stored.Stored({names}))
"""


@lru_cache(maxsize=4)
def _compiled(dtype: DType) -> Any:
    """Return the functions of a product that is called from Python, except the kernels."""
    return compiled(SOURCE.format(dtype=dtype))


@cache  # addresses of its functions are kept elsewhere
def _kernel(dtype: DType, transposed: bool) -> Any:
    from .stored import Stored

    return compiled(KERNEL.format(dtype=dtype, transposed=transposed, **as_arguments(Stored)))


@lru_cache(maxsize=16)
def addresses(dtype: DType, used: frozenset[bool]) -> HostArray:
    """Return the addresses of the products by an unpacked matrix, and by its transpose.

    used: whether matrices are transposed; an address that is not used is 0, and takes no time to
    compile.
    """
    ways = (False, True)
    return np.array([_kernel(dtype, way).product.address if way in used else 0 for way in ways])


def gemm(x: HostArray, M: HostArray, y: HostArray) -> None:
    """Fill y (R, N) with x (R, K) M (K, N), of which x and M may be transposes."""
    (R, K), N, code = x.shape, y.shape[1], _compiled(y.dtype)
    transposed = not M.flags.c_contiguous
    functions = addresses(y.dtype, frozenset((transposed,)))
    M = M.T if transposed else M
    M = M if M.flags.carray else ascarray(M)
    x = ascarray(x) if transposed or not x.flags.behaved else x  # dots read rows of x
    given = functions, transposed, x, M, y
    if tuning.shared(R * K * N):
        parallel_for(lambda hands: code.shared(*hands, *given), R, R * K * N)
    else:
        code.alone(*given)
