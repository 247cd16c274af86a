"""Which way of running blocks of steps a backend has."""

import os
from typing import Any

from .plain import Plain


def runner(backend: Any) -> Plain:
    """How this backend runs a block of steps. GRU_ANY_PLAIN=1: the equations as they stand."""
    if not backend.host or os.environ.get("GRU_ANY_PLAIN"):
        return Plain(backend.xp, backend.device)
    from .numpy import NumPy

    return NumPy(backend.xp, backend.device)
