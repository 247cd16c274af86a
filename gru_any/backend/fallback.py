"""Numba's runner, which leaves to NumPy's what Numba turns out not to compile here."""

from collections.abc import Callable
from typing import Any

import numpy as np

from . import numba
from .compiled import give_up, may_be_numbas
from .numpy import NumPy, Rows
from .packed import Packed


class Numba(numba.Numba):
    """Runs blocks of steps with compiled loops where they compile, else as NumPy does."""

    def rows(self, v: Any) -> Any:
        found = super().rows(v)
        return found.view(Tiled) if type(found) is numba.Tiled else found

    def prepared(self, *arguments: Any) -> Any:
        return attempt(
            lambda: super(Numba, self).prepared(*arguments),
            lambda: NumPy.prepared(self, *arguments),
        )

    def packed(self, *arguments: Any) -> tuple[Any, Any, Any]:
        return attempt(
            lambda: super(Numba, self).packed(*arguments), lambda: NumPy.packed(self, *arguments)
        )

    def forward(self, step: Any, a: Any, h: Any, recurrent: Any, *others: Any) -> tuple[Any, Any]:
        def on_numpy() -> tuple[Any, Any]:
            affine = NumPy.affine(self, a.x, _matrix(a.W), a.b) if isinstance(a, numba.Input) else a
            plain = (_matrix(recurrent[0]), *recurrent[1:])
            return NumPy.forward(self, step, affine, h, plain, *others)

        return attempt(lambda: super(Numba, self).forward(step, a, h, recurrent, *others), on_numpy)

    def backward(
        self, step: Any, dy: Any, dh: Any, previous: Any, saved: Any, U: Any, *others: Any
    ) -> tuple[Any, Any, Any]:
        given = (step, dy, dh, previous, saved)
        return attempt(
            lambda: super(Numba, self).backward(*given, U, *others),
            lambda: NumPy.backward(self, *given, _matrix(U), *others),
        )


class Tiled(numba.Tiled):
    """A matrix whose product from the left is ours where it compiles."""

    def into(self, M: Any, out: Any) -> None:
        attempt(
            lambda: super(Tiled, self).into(M, out),
            lambda: Rows.into(self.view(Rows), _matrix(M), out),
        )


def attempt(call: Callable[[], Any], instead: Callable[[], Any]) -> Any:
    """Return call(), or instead() where Numba fails; then it is not asked again."""
    try:
        try:
            return call()
        except OSError as e:  # the folder has gone: what was compiled is in memory now
            if e.errno is None:
                raise
            return call()
    except Exception as e:
        if not may_be_numbas(e):
            raise
        failure = e
    found = instead()  # raises where Numba was not to blame
    give_up(failure)
    return found


def _matrix(M: Any) -> Any:
    return np.asarray(M.matrix) if isinstance(M, Packed) else M
