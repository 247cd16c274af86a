"""Which way of running blocks of steps a backend has."""

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

from .plain import Plain


def _chosen() -> str:
    """What the environment asks for on NumPy: "plain", "traced", or else "compiled"."""
    if os.environ.get("GRU_ANY_PLAIN"):
        return "plain"
    return "traced" if os.environ.get("GRU_ANY_NO_NUMBA") else "compiled"


chosen = _chosen()


def runner(backend: Any) -> Plain:
    """How this backend runs a block of steps.

    NumPy's is compiled where Numba is installed. GRU_ANY_NO_NUMBA=1 does without it, and
    GRU_ANY_PLAIN=1 evaluates the equations as they stand; both are read at the import.
    """
    return _runner(backend, chosen if backend.host else "plain")


@cache
def _runner(backend: Any, way: str) -> Plain:
    if way == "plain":
        return Plain(backend.xp, backend.device)
    if way == "traced" or find_spec("numba") is None:
        from .numpy import NumPy

        return NumPy(backend.xp, backend.device)
    from .numba import Numba

    return Numba(backend.xp, backend.device)


def environment(backend: Any) -> dict[str, str]:
    """What may change the last bits of a number: versions, threads, and how the backend runs."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from .threads import count

    def release(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    versions = {name: release(name) for name in ("gru-any", "numpy", "numba")}
    return {
        "Python": platform.python_version(),
        **versions,
        "threads": str(count()),
        "backend": f"{backend.name} on {backend.device}",
        "runner": type(runner(backend)).__name__,
    }
