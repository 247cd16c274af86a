"""The reference runner: the equations as they stand, one call a step, on any array library.

It never assigns into an array, so immutable arrays work too: steps are collected and stacked. Every
faster runner has the methods of `Plain`, documented here, and is tested against it.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from ..typing import Array, Pytree
from .contract import Movable, Output, Result, Runner


class Plain:
    """Runs blocks of steps on the namespace `xp`."""

    def __init__(self, xp: Any, device: Any) -> None:
        self.xp, self.device = xp, device

    def for_call(self, steps: int, rows: int, units: int) -> "Plain":
        """Return the runner for calls of so many steps, rows of the batch and units."""
        return self

    def pack_weights(self, W: Any, U: Any, rows: int) -> tuple[Any, Any]:
        """Return W and U in the layout that suits products of `rows` rows (steps times batch)."""
        return W, U

    def upcast(self, v: Any, dtype: Any) -> Any:
        """Upcast `v` to the dtype of the arithmetic, which is float32 for half precision."""
        return v if v.dtype == dtype else self.xp.astype(v, dtype)

    def affine(self, x: Any, W: Any, b: Any) -> Any:
        """Return x W^T + b (K, B, N) of x (K, B, I), W (N, I) and b (N,) or None."""
        a = self.as_matrix(x) @ W.T
        return self.xp.reshape(a if b is None else a + b, (x.shape[0], x.shape[1], W.shape[0]))

    def forward(
        self,
        step: Any,
        a: Any,
        h: Any,
        recurrent: Any,
        alive: Any,
        reverse: bool,
        keep: bool,
    ) -> tuple[Any, Any]:
        """Run one block of K steps forward.

        a: (K, B, 3H), the input products. h: (B, H), the state before the first step run. alive:
        None, or K entries, each None or (B, 1) of bool, False where a sequence has finished.
        Returns the states, path (K + 1, B, H), in which step t leads from path[t] to path[t + 1]
        (in reverse from path[t + 1] to path[t]); and the residuals that `step` saved, each
        (K, B, H), or None without `keep`.
        """
        xp, states, saved = self.xp, [h], []
        for t in _order(a.shape[0], reverse):
            new, extra = step(xp, a[t, :, :], h, *recurrent)
            h = xp.where(alive[t], new, h) if _ends(alive, t) else new
            states.append(h)
            saved.append(extra)
        if reverse:
            states.reverse()
            saved.reverse()
        return xp.stack(states), self._stack(saved) if keep else None

    def single_step(self, step: Any, W: Any, b: Any, recurrent: Any) -> Any:
        """Return a function of x (B, I) and h (B, H) that gives the next state and a copy of it."""
        U, *vectors = recurrent

        def one(x: Any, h: Any) -> Any:
            left, right = self.pack_weights(W, U, x.shape[0])
            a = self.affine(x[None, :, :], left, b)
            path, _ = self.forward(step, a, h, (right, *vectors), None, False, False)
            new = path[1, :, :]
            return new, self.xp.asarray(new, copy=True)

        return one

    def prepare_step(self, step: Any, W: Any, b: Any, recurrent: Any) -> Any:
        """Return the function of `single` for many steps; it may keep copies of the weights."""
        return self.single_step(step, W, b, recurrent)

    def frozen_weights(self, step: Any, W: Any, b: Any, recurrent: Any) -> tuple[Any, Any, Any]:
        """W, b, recurrent for calls without end, which may hold copies of them."""
        return W, b, recurrent

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
    ) -> tuple[Any, Any, Any]:
        """Run the backward pass of one block.

        dy: (K, B, H) or None. dh: (B, H), the gradient to the state after the block. previous:
        (K, B, H), the state before each step. Returns the gradients to the pre-activations, each
        (K, B, .); dh before the block; and with `taps` dL/dh' of every step (K, B, H), else None.
        """
        xp, parts, gs = self.xp, [], []
        for t in _order(previous.shape[0], not reverse):
            g = dh if dy is None else dh + dy[t, :, :]
            new, part = step(xp, g, previous[t, :, :], [s[t, :, :] for s in saved], U)
            dh = xp.where(alive[t], new, dh) if _ends(alive, t) else new
            parts.append(part)
            gs.append(g)
        if not reverse:
            parts.reverse()
            gs.reverse()
        return self._stack(parts), dh, xp.stack(gs) if taps else None

    def concurrent(self, calls: Sequence[Callable[[Runner], Result]]) -> list[Result]:
        """Call functions that do not depend on one another, and return their results.

        Each is given the runner that it must use.
        """
        return [call(self) for call in calls]

    def pipeline(
        self,
        calls: Sequence[Callable[[Runner, Array | None], Array | None]],
        x: Array | None,
        overlap: int | None = None,
    ) -> Array | None:
        """Call each function on the result of the one before, the first on x.

        Each is given the runner that it must use.
        overlap: None, or the number of elements of a state where a call may begin with a block of
        steps as soon as the call before it has finished that block.
        """
        for call in calls:
            x = call(self, x)
        return x

    def unmasked_prefix(self, steps: int) -> int:
        """Return how many of the leading steps, at which no sequence has ended, run unmasked."""
        return steps

    def run_graph(
        self,
        function: Callable[..., tuple[Pytree, object]],
        owner: Movable,
        static: tuple[Hashable, ...],
        arrays: Pytree,
        steps: int | None = None,
        tape: object = None,
    ) -> tuple[Pytree, object]:
        """Return function(owner.on(runner), *static, arrays[, tape]): its results, and a tape.

        A device may capture the call and replay it, since nothing but `owner`, `static` and the
        arrays enters it. steps: how many it has, all layers counted; None: it must not be captured.
        """
        return function(owner.on(self), *static, arrays, *(() if tape is None else (tape,)))

    def as_matrix(self, v: Any) -> Any:
        """Reshape v (..., N) to a matrix (rows, N) whose products this runner computes."""
        return self.xp.reshape(v, (math.prod(v.shape[:-1]), v.shape[-1]))

    def weight_gradients(self, weights: Any, h: Any, saved: Any, parts: Any) -> Any:
        """Call the equations' `weights` on the arrays of a block as matrices."""
        return weights(self.xp, self.as_matrix(h), OnDemand(self.as_matrix, saved), *parts)

    def overlap_products(self, calls: Sequence[Callable[[], Any]], work: int) -> list[Any]:
        """Call three functions of products that do not need each other -> what they return.

        work: multiply-adds of the third, which is about as much as the others together.
        """
        return [call() for call in calls]

    def as_contiguous(self, v: Any) -> Any:
        """Return `v` without a reference to the larger array that it is a view of."""
        return v

    def output(self, shape: tuple[int, ...], dtype: Any) -> Output:
        """Return an object that collects blocks of steps into an array of this shape."""
        return _Output(self.xp, lambda: self.xp.zeros(shape, dtype=dtype, device=self.device))

    def _stack(self, tuples: list[Any]) -> tuple[Any, ...]:
        return tuple(self.xp.stack(column) for column in zip(*tuples, strict=True))


class OnDemand:
    """A sequence whose entries are passed through a function when they are read."""

    def __init__(self, function: Any, entries: Any) -> None:
        self.function, self.entries = function, entries

    def __getitem__(self, i: int) -> Any:
        return self.function(self.entries[i])


class _Output:
    """Pieces of an array, concatenated along axis 0 at the end."""

    def __init__(self, xp: Any, nothing: Callable[[], Any]) -> None:
        self.xp, self.nothing = xp, nothing
        self.pieces: list[tuple[int, Any]] = []

    def put(self, block: slice, piece: Any) -> None:
        self.pieces.append((block.start, piece))

    def array(self) -> Any:
        pieces = [a for _, a in sorted(self.pieces, key=lambda piece: piece[0])]
        return self.xp.concat(pieces, axis=0) if pieces else self.nothing()


def _ends(alive: Any, t: int) -> bool:
    """Whether a sequence has finished before step t."""
    return alive is not None and alive[t] is not None


def _order(K: int, reverse: bool) -> range:
    return range(K - 1, -1, -1) if reverse else range(K)
