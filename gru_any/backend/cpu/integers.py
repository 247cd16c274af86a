"""Products of a single row with packed weights of int8, in integers.

    y = base + x M,    x is about s q, q of 16 bits;    a column of M is c w, w of 8 bits

A single row reads each weight once, so widening the weights takes as long as multiplying them. To
widen them to float32 takes two instructions for each vector of float32; to 16 bits, one for twice
as many, and one more multiplies these and adds the products of two rows, which stand side by side.

The entries of x are rounded to LEVELS on either side of zero, so that each is off by 1 / 65534 of
the largest at most, where a weight may be off by 1 / 254 of the largest in its column. The sums of
DEPTH products are exact: the bits depend on the row and the matrix alone.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import llvmlite.binding
import numba as untyped_numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped_cgutils

from ...typing import HostArray
from .barrier import Lowering, inner, intrinsic
from .gemm import (
    AHEAD_BYTES,
    AVX512,
    INDEX,
    INDEX32,
    LINE_BYTES,
    VECTOR_BYTES,
    VECTORS,
    Emitter,
    Gemm,
    Operands,
    Type,
    columns_of,
    intp,
)

cgutils: Any = untyped_cgutils
numba: Any = untyped_numba
Function: TypeAlias = Callable[..., Any]  # compiled
MULTIPLY = "llvm.x86.avx512.pmaddw.d.512" if AVX512 else "llvm.x86.avx2.pmadd.wd"
NEEDED = "avx512bw" if AVX512 else "avx2"
SUPPORTED = bool(llvmlite.binding.get_host_cpu_features().get(NEEDED))  # whether there is MULTIPLY
LEVELS = 32767
DEPTH = 512  # of the products of q and w: their sums are below 2^31
PANELS = 2  # of a tile
# bits of the bounds of the largest |x|, outside of which s or s c would over- or underflow
SMALLEST, LARGEST = (int(np.float32(v).view(np.int32)) for v in (1e-30, 1e6))


def tile(panels: int, gates: int) -> Function:
    """Return an intrinsic that fills a tile of y: its only row, some panels from p on.

    It adds s q[start : stop] @ M[start : stop] to what was there before. of.x: the address of q,
    after whose K elements there is a zero. units: how many are left from panel p on, or None where
    the tile needs no mask.
    """

    @intrinsic
    def kernel(
        typing: object, of: Type, s: Type, p: Type, units: Type, start: Type, stop: Type
    ) -> Lowering:
        def generate(
            context: Any, b: ir.IRBuilder, signature: Any, args: list[ir.Value]
        ) -> ir.Value:
            emit, of = Emitter(b, 32, "int8"), Operands(*cgutils.unpack_tuple(b, args[0]))
            s, p, units, start, stop = args[1:]
            whole = isinstance(signature.args[3], types.NoneType)
            columns = columns_of(emit, of, p, panels, gates, None if whole else units)
            add, mul, row = b.add, b.mul, INDEX(gates * VECTORS[gates] * emit.lanes)
            sums = ir.VectorType(INDEX32, emit.lanes)
            sixteens = ir.VectorType(ir.IntType(16), 2 * emit.lanes)
            kind = ir.FunctionType(sums, [sixteens, sixteens])
            multiply = cgutils.get_or_insert_function(b.module, kind, MULTIPLY)
            zeros = ir.Constant(sums, None)
            totals = [cgutils.alloca_once_value(b, zeros) for _ in columns.of_y]

            def weights(first: ir.Value, k: ir.Value, c: ir.Constant, rows: int) -> ir.Value:
                """Widen the weights of two rows, or of one, whose partner is multiplied by 0."""
                place = add(mul(add(first, k), row), mul(c, INDEX(rows)))
                if rows * c.constant % LINE_BYTES == 0:
                    emit.prefetch(of.panels, add(place, INDEX(AHEAD_BYTES)))
                narrow = ir.VectorType(ir.IntType(8), rows * emit.lanes)
                pointer = b.inttoptr(add(of.panels, place), narrow.as_pointer())
                wide = b.sext(b.load(pointer, align=1), sixteens if rows == 2 else sums)
                return b.bitcast(wide, sixteens)

            def add_products(k: ir.Value, rows: int) -> None:
                pair = b.inttoptr(add(of.x, mul(k, INDEX(2))), INDEX32.as_pointer())
                q = b.bitcast(emit.spread(b.load(pair, align=2), sums), sixteens)
                for total, (first, c) in zip(totals, columns.of_panels, strict=True):
                    found = b.call(multiply, [weights(first, k, c, rows), q])
                    b.store(add(b.load(total), found), total)

            pairs = b.sdiv(b.sub(stop, start), INDEX(2))
            with cgutils.for_range(b, pairs, INDEX(0), INDEX) as loop:
                add_products(add(start, mul(loop.index, INDEX(2))), 2)
            with cgutils.for_range(b, stop, add(start, mul(pairs, INDEX(2))), INDEX) as loop:
                add_products(loop.index, 1)
            s = emit.spread(s, emit.vector)
            for total, (c, mask), place in zip(
                totals, columns.of_y, columns.of_scales, strict=True
            ):
                scale = b.fmul(s, emit.load(*place))
                found = b.fmul(b.sitofp(b.load(total), emit.vector), scale)
                emit.store(b.fadd(emit.load(of.before, c, mask), found), of.y, c, mask)
            return context.get_dummy_value()

        return types.void(of, s, p, units, start, stop), generate

    return kernel


@intrinsic
def pointer_to(typing: object, address: Type) -> Lowering:
    """Return an address of float32 as a pointer."""

    def generate(context: Any, b: ir.IRBuilder, _: object, args: list[ir.Value]) -> ir.Value:
        return b.inttoptr(args[0], ir.FloatType().as_pointer())

    return numba.types.CPointer(types.float32)(address), generate


@inner
def fill_rounded(x: HostArray, q: HostArray) -> np.float32:
    """Fill q with x / s rounded to integers, and zeros after these; return s.

    Returns 0 where x holds NaN, infinity or huge numbers, or nothing but tiny ones.
    """
    bits, largest = x.view(np.int32), np.zeros(1, np.int32)
    for k in range(len(x)):  # of integers LLVM vectorises this loop
        largest[0] = max(largest[0], bits[k] & np.int32(0x7FFFFFFF))
    if largest[0] < SMALLEST or largest[0] > LARGEST:
        return np.float32(0)
    s: np.float32 = largest.view(np.float32)[0] / np.float32(LEVELS)
    inverse = np.float32(1) / s
    for k in range(len(x)):
        q[k] = np.int16(np.int32(np.floor(x[k] * inverse + np.float32(0.5))))
    q[len(x) :] = 0
    return s


def single_row(gates: int, usual: Function) -> Function:
    """Return a function that computes a `Gemm` of one row; usual: as of `gemm.macro_kernel`."""
    NR = VECTORS[gates] * VECTOR_BYTES // 4  # units of a panel
    whole, edge = tile(PANELS, gates), tile(1, gates)

    def product(gemm: Gemm) -> None:
        x, _, _, P, K, base, y, H, _, _, left, right = gemm
        room = np.empty(K + 1, np.int16)
        s = fill_rounded(numba.carray(pointer_to(x), (K,)), room)
        if s == 0:
            usual(gemm)
            return
        low, high, before = left // NR, -(-right // NR), base
        far = low + max(0, min(high, H // NR) - low) // PANELS * PANELS
        unused = intp(0)
        for start in range(0, K, DEPTH):
            stop = min(start + DEPTH, K)
            q = intp(room.ctypes.data)  # here: Numba frees it after the last use
            of = Operands(q, unused, unused, unused, P, K, before, unused, y, H)
            for p in range(low, far, PANELS):
                whole(of, s, p, None, start, stop)
            for p in range(far, high):
                edge(of, s, p, H - p * NR, start, stop)
            before = y

    return inner(product, f"single_row_{gates}")
