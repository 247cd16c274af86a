"""Matrix products for Numba, built as in BLIS: packed panels, a micro-kernel, and loops around it.

                                  panel p
                              +---+---+---+---+
        y = base + x M        |   |   | # |   |  k   M (K, N), packed: one panel after the other,
                              |   |   | # |   |      each row by row
                 k            +---+---+---+---+
            +---------+       +---+---+---+---+
          r | ####### |       |   |   | # |   |      a tile of y: MR rows of one panel or more,
            |         |       |   |   |   |   |      whose sums stay in registers for KC steps of k
            +---------+       +---+---+---+---+
               x (R, K)           y (R, N)

    for MC rows of x                      they stay in the L2 cache
        for KC rows of M                  a panel's part stays in the L1 cache
            for each panel
                for MR of the rows        micro_kernel: y = before + x M, a vector at a time

The N = G H columns belong to G gates of H units. A panel holds, row by row, the columns of the same
few units in each of the gates, so that threads can share the units of a step.

Each entry of y is a sum over k in order, in parts of KC, whatever the tile: its bits depend neither
on the other rows nor on the threads. LLVM does not find this form in loops over scalars, so the
micro-kernel is written in its intermediate language.

Panels may hold small weights, which become float32 as they are loaded: bfloat16, as uint16; or int8
with a float32 scale for each column of M, in the first SCALE_ROWS rows of its panel. Where GROUP
says so, rows stand side by side in pairs, an element of each together: AVX2 takes pairs of bfloat16
apart in less time than it widens 16 bits, and `integers.py` multiplies pairs of int8.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped_cgutils

from ...typing import HostArray
from .barrier import Lowering, inner, intrinsic

cgutils: Any = untyped_cgutils
Function: TypeAlias = Callable[..., Any]  # compiled
Type: TypeAlias = types.Type  # of a value in compiled code
intp: Any = np.intp  # no literal: each would be a type of its own in compiled code
AVX512 = bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))
VECTOR_BYTES = 64 if AVX512 else 32
SHAPES = ((8, 1), (4, 2), (1, 4)) if AVX512 else ((4, 1), (2, 2), (1, 4))  # of a tile: MR, panels
MR = SHAPES[0][0]
MR_NARROW = MR if AVX512 else 6  # of panels of 2 vectors, whose sums leave registers free
VECTORS = {1: 2, 2: 1, 3: 1}  # gates -> vectors of each in a row of a panel
UNIT_BYTES = 2 * VECTOR_BYTES  # of the units of the widest panel
LINE_BYTES = 64  # of a line of the cache
MC = 64  # rows of x
KC_BYTES = 48 * 1024  # of KC rows of a panel
BITS = {"float32": 32, "float64": 64, "uint16": 32, "int8": 32}  # of sums, by dtype of panels
GROUP = {"int8": 2} | ({} if AVX512 else {"uint16": 2})  # rows side by side, by dtype; others 1
SCALE_ROWS = 4  # rows of int8 that are as long as a row of float32
AHEAD_BYTES = 2048  # from where a single row reads small weights to what it prefetches

INDEX, INDEX32 = ir.IntType(64), ir.IntType(32)


class Gemm(NamedTuple):
    """The operands of a product y = base + x M for some rows and units; the compiled interface.

    The first row, and the units, begin where tiles and panels do; the units may end where y does.
    """

    x: int  # address of x (R, K)
    x_row: int  # elements from a row of x to the next
    x_column: int  # elements from a column of x to the next
    panels: int  # address of M (K, G H), packed
    K: int
    base: int  # address of base (G H,)
    y: int  # address of y (R, G H)
    H: int
    first: int  # row
    last: int  # row, not included
    left: int  # unit
    right: int  # unit, not included


class Pack(NamedTuple):
    """The operands of a packing of M^T into some panels; the compiled interface."""

    M: int  # address of M (gates H, K)
    down: int  # elements from a row of M to the next
    across: int  # elements from a column of M to the next
    panels: int  # address
    K: int
    width: int  # elements of a row of a panel
    gates: int
    H: int
    low: int  # panel
    high: int  # panel, not included


class Operands(NamedTuple):
    """What a micro-kernel reads and writes: y = before + x M."""

    x: int  # address
    tile_stride: int  # elements of x from a row to the next, counted to where a tile begins
    row_stride: int  # elements of x from a row of a tile to the next
    k_stride: int  # elements of x from a k to the next
    panels: int  # address
    K: int
    before: int  # address
    before_stride: int  # elements from a row to the next; 0: all rows begin with one vector
    y: int  # address
    H: int


def scale_rows(stored: str) -> int:
    """Return how many rows of a panel, the scales, stand before its weights."""
    return SCALE_ROWS if stored == "int8" else 0


def shapes(gates: int, stored: str) -> list[tuple[int, int]]:
    """Return the rows and panels of each tile."""
    many, some, (one, panels) = SHAPES
    if stored in GROUP:  # a pair of rows needs more registers
        return [many, some, (one, 8 // (gates * VECTORS[gates]))]
    return [many if gates == 3 else (MR_NARROW, 1), some, (one, panels)]


class Emitter:
    """Writes LLVM's instructions for one element type."""

    def __init__(self, builder: ir.IRBuilder, bits: int, stored: str = "") -> None:
        self.builder, self.stored = builder, stored or f"float{bits}"  # dtype of the panels
        self.element = ir.FloatType() if bits == 32 else ir.DoubleType()
        self.lanes = VECTOR_BYTES * 8 // bits
        self.vector = ir.VectorType(self.element, self.lanes)
        self.size = bits // 8
        self.weight_size = np.dtype(self.stored).itemsize
        self.line = LINE_BYTES // self.weight_size
        self.head = scale_rows(self.stored)  # rows of a panel before its weights
        self.group = GROUP.get(self.stored, 1)

    def address(self, start: ir.Value, offset: ir.Value, kind: ir.Type) -> ir.Value:
        """Return a pointer to a value of this type, `offset` elements after an address."""
        b = self.builder
        return b.inttoptr(b.add(start, b.mul(offset, INDEX(self.size))), kind.as_pointer())

    def mask(self, count: ir.Value) -> ir.Value:
        """Return a mask of the first `count` lanes."""
        kind = ir.VectorType(INDEX, self.lanes)
        lanes = ir.Constant(kind, list(range(self.lanes)))
        return self.builder.icmp_signed("<", lanes, self.spread(count, kind))

    def load(self, start: ir.Value, offset: ir.Value, mask: ir.Value | None = None) -> ir.Value:
        """Load a vector, with zeros in the lanes that are masked."""
        pointer = self.address(start, offset, self.vector)
        if mask is None:
            return self.builder.load(pointer, align=self.size)
        arguments = [pointer, ir.IntType(32)(self.size), mask, ir.Constant(self.vector, None)]
        return self._intrinsic("llvm.masked.load", self.vector, arguments)

    def store(
        self, value: ir.Value, start: ir.Value, offset: ir.Value, mask: ir.Value | None = None
    ) -> None:
        """Store the lanes of a vector that are not masked."""
        pointer = self.address(start, offset, self.vector)
        if mask is None:
            self.builder.store(value, pointer, align=self.size)
            return
        arguments = [value, pointer, ir.IntType(32)(self.size), mask]
        self._intrinsic("llvm.masked.store", ir.VoidType(), arguments)

    def weights(self, start: ir.Value, offset: ir.Value) -> ir.Value:
        """Load a vector of weights, in the type of the arithmetic."""
        if self.weight_size == self.size:
            return self.load(start, offset)
        b, lanes, size = self.builder, self.lanes, self.weight_size
        stored, wide = ir.VectorType(ir.IntType(8 * size), lanes), ir.VectorType(INDEX32, lanes)
        place = b.add(start, b.mul(offset, INDEX(size)))
        v = b.load(b.inttoptr(place, stored.as_pointer()), align=size)
        if self.stored == "int8":
            return b.sitofp(b.sext(v, wide), self.vector)
        sixteen = ir.Constant(wide, [16] * lanes)
        return b.bitcast(b.shl(b.zext(v, wide), sixteen), self.vector)

    def pair_of_weights(self, start: ir.Value, offset: ir.Value) -> list[ir.Value]:
        """Load a vector of weights from each of two rows side by side."""
        b, lanes, size = self.builder, self.lanes, self.weight_size
        pair, wide = ir.VectorType(ir.IntType(16 * size), lanes), ir.VectorType(INDEX32, lanes)
        place = b.add(start, b.mul(offset, INDEX(size)))
        v = b.load(b.inttoptr(place, pair.as_pointer()), align=size)
        if self.stored == "int8":
            v, (eight, high) = b.sext(v, wide), (ir.Constant(wide, [n] * lanes) for n in (8, 24))
            both = b.ashr(b.shl(v, high), high), b.ashr(v, eight)
            return [b.sitofp(each, self.vector) for each in both]
        sixteen, high = (ir.Constant(wide, [n] * lanes) for n in (16, -1 << 16))
        return [b.bitcast(each, self.vector) for each in (b.shl(v, sixteen), b.and_(v, high))]

    def prefetch(self, start: ir.Value, offset: ir.Value) -> None:
        """Prefetch the line of a weight into the L2 cache."""
        b, flag = self.builder, ir.IntType(32)
        place = b.add(start, b.mul(offset, INDEX(self.weight_size)))
        pointer = b.inttoptr(place, self.element.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, flag, flag, flag])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        self.builder.call(function, [pointer, flag(0), flag(2), flag(1)])

    def broadcast(self, start: ir.Value, offset: ir.Value) -> ir.Value:
        """Load one element into every lane."""
        element = self.builder.load(self.address(start, offset, self.element))
        return self.spread(element, self.vector)

    def accumulate(self, place: ir.Value, left: ir.Value, right: ir.Value) -> None:
        """Add a product of two vectors to the sum at a place."""
        term = self.builder.fmul(left, right, flags=("contract",))
        total = self.builder.fadd(self.builder.load(place), term, flags=("contract",))
        self.builder.store(total, place)

    def spread(self, value: ir.Value, kind: ir.Type) -> ir.Value:
        nothing, first = ir.Constant(kind, ir.Undefined), ir.IntType(32)(0)
        pattern = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(
            self.builder.insert_element(nothing, value, first), nothing, pattern
        )

    def _intrinsic(self, name: str, result: ir.Type, arguments: list[ir.Value]) -> ir.Value:
        kind = ir.FunctionType(result, [a.type for a in arguments])
        suffix = f"v{self.lanes}f{8 * self.size}.p0"
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"{name}.{suffix}")
        return self.builder.call(function, arguments)


# the product -------------------------------------------------------------------------------------


def micro_kernel(rows: int, panels: int, gates: int, stored: str) -> Function:
    """Return an intrinsic that fills a tile of y: some rows from r on, some panels from p on.

    It adds x[r, start : stop] @ M[start : stop] to what was there before. units: how many are left
    from panel p on, or None where the tile needs no mask.
    """

    @intrinsic
    def kernel(
        typing: object, operands: Type, r: Type, p: Type, units: Type, start: Type, stop: Type
    ) -> Lowering:
        def generate(
            context: Any, builder: ir.IRBuilder, signature: Any, args: list[ir.Value]
        ) -> ir.Value:
            emit, V = Emitter(builder, BITS[stored], stored), VECTORS[gates]
            of = Operands(*cgutils.unpack_tuple(builder, args[0]))
            r, p, units, start, stop = args[1:]
            add, mul, width = builder.add, builder.mul, V * emit.lanes
            whole = isinstance(signature.args[3], types.NoneType)
            lines = [add(r, INDEX(i)) for i in range(rows)]
            columns, factors, places = columns_of(
                emit, of, p, panels, gates, None if whole else units
            )
            zeros = ir.Constant(emit.vector, None)
            sums = [[cgutils.alloca_once_value(builder, zeros) for _ in columns] for _ in lines]
            ahead = None  # tiles of fewer sums have no time for it
            if gates == 3 and rows == MR:
                ahead = _next_panel(emit, gates * width, of, r, p, start, stop)

            def entry(i: int, k: ir.Value) -> ir.Value:
                offset = add(mul(r, of.tile_stride), mul(INDEX(i), of.row_stride))
                return emit.broadcast(of.x, add(offset, mul(k, of.k_stride)))

            def add_rows(k: ir.Value, load: Callable[..., list[ir.Value]], group: int) -> None:
                ks = [add(k, INDEX(n)) for n in range(group)]
                places = [
                    add(mul(add(row, k), INDEX(gates * width)), mul(c, INDEX(group)))
                    for row, c in factors
                ]
                if rows == 1:
                    if emit.weight_size < emit.size:
                        for place in places[:: gates * V]:
                            for n in range(group):
                                far = AHEAD_BYTES // emit.weight_size + n * gates * width
                                emit.prefetch(of.panels, add(place, INDEX(far)))
                    entries = [entry(0, k) for k in ks]
                    for total, place in zip(sums[0], places, strict=True):
                        for x, vector in zip(entries, load(of.panels, place), strict=True):
                            emit.accumulate(total, x, vector)
                    return
                groups = zip(*(load(of.panels, place) for place in places), strict=True)
                for k, vectors in zip(ks, groups, strict=True):
                    if ahead is not None:
                        emit.prefetch(ahead, mul(builder.sub(k, start), INDEX(emit.line)))
                    for i, row in enumerate(sums):
                        x = entry(i, k)
                        for total, vector in zip(row, vectors, strict=True):
                            emit.accumulate(total, x, vector)

            rest = start
            if emit.group > 1:
                pairs = builder.sdiv(builder.sub(stop, start), INDEX(2))
                with cgutils.for_range(builder, pairs, INDEX(0), INDEX) as loop:
                    add_rows(add(start, mul(loop.index, INDEX(2))), emit.pair_of_weights, 2)
                rest = add(start, mul(pairs, INDEX(2)))
            with cgutils.for_range(builder, stop, rest, INDEX) as loop:
                add_rows(loop.index, lambda *place: [emit.weights(*place)], 1)
            for i, row in zip(lines, sums, strict=True):
                offset = mul(i, mul(of.H, INDEX(gates)))
                for n, (total, (c, mask)) in enumerate(zip(row, columns, strict=True)):
                    # only now, since it is far away
                    before = emit.load(of.before, add(mul(i, of.before_stride), c), mask)
                    found = builder.load(total)
                    if places:
                        found = builder.fmul(found, emit.load(*places[n]))
                    emit.store(builder.fadd(before, found), of.y, add(offset, c), mask)
            return context.get_dummy_value()

        return types.void(operands, r, p, units, start, stop), generate

    return kernel


class Columns(NamedTuple):
    """The vectors of columns of a tile of y."""

    of_y: list[tuple[ir.Value, ir.Value | None]]  # the first element of a row, and the mask
    of_panels: list[tuple[ir.Value, ir.Value]]  # the row where weights begin, and the column
    of_scales: list[tuple[ir.Value, ir.Value]]  # address, and element from there


def columns_of(
    emit: Emitter, of: Operands, p: ir.Value, panels: int, gates: int, units: ir.Value | None
) -> Columns:
    """Return where the columns of some panels from p on are; units: how many are left, to mask."""
    add, mul, V = emit.builder.add, emit.builder.mul, VECTORS[gates]
    found, width = Columns([], [], []), V * emit.lanes
    for q in range(panels):
        panel = add(p, INDEX(q))
        start = mul(panel, add(of.K, INDEX(emit.head)))
        for v in range(gates * V):
            unit, gate = INDEX(v % V * emit.lanes), mul(of.H, INDEX(v // V))
            mask = None if units is None else emit.mask(emit.builder.sub(units, unit))
            found.of_y.append((add(mul(panel, INDEX(width)), add(gate, unit)), mask))
            found.of_panels.append((add(start, INDEX(emit.head)), INDEX(v * emit.lanes)))
            if emit.head:
                bytes_before = mul(start, INDEX(gates * width))
                found.of_scales.append((add(of.panels, bytes_before), INDEX(v * emit.lanes)))
    return found


def _next_panel(
    emit: Emitter,
    width: int,
    of: Operands,
    r: ir.Value,
    p: ir.Value,
    start: ir.Value,
    stop: ir.Value,
) -> ir.Value:
    """Return the address in the next panel from which a tile prefetches one line at each k.

    These are not all lines where a row is wider than a line: the tiles of other rows prefetch the
    others.
    """
    b, lines = emit.builder, -(-width // emit.line)
    mine = b.srem(b.sdiv(r, INDEX(MR)), INDEX(lines))
    apart = b.mul(b.sub(stop, start), INDEX((width - emit.line) // max(1, lines - 1)))
    rows = b.mul(b.add(p, INDEX(1)), b.add(of.K, INDEX(emit.head)))
    piece = b.mul(b.add(rows, b.add(start, INDEX(emit.head))), INDEX(width))
    return b.add(of.panels, b.mul(b.add(piece, b.mul(mine, apart)), INDEX(emit.weight_size)))


def tiles(rows: int, panels: int, gates: int, stored: str) -> Function:
    """Return a function that fills rows of y with equal tiles, and returns the first row left.

    At the right edge the tiles are one panel wide, since a mask costs time.
    """
    NR = VECTORS[gates] * VECTOR_BYTES * 8 // BITS[stored]  # units of a panel
    whole = micro_kernel(rows, panels, gates, stored)
    edge = micro_kernel(rows, 1, gates, stored)

    def fill(
        operands: Operands, first: int, last: int, low: int, high: int, start: int, stop: int
    ) -> int:
        end, far = last - (last - first) % rows, low
        if end > first:
            far += max(0, min(high, operands.H // NR) - low) // panels * panels
        for p in range(low, far, panels):
            for r in range(first, end, rows):
                whole(operands, r, p, None, start, stop)
        for p in range(far, high):
            for r in range(first, end, rows):
                edge(operands, r, p, operands.H - p * NR, start, stop)
        return end

    return inner(fill, f"fill_{rows}x{panels}x{gates}x{stored}")


def macro_kernel(gates: int, stored: str) -> Function:
    """Return a function that computes a `Gemm`: the loops around the micro-kernels.

    stored: the dtype of the panels.
    """
    bits = BITS[stored]
    (tall, _), *_ = used = shapes(gates, stored)
    many, some, one = (tiles(*shape, gates, stored) for shape in used)
    NR = VECTORS[gates] * VECTOR_BYTES * 8 // bits  # units of a panel
    size, element = bits // 8, {32: np.float32, 64: np.float64}[bits]
    gap = -(-LINE_BYTES // size // tall)  # keeps rows off one set
    KC = KC_BYTES // (gates * NR * np.dtype(stored).itemsize)

    def product(gemm: Gemm) -> None:
        x, x_row, x_column, P, K, base, y, H, first, last, left, right = gemm
        low, high, deep = left // NR, -(-right // NR), min(K, KC) + gap
        room = np.empty(min(MC, last - first) * deep if x_row == 1 else 0, element)
        for begin in range(first, last, MC):
            end, before = min(begin + MC, last), base
            stride = intp(0)
            whole = end - (end - begin) % tall
            for start in range(0, K, KC):
                stop = min(start + KC, K)
                direct = Operands(x, x_row, x_row, x_column, P, K, before, stride, y, H)
                if x_row == 1:
                    source, rows = x + begin * size, whole - begin
                    packed = intp(room.ctypes.data)  # here: Numba frees it after the last use
                    pack_rows(bits, tall, source, x_column, packed, deep, rows, start, stop)
                    packed -= (begin * deep + start * tall) * size  # where row 0, k = 0 would be
                    of = Operands(packed, deep, intp(1), intp(tall), P, K, before, stride, y, H)
                    many(of, begin, whole, low, high, start, stop)
                else:
                    many(direct, begin, whole, low, high, start, stop)
                r = some(direct, whole, end, low, high, start, stop)
                one(direct, r, end, low, high, start, stop)
                before, stride = y, gates * H

    return inner(product, f"product_{gates}x{stored}")


@intrinsic
def call(typing: object, function: Type, operands: Any) -> Lowering:
    """Call a product by its address."""

    def generate(
        context: Any, builder: ir.IRBuilder, signature: Any, args: list[ir.Value]
    ) -> ir.Value:
        kind = ir.FunctionType(ir.VoidType(), [INDEX] * len(operands))
        given = cgutils.unpack_tuple(builder, args[1])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), given)
        return context.get_dummy_value()

    return types.void(types.intp, operands), generate


@inner
def gemm(
    function: int,
    gates: int,
    x: HostArray,
    column: int,
    P: HostArray,
    base: HostArray,
    y: HostArray,
    first: int,
    last: int,
    left: int,
    right: int,
) -> None:
    """Fill y = base + x[:, column : column + K] M in some rows and units; P: M (K, .) packed."""
    start, x_row = x.ctypes.data + column * y.itemsize, x.shape[1]
    K = P.shape[1] - (SCALE_ROWS if P.itemsize == 1 else 0)
    panels, before, out, H = P.ctypes.data, base.ctypes.data, y.ctypes.data, y.shape[1] // gates
    call(function, Gemm(start, x_row, 1, panels, K, before, out, H, first, last, left, right))


# packing -----------------------------------------------------------------------------------------


@intrinsic
def copy_vector(
    typing: object, bits: Type, count: Type, source: Type, i: Type, target: Type, j: Type
) -> Lowering | None:
    """Copy so many elements from one address and offset to another."""
    if not (isinstance(bits, types.IntegerLiteral) and isinstance(count, types.IntegerLiteral)):
        return None

    def generate(
        context: Any, builder: ir.IRBuilder, signature: Any, args: list[ir.Value]
    ) -> ir.Value:
        emit = Emitter(builder, bits.literal_value)
        _, _, source, i, target, j = args
        kind = ir.VectorType(emit.element, count.literal_value)
        elements = builder.load(emit.address(source, i, kind), align=emit.size)
        builder.store(elements, emit.address(target, j, kind), align=emit.size)
        return context.get_dummy_value()

    return types.void(bits, count, source, i, target, j), generate


@inner
def pack_rows(
    bits: int,
    tall: int,
    x: int,
    x_column: int,
    room: int,
    deep: int,
    rows: int,
    start: int,
    stop: int,
) -> None:
    """Pack x, stored by columns, `tall` rows at a time, in the order in which tiles read it."""
    for k in range(start, stop):
        for i in range(0, rows, tall):
            copy_vector(bits, tall, x, i + k * x_column, room, i * deep + (k - start) * tall)


@intrinsic
def transpose_square(
    typing: object, bits: Type, source: Type, apart: Type, target: Type, width: Type
) -> Lowering | None:
    """Transpose a square of as many rows and columns as a vector has lanes.

    Its rows are `apart` elements apart at the source, and `width` at the target.
    """
    if not isinstance(bits, types.IntegerLiteral):
        return None

    def generate(
        context: Any, builder: ir.IRBuilder, signature: Any, args: list[ir.Value]
    ) -> ir.Value:
        emit = Emitter(builder, bits.literal_value)
        _, source, apart, target, width = args
        n, lanes = emit.lanes, range(emit.lanes)
        rows = [emit.load(source, builder.mul(apart, INDEX(i))) for i in lanes]
        for step in (s for s in (1, 2, 4, 8) if s < n):  # swap the squares beside the diagonal
            low = [i if not i & step else n + i - step for i in lanes]
            high = [i + step if not i & step else n + i for i in lanes]
            for i in (i for i in lanes if not i & step):
                pair = rows[i], rows[i + step]
                rows[i], rows[i + step] = (
                    builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(ir.IntType(32), n), m))
                    for m in (low, high)
                )
        for i, row in enumerate(rows):
            emit.store(row, target, builder.mul(width, INDEX(i)))
        return context.get_dummy_value()

    return types.void(bits, source, apart, target, width), generate


@inner
def pack(bits: int, of: Pack) -> None:
    """Pack M^T into panels low to high, all but the padding of the last."""
    M, down, across, P, K, width, gates, H, low, high = of
    units, square, size = width // gates, VECTOR_BYTES * 8 // bits, bits // 8
    for p in range(low, high):
        count = min(units, H - p * units)
        for g in range(gates):
            first, start, done = g * H + p * units, p * K * width + g * units, 0
            if count == units and across == 1:
                done = K - K % square
                for i in range(0, units, square):
                    for k in range(0, done, square):
                        a, b = (first + i) * down + k, start + k * width + i
                        transpose_square(bits, M + a * size, down, P + b * size, width)
            elif count == units and down == 1:
                done = K
                for k in range(K):
                    for i in range(0, units, MR):
                        copy_vector(bits, MR, M, first + i + k * across, P, start + k * width + i)
            for k in range(done, K):
                for i in range(count):
                    a = (first + i) * down + k * across
                    copy_vector(bits, 1, M, a, P, start + k * width + i)


@inner
def pack_units(
    function: int, M: HostArray, P: HostArray, gates: int, left: int, right: int
) -> None:
    """Pack M^T into the panels of the units from left to right; function: the address of `pack`."""
    (_, K, width), H, size = P.shape, len(M) // gates, M.itemsize
    units, down, across = width // gates, M.strides[0] // size, M.strides[1] // size
    low, high = left // units, -(-right // units)
    given = Pack(M.ctypes.data, down, across, P.ctypes.data, K, width, gates, H, low, high)
    call(function, given)
