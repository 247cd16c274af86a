"""How NumPy runs a block of steps: the traced equations, as calls that write into reused buffers.

The list of operations of a step becomes the source of one function that runs a whole block.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from ...codegen.exponential import by_exp
from ...codegen.numpy_source import NumPySource
from ...codegen.schedule import (
    HOST,
    Kinds,
    backward_program,
    backward_schedule,
    forward_program,
    forward_schedule,
)
from ...typing import Array, DType, HostArray, Shape, Step
from ..contract import Extra, kinds_of
from ..reductions import reduced
from ..reference import Plain
from . import tuning
from .buffers import LARGE, empty, result


class NumPy(Plain):
    """Runs blocks of steps on NumPy.

    The rows of the batch stand innermost in memory, (K, N, B), so that the columns of a step are
    contiguous: NumPy works on those twice as fast, and so does BLAS. Outside they are (K, B, N).
    """

    def _empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        K, B, N = shape
        return transposed(empty((K, N, B), dtype))

    def as_contiguous(self, v: Any) -> Any:
        if v.nbytes < LARGE:
            return v.copy()
        copy = result(v.shape, v.dtype)
        copy[...] = v
        return copy

    def affine(self, x: Any, W: Any, b: Any) -> Any:
        (K, B, I), N = x.shape, len(W)
        x = np.ascontiguousarray(x)  # NumPy calls no BLAS where strides are 0 or negative
        a = self._empty((K, B, N), x.dtype)
        if I == 1 or (
            b is not None and K * B > I
        ):  # BLAS adds b at less cost; it is slow for I = 1
            x, W, b = _wider(x, 1), _wider(W, 0 if b is None else b), None
        np.matmul(W, transposed(x), out=transposed(a))
        if b is not None:
            columns = transposed(a)
            columns += b[:, None]
        return a

    def as_matrix(self, v: Any) -> Any:
        v = v if v.flags.c_contiguous else _buffered(v)
        if v.ndim == 2:
            return v
        return v.reshape(math.prod(v.shape[:-1]), v.shape[-1])  # faster than np.reshape

    def as_steps(self, v: Any, steps: int) -> Any:
        return v.reshape(steps, len(v) // steps, v.shape[1])

    def product(self, left: Any, right: Any) -> Any:
        out = result((len(left), right.shape[1]), left.dtype)
        self.multiply(left, right, out)
        return out

    def multiply(self, left: Any, right: Any, out: Any) -> None:
        """Fill out with left @ right; BLAS is slow where the inner size is 1."""
        if len(right) == 1:
            np.einsum("ik,kj->ij", left, right, out=out)
        else:
            np.matmul(left, right, out)

    def row_sum(self, v: Any) -> Any:
        return v[0].copy() if len(v) == 1 else np.add.reduce(v, 0)

    def weight_gradients(self, weights: Any, h: Any, saved: Any, parts: Any) -> Any:
        return reduced(self, weights, h, saved, parts, result)

    def zero_skipped(self, v: Any, alive: Any, own: bool = False) -> Any:
        v = v if own else _buffered(v)
        _zero(v, alive)
        return v

    def output(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return Filled(shape, dtype)

    def stacked(self, states: Any, dtype: Any) -> Any:
        if len(states) * states[0].nbytes < LARGE:
            return np.array(states, dtype)  # costs less than to fill an array
        return super().stacked(states, dtype)

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
        (K, B, _), H = a.shape, h.shape[-1]
        step = by_exp(step) if tuning.current.exp_elements <= B * H else step
        kinds = step, len(recurrent) - 1, keep, kinds_of(extra)
        program, scan = forward_program(*kinds), forward_scan(*kinds)
        path = self._empty((K + 1, B, H), a.dtype)
        path[K if reverse else 0] = h
        saved = tuple(self._empty((K, B, H), a.dtype) for _ in program.extras)
        ends = (path[1:], path[:-1]) if reverse else (path[:-1], path[1:])
        pair = transposed(a)[:, : 2 * H]
        matrices = [*map(transposed, ends), *further(extra, K), *map(transposed, saved)]
        over = steps_over([*columns_of(a, 3), pair, *matrices], alive, reverse)
        vectors = spread((*recurrent[1:], *vectors_of(extra)), B)
        scan(over, recurrent[0], vectors, (H, B), a.dtype)
        return path, saved or None

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
        kinds = step, len(saved), dy is not None, taps, kinds_of(extra)
        program, scan = backward_program(*kinds), backward_scan(*kinds)
        parts = [self._empty((K, B, len(e) * H), dh.dtype) for e in program.extras]
        columns = [column for part in parts for column in columns_of(part, part.shape[2] // H)]
        given = [] if dy is None else [dy]
        matrices = [*map(transposed, (*given, previous, *saved)), *further(extra, K)]
        over = steps_over([*matrices, *columns, *map(transposed, parts)], alive, not reverse)
        dh = scan(over, U, spread(vectors_of(extra), B), (H, B), dh.dtype, dh.T)
        g = parts.pop() if taps else None
        return tuple(parts), dh.T, g


def transposed(v: Any) -> Any:
    """Return a view (K, N, B) of v (K, B, N), or back."""
    return v.swapaxes(1, 2)


def _buffered(v: Any) -> Any:
    """Return a contiguous copy in a buffer."""
    copy = empty(v.shape, v.dtype)
    copy[...] = v
    return copy


def _zero(v: Any, alive: Any) -> None:
    """Set v (K, B, .) to 0 at skipped steps."""
    v[~alive.block[:, :, 0]] = 0


def further(extra: Extra | None, K: int) -> list[Any]:
    """Return the further arguments that are no vectors, as sequences of K arrays (N, B)."""
    if extra is None:
        return []
    # transposed in memory, as the loops of a step want it
    matrices = [np.ascontiguousarray(v.swapaxes(-1, -2)) for v in extra.arrays if v.ndim > 1]
    return [[v] * K if v.ndim == 2 else v for v in matrices]


def vectors_of(extra: Extra | None) -> list[Any]:
    """Return the further arguments that are vectors."""
    return [] if extra is None else [v for v in extra.arrays if v.ndim == 1]


def spread(vectors: Iterable[Any], B: int) -> list[Any]:
    """Repeat vectors (H,) to (H, B); (H, 1) for one row."""
    return [c[:, None] if B == 1 else c[:, None].repeat(B, axis=1) for c in vectors]


class Filled:
    """An array for a user, filled block by block; one small block becomes the array."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self._shape, self._dtype = shape, dtype
        self._array: HostArray | None = None

    def put(self, block: slice, piece: Any, alive: Any = None) -> None:
        """Store the piece of these steps, cast to the array's dtype."""
        if self._array is None and piece.shape == self._shape and piece.nbytes < LARGE:
            self._array = piece.astype(self._dtype, "C")  # costs less than to fill it
        else:
            self.array()[block] = piece
        if alive is not None:
            _zero(self.array()[block], alive)

    def array(self) -> Any:
        """Return the array."""
        if self._array is None:
            self._array = result(self._shape, self._dtype)
        return self._array


def _wider(v: Any, last: Any) -> Any:
    """Append a column to v (..., N); return (..., N + 1)."""
    wider = empty((*v.shape[:-1], v.shape[-1] + 1), v.dtype)
    wider[..., :-1], wider[..., -1] = v, last
    return wider


def columns_of(v: Any, n: int) -> list[Any]:
    """Split v (K, B, nH) into n views (K, H, B)."""
    H = v.shape[-1] // n
    return [transposed(v)[:, i * H : (i + 1) * H] for i in range(n)]


def steps_over(arrays: list[Any], alive: Any, backwards: bool) -> Any:
    """Iterate over the steps: an entry of each array, and the mask of skipped rows, or None."""
    ended = [None if mask is None else ~mask.T for mask in alive or [None] * len(arrays[-1])]
    # a list, since CPython 3.11 loses a tuple where a generator stands behind the star
    return zip(*[v[::-1] if backwards else v for v in (*arrays, ended)], strict=True)


# source ------------------------------------------------------------------------------------------


class Scan(Protocol):
    """A scan of NumPy calls; see `NumPySource.source`."""

    def __call__(
        self,
        over: Iterable[tuple[Array, ...]],
        M: Array,
        vectors: Sequence[Array],
        shape: Shape,
        dtype: DType,
        *dh: Array,
    ) -> Array:
        """Run all steps."""


@lru_cache(maxsize=64)
def forward_scan(step: Step, vectors: int, keep: bool, extra: Kinds = ()) -> Scan:
    """Return a function that runs a forward scan."""
    return executed(NumPySource(forward_schedule(step, vectors, keep, HOST, extra)))


@lru_cache(maxsize=64)
def backward_scan(step: Step, saved: int, given: bool, taps: bool, extra: Kinds = ()) -> Scan:
    """Return a function that runs a backward scan."""
    return executed(NumPySource(backward_schedule(step, saved, given, taps, HOST, extra)))


def executed(printer: NumPySource) -> Scan:
    """Return the function `scan` of a printer."""
    scope: dict[str, Any] = {name: getattr(np, name) for name in printer.functions}
    exec(printer.source(), scope)
    scan: Scan = scope["scan"]
    quiet = np.errstate(over="ignore", under="ignore")  # exp is then inf or 0, as it should be
    return quiet(scan) if "exp" in printer.functions else scan
