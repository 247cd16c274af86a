"""Time: one layer in one direction over a whole sequence, forward and backward.

The sequence is cut into blocks of K steps. The input products and the gradients of the weights are
one product a block, summed in the order of the blocks. So the memory in use at once does not grow
with T, and recomputing a block gives the same bits.

A sequence that has finished keeps its state and gives the output 0, and so does one whose step is
skipped. So the last state is each row's own last state, and a sweep from the other end starts at
each row's own end. Where the state is cut after a step, the row's next step starts anew.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from ..backend.contract import Extra, Output, Recurrent, Runner, kinds_of
from ..backend.reductions import outer, reduced_by_row
from ..codegen.schedule import Kind
from ..equations import Variant
from ..typing import Array, DType, Shape

STEPS = 64  # least number of steps in a block
ROWS = 256  # least number of rows in a block, over all its steps: enough for efficient products


class Weights(NamedTuple):
    """The weights of one layer in one direction, in the dtype of the arithmetic."""

    W: Array  # (3H, I), or packed
    b: Array | None  # (3H,)
    recurrent: Recurrent  # U (3H, H), or packed, and with reset_after c (H,)


class StepMask:
    """The masks of a block by step: (B, 1) of bool, or None where all sequences run."""

    def __init__(self, block: Array, unmasked: int = 0) -> None:
        self.block = block  # (K, B, 1): all masks
        self.unmasked = unmasked  # how many of the leading steps have None

    def __len__(self) -> int:
        return int(self.block.shape[0])

    def __getitem__(self, t: int) -> Array | None:
        return None if t < self.unmasked else self.block[t, :, :]

    def __iter__(self) -> Iterator[Array | None]:
        return (self[t] for t in range(len(self)))


class SequenceMask(NamedTuple):
    """Which steps of a batch its sequences run."""

    alive: Array  # (T, B, 1) of bool: False where a step is skipped, as from a sequence's end on
    unmasked: int  # how many leading steps all sequences run

    def steps(self, block: slice) -> StepMask | None:
        """Return the masks of a block; None where all sequences run all of it."""
        if block.stop <= self.unmasked:
            return None
        return StepMask(self.alive[block, :, :], self.unmasked - block.start)


class StepMasks(NamedTuple):
    """The further arguments of the steps of a sweep, each an array or None."""

    dropout: Array | None  # (B, H), multiplies the operands of the products with U
    zoneout: Array | None  # (T, B, H), 1 where a unit keeps its state, else 0
    cut: Array | None  # (T, B, 1) of bool: the steps after which a state starts anew
    start: Array | None = None  # (B, H), the state after a cut; None: 0

    def steps(self, block: slice) -> Extra:
        """Return the further arguments of a block's steps."""
        d, k, cut, start = self
        given = [(Kind.BATCH, d)] if d is not None else []
        given += [(Kind.STEPS, k[block, :, :])] if k is not None else []
        given += [(Kind.START, start)] if start is not None else []
        given += [(Kind.ROWS, cut[block, :, :])] if cut is not None else []
        kinds, arrays = zip(*given, strict=True)
        return Extra(kinds, arrays)


class Residuals(NamedTuple):
    """The arrays of a block that its backward pass needs."""

    states: Array  # (K + 1, B, H), in the order of time
    saved: Sequence[Array]  # the residuals of the steps, each (K, B, H)
    outputs: Array  # (K, B, H), the h' of each step, before a cut resets it


class Segment(NamedTuple):
    """Consecutive blocks, whose residuals are all kept or all recomputed by the backward pass."""

    blocks: Sequence[slice]  # in the order in which the sweep reads them
    h: Array  # (B, H), the state before the first
    residuals: list[Residuals] | None  # of each block; None: they are recomputed


class Sweep(NamedTuple):
    """One layer in one direction."""

    run: Runner  # how a block of steps runs
    variant: Variant  # the equations
    weights: Weights
    mask: SequenceMask | None  # None: no step is skipped
    reverse: bool  # from the last step to the first
    dtype: DType  # of the arithmetic
    masks: StepMasks | None = None

    def on(self, run: Runner) -> "Sweep":
        """Return the sweep on another runner."""
        return self if run is self.run else self._replace(run=run)

    def forward(
        self,
        x: Array,
        h: Array,
        keep: bool = False,
        segment: int | None = None,
        outputs: bool = True,
    ) -> tuple[Array | None, Array, list[Segment]]:
        """Run x (T, B, I) from h (B, H); return y (T, B, H), the last state (B, H), the segments.

        keep: whether a backward pass will follow; the segments are for it. segment: the number of
        steps that it recomputes together; None keeps all residuals. y is None without `outputs`.
        """
        (T, B, _), run, mask = x.shape, self.run, None
        y = run.output((T, B, h.shape[-1]), x.dtype) if outputs else None
        weights = self._packed(x)
        segments: list[Segment] = []
        K = max(T, 1) if run.whole else steps_of_block(B)
        for blocks in _segments(T, K, segment, self.reverse):
            residuals: list[Residuals] | None = [] if keep and segment is None else None
            if keep:
                segments.append(Segment(blocks, h, residuals))
            for block in blocks:
                if self.mask is not None:
                    mask = self.mask.steps(block)
                found, h = self._block(weights, x, h, block, mask, residuals is not None)
                if residuals is not None:
                    residuals.append(found)
                if y is not None:
                    v = found.outputs
                    y.put(block, v if v.dtype == x.dtype else run.xp.astype(v, x.dtype), mask)
        return (None if y is None else y.array()), h, segments

    def backward(
        self,
        x: Array,
        segments: list[Segment],
        dy: Array | None,
        dh: Array,
        taps: Output | None = None,
        by_row: bool = False,
    ) -> tuple[Array, Array, list[Array]]:
        """Return dx (T, B, I), dh0 (B, H) and [dW, dU, db, ...] of dy (T, B, H) and dh (B, H).

        With a start, the last of the list is its gradient (B, H). taps: an output to be filled with
        dL/dh' (T, B, H) of every step. by_row: [dW, ...] of each row of the batch, (B, ...).
        """
        run, weights = self.run, self._packed(x)
        output = run.output(x.shape, x.dtype)
        total: list[Array] = []
        for segment in reversed(segments):
            residuals = segment.residuals or self._recompute(weights, x, segment)
            for block, kept in zip(reversed(segment.blocks), reversed(residuals), strict=True):
                found = self._block_back(weights, x, block, kept, dy, dh, taps is not None, by_row)
                dx, dh, g, grads = found
                if total and by_row:  # in place, where arrays can: they are large
                    for n, d in enumerate(grads):
                        total[n] += d
                else:
                    total = [s + d for s, d in zip(total, grads, strict=True)] if total else grads
                output.put(block, dx if dx.dtype == x.dtype else run.xp.astype(dx, x.dtype))
                if taps is not None:
                    taps.put(block, g)
        return output.array(), dh, total or self._zeros((x.shape[1],) if by_row else ())

    def _zeros(self, rows: Shape) -> list[Array]:
        """Return the zero gradients of an empty sequence; rows: their leading axes."""
        (W, _, (U, *c)), run = self.weights, self.run
        vectors = 4 if self.variant.gains else 1 + len(c)  # gains and biases, each (3H,)
        like = [W, U, *[W[:, 0]] * vectors]
        shapes = [(*rows, *v.shape) for v in like]
        return [run.xp.zeros(shape, dtype=W.dtype, device=run.device) for shape in shapes]

    def one_block(self, x: Array, h: Array) -> tuple[Array, Array]:
        """Run x (T, B, I) from h (B, H) as one block; return all h' (T, B, H), and the last.

        Both are in memory of their own.
        """
        found, h = self._block(self._packed(x), x, h, slice(0, x.shape[0]), None, False)
        return self.run.as_contiguous(found.outputs), h

    def one_block_kept(self, x: Array, h: Array) -> tuple[Residuals, Array]:
        """Run x from h as one block, and keep the residuals; return these, and the last state."""
        return self._block(self._packed(x), x, h, slice(0, x.shape[0]), None, True)

    def one_block_back(
        self, x: Array, kept: Residuals, dy: Array | None, dh: Array
    ) -> tuple[Array, Array, list[Array]]:
        """Run the backward pass of one block, as `backward` does."""
        whole, weights = slice(0, x.shape[0]), self._packed(x)
        dx, dh, _, grads = self._block_back(weights, x, whole, kept, dy, dh, False, False)
        return dx, self.run.as_contiguous(dh), grads

    def gates(self, x: Array, segments: list[Segment]) -> list[Array]:
        """Return r, z, n and h', each (T, B, H), of a forward pass that kept all residuals."""
        shape = (*x.shape[:2], self.weights.recurrent[0].shape[-1])
        outputs = [self.run.output(shape, self.dtype) for _ in range(4)]
        for segment in segments:
            for block, kept in zip(segment.blocks, segment.residuals or [], strict=True):
                mask = None if self.mask is None else self.mask.steps(block)
                arrays = (*kept.saved[:3], kept.outputs)
                for output, v in zip(outputs, arrays, strict=True):
                    output.put(block, v, mask)
        return [output.array() for output in outputs]

    def _recompute(self, weights: Weights, x: Array, segment: Segment) -> list[Residuals]:
        residuals, h = [], segment.h
        for block in segment.blocks:
            mask = None if self.mask is None else self.mask.steps(block)
            found, h = self._block(weights, x, h, block, mask, True)
            residuals.append(found)
        return residuals

    def _packed(self, x: Array) -> Weights:
        """Return the weights, packed if the runner does so for products of this many rows."""
        W, b, (U, *c) = self.weights
        packed, U = self.run.pack_weights(W, U, x.shape[0] * x.shape[1])
        return self.weights if packed is W else Weights(packed, b, (U, *c))

    def _block(
        self,
        weights: Weights,
        x: Array,
        h: Array,
        block: slice,
        mask: StepMask | None,
        keep: bool,
    ) -> tuple[Residuals, Array]:
        """Run one block forward; return its residuals, and the state after it."""
        run, (W, b, recurrent) = self.run, weights
        extra = None if self.masks is None else self.masks.steps(block)
        a = run.affine(self._read(x, block, mask), W, b)
        step, reverse = self.variant.step, self.reverse
        states, found = run.forward(step, a, h, recurrent, mask, reverse, keep, extra)
        saved = list(found or ())
        if extra is not None and extra.cut:
            outputs = saved.pop()
        else:
            outputs = states[:-1, :, :] if reverse else states[1:, :, :]
        h = run.as_contiguous(states[0 if reverse else -1, :, :])
        return Residuals(states, saved, outputs), h

    def _block_back(
        self,
        weights: Weights,
        x: Array,
        block: slice,
        kept: Residuals,
        dy: Array | None,
        dh: Array,
        taps: bool,
        by_row: bool,
    ) -> tuple[Array, Array, Array | None, list[Array]]:
        """Run the backward pass of one block; return dx (K, B, I), dh, the taps, the gradients."""
        run, (W, _, (U, *vectors)), (states, saved, _) = self.run, weights, kept
        mask = None if self.mask is None else self.mask.steps(block)
        dy = None if dy is None else self._read(dy, block, mask)
        previous = states[1:, :, :] if self.reverse else states[:-1, :, :]
        extra = None if self.masks is None else self.masks.steps(block)
        if gains := self.variant.gains:
            arrays = (*vectors[-gains:], *(() if extra is None else extra.arrays))
            extra = Extra((*[Kind.VECTOR] * gains, *kinds_of(extra)), arrays)
        back = dy, dh, previous, saved, U, mask, self.reverse, taps, extra
        parts: Sequence[Array]
        parts, dh, g = run.backward(self.variant.backward, *back)
        dstart: list[Array] = []
        if extra is not None and extra.start:
            *parts, reached = parts
            dstart = [run.row_sum(reached)]
        if mask is not None:
            parts = tuple(run.zero_skipped(part, mask, own=True) for part in parts)
            g = None if g is None else run.zero_skipped(g, mask, own=True)
        if self.masks is not None and self.masks.dropout is not None:
            previous, saved = self._operands(self.masks.dropout, previous, saved)
        x = self._read(x, block, mask)
        if by_row:
            dx = run.as_steps(run.product(run.as_matrix(parts[0]), W), previous.shape[0])
            return dx, dh, g, [*self._by_row(x, previous, saved, parts), *dstart]
        rows, product = run.as_matrix, run.product
        matrices = list(map(rows, parts))
        da = matrices[0]
        dx = product(da, W)
        dW, db = product(da.T, rows(x)), run.row_sum(da)
        dU, *dc = run.weight_gradients(self.variant.weights, previous, saved, matrices)
        grads = [dW, dU, *([] if gains else [db]), *dc, *dstart]
        return run.as_steps(dx, previous.shape[0]), dh, g, grads

    def _by_row(
        self, x: Array, h: Array, saved: Sequence[Array], parts: Sequence[Array]
    ) -> list[Array]:
        """Return the gradients of a block for each row of the batch, (B, ...)."""
        xp = self.run.xp
        x, h = (xp.astype(v, self.dtype, copy=False) for v in (x, h))
        saved, parts = (
            [xp.astype(v, self.dtype, copy=False) for v in several] for several in (saved, parts)
        )
        dU, *dc = reduced_by_row(xp, self.variant.weights, h, saved, parts)
        db = [] if self.variant.gains else [outer(xp, parts[0], None)]
        return [outer(xp, parts[0], x), dU, *db, *dc]

    def _operands(
        self, d: Array, h: Array, saved: Sequence[Array]
    ) -> tuple[Array, Sequence[Array]]:
        """Return h and the residuals, where operands of products with U are multiplied by d."""
        reads = self.variant.reads
        return h * d, [v * d if n in reads else v for n, v in enumerate(saved)]

    def _read(self, v: Array, block: slice, mask: StepMask | None) -> Array:
        """Return the steps of a block of v (T, B, .), upcast, with zeros at padded steps."""
        v = v[block, :, :]
        if v.dtype != self.dtype:
            v = self.run.upcast(v, self.dtype)
        return v if mask is None else self.run.zero_skipped(v, mask)


def steps_of_block(B: int) -> int:
    """Return K, the number of steps in a block of B rows."""
    return max(STEPS, ROWS // max(B, 1))


@lru_cache(maxsize=16)
def _segments(T: int, K: int, length: int | None, reverse: bool) -> tuple[tuple[slice, ...], ...]:
    """Cut T steps into blocks of K, grouped by about `length` steps, in the order of the sweep."""
    n = 1 if length is None else math.ceil(length / K)
    starts = range(0, T, K)[::-1] if reverse else range(0, T, K)
    return tuple(
        tuple(slice(t, min(t + K, T)) for t in starts[first : first + n])
        for first in range(0, len(starts), n)
    )
