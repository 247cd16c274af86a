"""A matrix product for Numba: tiles of the result that stay in the processor's registers.

LLVM does not find this form in loops over scalars, so the innermost part is written as vectors.
The right matrix is copied first, into panels that are read from one end to the other: a panel holds
row by row the columns of the same few units in each of the gates. Each entry of the result is a sum
over k in order, whatever the tile: its bits depend neither on the other rows nor on the threads.
"""

import math
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

WIDE = bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))
BYTES = 64 if WIDE else 32  # of a vector
SHAPES = ((8, 1), (4, 2), (1, 4)) if WIDE else ((4, 1), (2, 2), (1, 4))  # rows x panels
VECTORS = {1: 2, 2: 1, 3: 1}  # gates -> vectors of each in a panel
UNIT_BYTES = 2 * BYTES  # of the units of the widest panel
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

    def length(self, array: Any, axis: int) -> Any:
        """The array's shape along an axis."""
        return cgutils.unpack_tuple(self.builder, array.shape)[axis]

    def packed(self, array: Any, row: Any, width: int, column: Any) -> Any:
        """The numbers from a column on of a row of all the panels, which follow each other."""
        place = self.builder.add(self.builder.mul(row, ir.IntType(64)(width)), column)
        pointer = self.builder.gep(array.data, [place])
        pointer = self.builder.bitcast(pointer, self.vector.as_pointer())
        return self.builder.load(pointer, align=BYTES)

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
def tile(typing, rows, panels, gates, x, P, base, y, r, p, n, start, stop):  # type: ignore[no-untyped-def]
    """Fill y = base + x[:, start : stop] @ M[start : stop], some rows from r, panels of M from p.

    rows, panels and gates are literal. n is how many units are left from panel p on, None if
    enough.
    """
    if not all(isinstance(v, types.IntegerLiteral) for v in (rows, panels, gates)):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, y.dtype)
        arrays = zip((x, P, base, y), args[3:7], strict=True)
        X, packed, old, out = (emit.array(kind, value) for kind, value in arrays)
        r, p, n, start, stop = args[7:]
        index, G = ir.IntType(64), gates.literal_value
        width = VECTORS[G] * emit.lanes
        lines = [builder.add(r, index(i)) for i in range(rows.literal_value)]
        whole = isinstance(signature.args[9], types.NoneType)
        H = builder.udiv(emit.length(out, 1), index(G))
        places, factors = [], []
        for q in range(panels.literal_value):
            panel = builder.add(p, index(q))
            row = builder.mul(panel, emit.length(packed, 1))
            for v in range(G * VECTORS[G]):
                unit = index(v % VECTORS[G] * emit.lanes)
                mask = None if whole else emit.mask(builder.sub(n, unit))
                gate = builder.mul(H, index(v // VECTORS[G]))
                column = builder.add(builder.mul(panel, index(width)), builder.add(gate, unit))
                places.append((column, mask))
                factors.append((row, index(v * emit.lanes)))
        sums = [
            [cgutils.alloca_once_value(builder, emit.load(old, i, *place)) for place in places]
            for i in lines
        ]
        with cgutils.for_range(builder, stop, start, index) as loop:
            numbers = [
                emit.packed(packed, builder.add(row, loop.index), G * width, c)
                for row, c in factors
            ]
            for i, row in zip(lines, sums, strict=True):
                entry = emit.repeated(X, i, loop.index)
                for total, number in zip(row, numbers, strict=True):
                    term = builder.fmul(entry, number, flags=("contract",))
                    new = builder.fadd(builder.load(total), term, flags=("contract",))
                    builder.store(new, total)
        for i, row in zip(lines, sums, strict=True):
            for total, place in zip(row, places, strict=True):
                emit.store(builder.load(total), out, i, *place)
        return context.get_dummy_value()

    return types.void(rows, panels, gates, x, P, base, y, r, p, n, start, stop), generate


def strips(rows: int, panels: int, gates: int) -> Any:
    """A function that fills rows of y in tiles of one shape, and gives the first row left."""

    def fill(x, P, base, y, first, last, low, high, start, stop):  # type: ignore[no-untyped-def]
        H = y.shape[1] // gates
        end = last - (last - first) % rows
        wide = low
        if end > first:
            whole = min(high, H // (P.shape[2] // gates))
            wide += max(0, whole - low) // panels * panels
        for p in range(low, wide, panels):
            for r in range(first, end, rows):
                tile(rows, panels, gates, x, P, base, y, r, p, None, start, stop)
        for p in range(wide, high):
            for r in range(first, end, rows):
                n = H - p * (P.shape[2] // gates)
                tile(rows, 1, gates, x, P, base, y, r, p, n, start, stop)
        return end

    # Numba makes symbols of this and a count; code cached by two processes must not be mixed up
    fill.__qualname__ = f"fill_{rows}x{panels}x{gates}"
    return njit(nogil=True, error_model="numpy")(fill)


def products(gates: int) -> Any:
    """A function: y = base + x M in some rows of y, and in the units from one to another.

    y (R, GH); M (K, GH) as panels; the rows of x, base and y are contiguous. The units begin and
    end where panels do, or at the end of y.
    """
    many, some, one = (strips(*shape, gates) for shape in SHAPES)

    def product(x, P, base, y, first, last, left, right):  # type: ignore[no-untyped-def]
        units = P.shape[2] // gates
        low, high = left // units, -(-right // units)
        deep = min(DEEP, x.shape[1])
        r = many(x, P, base, y, first, last, low, high, 0, deep)
        r = some(x, P, base, y, r, last, low, high, 0, deep)
        one(x, P, base, y, r, last, low, high, 0, deep)
        sums = y[:, : y.shape[1]]  # for Numba of the same type as base
        for start in range(DEEP, x.shape[1], DEEP):
            stop = min(start + DEEP, x.shape[1])
            r = many(x, P, sums, y, first, last, low, high, start, stop)
            r = some(x, P, sums, y, r, last, low, high, start, stop)
            one(x, P, sums, y, r, last, low, high, start, stop)

    product.__qualname__ = f"product_{gates}"
    return njit(nogil=True, error_model="numpy")(product)


product1, product2, product3 = map(products, (1, 2, 3))


def panels(N: int, K: int, gates: int, dtype: Any) -> Any:
    """Room for a matrix (K, N) as panels, from the start of a line of the cache on."""
    width = VECTORS[gates] * BYTES // dtype.itemsize
    shape = (-(-(N // gates) // width), K, gates * width)
    size, line = math.prod(shape), 64 // dtype.itemsize
    room = np.empty(size + line, dtype)
    start = -room.ctypes.data % 64 // dtype.itemsize
    return room[start : start + size].reshape(shape)


@njit(nogil=True, error_model="numpy")
def pack(M, P, gates, low, high):  # type: ignore[no-untyped-def]
    """Copy M^T (N, K) into some of the panels, with zeros beside the last units."""
    H, units = len(M) // gates, P.shape[2] // gates
    for p in range(low, high):
        count = min(units, H - p * units)
        if count < units:
            P[p] = 0
        for g in range(gates):
            rows, columns = M[g * H + p * units :][:count], P[p, :, g * units :]
            for k in range(P.shape[1]):
                for i in range(count):
                    columns[k, i] = rows[i, k]
