"""How a few steps of a batch run: products by BLAS, the rest compiled.

Weights are used as they stand, since packing them for one step costs as much as a product. BLAS
also keeps its threads awake, where waking ours would take as long as a whole step. The operations
between two products become one compiled loop.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from ...codegen.brief_source import BriefSource
from ...codegen.numpy_source import NumPySource
from ...codegen.schedule import (
    HOST,
    Kinds,
    Schedule,
    backward_program,
    backward_schedule,
    forward_program,
    forward_schedule,
)
from ...typing import Step
from ..contract import Extra, kinds_of
from .jit_cache import compiled, rescued
from .numpy_runner import (
    NumPy,
    Scan,
    columns_of,
    executed,
    further,
    spread,
    steps_over,
    turned,
    vectors_of,
)
from .packed import PackedMatrix


class Brief(NumPy):
    """Runs blocks of a few steps as NumPy does, with compiled loops between two products."""

    def affine(self, x: Any, W: Any, b: Any) -> Any:
        W = _matrix(W)
        a = self._empty((*x.shape[:2], len(W)), x.dtype)
        columns = turned(a)
        np.matmul(W, turned(np.ascontiguousarray(x)), out=columns)
        if b is not None:
            columns += b[:, None]
        return a

    def as_matrix(self, v: Any) -> Any:
        return v[0] if v.ndim == 3 and len(v) == 1 else super().as_matrix(v)

    def forward(self, step: Any, a: Any, h: Any, recurrent: Any, *others: Any) -> tuple[Any, Any]:
        U, *vectors = recurrent
        given = step, a, h, (_matrix(U), *vectors), *others
        try:
            return self._forward(*given)
        except Exception as e:
            found: tuple[Any, Any] = rescued(
                e, lambda: self._forward(*given), lambda: super(Brief, self).forward(*given)
            )
            return found

    def _forward(
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
        (K, B, _), H, (U, *vectors) = a.shape, h.shape[-1], recurrent
        program = forward_program(step, len(vectors), keep, kinds_of(extra))
        scan = forward_scan(step, len(vectors), keep, a.dtype.name, kinds_of(extra))
        path = self._empty((K + 1, B, H), a.dtype)
        path[K if reverse else 0] = h
        saved = tuple(self._empty((K, B, H), a.dtype) for _ in program.extras)
        ends = (path[1:], path[:-1]) if reverse else (path[:-1], path[1:])
        wide = [*map(turned, ends), *further(extra, K), *map(turned, saved)]
        over = steps_over([*columns_of(a, 3), turned(a)[:, : 2 * H], *wide], alive, reverse)
        scan(over, U, spread((*vectors, *vectors_of(extra)), B), (H, B), a.dtype)
        return path, saved or None

    def backward(
        self, step: Any, dy: Any, dh: Any, previous: Any, saved: Any, U: Any, *others: Any
    ) -> tuple[Any, Any, Any]:
        given = step, dy, dh, previous, saved, _matrix(U), *others
        try:
            return self._backward(*given)
        except Exception as e:
            found: tuple[Any, Any, Any] = rescued(
                e, lambda: self._backward(*given), lambda: super(Brief, self).backward(*given)
            )
            return found

    def _backward(
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
        kinds = step, len(saved), dy is not None, taps
        scan = backward_scan(*kinds, dh.dtype.name, kinds_of(extra))
        widths = [len(extra) for extra in backward_program(*kinds, kinds_of(extra)).extras]
        parts = [self._empty((K, B, n * H), dh.dtype) for n in widths]
        given = [] if dy is None else [np.ascontiguousarray(turned(dy))]
        given += [np.ascontiguousarray(turned(v)) for v in (previous, *saved)]
        given += further(extra, K)
        columns = [c for part, n in zip(parts, widths, strict=True) for c in columns_of(part, n)]
        over = steps_over([*given, *columns, *map(turned, parts)], alive, not reverse)
        dh = scan(over, U, spread(vectors_of(extra), B), (H, B), dh.dtype, dh.T)
        g = parts.pop() if taps else None
        return tuple(parts), dh.T, g


def _matrix(M: Any) -> Any:
    return M.matrix if isinstance(M, PackedMatrix) else M


@lru_cache(maxsize=64)
def forward_scan(step: Step, vectors: int, keep: bool, dtype: str, extra: Kinds) -> Scan:
    """Return a function that runs a forward scan."""
    return _built(forward_schedule(step, vectors, keep, HOST, extra), dtype)


@lru_cache(maxsize=64)
def backward_scan(
    step: Step, saved: int, given: bool, taps: bool, dtype: str, extra: Kinds
) -> Scan:
    """Return a function that runs a backward scan."""
    return _built(backward_schedule(step, saved, given, taps, HOST, extra), dtype)


def _built(schedule: Schedule, dtype: str) -> Scan:
    if any(group.means for group in schedule.groups):
        return executed(NumPySource(schedule))  # whose means are not along a compiled loop
    printer = BriefSource(schedule, dtype)
    return executed(printer, vars(compiled(printer.loops)))
