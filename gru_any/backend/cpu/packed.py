"""Weight matrices packed into panels for the compiled products, and a product with such panels."""

import math
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any

import numpy as np

from ...typing import DType, HostArray
from . import tuning
from .buffers import empty
from .jit_cache import compiled
from .threads import parallel_for

SOURCE = """\
import numpy as np
from numba import cfunc, float{bits}, int8, int64, intp, njit, types, uint16, void
from gru_any.backend.cpu import barrier, gemm, handoff


@barrier.inner
def some_rows(first, last, me, function, x, x_row, x_column, K, P, base, y, N):
    gemm.call(
        function, gemm.Gemm(x, x_row, x_column, P, K, base, y, N, first, last, np.intp(0), N)
    )


rows_entry = handoff.entry_of(some_rows)
vector, matrix, panels = float{bits}[::1], float{bits}[:, ::1], {stored}[:, :, ::1]
line = int64[::1]
hands, pair = (int64[:, ::1], line, line, line, int64), types.UniTuple(int64, 2)


@njit(pair(*hands, {integers}, panels, vector, matrix), cache=CACHE, nogil=True)
def product(boxes, hired, edges, sync, polls, function, x, x_row, x_column, K, P, base, y):
    N = np.intp(y.shape[1])
    P, base, y = np.intp(P.ctypes.data), np.intp(base.ctypes.data), np.intp(y.ctypes.data)
    entry = rows_entry((function, x, x_row, x_column, K, P, base, y, N))
    return handoff.share(boxes, hired, edges, sync, polls, *entry)
"""
PACK = """

@cfunc("void({types})", cache=CACHE)
def pack_panels({names}):
    gemm.pack({bits}, gemm.Pack({names}))


@barrier.inner
def some_panels(low, high, me, function, M, down, across, P, K, width, gates, H):
    gemm.call(function, gemm.Pack(M, down, across, P, K, width, gates, H, low, high))


panels_entry = handoff.entry_of(some_panels)


@njit(cache=CACHE, nogil=True)
def pack(boxes, hired, edges, sync, polls, *given):
    return handoff.share(boxes, hired, edges, sync, polls, *panels_entry(given))
"""
KERNEL = """\
from numba import cfunc
from gru_any.backend.cpu import gemm

kernel = gemm.macro_kernel({gates}, "{stored}")


@cfunc("void({types})", cache=CACHE)
def product{gates}({names}):
    kernel(gemm.Gemm({names}))
"""
SINGLE = """
from gru_any.backend.cpu import integers

single = integers.single_row({gates}, kernel)


@cfunc("void({types})", cache=CACHE)
def row{gates}({names}):
    single(gemm.Gemm({names}))
"""


@lru_cache(maxsize=8)
def _compiled(stored: DType) -> Any:
    """Return the functions for panels of this dtype, except the kernels."""
    from .gemm import BITS, Pack

    bits, integers = BITS[stored.name], ", ".join(["intp"] * 5)
    source = SOURCE.format(bits=bits, stored=stored.name, integers=integers)
    pack = PACK.format(bits=bits, **as_arguments(Pack)) if stored.kind == "f" else ""
    return compiled(source + pack)


@cache  # addresses of its functions are kept elsewhere
def _kernel(stored: DType, gates: int) -> Any:
    """Return the macro-kernel for panels of this dtype; with int8 that of a single row, too."""
    from .gemm import Gemm

    source = KERNEL + SINGLE if _has_single(stored) else KERNEL
    return compiled(source.format(gates=gates, stored=stored.name, **as_arguments(Gemm)))


def _has_single(stored: DType) -> bool:
    """Whether panels of this dtype have a product of a single row in integers."""
    from .integers import SUPPORTED

    return stored == np.int8 and SUPPORTED


@cache
def _address(stored: DType, gates: int, single: bool) -> int:
    """Return the address of a macro-kernel; stored: dtype of panels."""
    name = "row" if single and _has_single(stored) else "product"
    return int(getattr(_kernel(stored, gates), f"{name}{gates}").address)


def as_arguments(operands: Any) -> dict[str, str]:
    """Return the names of integers, and their types, as the arguments of a compiled function."""
    fields = operands._fields
    return {"names": ", ".join(fields), "types": ", ".join(["intp"] * len(fields))}


@lru_cache(maxsize=32)
def kernel_addresses(
    stored: DType, used: frozenset[int], single: bool, single_input: bool
) -> HostArray:
    """Return the macro-kernels for 1, 2 and 3 gates, and for the product of x with 3; then `pack`.

    stored: dtype of panels. used: the gates of products with U; the kernels for others are 0, and
    take no time to compile. single, single_input: whether the products with U, and that of x, have
    one row and may be computed in integers; see `tuning.integers`.
    """
    found = [_address(stored, gates, single) if gates in used else 0 for gates in (1, 2, 3)]
    pack = _compiled(stored).pack_panels.address if stored.kind == "f" else 0
    return np.array([*found, _address(stored, 3, single_input), pack])


COPIED = 1 << 16  # bytes of a read-only array, up to which a copy is quicker than an alias


class PackedMatrix:
    """A matrix of weights, and the packed copies of its parts, each made when first needed.

    The matrix must not change as long as this is in use.
    """

    # by first row, row after the last, transposed, gates
    packed: dict[tuple[int, int, bool, int], HostArray]

    def __init__(self, matrix: HostArray) -> None:
        self.matrix, self.shape = ascarray(matrix), matrix.shape
        self.packed = {}

    @property
    def dtype(self) -> DType:
        """The dtype of the arithmetic."""
        return self.matrix.dtype

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return int(self.shape[0])

    @property
    def arrays(self) -> list[HostArray]:
        """The matrix and its packed copies."""
        return [self.matrix, *self.packed.values()]

    def panels(self, rows: slice, transposed: bool, gates: int) -> HostArray:
        """Return matrix[rows].T or matrix[rows] as panels, with `gates` gates side by side."""
        key = rows.start, rows.stop, transposed, gates
        if key not in self.packed:
            source, P = self.source(rows, transposed), self.empty_panels(rows, transposed, gates)
            # numbers, so that one machine code serves every layout of a matrix
            code, (_, K, width) = _compiled(P.dtype), P.shape
            down, across = (stride // P.itemsize for stride in source.strides)
            left = code.pack_panels.address, source.ctypes.data, down, across, P.ctypes.data
            right = K, width, gates, len(source) // gates
            work = tuning.current.copy_work * P.size
            parallel_for(lambda hands: code.pack(*hands, *left, *right), len(P), work)
            self.packed[key] = P
        return self.packed[key]

    def source(self, rows: slice, transposed: bool) -> HostArray:
        """Return the array that panels are packed from, the transpose of their content."""
        return self.matrix[rows] if transposed else self.matrix[rows].T

    def empty_panels(self, rows: slice, transposed: bool, gates: int) -> HostArray:
        """Return panels, aligned to a cache line, of which the padding alone is initialised."""
        from .gemm import LINE_BYTES, VECTOR_BYTES, VECTORS

        K, dtype = self.shape[1], self.matrix.dtype
        N, K = (rows.stop - rows.start, K) if transposed else (K, rows.stop - rows.start)
        width = VECTORS[gates] * VECTOR_BYTES // dtype.itemsize
        shape = (-(-(N // gates) // width), K, gates * width)
        size, line = math.prod(shape), LINE_BYTES // dtype.itemsize
        room = empty((size + line,), dtype)
        start = -room.ctypes.data % LINE_BYTES // dtype.itemsize
        panels = room[start : start + size].reshape(shape)
        if N // gates % width:
            panels[-1] = 0
        return panels


def gemm(x: HostArray, P: HostArray, base: HostArray | None, y: HostArray) -> None:
    """Fill y = base + x M, the rows of y split over threads; P: M (K, N) packed, base (N,)."""
    (R, K), N, code = x.shape, y.shape[1], _compiled(P.dtype)
    base = np.zeros(N, y.dtype) if base is None else ascarray(base)
    if any(stride % x.itemsize for stride in x.strides):  # a field of records
        x = x.copy()
    integers = tuning.integers(R, P.size)
    if integers:
        x = ascarray(x)
    x_row, x_column = (stride // x.itemsize for stride in x.strides)
    left, function = (x.ctypes.data, x_row, x_column, K), _address(P.dtype, 1, integers)

    parallel_for(lambda hands: code.product(*hands, function, *left, P, base, y), R, R * K * N)


def ascarray(v: HostArray) -> HostArray:
    """Return v contiguous, aligned and writable, as compiled code takes it; a copy if need be.

    A large read-only array, such as JAX's, is not copied but passed as writable: compiled code does
    not write into its inputs. (Numba's own check of an argument takes 0.2 ms.)
    """
    flags = v.flags
    if flags.carray:
        return v if type(v) is np.ndarray else v.view(np.ndarray)
    if v.nbytes > COPIED and flags.c_contiguous and flags.aligned:
        return writable(v)
    return np.array(v, order="C")


def writable(v: HostArray) -> HostArray:
    """Return a read-only array as one that NumPy takes for writable; it must not be written to."""
    return np.asarray(_Alias(v))


def ascarrays(arrays: Iterable[HostArray]) -> list[HostArray]:
    """Return several arrays as `ascarray` does."""
    return [v if v.flags.carray and type(v) is np.ndarray else ascarray(v) for v in arrays]


class _Alias:
    """The memory of a read-only array, declared writable by the array interface."""

    def __init__(self, v: HostArray) -> None:
        self.owner, interface = v, v.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
