"""A matrix product for Numba: tiles of the result that stay in the processor's registers.

LLVM does not find this form in loops over scalars, so the innermost part is written as vectors.
Each entry of the result is a sum over k in order, whatever the tile: its bits depend neither on the
other rows nor on the number of threads.
"""

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

WIDE = bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))
BYTES = 64 if WIDE else 32  # of a vector
SHAPES = ((8, 3), (4, 6), (1, 8)) if WIDE else ((4, 3), (2, 6), (1, 8))  # rows x vectors
DEEP = 512  # so many entries of a row of x are used before the next tile begins


class Emit:
    """Writes what a tile is made of, in LLVM's language."""

    def __init__(self, context: Any, builder: Any, number: Any) -> None:
        self.context, self.builder = context, builder
        self.number = context.get_data_type(number)
        self.lanes = BYTES * 8 // number.bitwidth
        self.vector = ir.VectorType(self.number, self.lanes)
        self.align = number.bitwidth // 8

    def array(self, kind: Any, value: Any) -> Any:
        """Numba's array."""
        return self.context.make_array(kind)(self.context, self.builder, value)

    def address(self, array: Any, row: Any, column: Any, kind: Any) -> Any:
        """Where an entry stands, as a pointer to so many numbers."""
        b = self.builder
        offset = ir.IntType(64)(0)
        for index, stride in zip(
            (row, column), cgutils.unpack_tuple(b, array.strides), strict=True
        ):
            offset = b.add(offset, b.mul(index, stride))
        start = b.bitcast(array.data, ir.IntType(8).as_pointer())
        return b.bitcast(b.gep(start, [offset]), kind.as_pointer())

    def mask(self, count: Any) -> Any:
        """True in the first `count` lanes."""
        numbers = ir.VectorType(ir.IntType(64), self.lanes)
        return self.builder.icmp_signed(
            "<", ir.Constant(numbers, list(range(self.lanes))), self._spread(count, numbers)
        )

    def load(self, array: Any, row: Any, column: Any, mask: Any) -> Any:
        """The numbers from a column on; zeros where the mask says so."""
        pointer = self.address(array, row, column, self.vector)
        if mask is None:
            return self.builder.load(pointer, align=self.align)
        arguments = [pointer, ir.IntType(32)(self.align), mask, ir.Constant(self.vector, None)]
        return self._intrinsic("llvm.masked.load", self.vector, pointer, arguments)

    def store(self, value: Any, array: Any, row: Any, column: Any, mask: Any) -> None:
        """Write the numbers from a column on, where the mask says so."""
        pointer = self.address(array, row, column, self.vector)
        if mask is None:
            self.builder.store(value, pointer, align=self.align)
            return
        arguments = [value, pointer, ir.IntType(32)(self.align), mask]
        self._intrinsic("llvm.masked.store", ir.VoidType(), pointer, arguments)

    def repeated(self, array: Any, row: Any, column: Any) -> Any:
        """One entry in every lane."""
        entry = self.builder.load(self.address(array, row, column, self.number))
        return self._spread(entry, self.vector)

    def _spread(self, value: Any, kind: Any) -> Any:
        nothing, first = ir.Constant(kind, ir.Undefined), ir.IntType(32)(0)
        pattern = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(
            self.builder.insert_element(nothing, value, first), nothing, pattern
        )

    def _intrinsic(self, name: str, result: Any, pointer: Any, arguments: list[Any]) -> Any:
        kind = ir.FunctionType(result, [a.type for a in arguments])
        suffix = f"v{self.lanes}f{8 * self.align}.p0"
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"{name}.{suffix}")
        return self.builder.call(function, arguments)


@intrinsic
def tile(typing, rows, vectors, x, M, base, y, r, j, n, start, stop):  # type: ignore[no-untyped-def]
    """Fill y = base + x[:, start : stop] @ M[start : stop], n columns from j, some rows from r.

    rows and vectors are literal; n None is as many columns as so many vectors hold.
    """
    if not isinstance(rows, types.IntegerLiteral) or not isinstance(vectors, types.IntegerLiteral):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, y.dtype)
        arrays = zip((x, M, base, y), args[2:6], strict=True)
        X, right, old, out = (emit.array(kind, value) for kind, value in arrays)
        r, j, n, start, stop = args[6:]
        index = ir.IntType(64)
        lines = [builder.add(r, index(i)) for i in range(rows.literal_value)]
        starts = [index(v * emit.lanes) for v in range(vectors.literal_value)]
        whole = isinstance(signature.args[8], types.NoneType)
        places = [
            (builder.add(j, s), None if whole else emit.mask(builder.sub(n, s))) for s in starts
        ]
        sums = [
            [cgutils.alloca_once_value(builder, emit.load(old, i, *p)) for p in places]
            for i in lines
        ]
        with cgutils.for_range(builder, stop, start, index) as loop:
            factors = [emit.load(right, loop.index, *p) for p in places]
            for i, row in zip(lines, sums, strict=True):
                entry = emit.repeated(X, i, loop.index)
                for total, factor in zip(row, factors, strict=True):
                    term = builder.fmul(entry, factor, flags=("contract",))
                    new = builder.fadd(builder.load(total), term, flags=("contract",))
                    builder.store(new, total)
        for i, row in zip(lines, sums, strict=True):
            for total, place in zip(row, places, strict=True):
                emit.store(builder.load(total), out, i, *place)
        return context.get_dummy_value()

    return types.void(rows, vectors, x, M, base, y, r, j, n, start, stop), generate


def strips(rows: int, vectors: int) -> Any:
    """A function that fills rows of y in tiles of one shape, and gives the first row left."""

    def fill(x, M, base, y, first, last, start, stop):  # type: ignore[no-untyped-def]
        N, width = y.shape[1], vectors * (BYTES // y.itemsize)
        end = last - (last - first) % rows
        whole = N - N % width
        for j in range(0, whole, width):
            for r in range(first, end, rows):
                tile(rows, vectors, x, M, base, y, r, j, None, start, stop)
        if whole < N:
            for r in range(first, end, rows):
                tile(rows, vectors, x, M, base, y, r, whole, N - whole, start, stop)
        return end

    # Numba makes symbols of this and a count; code cached by two processes must not be mixed up
    fill.__qualname__ = f"fill_{rows}x{vectors}"
    return njit(nogil=True, error_model="numpy")(fill)


many, some, one = (strips(*shape) for shape in SHAPES)


@njit(nogil=True, error_model="numpy")
def product(x, M, base, y, first, last):  # type: ignore[no-untyped-def]
    """Fill y = base + x M in the rows first : last. The rows of M, base and y are contiguous."""
    deep = min(DEEP, x.shape[1])
    r = many(x, M, base, y, first, last, 0, deep)
    r = some(x, M, base, y, r, last, 0, deep)
    one(x, M, base, y, r, last, 0, deep)
    sums = y[:, : y.shape[1]]  # for Numba of the same type as base
    for start in range(DEEP, x.shape[1], DEEP):
        stop = min(start + DEEP, x.shape[1])
        r = many(x, M, sums, y, first, last, start, stop)
        r = some(x, M, sums, y, r, last, start, stop)
        one(x, M, sums, y, r, last, start, stop)
