"""How any array library runs a block of steps: the equations as they stand, one call a step.

Nothing is assigned into an array, so immutable arrays work too; the steps are collected and
stacked. This is the definition that every faster way of running a block is tested against.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any


class Plain:
    """Runs blocks of steps on the namespace `xp`."""

    def __init__(self, xp: Any, device: Any) -> None:
        self.xp, self.device = xp, device

    def laid_out(self, W: Any, U: Any, rows: int) -> tuple[Any, Any]:
        """The weights as a sweep that multiplies so many rows, steps counted, likes them."""
        return W, U

    def wide(self, v: Any, dtype: Any) -> Any:
        """V as a sweep takes it: in the dtype of the arithmetic, which is float32 for halves."""
        return v if v.dtype == dtype else self.xp.astype(v, dtype)

    def affine(self, x: Any, W: Any, b: Any) -> Any:
        """X (K, B, I), W (N, I), b (N,) or None -> x W^T + b (K, B, N)."""
        a = self.rows(x) @ W.T
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
        """Walk one block of K steps.

        a (K, B, 3H); h (B, H) the state before the first step walked; alive None, or a list of
        K entries, None or (B, 1) of bool. Returns the path (K + 1, B, H), in which step t leads
        from path[t] to path[t + 1] (from path[t + 1] to path[t] in reverse), and what `step`
        saved, each (K, B, H), or None.
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

    def single(self, step: Any, W: Any, b: Any, recurrent: Any) -> Any:
        """A function x (B, I), h (B, H) -> the next h, with these weights, and a copy of it."""
        U, *vectors = recurrent

        def one(x: Any, h: Any) -> Any:
            left, right = self.laid_out(W, U, x.shape[0])
            a = self.affine(x[None, :, :], left, b)
            path, _ = self.forward(step, a, h, (right, *vectors), None, False, False)
            new = path[1, :, :]
            return new, self.xp.asarray(new, copy=True)

        return one

    def prepared(self, step: Any, W: Any, b: Any, recurrent: Any) -> Any:
        """As `single`, for a stream of steps: it may work on copies of the weights."""
        return self.single(step, W, b, recurrent)

    def packed(self, step: Any, W: Any, b: Any, recurrent: Any) -> tuple[Any, Any, Any]:
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
        """Walk the block back. dy (K, B, H) or None; dh (B, H); previous (K, B, H).

        Returns the gradients of the pre-activations, each (K, B, .), the new dh, and with
        `taps` g = dL/dh' of every step (K, B, H), else None.
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

    def parallel(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Call functions that do not need each other -> what they return."""
        return [call() for call in calls]

    def chained(
        self, calls: Sequence[Callable[[Any], Any]], x: Any, overlap: int | None = None
    ) -> Any:
        """Call functions on what the one before returned, the first on x -> what the last returns.

        overlap: None, or how many numbers a state has where a call may begin at a block of steps
        as soon as the one before is done with it.
        """
        for call in calls:
            x = call(x)
        return x

    def complete(self, steps: int) -> int:
        """Of the first steps, at which all rows are alive, how many are run without a mask."""
        return steps

    def call(
        self, function: Any, static: Any, arrays: Any, steps: int | None = None, tape: Any = None
    ) -> tuple[Any, Any]:
        """function(*static, arrays), and the tape if there is one -> results, and a new tape.

        It may be recorded and replayed where all depends on `static` and the arrays alone.
        steps: so many it has, of all layers; None: not to be recorded.
        """
        return function(*static, arrays, *(() if tape is None else (tape,)))

    def rows(self, v: Any) -> Any:
        """V (..., N) -> (rows, N), a matrix whose products this object takes care of."""
        return self.xp.reshape(v, (math.prod(v.shape[:-1]), v.shape[-1]))

    def gradients(self, weights: Any, h: Any, saved: Any, parts: Any) -> Any:
        """What the equations' `weights` returns, of these arrays of a block as matrices."""
        return weights(self.xp, self.rows(h), OnDemand(self.rows, saved), *parts)

    def products(self, calls: Sequence[Callable[[], Any]], work: int) -> list[Any]:
        """Call three functions of products that do not need each other -> what they return.

        work: multiply-adds of the third, which is about as much as the others together.
        """
        return [call() for call in calls]

    def own(self, v: Any) -> Any:
        """v, so that it does not hold on to the array that it is a part of."""
        return v

    def output(self, shape: tuple[int, ...], dtype: Any) -> "_Output":
        """Collect blocks of steps into an array of the shape."""
        return _Output(self.xp, lambda: self.xp.zeros(shape, dtype=dtype, device=self.device))

    def _stack(self, tuples: list[Any]) -> tuple[Any, ...]:
        return tuple(self.xp.stack(column) for column in zip(*tuples, strict=True))


class OnDemand:
    """A sequence through a function that is called where an entry is asked for."""

    def __init__(self, function: Any, entries: Any) -> None:
        self.function, self.entries = function, entries

    def __getitem__(self, i: int) -> Any:
        return self.function(self.entries[i])


class _Output:
    """Pieces of an array, put together along axis 0 at the end."""

    def __init__(self, xp: Any, nothing: Callable[[], Any]) -> None:
        self.xp, self.nothing = xp, nothing
        self.pieces: list[tuple[int, Any]] = []

    def put(self, block: slice, piece: Any) -> None:
        self.pieces.append((block.start, piece))

    def array(self) -> Any:
        pieces = [a for _, a in sorted(self.pieces, key=lambda piece: piece[0])]
        return self.xp.concat(pieces, axis=0) if pieces else self.nothing()


def _ends(alive: Any, t: int) -> bool:
    """Whether some row has ended at step t."""
    return alive is not None and alive[t] is not None


def _order(K: int, reverse: bool) -> range:
    return range(K - 1, -1, -1) if reverse else range(K)
