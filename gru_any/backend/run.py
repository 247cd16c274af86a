"""Which way of running blocks of steps a backend has."""

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

from .plain import Plain


def runner(backend: Any) -> Plain:
    """How this backend runs a block of steps.

    NumPy's is compiled where Numba is installed. GRU_ANY_NO_NUMBA=1 does without it, and
    GRU_ANY_PLAIN=1 evaluates the equations as they stand.
    """
    if not backend.host or os.environ.get("GRU_ANY_PLAIN"):
        return Plain(backend.xp, backend.device)
    if os.environ.get("GRU_ANY_NO_NUMBA") or not _has_numba():
        from .numpy import NumPy

        return NumPy(backend.xp, backend.device)
    from .numba import Numba

    return Numba(backend.xp, backend.device)


@cache
def _has_numba() -> bool:
    return find_spec("numba") is not None
