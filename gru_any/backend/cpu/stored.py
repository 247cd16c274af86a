"""Matrix products for Numba with unpacked matrices, for so few rows that packing does not pay.

    y = x M^T   dots    a tile of y is some rows of x by some rows of M; k runs along the lanes of
                        a vector, which are added at the end
    y = x M     strips  a tile of y is some rows of x by some vectors of columns of M, as in `gemm`

A tile reads each weight once for all its rows. Each entry of y is a sum whose order depends on the
number of k alone: its bits depend neither on the other rows nor on the threads.
"""

from collections.abc import Callable
from itertools import zip_longest
from typing import Any, NamedTuple, TypeAlias

from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped_cgutils

from ...typing import HostArray
from .barrier import Lowering, inner, intrinsic
from .gemm import AVX512, BITS, INDEX, INDEX32, VECTOR_BYTES, Emitter, call

cgutils: Any = untyped_cgutils
Function: TypeAlias = Callable[..., Any]  # compiled
Type: TypeAlias = types.Type  # of a value in compiled code
DOTS = ((4, 4), (2, 8), (1, 8)) if AVX512 else ((4, 2), (2, 4), (1, 8))  # rows of x, and of M
BLOCK = 16  # rows of M that all rows of x are multiplied by while they are in the cache
STRIPS = ((4, 4), (2, 4), (1, 16)) if AVX512 else ((4, 2), (2, 4), (1, 8))  # rows, and vectors
FEWER = 4  # vectors where a wider tile finds too few columns


class Stored(NamedTuple):
    """The operands of a product for some rows and columns of y; the compiled interface."""

    x: int  # address
    x_row: int  # elements from a row to the next
    x_column: int  # elements from a column to the next; dots need 1
    M: int
    M_row: int
    K: int
    y: int
    y_row: int
    first: int  # row
    last: int  # row, not included
    low: int  # column
    high: int  # column, not included


def dots(rows: int, columns: int, bits: int) -> Function:
    """Return an intrinsic that fills y[r : r + rows, c : c + columns] with x M^T."""

    @intrinsic
    def kernel(typing: object, operands: Type, r: Type, c: Type) -> Lowering:
        def generate(context: Any, b: ir.IRBuilder, _: object, args: list[ir.Value]) -> ir.Value:
            emit, of = Emitter(b, bits), Stored(*cgutils.unpack_tuple(b, args[0]))
            lines, others = (
                [b.add(first, INDEX(i)) for i in range(count)]
                for first, count in zip(args[1:], (rows, columns), strict=True)
            )
            zeros, lanes = ir.Constant(emit.vector, None), INDEX(emit.lanes)
            sums = [[cgutils.alloca_once_value(b, zeros) for _ in others] for _ in lines]

            def add(k: ir.Value, mask: ir.Value | None) -> None:
                weights = [emit.load(of.M, b.add(b.mul(j, of.M_row), k), mask) for j in others]
                for i, row in zip(lines, sums, strict=True):
                    v = emit.load(of.x, b.add(b.mul(i, of.x_row), k), mask)
                    for total, weight in zip(row, weights, strict=True):
                        emit.accumulate(total, v, weight)

            whole = b.sdiv(of.K, lanes)
            with cgutils.for_range(b, whole, INDEX(0), INDEX) as loop:
                add(b.mul(loop.index, lanes), None)
            done = b.mul(whole, lanes)
            with b.if_then(b.icmp_signed("<", done, of.K)):
                add(done, emit.mask(b.sub(of.K, done)))
            found = _sums_of_lanes(emit, [b.load(total) for row in sums for total in row])
            for n, i in enumerate(lines):
                start = b.add(b.mul(i, of.y_row), others[0])
                for j, piece in _pieces(emit, found, n * columns, columns):
                    pointer = emit.address(of.y, b.add(start, INDEX(j)), piece.type)
                    b.store(piece, pointer, align=emit.size)
            return context.get_dummy_value()

        return types.void(operands, r, c), generate

    return kernel


def _sums_of_lanes(emit: Emitter, vectors: list[ir.Value]) -> list[ir.Value]:
    """Return the sum of the lanes of each vector, side by side in vectors."""
    b, n, lanes = emit.builder, emit.lanes, range(emit.lanes)
    kind = ir.VectorType(INDEX32, n)
    for step in (s for s in (1, 2, 4, 8) if s < n):  # halves the vectors, two in the lanes of one
        low = ir.Constant(kind, [i if not i & step else n + i - step for i in lanes])
        high = ir.Constant(kind, [i + step if not i & step else n + i for i in lanes])
        vectors = [
            b.fadd(b.shuffle_vector(v, other, low), b.shuffle_vector(v, other, high))
            for v, other in zip_longest(vectors[::2], vectors[1::2], fillvalue=vectors[-1])
        ]
    return vectors


def _pieces(
    emit: Emitter, vectors: list[ir.Value], first: int, count: int
) -> list[tuple[int, ir.Value]]:
    """Cut `count` elements, from `first` on, out of vectors; return pieces with their offsets."""
    found, n, size = list[tuple[int, ir.Value]](), emit.lanes, min(count, emit.lanes)
    for start in range(first, first + count, size):
        v, lanes = vectors[start // n], [start % n + i for i in range(size)]
        mask = ir.Constant(ir.VectorType(INDEX32, size), lanes)
        found.append((start - first, emit.builder.shuffle_vector(v, v, mask)))
    return found


def strips(rows: int, vectors: int, bits: int) -> Function:
    """Return an intrinsic that fills some rows from r on, and vectors from column c on, with x M.

    left: how many columns there are from c on, or None where the tile needs no mask.
    """

    @intrinsic
    def kernel(typing: object, operands: Type, r: Type, c: Type, left: Type) -> Lowering:
        def generate(
            context: Any, b: ir.IRBuilder, signature: Any, args: list[ir.Value]
        ) -> ir.Value:
            emit, of = Emitter(b, bits), Stored(*cgutils.unpack_tuple(b, args[0]))
            lines = [b.add(args[1], INDEX(i)) for i in range(rows)]
            columns = [b.add(args[2], INDEX(v * emit.lanes)) for v in range(vectors)]
            mask = None if isinstance(signature.args[3], types.NoneType) else emit.mask(args[3])
            zeros = ir.Constant(emit.vector, None)
            sums = [[cgutils.alloca_once_value(b, zeros) for _ in columns] for _ in lines]
            with cgutils.for_range(b, of.K, INDEX(0), INDEX) as loop:
                start, k = b.mul(loop.index, of.M_row), b.mul(loop.index, of.x_column)
                weights = [emit.load(of.M, b.add(start, j), mask) for j in columns]
                for i, row in zip(lines, sums, strict=True):
                    v = emit.broadcast(of.x, b.add(b.mul(i, of.x_row), k))
                    for total, weight in zip(row, weights, strict=True):
                        emit.accumulate(total, v, weight)
            for i, row in zip(lines, sums, strict=True):
                for j, total in zip(columns, row, strict=True):
                    emit.store(b.load(total), of.y, b.add(b.mul(i, of.y_row), j), mask)
            return context.get_dummy_value()

        return types.void(operands, r, c, left), generate

    return kernel


def _by_strips(rows: int, vectors: int, bits: int) -> Function:
    """Return a function that fills whole tiles of so many rows with x M."""
    lanes = VECTOR_BYTES * 8 // bits
    wide, some, one = (strips(rows, count, bits) for count in (vectors, FEWER, 1))
    of_wide, of_some, are_some = vectors * lanes, FEWER * lanes, vectors > FEWER

    def fill(of: Stored, first: int, last: int, low: int, high: int) -> None:
        far = high - (high - low) % of_wide
        near = high - (high - far) % of_some if are_some else far
        # where M is small it stays in the cache, and y is written from one end to the other
        step = rows if last - first >= of.K else last - first
        for start in range(first, last, max(1, step)):
            stop = start + step
            for c in range(low, far, of_wide):
                for r in range(start, stop, rows):
                    wide(of, r, c, None)
            if are_some:
                for c in range(far, near, of_some):
                    for r in range(start, stop, rows):
                        some(of, r, c, None)
            for c in range(near, high, lanes):
                for r in range(start, stop, rows):
                    one(of, r, c, high - c)

    return inner(fill, f"strips_{rows}x{vectors}x{bits}")


def _by_dots(rows: int, columns: int, bits: int) -> Function:
    """Return a function that fills whole tiles of so many rows with x M^T."""
    wide, one = dots(rows, columns, bits), dots(rows, 1, bits)

    def fill(of: Stored, first: int, last: int, low: int, high: int) -> None:
        end = high - (high - low) % columns
        for r in range(first, last, rows):
            for c in range(low, end, columns):
                wide(of, r, c)
            for c in range(end, high):
                one(of, r, c)

    return inner(fill, f"dots_{rows}x{columns}x{bits}")


def product(dtype: str, transposed: bool) -> Function:
    """Return a function that fills y with x M or x M^T, given a `Stored`."""
    made, shapes = (_by_dots, DOTS) if transposed else (_by_strips, STRIPS)
    four, two, one = (made(*shape, BITS[dtype]) for shape in shapes)

    def fill(of: Stored) -> None:
        first, last, low, high = of.first, of.last, of.low, of.high
        fours = last - (last - first) % 4
        twos = last - (last - fours) % 2
        block = BLOCK if transposed and last - first > 4 else high - low
        for c in range(low, high, max(1, block)):
            end = min(c + block, high)
            four(of, first, fours, c, end)
            two(of, fours, twos, c, end)
            one(of, twos, last, c, end)

    return inner(fill, f"{'dots' if transposed else 'strips'}_{dtype}")


@inner
def multiply(
    functions: HostArray,
    transposed: bool,
    x: HostArray,
    column: int,
    M: HostArray,
    y: HostArray,
    first: int,
    last: int,
    low: int,
    high: int,
) -> None:
    """Fill y with x[:, column : column + K] M or M^T in some rows and columns.

    functions: the addresses of the products by M and by M^T. M and y are contiguous.
    """
    size, K = y.itemsize, M.shape[1 if transposed else 0]
    row, across = x.strides[0] // size, x.strides[1] // size
    of = Stored(
        x.ctypes.data + column * across * size,
        row,
        across,
        M.ctypes.data,
        M.shape[1],
        K,
        y.ctypes.data,
        y.shape[1],
        first,
        last,
        low,
        high,
    )
    call(functions[1 if transposed else 0], of)
