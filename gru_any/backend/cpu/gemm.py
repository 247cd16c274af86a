"""A matrix product for Numba: tiles of the result that stay in the processor's registers.

LLVM does not find this form in loops over scalars, so the innermost part is written as vectors.
The right matrix is copied first, into panels that are read from one end to the other: a panel holds
row by row the columns of the same few units in each of the gates. Each entry of the result is a sum
over k in order, in pieces of so many, whatever the tile: its bits depend neither on the other rows
nor on the threads.
"""

import math
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .buffers import empty

WIDE = bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))
BYTES = 64 if WIDE else 32  # of a vector
SHAPES = ((8, 1), (4, 2), (1, 4)) if WIDE else ((4, 1), (2, 2), (1, 4))  # rows x panels
ROWS = SHAPES[0][0]
VECTORS = {1: 2, 2: 1, 3: 1}  # gates -> vectors of each in a panel
UNIT_BYTES = 2 * BYTES  # of the units of the widest panel
LINE = 64  # bytes of a line of the cache
BLOCK = 64  # rows of x that all panels meet before the next rows: they stay in the second cache
PIECE = 48 * 1024  # bytes of a panel that all tiles of a block meet before the next piece


class Emit:
    """Writes what a tile is made of, in LLVM's language."""

    def __init__(self, context: Any, builder: Any, bits: int) -> None:
        self.context, self.builder = context, builder
        self.number = ir.FloatType() if bits == 32 else ir.DoubleType()
        self.lanes = BYTES * 8 // bits
        self.vector = ir.VectorType(self.number, self.lanes)
        self.align = bits // 8
        self.line = LINE // self.align

    def address(self, start: Any, place: Any, kind: Any) -> Any:
        """Where a number stands, counted from a start, as a pointer to so many numbers."""
        b = self.builder
        offset = b.mul(place, ir.IntType(64)(self.align))
        return b.inttoptr(b.add(start, offset), kind.as_pointer())

    def mask(self, count: Any) -> Any:
        """True in the first `count` lanes."""
        numbers = ir.VectorType(ir.IntType(64), self.lanes)
        return self.builder.icmp_signed(
            "<", ir.Constant(numbers, list(range(self.lanes))), self._spread(count, numbers)
        )

    def load(self, start: Any, place: Any, mask: Any = None) -> Any:
        """The numbers from a place on; zeros where the mask says so."""
        pointer = self.address(start, place, self.vector)
        if mask is None:
            return self.builder.load(pointer, align=self.align)
        arguments = [pointer, ir.IntType(32)(self.align), mask, ir.Constant(self.vector, None)]
        return self._intrinsic("llvm.masked.load", self.vector, arguments)

    def store(self, value: Any, start: Any, place: Any, mask: Any) -> None:
        """Write the numbers from a place on, where the mask says so."""
        pointer = self.address(start, place, self.vector)
        if mask is None:
            self.builder.store(value, pointer, align=self.align)
            return
        arguments = [value, pointer, ir.IntType(32)(self.align), mask]
        self._intrinsic("llvm.masked.store", ir.VoidType(), arguments)

    def fetch(self, start: Any, place: Any) -> None:
        """Have the line of a place in the second cache soon."""
        flag, pointer = ir.IntType(32), self.address(start, place, self.number)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, flag, flag, flag])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        self.builder.call(function, [pointer, flag(0), flag(2), flag(1)])

    def repeated(self, start: Any, place: Any) -> Any:
        """One number in every lane."""
        number = self.builder.load(self.address(start, place, self.number))
        return self._spread(number, self.vector)

    def _spread(self, value: Any, kind: Any) -> Any:
        nothing, first = ir.Constant(kind, ir.Undefined), ir.IntType(32)(0)
        pattern = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(
            self.builder.insert_element(nothing, value, first), nothing, pattern
        )

    def _intrinsic(self, name: str, result: Any, arguments: list[Any]) -> Any:
        kind = ir.FunctionType(result, [a.type for a in arguments])
        suffix = f"v{self.lanes}f{8 * self.align}.p0"
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"{name}.{suffix}")
        return self.builder.call(function, arguments)


@intrinsic
def tile(typing, bits, rows, panels, gates, of, r, p, n, start, stop):  # type: ignore[no-untyped-def]
    """Fill y = old + x[:, start : stop] @ M[start : stop], some rows from r, panels of M from p.

    bits (of a number), rows, panels and gates are literal. of: x, xr, xi, xc, P, K, old, stride,
    y, H; x, P, old and y are addresses. Entry k of row i of a tile is xr r + xi i + xc k away from
    x; the rows of old are stride apart, those of y gates H. n is how many units are left from panel
    p on, None if enough.
    """
    literal = (bits, rows, panels, gates)
    if not all(isinstance(v, types.IntegerLiteral) for v in literal):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit, G = Emit(context, builder, bits.literal_value), gates.literal_value
        x, xr, xi, xc, P, K, old, stride, y, H = cgutils.unpack_tuple(builder, args[4])
        r, p, n, start, stop = args[5:]
        index, V = ir.IntType(64), VECTORS[G]
        add, mul, width = builder.add, builder.mul, V * emit.lanes
        whole = isinstance(signature.args[7], types.NoneType)
        lines = [add(r, index(i)) for i in range(rows.literal_value)]
        columns, factors = [], []
        for q in range(panels.literal_value):
            panel = add(p, index(q))
            for v in range(G * V):
                unit = index(v % V * emit.lanes)
                mask = None if whole else emit.mask(builder.sub(n, unit))
                column = add(mul(panel, index(width)), add(mul(H, index(v // V)), unit))
                columns.append((column, mask))
                factors.append((mul(panel, K), index(v * emit.lanes)))
        zeros = ir.Constant(emit.vector, None)
        sums = [[cgutils.alloca_once_value(builder, zeros) for _ in columns] for _ in lines]
        ahead = None  # tiles of fewer sums have no time for it
        if G == 3 and rows.literal_value == ROWS:
            ahead = _following(emit, G * width, P, K, r, p, start, stop)
        with cgutils.for_range(builder, stop, start, index) as loop:
            numbers = [
                emit.load(P, add(mul(add(row, loop.index), index(G * width)), c))
                for row, c in factors
            ]
            if ahead is not None:
                emit.fetch(ahead, mul(builder.sub(loop.index, start), index(emit.line)))
            for i, row in enumerate(sums):
                place = add(add(mul(r, xr), mul(index(i), xi)), mul(loop.index, xc))
                entry = emit.repeated(x, place)
                for total, number in zip(row, numbers, strict=True):
                    term = builder.fmul(entry, number, flags=("contract",))
                    new = builder.fadd(builder.load(total), term, flags=("contract",))
                    builder.store(new, total)
        for i, row in zip(lines, sums, strict=True):
            place = mul(i, mul(H, index(G)))
            for total, (c, mask) in zip(row, columns, strict=True):
                before = emit.load(old, add(mul(i, stride), c), mask)  # late: it is far away
                emit.store(builder.fadd(before, builder.load(total)), y, add(place, c), mask)
        return context.get_dummy_value()

    return types.void(*literal, of, r, p, n, start, stop), generate


def _following(emit: Any, width: int, P: Any, K: Any, r: Any, p: Any, start: Any, stop: Any) -> Any:
    """The address in the panel after p from where on a tile fetches one line at each k.

    That is not all of it where a row is wider than a line: the tiles of other rows fetch the rest.
    """
    b, index = emit.builder, ir.IntType(64)
    tiles = -(-width // emit.line)
    turn = b.srem(b.sdiv(r, index(ROWS)), index(tiles))
    apart = b.mul(b.sub(stop, start), index((width - emit.line) // max(1, tiles - 1)))
    piece = b.mul(b.add(b.mul(b.add(p, index(1)), K), start), index(width))
    return b.add(P, b.mul(b.add(piece, b.mul(turn, apart)), index(emit.align)))


def strips(rows: int, panels: int, gates: int, bits: int) -> Any:
    """A function that fills rows of y in tiles of one shape, and gives the first row left."""
    units = VECTORS[gates] * BYTES * 8 // bits  # of a panel

    def fill(of, first, last, low, high, start, stop):  # type: ignore[no-untyped-def]
        end, wide = last - (last - first) % rows, low
        if end > first:
            wide += max(0, min(high, of[-1] // units) - low) // panels * panels
        for p in range(low, wide, panels):
            for r in range(first, end, rows):
                tile(bits, rows, panels, gates, of, r, p, None, start, stop)
        for p in range(wide, high):
            for r in range(first, end, rows):
                tile(bits, rows, 1, gates, of, r, p, of[-1] - p * units, start, stop)
        return end

    # Numba makes symbols of this and a count; code cached by two processes must not be mixed up
    fill.__qualname__ = f"fill_{rows}x{panels}x{gates}x{bits}"
    return njit(nogil=True, error_model="numpy")(fill)


@intrinsic
def move(typing, bits, source, i, target, j):  # type: ignore[no-untyped-def]
    """Copy as many numbers as a tile has rows from one place to another."""
    if not isinstance(bits, types.IntegerLiteral):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emit(context, builder, bits.literal_value)
        kind = ir.VectorType(emit.number, ROWS)
        numbers = builder.load(emit.address(args[1], args[2], kind), align=emit.align)
        builder.store(numbers, emit.address(args[3], args[4], kind), align=emit.align)
        return context.get_dummy_value()

    return types.void(bits, source, i, target, j), generate


@njit(nogil=True)
def gather(bits, x, xc, room, deep, rows, start, stop):  # type: ignore[no-untyped-def]
    """Copy rows of x, which stand side by side in memory, as the tiles read them: one by one."""
    for k in range(start, stop):
        for i in range(0, rows, ROWS):
            move(bits, x, i + k * xc, room, i * deep + (k - start) * ROWS)


def products(gates: int, bits: int) -> Any:
    """A function: y = base + x M in some rows of y, and in the units from one to another.

    Addresses: x (R, K), whose entries are xr and xc apart, M (K, GH) as panels, base (GH,),
    y (R, GH). The units begin and end where panels do, or at the end of y.
    """
    many, some, one = (strips(*shape, gates, bits) for shape in SHAPES)
    units = VECTORS[gates] * BYTES * 8 // bits
    size, number = bits // 8, {32: np.float32, 64: np.float64}[bits]
    deep, apart = PIECE // (gates * units * size), LINE // size // ROWS  # keeps rows off one set

    def product(x, xr, xc, P, K, base, y, H, first, last, left, right):  # type: ignore[no-untyped-def]
        low, high, far = left // units, -(-right // units), min(K, deep) + apart
        room = np.empty(min(BLOCK, last - first) * far if xr == 1 else 0, number)
        for begin in range(first, last, BLOCK):
            end, old = min(begin + BLOCK, last), base
            stride = np.intp(0)  # no literal: each would be a type of its own
            whole = end - (end - begin) % ROWS
            for start in range(0, K, deep):
                stop = min(start + deep, K)
                of = (x, xr, xr, xc, P, K, old, stride, y, H)
                if xr == 1:
                    near = np.intp(room.ctypes.data)  # here, as Numba lets go after the last use
                    gather(bits, x + begin * size, xc, near, far, whole - begin, start, stop)
                    near -= (begin * far + start * ROWS) * size  # of row 0, entry 0
                    gathered = (near, far, np.intp(1), np.intp(ROWS), P, K, old, stride, y, H)
                    many(gathered, begin, whole, low, high, start, stop)
                else:
                    many(of, begin, whole, low, high, start, stop)
                r = some(of, whole, end, low, high, start, stop)
                one(of, r, end, low, high, start, stop)
                old, stride = y, gates * H

    product.__qualname__ = f"product_{gates}x{bits}"
    return njit(nogil=True, error_model="numpy")(product)


@intrinsic
def call(typing, function, x, xr, xc, P, K, base, y, H, first, last, left, right):  # type: ignore[no-untyped-def]
    """Call one of the products by its address."""
    index = ir.IntType(64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [index] * 12)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 13), generate


@njit(nogil=True, error_model="numpy")
def multiply(function, gates, x, column, P, zeros, y, first, last, left, right):  # type: ignore[no-untyped-def]
    """Y = x[:, column : column + K] M in some rows and units; P: the panels of M (K, .)."""
    start = np.intp(x.ctypes.data) + column * y.itemsize
    matrix, base, out = P.ctypes.data, zeros.ctypes.data, y.ctypes.data
    call(function, start, x.shape[1], 1, matrix, P.shape[1], base, out, y.shape[1] // gates,
         first, last, left, right)  # fmt: skip


def panels(N: int, K: int, gates: int, dtype: Any) -> Any:
    """Room for a matrix (K, N) as panels, from the start of a line of the cache on."""
    width = VECTORS[gates] * BYTES // dtype.itemsize
    shape = (-(-(N // gates) // width), K, gates * width)
    size, line = math.prod(shape), LINE // dtype.itemsize
    room = empty((size + line,), dtype)
    start = -room.ctypes.data % LINE // dtype.itemsize
    return room[start : start + size].reshape(shape)


@intrinsic
def turn(typing, bits, source, apart, target, wide):  # type: ignore[no-untyped-def]
    """Copy a square of numbers turned, as many each way as a vector has.

    Its rows are so many numbers apart at the source, and wide at the target.
    """
    if not isinstance(bits, types.IntegerLiteral):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit, index = Emit(context, builder, bits.literal_value), ir.IntType(64)
        _, source, apart, target, wide = args
        n, numbers = emit.lanes, range(emit.lanes)
        rows = [emit.load(source, builder.mul(apart, index(i))) for i in numbers]
        for step in (s for s in (1, 2, 4, 8) if s < n):  # swap the squares beside the diagonal
            low = [i if not i & step else n + i - step for i in numbers]
            high = [i + step if not i & step else n + i for i in numbers]
            for i in (i for i in numbers if not i & step):
                pair = rows[i], rows[i + step]
                rows[i], rows[i + step] = (
                    builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(ir.IntType(32), n), m))
                    for m in (low, high)
                )
        for i, row in enumerate(rows):
            emit.store(row, target, builder.mul(wide, index(i)), None)
        return context.get_dummy_value()

    return types.void(bits, source, apart, target, wide), generate


@njit(nogil=True, error_model="numpy")
def pack(bits, M, P, gates, low, high):  # type: ignore[no-untyped-def]
    """Copy M^T (N, K) into some of the panels, with zeros beside the last units."""
    (_, K, wide), H, square, size = P.shape, len(M) // gates, BYTES * 8 // bits, bits // 8
    units, down, across = wide // gates, M.strides[0] // size, M.strides[1] // size
    source, target = np.intp(M.ctypes.data), np.intp(P.ctypes.data)
    for p in range(low, high):
        count = min(units, H - p * units)
        if count < units:
            P[p] = 0
        for g in range(gates):
            first, start, done = g * H + p * units, p * K * wide + g * units, 0
            if count == units and across == 1:
                done = K - K % square
                for i in range(0, units, square):
                    for k in range(0, done, square):
                        a, b = (first + i) * down + k, start + k * wide + i
                        turn(bits, source + a * size, down, target + b * size, wide)
            elif count == units and down == 1:
                done = K
                for k in range(K):
                    for i in range(0, units, ROWS):
                        move(bits, source, first + i + k * across, target, start + k * wide + i)
            rows, columns = M[first:][:count], P[p, :, g * units :]
            for k in range(done, K):
                for i in range(count):
                    columns[k, i] = rows[i, k]


@njit(nogil=True, error_model="numpy")
def fill(bits, M, P, gates, left, right):  # type: ignore[no-untyped-def]
    """Copy M^T into those panels that hold some of the units from left to right."""
    units = P.shape[2] // gates
    pack(bits, M, P, gates, left // units, -(-right // units))
