"""Time: one layer in one direction over a whole sequence, forward and backward.

The sequence is cut into blocks of K steps. The input products and the gradients of the weights are
one product a block, summed in the order of the blocks, so that what has to be in memory at once
does not grow with T, and recomputing a block gives the same bits.

A row of the batch that has ended keeps its state and gives the output 0. So the last state is each
row's own last state, and a walk from the other end starts at each row's own end.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..backend.contract import Runner

STEPS = 64  # of a block, at least; there is no more in memory at once, however large T is
ROWS = 256  # of a block, over all steps, at least: enough for efficient products


class Weights(NamedTuple):
    """Of one layer in one direction: W (3H, I), b (3H,) or None, and (U (3H, H), ...)."""

    W: Any
    b: Any
    recurrent: tuple[Any, ...]


class StepMask:
    """For each step of a block None, where all rows are alive, or (B, 1) of bool.

    block (K, B, 1): all of them; before step `full` all rows are alive.
    """

    def __init__(self, block: Any, full: int = 0) -> None:
        self.block, self.full = block, full

    def __len__(self) -> int:
        return self.block.shape[0]

    def __getitem__(self, t: int) -> Any:
        return None if t < self.full else self.block[t, :, :]

    def __iter__(self) -> Iterator[Any]:
        return (self[t] for t in range(len(self)))


class Padding(NamedTuple):
    """Which steps count. alive (T, B, 1) of bool; before step `full` all rows are alive."""

    alive: Any
    full: int

    def steps(self, block: slice) -> "StepMask | None":
        """Of a block; None where all rows are alive throughout."""
        if block.stop <= self.full:
            return None
        return StepMask(self.alive[block, :, :], self.full - block.start)

    def clean(self, xp: Any, v: Any, block: slice) -> Any:
        """Return v (K, B, .) with zeros at the padded steps, whatever stood there."""
        if block.stop <= self.full:
            return v
        return xp.where(self.alive[block, :, :], v, xp.zeros_like(v))


class Residuals(NamedTuple):
    """The residuals of one block: its K + 1 states, and what each step saved."""

    path: Any
    saved: Any


class Segment(NamedTuple):
    """Blocks that are recomputed together, in the order walked, from the state before them.

    `kept` is None where they are to be recomputed.
    """

    blocks: list[slice]
    h: Any
    kept: list[Residuals] | None


class Sweep(NamedTuple):
    """One layer in one direction: how to run it, its equations and its weights.

    run: how the backend runs a block; variant: the equations; dtype: of the arithmetic.
    """

    run: Any
    variant: Any
    weights: Weights
    padding: Padding | None
    reverse: bool
    dtype: Any

    def on(self, run: Runner) -> "Sweep":
        """Return the sweep on another runner."""
        return self if run is self.run else self._replace(run=run)

    def forward(
        self, x: Any, h: Any, keep: bool = False, segment: int | None = None, outputs: bool = True
    ) -> tuple[Any, Any, list[Segment]]:
        """Run x (T, B, I) from h (B, H): y (T, B, H) or None, the last state (B, H), the tape.

        keep: make the tape of residuals for `backward`. segment: the number of steps that the
        backward pass recomputes together; None keeps everything.
        """
        y = self.run.output((*x.shape[:2], h.shape[-1]), x.dtype) if outputs else None
        weights = self._packed(x)
        tape: list[Segment] = []
        for blocks in _segments(x.shape[0], x.shape[1], segment, self.reverse):
            kept: list[Residuals] | None = [] if keep and segment is None else None
            if keep:
                tape.append(Segment(blocks, h, kept))
            for block in blocks:
                of_block, h = self._block(weights, x, h, block, kept is not None)
                if kept is not None:
                    kept.append(of_block)
                if y is not None:
                    y.put(block, self._stored(self._clean(self._after(of_block.path), block), x))
        return (None if y is None else y.array()), h, tape

    def backward(
        self, x: Any, tape: list[Segment], dy: Any, dh: Any, taps: Any = None
    ) -> tuple[Any, Any, list[Any]]:
        """Dy (T, B, H) or None, dh (B, H) -> dx (T, B, I), dh0 (B, H), [dW, db, dU, ...].

        taps: an output, into which dL/dh' (K, B, H) of each block is put.
        """
        dx, weights = self.run.output(x.shape, x.dtype), self._packed(x)
        total: list[Any] = []
        for segment in reversed(tape):
            kept = segment.kept or self._recompute(weights, x, segment)
            for block, of_block in zip(reversed(segment.blocks), reversed(kept), strict=True):
                found = self._block_back(weights, x, block, of_block, dy, dh, taps is not None)
                piece, dh, g, grads = found
                total = [s + d for s, d in zip(total, grads, strict=True)] if total else grads
                dx.put(block, self._stored(piece, x))
                if taps is not None:
                    taps.put(block, self._clean(g, block))
        return dx.array(), dh, total or self._zeros()

    def _zeros(self) -> list[Any]:
        """The gradients of a sequence without steps."""
        W, _, (U, *c) = self.weights
        like = [W, W[:, 0], U, *(U[:, 0] for _ in c)]
        return [self.run.xp.zeros_like(v) for v in like]

    def gates(self, x: Any, tape: list[Segment]) -> list[Any]:
        """What a tape that keeps everything holds: r, z, n and h', each (T, B, H)."""
        shape = (*x.shape[:2], self.weights.recurrent[0].shape[-1])
        outputs = [self.run.output(shape, self.dtype) for _ in range(4)]
        for segment in tape:
            for block, kept in zip(segment.blocks, segment.kept or [], strict=True):
                arrays = (*kept.saved[:3], self._after(kept.path))
                for output, v in zip(outputs, arrays, strict=True):
                    output.put(block, self._clean(v, block))
        return [output.array() for output in outputs]

    def _recompute(self, weights: Weights, x: Any, segment: Segment) -> list[Residuals]:
        kept, h = [], segment.h
        for block in segment.blocks:
            of_block, h = self._block(weights, x, h, block, True)
            kept.append(of_block)
        return kept

    def _packed(self, x: Any) -> Weights:
        """The weights as the backend likes them in memory."""
        W, b, (U, *c) = self.weights
        W, U = self.run.pack_weights(W, U, x.shape[0] * x.shape[1])
        return Weights(W, b, (U, *c))

    def _block(
        self, weights: Weights, x: Any, h: Any, block: slice, keep: bool
    ) -> tuple[Residuals, Any]:
        """Forward through one block -> its states and saved arrays, and the last state."""
        W, b, recurrent = weights
        a = self.run.affine(self._input(x, block), W, b)
        path, saved = self.run.forward(
            self.variant.step, a, h, recurrent, self._alive(block), self.reverse, keep
        )
        return Residuals(path, saved), self.run.as_contiguous(path[0 if self.reverse else -1, :, :])

    def _block_back(
        self, weights: Weights, x: Any, block: slice, kept: Residuals, dy: Any, dh: Any, taps: bool
    ) -> Any:
        """Back through one block -> dx (K, B, I), dh, g if wanted (K, B, H), the gradients."""
        xp, (W, _, (U, *_)) = self.run.xp, weights
        if dy is not None:
            dy = self._clean(self._upcast(dy[block, :, :]), block)
        previous, alive = self._before(kept.path), self._alive(block)
        parts, dh, g = self.run.backward(
            self.variant.backward, dy, dh, previous, kept.saved, U, alive, self.reverse, taps
        )
        rows, product = self.run.as_matrix, self.run.product
        gradients = self.run.weight_gradients
        cleaned = [rows(self._clean(part, block)) for part in parts]
        da = cleaned[0]
        calls = (
            lambda: product(da, W),
            lambda: [product(da.T, rows(self._input(x, block))), self.run.row_sum(da)],
            lambda: list(gradients(self.variant.weights, previous, kept.saved, cleaned)),
        )
        work = previous.shape[0] * previous.shape[1] * U.shape[0] * U.shape[1]
        dx, of_input, of_recurrent = self.run.overlap_products(calls, work)
        dx = xp.reshape(dx, (block.stop - block.start, *x.shape[1:]))
        return dx, dh, g, of_input + of_recurrent

    def _before(self, path: Any) -> Any:
        """The state before each step of a block."""
        return path[1:, :, :] if self.reverse else path[:-1, :, :]

    def _after(self, path: Any) -> Any:
        """The state after each step of a block."""
        return path[:-1, :, :] if self.reverse else path[1:, :, :]

    def _input(self, x: Any, block: slice) -> Any:
        return self._clean(self._upcast(x[block, :, :]), block)

    def _upcast(self, v: Any) -> Any:
        return self.run.upcast(v, self.dtype)

    def _stored(self, v: Any, x: Any) -> Any:
        return v if v.dtype == x.dtype else self.run.xp.astype(v, x.dtype)

    def _alive(self, block: slice) -> StepMask | None:
        return None if self.padding is None else self.padding.steps(block)

    def _clean(self, v: Any, block: slice) -> Any:
        return v if self.padding is None else self.padding.clean(self.run.xp, v, block)


def _segments(T: int, B: int, length: int | None, reverse: bool) -> Iterator[list[slice]]:
    """Cut T steps into blocks, and group them by about `length` steps, in the order walked."""
    K = max(STEPS, ROWS // max(B, 1))
    n = 1 if length is None else math.ceil(length / K)
    starts = range(0, T, K)
    starts = starts[::-1] if reverse else starts
    for first in range(0, len(starts), n):
        yield [slice(t, min(t + K, T)) for t in starts[first : first + n]]
