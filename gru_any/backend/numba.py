"""How Numba runs a block of steps: the traced equations, as one compiled walk over all steps.

Rows of a batch do not need each other, so they are split over threads, which never wait for one
another. Where there are few rows and many units, the units are split, and the threads wait for each
other at each product. All products are our own: BLAS keeps its threads busy for a while after each.
"""

from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from .compiled import compiled
from .fused import Layout, Place
from .memory import empty
from .numpy import NumPy, Rows, backward_program, forward_program
from .packed import Packed, addresses, own, product
from .plain import Plain
from .single import outer, times
from .threads import ALONE, GRAIN, count, split, together

FEW = 8  # so few rows in all are not worth a copy of the matrix
SHARED = 40_000  # multiply-adds of a step that are worth a wait of the threads for each other
NOTHING, NO_PRODUCTS = np.zeros((0, 0), bool), np.zeros(0, int)


class Numba(NumPy):
    """Runs blocks of steps with compiled loops, in float32 and float64."""

    def laid_out(self, W: Any, rows: int, times: int) -> Any:
        """As `Plain.laid_out`."""
        few = rows == 1 or rows * times <= FEW
        return W if few or W.dtype.kind == "c" else Packed(W)

    def affine(self, x: Any, W: Any, b: Any) -> Any:
        """As `Plain.affine`."""
        if not isinstance(W, Packed):
            return Plain.affine(self, x, W, b)
        (K, B, n), N = x.shape, len(W.matrix)
        out = self._empty((K, B, N), x.dtype)
        rows = out.reshape(K * B, N)
        product(x.reshape(K * B, n), W.panels(slice(0, N), True, 1), b, rows)
        return out

    def _empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return empty(shape, dtype)

    def rows(self, v: Any) -> Any:
        """As `Plain.rows`."""
        return super().rows(v).view(Rows if v.dtype.kind == "c" else Tiled)

    def prepared(self, step: Any, W: Any, b: Any, recurrent: Any) -> Any:
        """As `Plain.prepared`."""
        many = super().prepared(step, W, b, recurrent)
        if W.dtype.kind == "c":
            return many
        call = forward_step(step, len(recurrent) - 1, W.dtype)
        b = np.zeros(len(W), W.dtype) if b is None else b
        W, b, *others = map(own, (W, b, *recurrent))

        def one(x: Any, h: Any) -> Any:
            if len(x) > FEW:
                return many(x, h)
            try:
                return call(x, W, b, h, *others)
            except TypeError:  # not of the types that it was compiled for
                return call(own(x), W, b, own(h), *others)

        return one

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
        """As `Plain.forward`."""
        if a.dtype.kind == "c":
            return super().forward(step, a, h, recurrent, alive, reverse, keep)
        (K, B, _), H = a.shape, h.shape[-1]
        few = not isinstance(recurrent[0], Packed)
        walk = forward_walk(step, len(recurrent) - 1, keep, a.dtype, few)
        path = self._empty((K + 1, B, H), a.dtype)
        path[K if reverse else 0] = h
        saved = [self._empty((K, B, H), a.dtype) for _ in walk.widths]
        arrays = [a, path, *map(own, recurrent[1:]), *saved]
        walk(_forwards(K, reverse), arrays, path, recurrent[0], alive)
        return path, tuple(saved) if keep else None

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
        """As `Plain.backward`."""
        K, B, H = previous.shape
        few = not isinstance(U, Packed)
        walk = backward_walk(step, len(saved), dy is not None, taps, dh.dtype, few)
        parts = [self._empty((K, B, n * H), dh.dtype) for n in walk.widths]
        pair = np.empty((2, B, H), dh.dtype)
        pair[0] = dh
        arrays = [*([] if dy is None else [own(dy)]), pair, previous, *saved, *parts]
        walk(_backwards(K, reverse), arrays, pair, U, alive)
        g = parts.pop() if taps else None
        return tuple(parts), pair[K % 2], g


class Tiled(Rows):
    """A matrix whose product from the left is ours."""

    def into(self, M: Any, out: Any) -> None:
        """As `Rows.into`."""
        packed, matrix = (M, M.matrix) if isinstance(M, Packed) else (None, M)
        few, K = packed is None and len(self) <= FEW, len(matrix)
        if K == 1:
            outer(self[:, 0], matrix[0], out)
        elif packed is None and len(self) == 1:
            times(self[0], matrix, out[0])
        elif few or K < 2 or matrix.shape[1] < 4:
            super().into(matrix, out)
        else:
            packed = packed or Packed(matrix)
            product(self.view(np.ndarray), packed.panels(slice(0, K), False, 1), None, out)


@lru_cache(maxsize=64)
def _forwards(K: int, reverse: bool) -> tuple[Any, Any, Any]:
    """For each step walked: its number, and where the state before and after it stands."""
    t = np.arange(K)[::-1].copy() if reverse else np.arange(K)
    return t, t + reverse, t + (not reverse)


@lru_cache(maxsize=64)
def _backwards(K: int, reverse: bool) -> tuple[Any, Any, Any]:
    """For each step walked back: its number, and which of the pair is dh before and after it."""
    t, turn = np.arange(K) if reverse else np.arange(K)[::-1].copy(), np.arange(K) % 2
    return t, turn, 1 - turn


# the walks ---------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def forward_walk(step: Any, vectors: int, keep: bool, dtype: Any, few: bool) -> Any:
    """A function that walks a block of steps forward."""
    program = forward_program(step, vectors, keep)
    (a, (h,), _, *c) = program.inputs
    inputs = {column: Place(("a", "t", n)) for n, column in enumerate(a)}
    inputs[h] = Place(("path", "i", 0))
    inputs |= {column: Place((f"c{n}", None, 0)) for n, (column,) in enumerate(c)}  # type: ignore[arg-type]
    results = {program.result: [Place(("path", "o", 0))]}
    saved = [f"s{n}" for n in range(len(program.extras))]
    for name, (column,) in zip(saved, program.extras, strict=True):
        results.setdefault(column, []).append(Place((name, "t", 0)))
    arrays = ["a", "path", *(f"c{n}" for n in range(vectors)), *saved]
    return Walk(Layout(program, inputs, results), arrays, "path", program.extras, dtype, few)


@lru_cache(maxsize=64)
def forward_step(step: Any, vectors: int, dtype: Any) -> Any:
    """A function that takes a few rows one step forward: x, W, b, h, U, ... -> h'."""
    walk = forward_walk(step, vectors, False, dtype, True)
    return compiled(walk.source + walk.layout.single([f"c{n}" for n in range(vectors)], dtype)).step


@lru_cache(maxsize=64)
def backward_walk(step: Any, saved: int, given: bool, taps: bool, dtype: Any, few: bool) -> Any:
    """A function that walks a block of steps back."""
    program = backward_program(step, saved, given, taps)
    names = [*(["dy"] if given else []), "pair", "previous", *(f"s{n}" for n in range(saved))]
    columns = [c for ids in program.inputs for c in ids]
    inputs = {
        c: Place((name, "i" if name == "pair" else "t", 0))
        for c, name in zip(columns, names, strict=True)
    }
    results = {program.result: [Place(("pair", "o", 0))]}
    for p, extra in enumerate(program.extras):
        names.append(f"p{p}")
        for n, column in enumerate(extra):
            results.setdefault(column, []).append(Place((f"p{p}", "t", n)))
    return Walk(Layout(program, inputs, results), names, "pair", program.extras, dtype, few)


class Walk:
    """Walks a block of steps in compiled code.

    widths: of the arrays beside the state that a step gives, in columns.
    """

    def __init__(
        self, layout: Layout, names: list[str], state: str, extras: Any, dtype: Any, few: bool
    ) -> None:
        self.widths = [len(extra) for extra in extras]
        self.layout, self.few = layout, few
        self.source = layout.source(names, state, dtype.name, few)

    @cached_property
    def walk(self) -> Any:
        """The compiled function."""
        return compiled(self.source).walk

    def __call__(self, steps: Any, arrays: list[Any], state: Any, U: Any, alive: Any) -> None:
        """Fill the arrays that results go to. U (3H, H); state (., B, H) is one of the arrays."""
        B, H = state.shape[1:]
        matrices = [self._matrix(op, U, H) for op in self.layout.products]
        buffers = [np.empty((B, n * H), state.dtype) for n in self.layout.buffers.values()]
        arrays, ended = [*matrices, *arrays, *buffers], _ended(alive, B)
        zeros, walk = np.zeros(3 * H, state.dtype), self.walk
        functions = NO_PRODUCTS if self.few else addresses(state.dtype)
        of_step, members = 3 * B * H * H, min(count(), H // 64)
        work = of_step * len(steps[0])

        def rows(first: int, last: int) -> None:
            walk(*steps, ended, zeros, first, last, 0, ALONE, functions, *arrays)

        def units(me: int, sync: np.ndarray) -> None:
            walk(*steps, ended, zeros, 0, B, me, sync, functions, *arrays)

        if B < 8 and members > 1 and of_step >= SHARED and work >= GRAIN:
            together(units, members)
        else:
            split(rows, B, work)

    def _matrix(self, op: Any, U: Any, H: int) -> Any:
        rows = slice(op.rows.start * H, op.rows.stop * H)
        return own(U[rows]) if self.few else U.panels(rows, op.transposed, len(op.outputs))


def _ended(alive: Any, B: int) -> Any:
    """Which rows have ended at which step, (K, B); empty where none has."""
    if alive is None:
        return NOTHING
    ended = np.zeros((len(alive), B), bool)
    for row, mask in zip(ended, alive, strict=True):
        if mask is not None:
            row[:] = ~mask[:, 0]
    return ended
