"""The reference runner: the equations as they stand, one call a step, on any array library.

It never assigns into an array, so immutable arrays work too: steps are collected and stacked. Its
methods are documented in `contract.py`; every faster runner is tested against it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..codegen.restart import restarted, restarted_backward
from ..typing import Array, Device, DType, Namespace, Pytree, Shape, Step, WeightGradients
from .contract import (
    Alive,
    Extra,
    InputProducts,
    Matrix,
    Movable,
    OneBlock,
    OneStep,
    Output,
    Recurrent,
    Result,
    Runner,
    StepMask,
)


class Plain:
    """Runs blocks of steps on the namespace `xp`."""

    whole = False

    def __init__(self, xp: Namespace, device: Device) -> None:
        self.xp, self.device = xp, device

    def pack_weights(self, W: Matrix, U: Matrix, rows: int) -> tuple[Matrix, Matrix]:
        return W, U

    def upcast(self, v: Array, dtype: DType) -> Array:
        return v if v.dtype == dtype else self.xp.astype(v, dtype)

    def affine(self, x: Array, W: Matrix, b: Array | None) -> InputProducts:
        a = self.product(self.as_matrix(x), W.T)
        return self.xp.reshape(a if b is None else a + b, (x.shape[0], x.shape[1], W.shape[0]))

    def forward(
        self,
        step: Step,
        a: InputProducts,
        h: Array,
        recurrent: Recurrent,
        alive: Alive,
        reverse: bool,
        keep: bool,
        extra: Extra | None = None,
    ) -> tuple[Array, Sequence[Array] | None]:
        xp, states, saved = self.xp, [h], []
        cut = extra is not None and extra.cut
        step = restarted(step, extra.start) if extra is not None and cut else step
        for t in _order(a.shape[0], reverse):
            further = () if extra is None else extra.at(t)
            new, kept = step(xp, a[t, :, :], h, *recurrent, *further)
            mask = None if alive is None else alive[t]
            h = new if mask is None else xp.where(mask, new, h)
            states.append(h)
            saved.append(kept if keep else kept[len(kept) - cut :])
        if reverse:
            states.reverse()
            saved.reverse()
        return xp.stack(states), self._stack(saved) if keep or cut else None

    def single_step(self, step: Step, W: Matrix, b: Array | None, recurrent: Recurrent) -> OneStep:
        return as_step(Plain.prepare_block(self, step, W, b, recurrent, False))

    def prepare_step(self, step: Step, W: Matrix, b: Array | None, recurrent: Recurrent) -> OneStep:
        return self.single_step(step, W, b, recurrent)

    def prepare_block(
        self, step: Step, W: Matrix, b: Array | None, recurrent: Recurrent, reverse: bool
    ) -> OneBlock:
        U, *vectors = recurrent

        def block(x: Array, h: Array) -> tuple[Array, Array]:
            left, right = self.pack_weights(W, U, x.shape[0] * x.shape[1])
            a = self.affine(x, left, b)
            path, _ = self.forward(step, a, h, (right, *vectors), None, reverse, False)
            last = path[0 if reverse else -1, :, :]
            states = path[:-1, :, :] if reverse else path[1:, :, :]
            return states, self.xp.asarray(last, copy=True)

        return block

    def frozen_weights(
        self, step: Step, W: Array, b: Array | None, recurrent: Recurrent, small: str
    ) -> tuple[Matrix, Array | None, Recurrent]:
        return W, b, recurrent

    def frozen_matrix(self, W: Array, small: str) -> Matrix:
        return W

    def frozen_affine(self, x: Array, W: Matrix, b: Array | None) -> Array:
        y = self.product(x, W.T)
        return y if b is None else y + b

    def backward(
        self,
        step: Step,
        dy: Array | None,
        dh: Array,
        previous: Array,
        saved: Sequence[Array],
        U: Matrix,
        alive: Alive,
        reverse: bool,
        taps: bool,
        extra: Extra | None = None,
    ) -> tuple[tuple[Array, ...], Array, Array | None]:
        xp, parts, gs = self.xp, [], []
        for t in _order(previous.shape[0], not reverse):
            further: Sequence[Array] = () if extra is None else extra.at(t)
            reached: tuple[Array, ...] = ()
            if extra is not None and extra.cut:
                dh, further, reached = restarted_backward(xp, dh, further, extra.start)
            g = dh if dy is None else dh + dy[t, :, :]
            new, part = step(xp, g, previous[t, :, :], [s[t, :, :] for s in saved], U, *further)
            mask = None if alive is None else alive[t]
            dh = new if mask is None else xp.where(mask, new, dh)
            parts.append((*part, *reached))
            gs.append(g)
        if not reverse:
            parts.reverse()
            gs.reverse()
        return self._stack(parts), dh, xp.stack(gs) if taps else None

    def concurrent(self, calls: Sequence[Callable[[Runner], Result]]) -> list[Result]:
        """Call independent functions, each with the runner that it must use; return the results."""
        return [call(self) for call in calls]

    def pipeline(
        self,
        calls: Sequence[Callable[[Runner, Array | None], Array | None]],
        x: Array | None,
        overlap: int | None = None,
    ) -> Array | None:
        """Call each function on the result of the one before, the first on x.

        Each takes the runner that it must use, and that result.
        overlap: None, or the number of elements of a state where a call may begin with a block of
        steps as soon as the call before it has finished that block.
        """
        for call in calls:
            x = call(self, x)
        return x

    def unmasked_prefix(self, steps: int) -> int:
        """Return how many of these leading steps, which no sequence skips, run without a mask."""
        return steps

    def run_graph(
        self,
        function: Callable[..., tuple[Pytree, object]],
        owner: Movable,
        static: tuple[Any, ...],
        arrays: Pytree,
        steps: int | None = None,
        tape: object = None,
        gradients: Callable[..., Pytree] | None = None,
    ) -> tuple[Pytree, object]:
        """Return function(owner.on(runner), *static, arrays[, tape]): its results, and a tape.

        A device may capture the call and replay it, since nothing but `owner`, `static` and the
        arrays enters it. steps: how many it has, all layers counted; None: it must not be captured.
        gradients: of a call that another library may differentiate, a function of the same and of
        the results' cotangents, of which None is 0. It returns the gradients to the arrays.
        """
        return function(owner.on(self), *static, arrays, *(() if tape is None else (tape,)))

    def as_matrix(self, v: Array) -> Array:
        return self.xp.reshape(v, (math.prod(v.shape[:-1]), v.shape[-1]))

    def as_steps(self, v: Array, steps: int) -> Array:
        return self.xp.reshape(v, (steps, v.shape[0] // steps, v.shape[1]))

    def product(self, left: Array, right: Matrix) -> Array:
        return left @ right

    def row_sum(self, v: Array) -> Array:
        return self.xp.sum(v, axis=0)

    def weight_gradients(
        self, weights: WeightGradients, h: Array, saved: Sequence[Array], parts: Sequence[Array]
    ) -> Iterable[Array]:
        return weights(self.xp, self.as_matrix(h), [self.as_matrix(v) for v in saved], *parts)

    def as_contiguous(self, v: Array) -> Array:
        return self.xp.concat((v,), axis=0)  # a copy in every library

    def zero_skipped(self, v: Array, alive: StepMask, own: bool = False) -> Array:
        return running(self.xp, v, alive)

    def output(self, shape: Shape, dtype: DType) -> Output:
        return Pieces(self.xp, lambda: self.xp.zeros(shape, dtype=dtype, device=self.device))

    def stacked(self, states: Sequence[Array], dtype: DType) -> Array:
        out = self.output((len(states), *states[0].shape), dtype)
        for n, state in enumerate(states):
            v = state if state.dtype == dtype else self.xp.astype(state, dtype)
            out.put(slice(n, n + 1), v[None, :, :])
        return out.array()

    def _stack(self, tuples: Sequence[Sequence[Array]]) -> tuple[Array, ...]:
        return tuple(self.xp.stack(column) for column in zip(*tuples, strict=True))


class Pieces:
    """Pieces of an array, concatenated along axis 0 at the end."""

    def __init__(self, xp: Namespace, nothing: Callable[[], Array]) -> None:
        self.xp, self.nothing = xp, nothing
        self.pieces: list[tuple[int, Array]] = []

    def put(self, block: slice, piece: Array, alive: Alive = None) -> None:
        self.pieces.append((block.start, running(self.xp, piece, alive)))

    def array(self) -> Array:
        pieces = [a for _, a in sorted(self.pieces, key=lambda piece: piece[0])]
        return self.xp.concat(pieces, axis=0) if pieces else self.nothing()


def as_step(block: OneBlock) -> OneStep:
    """Return a function that runs a block of one step, on x (B, I) in place of (1, B, I)."""

    def one(x: Array, h: Array) -> tuple[Array, Array]:
        states, new = block(x[None, :, :], h)
        return states[0, :, :], new

    return one


def running(xp: Namespace, v: Array, alive: Alive) -> Array:
    """Return v (K, B, .) with zeros where steps are skipped, whatever v holds there."""
    return v if alive is None else xp.where(alive.block, v, xp.zeros_like(v))


def _order(K: int, reverse: bool) -> range:
    return range(K - 1, -1, -1) if reverse else range(K)
