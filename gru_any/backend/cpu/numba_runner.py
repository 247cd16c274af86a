"""How Numba runs a block of steps: the traced equations, as one compiled scan over all steps.

Rows of a batch are independent, so they are split over threads, which never wait for one another.
Where there are few rows and many units, the units are split, and the threads meet at a barrier
before each product. All products are our own: BLAS keeps its threads spinning after each.
"""

from collections.abc import Callable
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from ...codegen.numba_source import NumbaSource
from ...codegen.schedule import HOST, Kinds, Schedule, backward_schedule, forward_schedule
from ...codegen.trace import Product
from ...typing import DType, HostArray, Step
from ..contract import Extra, OneBlock, OneStep
from ..reference import as_step
from . import tuning, unpacked
from .buffers import Scratch, empty, result
from .jit_cache import compiled
from .numpy_runner import NumPy
from .packed import PackedMatrix, ascarray, ascarrays, gemm, kernel_addresses
from .small import SmallMatrix
from .threads import Hands, count, parallel_for, run_team

NONE_ENDED = np.zeros((0, 0), bool)


class Numba(NumPy):
    """Runs blocks of steps with compiled loops, in float32 and float64."""

    def pack_weights(self, W: Any, U: Any, rows: int) -> tuple[Any, Any]:
        if isinstance(U, PackedMatrix):  # of a frozen model
            panels = isinstance(U, SmallMatrix) or tuning.frozen_packed(rows, W.size + U.size)
            return (W, U) if panels else (W.matrix, U.matrix)
        if tuning.packed(rows):
            return PackedMatrix(W), PackedMatrix(U)
        return W, U

    def affine(self, x: Any, W: Any, b: Any) -> Any:
        """Return an `Input`: the scan computes the product."""
        return Input(x, W, b)

    def multiply(self, left: Any, right: Any, out: Any) -> None:
        """Fill out with left @ right, by our own products; right may be packed."""
        packed, (R, K), N = isinstance(right, PackedMatrix), left.shape, right.shape[1]
        if N < 4 or (not packed and tuning.in_place(R, K, N)):
            unpacked.gemm(left, right.matrix if packed else right, out)
        else:
            P = (right if packed else PackedMatrix(right)).panels(slice(0, K), False, 1)
            gemm(left, P, None, out)

    def prepare_step(self, step: Any, W: Any, b: Any, recurrent: Any) -> Any:
        U, *vectors = recurrent
        if not isinstance(U, PackedMatrix):  # of no frozen model
            W, U = PackedMatrix(W), PackedMatrix(U)
        scan, elements = forward_scan(step, len(vectors), False, U.dtype), W.size + U.size
        packed = cache(lambda: as_step(scan.packed_block(W, b, U, vectors, False)))
        if isinstance(U, SmallMatrix):
            return packed()
        stored = cache(lambda: scan.stored_step(W.matrix, b, U.matrix, vectors))

        def one(x: Any, h: Any) -> Any:
            panels = tuning.frozen_packed(len(x), elements, not has_512_bits())
            return (packed if panels else stored)()(x, h)

        return one

    def prepare_block(self, step: Any, W: Any, b: Any, recurrent: Any, reverse: bool) -> Any:
        U, *vectors = recurrent
        if not isinstance(U, PackedMatrix):  # Numba has failed to pack it
            return super().prepare_block(step, W, b, recurrent, reverse)
        scan = forward_scan(step, len(vectors), False, U.dtype)
        packed = scan.packed_block(W, b, U, vectors, reverse)
        if isinstance(U, SmallMatrix):
            return packed
        stored = scan.stored_block(W.matrix, b, U.matrix, vectors, reverse)
        elements = W.size + U.size

        def block(x: Any, h: Any) -> tuple[Any, Any]:
            K, B, _ = x.shape
            panels = tuning.frozen_packed(K * B, elements, K == 1 and not has_512_bits())
            return (packed if panels else stored)(x, h)

        return block

    def frozen_weights(
        self, step: Any, W: Any, b: Any, recurrent: Any, small: str
    ) -> tuple[Any, Any, Any]:
        (U, *vectors), H = recurrent, len(W) // 3
        products = forward_scan(step, len(vectors), False, U.dtype).products(H)
        parts = [(rows, len(op.outputs)) for rows, op in products]
        return _frozen(W, small, [(slice(0, 3 * H), 3)]), b, (_frozen(U, small, parts), *vectors)

    def frozen_matrix(self, W: Any, small: str) -> Any:
        return _frozen(W, small, [(slice(0, len(W)), 1)])

    def frozen_affine(self, x: Any, W: Any, b: Any) -> Any:
        if not isinstance(W, PackedMatrix):
            return super().frozen_affine(x, W, b)
        y = np.empty((len(x), len(W)), x.dtype)
        gemm(x, W.panels(slice(0, len(W)), True, 1), b, y)
        return y

    def forward(
        self,
        step: Any,
        a: Any,
        h: Any,
        recurrent: Any,
        alive: Any,
        reverse: bool,
        keep: bool,
        extra: Extra | None = None,
    ) -> tuple[Any, Any]:
        U, *vectors = recurrent
        kinds, further = ((), ()) if extra is None else extra
        scan, H = forward_scan(step, len(vectors), keep, h.dtype, kinds), len(U) // 3
        stored = not isinstance(U, PackedMatrix)
        if isinstance(a, Input):
            (x, W, b), (K, B, _) = a, a.x.shape
            a = empty((K if stored or tuning.inputs_at_once(B) else 1, B, 3 * H), h.dtype)
        else:
            x, W, b, (K, B, _) = a[..., :0], U, None, a.shape
        b = np.zeros(3 * H, h.dtype) if b is None else b
        steps, ended = _forwards(K, reverse), NONE_ENDED if alive is None else _ended(alive)
        others = [a, *vectors, *further]
        path = empty((K + 1, B, H), h.dtype)
        path[K if reverse else 0] = h
        saved = list(empty((len(scan.widths), K, B, H), h.dtype))
        if stored:
            given = [*ascarrays((U, *others, x, W, b)), path, *saved]
            scan.stored(tuning.team_in_place(K, B, H, W.size + U.size, count), steps, ended, given)
            return path, saved
        W = W if isinstance(W, PackedMatrix) else PackedMatrix(W)
        arrays = [path, *others, *saved, x, b]
        scan(steps, ended, ascarrays(arrays), U, W)
        return path, saved

    def backward(
        self,
        step: Any,
        dy: Any,
        dh: Any,
        previous: Any,
        saved: Any,
        U: Any,
        alive: Any,
        reverse: bool,
        taps: bool,
        extra: Extra | None = None,
    ) -> tuple[Any, Any, Any]:
        K, B, H = previous.shape
        kinds, further = ((), ()) if extra is None else extra
        scan = backward_scan(step, len(saved), dy is not None, taps, dh.dtype, kinds)
        steps, ended = _backwards(K, reverse), NONE_ENDED if alive is None else _ended(alive)
        given = [*([] if dy is None else [dy]), previous, *saved, *further]
        parts = [empty((K, B, n * H), dh.dtype) for n in scan.widths]
        pair = np.empty((2, B, H), dh.dtype)
        pair[0] = dh
        if isinstance(U, PackedMatrix):
            scan(steps, ended, ascarrays([pair, *given, *parts]), U)
        else:
            arrays = ascarrays([U, *given, pair, *parts])
            scan.stored(tuning.team_in_place(K, B, H, U.size, count), steps, ended, arrays)
        g = parts.pop() if taps else None
        return tuple(parts), pair[K % 2], g


@cache
def has_512_bits() -> bool:
    """Return whether vectors have 512 bits."""
    from .gemm import AVX512  # which needs Numba

    return AVX512


def _frozen(M: Any, small: str, parts: Any) -> PackedMatrix:
    """Return a matrix packed for good; small and parts: as of `SmallMatrix`."""
    if small:
        return SmallMatrix(M, small, parts)
    packed = PackedMatrix(M)
    for rows, gates in parts:
        packed.panels(rows, True, gates)
    return packed


class Input(NamedTuple):
    """The operands of x W^T + b, not computed yet: x (K, B, I), W (3H, I), b (3H,) or None."""

    x: Any
    W: Any
    b: Any


@lru_cache(maxsize=64)
def _forwards(K: int, reverse: bool) -> tuple[Any, Any, Any]:
    """Return each step of a forward scan, and the indices of the states before and after it."""
    t = np.arange(K)[::-1].copy() if reverse else np.arange(K)
    return t, t + reverse, t + (not reverse)


@lru_cache(maxsize=64)
def _backwards(K: int, reverse: bool) -> tuple[Any, Any, Any]:
    """Return each step of a backward scan, and which of the pair is dh before and after it."""
    t, turn = np.arange(K) if reverse else np.arange(K)[::-1].copy(), np.arange(K) % 2
    return t, turn, 1 - turn


# the scans ---------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def forward_scan(step: Step, vectors: int, keep: bool, dtype: DType, extra: Kinds = ()) -> "Scan":
    """Return the compiled forward scan of a step."""
    return Scan(forward_schedule(step, vectors, keep, HOST, extra), dtype.name)


@lru_cache(maxsize=64)
def backward_scan(
    step: Step, saved: int, given: bool, taps: bool, dtype: DType, extra: Kinds = ()
) -> "Scan":
    """Return the compiled backward scan of a step."""
    return Scan(backward_schedule(step, saved, given, taps, HOST, extra), dtype.name)


class Scan:
    """A scan in compiled code; widths: columns of each residual, or of each gradient."""

    def __init__(self, schedule: Schedule, dtype: str) -> None:
        self.schedule, self.source = schedule, NumbaSource(schedule, dtype)
        self.widths = [array.columns for array in schedule.extras]
        self.gates = frozenset(gemm.out.columns for gemm in schedule.gemms)  # of each product

    @cached_property
    def scan(self) -> Callable[..., tuple[int, int]]:
        """The compiled scan with packed matrices, for one or several threads."""
        function: Callable[..., tuple[int, int]] = compiled(self.source.scan()).shared
        return function

    @cached_property
    def _stored(self) -> Any:
        return compiled(self.source.stored())

    @cached_property
    def few(self) -> Callable[..., None]:
        """The compiled scan with matrices as they are stored, for few rows; on one thread."""
        function: Callable[..., None] = self._stored.few
        return function

    @cached_property
    def functions(self) -> HostArray:
        """The addresses of products by matrices as they are stored; see `stored.multiply`."""
        used = {gemm.product.transposed for gemm in self.schedule.gemms}
        used |= {True} if self.schedule.forward else set()  # of x W^T
        return unpacked.addresses(np.dtype(self.source.dtype), frozenset(used))

    @cached_property
    def step(self) -> Callable[..., None]:
        """The compiled single step of few rows; see `NumbaSource.step`."""
        function: Callable[..., None] = compiled(self.source.step()).step
        return function

    @cached_property
    def step_of_panels(self) -> Callable[..., None]:
        """The compiled single step with packed matrices; see `NumbaSource.packed_step`."""
        function: Callable[..., None] = compiled(self.source.packed_step()).step
        return function

    def products(self, H: int) -> list[tuple[slice, Product]]:
        """Return each product, with the rows of U in it."""
        found = [gemm.product for gemm in self.schedule.gemms]
        return [(slice(op.rows.start * H, op.rows.stop * H), op) for op in found]

    def read(self, U: HostArray) -> list[HostArray]:
        """Return the right operand of each product."""
        pairs = self.products(U.shape[1])
        return [U[rows].T if op.transposed else U[rows] for rows, op in pairs]

    def packed_block(
        self,
        W: PackedMatrix,
        b: HostArray | None,
        U: PackedMatrix,
        vectors: list[HostArray],
        reverse: bool,
    ) -> OneBlock:
        """Return a function that runs blocks with the panels of frozen weights; see `OneBlock`.

        W: (3H, I); U: (3H, H); b: (3H,) or None.
        """
        H, dtype, parts, panels = U.shape[1], U.dtype, self._parts(U, W), self._panels(U, W)
        sources = [M.source(rows, transposed) for M, rows, transposed, _ in parts]
        zeros, stored = np.zeros(3 * H, dtype), panels[0].dtype
        bias, vectors = ascarray(zeros if b is None else b), [ascarray(v) for v in vectors]
        widths, given = [v.columns * H for v in self.schedule.buffers], [*panels, bias, *vectors]
        size = sum((rows.stop - rows.start) * M.shape[1] for M, rows, *_ in parts)

        def made(K: int, B: int) -> list[HostArray]:
            buffers = [empty((B, width), dtype) for width in widths]
            return [empty((K, B, 3 * H), dtype), *buffers]

        scratch = Scratch(made)

        def block(x: HostArray, h: HostArray) -> tuple[HostArray, HostArray]:
            K, B, _ = x.shape
            functions = self._kernels(stored, K, B, size)
            if K == 1 and not tuning.step_shared(B * size, has_512_bits(), count):
                y, new = np.empty((B, H), dtype), np.empty((B, H), dtype)
                self.step_of_panels(functions, ascarray(x[0]), ascarray(h), y, new, *given)
                return y[None], new
            scan, path = self.scan, result((K + 1, B, H), dtype)
            path[K if reverse else 0] = h
            a, *buffers = scratch.arrays(K if tuning.inputs_at_once(B) else 1, B)
            steps = _forwards(K, reverse)
            arrays = [*panels, path, a, *vectors, ascarray(x), bias, *buffers, *sources]

            def call(hands: Hands) -> tuple[int, int]:
                return scan(*hands, *steps, NONE_ENDED, zeros, False, functions, *arrays)

            members = tuning.team(K, B, H, size, False, count())
            if members > 1:
                run_team(call, B, members)
            else:
                parallel_for(call, B, K * B * size)
            return _after(path, reverse)

        return block

    def stored_block(
        self,
        W: HostArray,
        b: HostArray | None,
        U: HostArray,
        vectors: list[HostArray],
        reverse: bool,
    ) -> OneBlock:
        """Return such a function for few rows, which reads the matrices as they are stored."""
        H, dtype, size = U.shape[1], U.dtype, W.size + U.size
        b = np.zeros(3 * H, dtype) if b is None else b
        W, U, b, *vectors = map(ascarray, (W, U, b, *vectors))

        def block(x: HostArray, h: HostArray) -> tuple[HostArray, HostArray]:
            K, B, _ = x.shape
            a = empty((K, B, 3 * H), dtype)
            path = result((K + 1, B, H), dtype)
            path[K if reverse else 0] = h
            arrays = [U, a, *vectors, ascarray(x), W, b, path]
            members = tuning.team_in_place(K, B, H, size, count)
            self.stored(members, _forwards(K, reverse), NONE_ENDED, arrays)
            return _after(path, reverse)

        return block

    def stored_step(
        self, W: HostArray, b: HostArray | None, U: HostArray, vectors: list[HostArray]
    ) -> OneStep:
        """Return a function that runs one step of few rows, with copies of the products' operands.

        A call with small sizes costs less than one of `stored_block`.
        """
        few, functions = self.step, unpacked.addresses(W.dtype, frozenset((False,)))
        b = np.zeros(len(W), W.dtype) if b is None else b
        weights = np.concat([v.ravel() for v in (W.T, *self.read(U), b, *vectors)])

        def one(x: HostArray, h: HostArray) -> tuple[HostArray, HostArray]:
            y, new = np.empty(h.shape, h.dtype), np.empty(h.shape, h.dtype)
            few(functions, ascarray(x), ascarray(h), y, new, weights)
            return y, new

        return one

    def stored(
        self,
        members: int,
        steps: tuple[HostArray, HostArray, HostArray],
        ended: HostArray,
        arrays: list[HostArray],
    ) -> None:
        """Fill the results, with matrices as they are stored; members: threads of the team.

        arrays: U, then the further arguments of `few`, the results at the end.
        """
        if members < 2:
            self.few(self.functions, *steps, ended, *arrays)
            return
        B, H = arrays[-1].shape[1], arrays[0].shape[1]
        buffers = [np.empty((B, v.columns * H), arrays[0].dtype) for v in self.schedule.buffers]
        shared, given = self._stored.shared, (*steps, ended, *arrays, *buffers)
        run_team(lambda hands: shared(*hands, self.functions, *given), B, members)

    def _kernels(self, stored: DType, K: int, B: int, size: int) -> HostArray:
        """Return the macro-kernels for K steps of B rows; size: elements of the weights."""
        single, single_input = (tuning.integers(rows, size) for rows in (B, K * B))
        return kernel_addresses(stored, self.gates, single, single_input)

    def _parts(
        self, U: PackedMatrix, W: PackedMatrix | None
    ) -> list[tuple[PackedMatrix, slice, bool, int]]:
        """Return the matrix of each product, its rows, whether it is transposed, and its gates."""
        H = U.shape[1]
        parts = [(U, rows, op.transposed, len(op.outputs)) for rows, op in self.products(H)]
        return parts if W is None else [*parts, (W, slice(0, 3 * H), True, 3)]

    def _panels(self, U: PackedMatrix, W: PackedMatrix) -> list[HostArray]:
        """Return the panels of each product, then those of W."""
        parts = self._parts(U, W)
        return [M.panels(rows, transposed, gates) for M, rows, transposed, gates in parts]

    def __call__(
        self,
        steps: tuple[HostArray, HostArray, HostArray],
        ended: HostArray,
        arrays: list[HostArray],
        U: PackedMatrix,
        W: PackedMatrix | None = None,
    ) -> None:
        """Run the scan, which fills the arrays of results.

        arrays: the state (., B, H), the others in the order of `NumbaSource.arrays`, and for a
        forward scan x and the bias. U: (3H, H). W: (3H, I), for a forward scan.
        """
        (B, H), K, dtype = arrays[0].shape[1:], len(steps[0]), arrays[0].dtype
        wanted = self._parts(U, W)
        size = sum((rows.stop - rows.start) * M.shape[1] for M, rows, *_ in wanted)
        fresh = not any(M.packed for M, *_ in wanted)
        members = tuning.team(K, B, H, size, fresh, count())
        panels = [
            (M.empty_panels if fresh else M.panels)(part, transposed, gates)
            for M, part, transposed, gates in wanted
        ]
        sources = [M.source(part, transposed) for M, part, transposed, _ in wanted]
        buffers = [np.empty((B, v.columns * H), dtype) for v in self.schedule.buffers]
        arrays = [*panels, *arrays, *buffers, *sources]
        zeros, scan = np.zeros(3 * H, dtype), self.scan
        functions = self._kernels(panels[0].dtype, K, B, size)

        def call(hands: Hands) -> tuple[int, int]:
            return scan(*hands, *steps, ended, zeros, fresh, functions, *arrays)

        if members > 1:
            run_team(call, B, members)
        else:
            packing = tuning.current.copy_work * size * fresh
            parallel_for(call, B, K * B * size + packing)
        for (M, part, transposed, gates), P in zip(wanted, panels, strict=True):
            M.packed[part.start, part.stop, transposed, gates] = P  # now that it is filled


def _after(path: HostArray, reverse: bool) -> tuple[HostArray, HostArray]:
    """Return the state after each step, and a copy of that after the last step run."""
    return (path[:-1], path[0].copy()) if reverse else (path[1:], path[-1].copy())


def _ended(alive: Any) -> Any:
    """Return which rows are skipped at which step, (K, B)."""
    return ~alive.block[:, :, 0]
