"""Numba's runner, which falls back to NumPy's where Numba fails to compile."""

from collections.abc import Callable
from typing import Any

import numpy as np

from . import numba_runner as numba
from .jit_cache import rescued
from .numpy_runner import NumPy
from .packed import PackedMatrix


class Numba(numba.Numba):
    """Runs blocks of steps with compiled loops, or as the NumPy runner if these do not compile."""

    def multiply(self, left: Any, right: Any, out: Any) -> None:
        try:
            super().multiply(left, right, out)
        except Exception as e:
            rescued(
                e,
                lambda: super(Numba, self).multiply(left, right, out),
                lambda: NumPy.multiply(self, left, _matrix(right), out),
            )

    def prepare_step(self, *arguments: Any) -> Any:
        return _guarded(super().prepare_step, NumPy.prepare_step, self, arguments)

    def prepare_block(self, *arguments: Any) -> Any:
        return _guarded(super().prepare_block, NumPy.prepare_block, self, arguments)

    def frozen_weights(self, *arguments: Any) -> tuple[Any, Any, Any]:
        try:
            return super().frozen_weights(*arguments)
        except Exception as e:
            found: tuple[Any, Any, Any] = rescued(
                e,
                lambda: super(Numba, self).frozen_weights(*arguments),
                lambda: NumPy.frozen_weights(self, *arguments),
            )
            return found

    def frozen_matrix(self, *arguments: Any) -> Any:
        try:
            return super().frozen_matrix(*arguments)
        except Exception as e:
            return rescued(
                e,
                lambda: super(Numba, self).frozen_matrix(*arguments),
                lambda: NumPy.frozen_matrix(self, *arguments),
            )

    def frozen_affine(self, x: Any, W: Any, b: Any) -> Any:
        try:
            return super().frozen_affine(x, W, b)
        except Exception as e:
            return rescued(
                e,
                lambda: super(Numba, self).frozen_affine(x, W, b),
                lambda: NumPy.frozen_affine(self, x, _matrix(W), b),
            )

    def forward(self, *given: Any) -> tuple[Any, Any]:
        try:
            return super().forward(*given)
        except Exception as e:
            found: tuple[Any, Any] = rescued(
                e,
                lambda: super(Numba, self).forward(*given),
                lambda: self._on_numpy(*given),
            )
            return found

    def _on_numpy(self, step: Any, a: Any, h: Any, recurrent: Any, *others: Any) -> tuple[Any, Any]:
        a = NumPy.affine(self, a.x, _matrix(a.W), a.b) if isinstance(a, numba.Input) else a
        return NumPy.forward(self, step, a, h, (_matrix(recurrent[0]), *recurrent[1:]), *others)

    def backward(
        self, step: Any, dy: Any, dh: Any, previous: Any, saved: Any, U: Any, *others: Any
    ) -> tuple[Any, Any, Any]:
        given = (step, dy, dh, previous, saved)
        try:
            return super().backward(*given, U, *others)
        except Exception as e:
            found: tuple[Any, Any, Any] = rescued(
                e,
                lambda: super(Numba, self).backward(*given, U, *others),
                lambda: NumPy.backward(self, *given, _matrix(U), *others),
            )
            return found


def _guarded(
    prepare: Callable[..., Any], instead: Callable[..., Any], run: Numba, arguments: Any
) -> Any:
    """Return the function of two arrays that `prepare` makes, and that of `instead` if it fails."""
    general = instead(run, *arguments)
    try:
        fast = prepare(*arguments)
    except Exception as e:
        return rescued(e, lambda: prepare(*arguments), lambda: general)

    def call(x: Any, h: Any) -> Any:
        try:
            return fast(x, h)
        except Exception as e:
            return rescued(e, lambda: fast(x, h), lambda: general(x, h))

    return call


def _matrix(M: Any) -> Any:
    return np.asarray(M.matrix) if isinstance(M, PackedMatrix) else M
