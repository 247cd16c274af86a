"""How blocks of steps run on dual numbers: two scans of the runner of their values.

The derivatives of a block follow a recurrence of their own, which is linear in them: once the
states are known, step t leads from h'_t to h'_(t+1) by numbers that do not depend on h'. It has the
form of a backward scan, and its step is that of the equations on dual numbers. So whatever runs
backward scans, compiled or as a kernel, runs it; no derivative of a step is written by hand.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from ..typing import Array, Device, Namespace, Step
from .contract import Alive, Extra, InputProducts, Matrix, Recurrent, Runner
from .dual import Dual, DualNamespace, value_of
from .reference import Plain

# (xp, state, other arguments, U) -> the next state, and the other results of the step
Call: TypeAlias = Callable[..., tuple[Array, tuple[Array, ...]]]


class Entry(NamedTuple):
    """An argument of a step: its columns of width H, and whether it has a derivative."""

    columns: int
    dual: bool


class KnownProducts:
    """A stand-in for U whose products are known, up to the term of the state's derivative."""

    def __init__(self, matrix: Matrix, products: Iterator[Array]) -> None:
        self.matrix, self.products = matrix, products

    def __getitem__(self, key: slice | tuple[slice, ...]) -> "KnownProducts":
        return KnownProducts(self.matrix[key], self.products)

    T = property(lambda self: KnownProducts(self.matrix.T, self.products))

    def __rmatmul__(self, left: Dual) -> Dual:
        known, dot = next(self.products), left.dot @ self.matrix
        if isinstance(known, Dual):
            return Dual(known.value, known.dot + dot, known.space)
        return Dual(known, dot, left.space)


class Recorder:
    """A stand-in for U that multiplies all rows of a block at once, and records the products.

    dot: the derivative of U, or None.
    """

    __array_ufunc__ = None

    def __init__(
        self, run: Runner, matrix: Array, dot: Array | None, found: list[list[Array]]
    ) -> None:
        self.run, self.matrix, self.dot, self.found = run, matrix, dot, found

    def _each(self, function: Callable[[Array], Array]) -> "Recorder":
        dot = None if self.dot is None else function(self.dot)
        return Recorder(self.run, function(self.matrix), dot, self.found)

    def __getitem__(self, key: slice | tuple[slice, ...]) -> "Recorder":
        return self._each(lambda v: v[key])

    T = property(lambda self: self._each(lambda v: v.T))

    def __rmatmul__(self, left: Array) -> Array:
        factors = [v for v in (self.matrix, self.dot) if v is not None]
        self.found.append([self.run.product(left, v) for v in factors])
        return self.found[-1][0]


@lru_cache(maxsize=64)
def _forward(step: Step, keep: bool, cut: bool) -> Call:
    """Return a step as a function of its state, the other arguments and U.

    keep: whether its residuals are among the results; cut: whether h' is, at the end.
    """

    def call(
        xp: Namespace, h: Array, others: Sequence[Array], U: Matrix
    ) -> tuple[Array, tuple[Array, ...]]:
        a, *vectors = others
        new, saved = step(xp, a, h, U, *vectors)
        return new, (*(saved if keep else ()), *((new,) if cut else ()))

    return call


@lru_cache(maxsize=64)
def _backward(step: Step, saved: int) -> Call:
    """Return a backward step as such a function, whose state is g; saved: number of residuals."""

    def call(
        xp: Namespace, g: Array, others: Sequence[Array], U: Matrix
    ) -> tuple[Array, tuple[Array, ...]]:
        h, kept, further = others[0], others[1 : saved + 1], others[saved + 1 :]
        return step(xp, g, h, kept, U, *further)

    return call


@lru_cache(maxsize=64)
def tangent(call: Call, others: tuple[Entry, ...], products: tuple[Entry, ...]) -> Step:
    """Return the step of the derivative, in the form of a gradient of a step.

    It takes the derivative of the state, the state, and the columns of `others` and `products`.
    """

    def step(
        xp: Namespace, dot: Array, state: Array, columns: Sequence[Array], U: Matrix
    ) -> tuple[Array, tuple[Array, ...]]:
        space, left = DualNamespace(xp), iter(columns)

        def joined(n: int) -> Array:
            parts = [next(left) for _ in range(n)]
            return parts[0] if n == 1 else xp.concat(parts, axis=-1)

        def taken(entry: Entry) -> Array:
            value = joined(entry.columns)
            return Dual(value, joined(entry.columns), space) if entry.dual else value

        given = [taken(entry) for entry in others]
        known = KnownProducts(U, iter([taken(entry) for entry in products]))
        new, beside = call(space, Dual(state, dot, space), given, known)
        return new.dot, tuple(v.dot for v in beside)

    return step


def _split_cut(extra: Extra | None) -> tuple[tuple[Array, ...], Extra | None]:
    """Split the further arguments of a step: those before the cut, and the cut with its start."""
    if extra is None or not extra.cut:
        return () if extra is None else extra.arrays, None
    n = len(extra.arrays) - 1 - extra.start
    return extra.arrays[:n], Extra(extra.kinds[n:], extra.arrays[n:])


def _values(extra: Extra | None) -> Extra | None:
    return None if extra is None else extra._replace(arrays=tuple(map(value_of, extra.arrays)))


def _begins(xp: Namespace, cut: Array, alive: Alive, reverse: bool) -> tuple[Array, Array]:
    """Return at which steps rows start anew (K, B, 1), and which rows are cut at the end (B, 1).

    A row starts anew at the first step that it runs after a cut.
    """
    K = cut.shape[0]
    waiting, found = xp.zeros_like(cut[0, :, :]), []
    for t in range(K - 1, -1, -1) if reverse else range(K):
        mask = None if alive is None else alive[t]
        found.append(waiting if mask is None else waiting & mask)
        waiting = cut[t, :, :] if mask is None else xp.where(mask, cut[t, :, :], waiting)
    return xp.stack(found[::-1] if reverse else found), waiting


class DualRunner(Plain):
    """Runs blocks of steps on dual numbers by the runner of their values."""

    def __init__(self, xp: DualNamespace, device: Device, inner: Runner) -> None:
        super().__init__(xp, device)
        self.inner, self.whole = inner, inner.whole

    def product(self, left: Array, right: Matrix) -> Array:
        product, (a, b) = self.inner.product, (value_of(left), value_of(right))
        dots = [product(left.dot, b)] if isinstance(left, Dual) else []
        dots += [product(a, right.dot)] if isinstance(right, Dual) else []
        return Dual(product(a, b), sum(dots[1:], dots[0]), self.xp) if dots else product(a, b)

    def as_contiguous(self, v: Array) -> Array:
        copy = self.inner.as_contiguous
        return v._each(copy) if isinstance(v, Dual) else copy(v)

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
        U, *vectors = recurrent
        (K, B, _), run, xp = a.shape, self.inner, self.xp.plain
        if not K * B:
            return super().forward(step, a, h, recurrent, alive, reverse, keep, extra)
        packed, (further, cut) = self._packed(U, K * B), _split_cut(extra)
        values = value_of(h), (packed, *map(value_of, vectors)), alive, reverse, keep
        states, saved = run.forward(step, value_of(a), *values, _values(extra))
        start = cut.arrays[0] if cut is not None and cut.start else None
        if not any(isinstance(v, Dual) for v in (a, h, *recurrent, start)):
            return states, saved
        before = states[1:, :, :] if reverse else states[:-1, :, :]
        spread = [self._spread(v, before.shape) for v in (*vectors, *further)]
        made, columns = self._tangent(
            _forward(step, keep, cut is not None), before, [a, *spread], U
        )
        dh = h.dot if isinstance(h, Dual) else xp.zeros_like(h)
        begins, ended, added = None, None, None
        begun = start.dot if isinstance(start, Dual) else xp.zeros_like(dh)
        if cut is not None:
            starts, ended = _begins(xp, cut.arrays[-1], alive, reverse)
            begins = Extra(cut.kinds[-1:], (starts,))
            if isinstance(start, Dual):
                added = xp.where(starts, begun[None, :, :], xp.zeros_like(before))
        dots, last, before = run.backward(
            made, added, dh, before, columns, packed, alive, not reverse, True, begins
        )
        last = last if ended is None else xp.where(ended, begun, last)
        ends = (last[None, :, :], before) if reverse else (before, last[None, :, :])
        path = Dual(states, xp.concat(ends), self.xp)
        return path, None if saved is None else self._pairs(saved, dots)

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
        (K, B, _), run = previous.shape, self.inner
        further, cut = _split_cut(extra)
        given = dy, dh, previous, *saved, U, *further
        if not K * B:
            return super().backward(step, dy, dh, previous, saved, U, alive, reverse, taps, extra)
        packed, kept = self._packed(U, K * B), [value_of(v) for v in saved]
        values = value_of(dy), value_of(dh), value_of(previous), kept, packed, alive, reverse
        parts, last, g = run.backward(step, *values, True, _values(extra))
        if not any(isinstance(v, Dual) for v in given):
            return parts, last, g if taps else None
        spread = [self._spread(v, previous.shape) for v in further]
        call = _backward(step, len(saved))
        made, columns = self._tangent(call, g, [previous, *saved, *spread], U)
        dots = [v.dot if isinstance(v, Dual) else None for v in (dy, dh)]
        dh_dot = self.xp.plain.zeros_like(last) if dots[1] is None else dots[1]
        scan = made, dots[0], dh_dot, g, columns, packed, alive, reverse, taps, _values(cut)
        parts_dot, last_dot, g_dot = run.backward(*scan)
        pairs = self._pairs(parts, parts_dot), Dual(last, last_dot, self.xp)
        return *pairs, Dual(g, g_dot, self.xp) if taps else None

    def _tangent(
        self, call: Call, state: Array, others: Sequence[Array], U: Matrix
    ) -> tuple[Step, list[Array]]:
        """Return the step of the derivative, and its columns, each (K, B, H)."""
        run, (K, _, H) = self.inner, state.shape
        found: list[list[Array]] = []
        dot = U.dot if isinstance(U, Dual) else None
        rows = [run.as_matrix(value_of(v)) for v in others]
        recorder = Recorder(run, value_of(U), dot, found)
        call(self.xp.plain, run.as_matrix(state), rows, recorder)
        products = [[run.as_steps(v, K) for v in pair] for pair in found]
        given = [[v.value, v.dot] if isinstance(v, Dual) else [v] for v in others]
        kinds = [
            tuple(Entry(pair[0].shape[-1] // H, len(pair) == 2) for pair in pairs)
            for pairs in (given, products)
        ]
        columns = [v for pair in (*given, *products) for v in pair]
        return tangent(call, *kinds), [c for v in columns for c in self._columns(v, H)]

    def _columns(self, v: Array, H: int) -> list[Array]:
        """Split v (K, B, nH) into n contiguous arrays (K, B, H)."""
        if v.shape[-1] == H:
            return [v]
        starts = range(0, v.shape[-1], H)
        return [self.inner.as_contiguous(v[:, :, n : n + H]) for n in starts]

    def _packed(self, U: Matrix, rows: int) -> Matrix:
        value = value_of(U)
        return self.inner.pack_weights(value, value, rows)[1]

    def _spread(self, vector: Array, shape: tuple[int, ...]) -> Array:
        """Broadcast a vector (H,) to all steps and rows."""
        return self.as_contiguous(self.xp.broadcast_to(vector, shape))

    def _pairs(self, values: Sequence[Array], dots: Sequence[Array]) -> tuple[Array, ...]:
        return tuple(Dual(v, d, self.xp) for v, d in zip(values, dots, strict=True))
