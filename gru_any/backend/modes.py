"""Which way of running blocks of steps a backend has, and why."""

import os
from functools import cache
from typing import Any

from .cpu import buffers as memory
from .cpu.jit_cache import problem, trial
from .reference import Plain

# from the simplest to the fastest, as we believe; "whole" has to be asked for
CUDA = ("plain", "eager", "blocks", "graph", "persistent", "whole")


OFF, ON = ("", "0", "false", "no", "off"), ("1", "true", "yes", "on")

# what tests and scripts ask for, in place of the environment
chosen: str | None = None
chosen_on_cuda: str | None = None


def switch(name: str) -> bool:
    """Read a switch from the environment.

    Raises
    ------
    ValueError
        It is neither on nor off.
    """
    value = os.environ.get(name, "").strip().lower()
    if value not in OFF + ON:
        raise ValueError(f"the environment variable {name} is {value!r}, expected 1 or 0")
    return value in ON


def _chosen() -> str:
    """What the environment asks for on NumPy: "plain", "traced", or else "compiled"."""
    if switch("GRU_ANY_PLAIN"):
        return "plain"
    return "traced" if switch("GRU_ANY_NO_NUMBA") else "compiled"


def _chosen_on_cuda() -> str:
    """The fastest way that may be taken on CuPy; GRU_ANY_CUDA names it."""
    asked = os.environ.get("GRU_ANY_CUDA") or "persistent"
    way = "plain" if switch("GRU_ANY_PLAIN") else asked
    if way not in CUDA:
        raise ValueError(f"GRU_ANY_CUDA is {way!r}, expected one of {', '.join(CUDA)}")
    return way


_chosen_once, _chosen_on_cuda_once = cache(_chosen), cache(_chosen_on_cuda)


def _way(backend: Any) -> str:
    if backend.host:
        return chosen or _chosen_once()
    return (chosen_on_cuda or _chosen_on_cuda_once()) if backend.cuda else "plain"


def runner(backend: Any, precision: str = "full") -> Plain:
    """How this backend runs a block of steps; precision: "tf32" where CUDA may multiply so.

    NumPy's is compiled where Numba is installed and works. GRU_ANY_NO_NUMBA=1 does without it, and
    GRU_ANY_PLAIN=1 evaluates the equations as they stand. GRU_ANY_CUDA=eager (or blocks, or graph,
    or plain) is the fastest way that CuPy may take. Each is read once, by the first call that needs
    it; 0, false and the empty string mean off.
    """
    way = _way(backend)
    if way == "compiled" and problem():
        way = "traced"
    return _runner(backend, way, precision if backend.cuda else "full")


@cache
def _runner(backend: Any, way: str, precision: str) -> Plain:
    if way == "plain":
        return Plain(backend.xp, backend.device)
    if backend.cuda:
        from .cuda.runner import runner_on

        return runner_on(backend, way, precision)
    if way == "traced":
        from .cpu.numpy_runner import NumPy

        return NumPy(backend.xp, backend.device)
    from .cpu.fallback import Numba

    return Numba(backend.xp, backend.device)


def path(backend: Any, hidden_size: int, dtype: str = "float32") -> tuple[str, str]:
    """Which way a call of this size takes, and in words why it is not a faster one.

    The name is "plain", "traced" or "compiled" on NumPy; "plain", "eager" (a kernel between two
    products), "blocks" (those recorded, each block of steps), "graph" (the whole call recorded) or
    "persistent" (a kernel for all steps) on CuPy; else "plain".
    """
    if backend.cuda and dtype != "complex128":
        return _path_on_cuda(backend, hidden_size, dtype)
    if not backend.host:
        return "plain", f"{backend.name} evaluates the equations as they stand, one call a step"
    if dtype == "complex128":
        return "plain", "complex128 serves complex-step differentiation alone"
    if _way(backend) == "plain":
        return "plain", "GRU_ANY_PLAIN is set"
    if _way(backend) == "traced":
        return "traced", "GRU_ANY_NO_NUMBA is set"
    if why := problem() or trial():
        return "traced", why
    return "compiled", "this is the fastest way on NumPy"


def _path_on_cuda(backend: Any, hidden_size: int, dtype: str) -> tuple[str, str]:
    if _way(backend) == "plain":
        return "plain", f"{'GRU_ANY_PLAIN' if switch('GRU_ANY_PLAIN') else 'GRU_ANY_CUDA'} is set"
    run: Any = runner(backend)
    return run.path(hidden_size, dtype)


def recorded(backend: Any, steps: int | None) -> str:
    """In words, whether CUDA records a call of so many steps as a whole; "" elsewhere."""
    if not backend.cuda or _way(backend) == "plain":
        return ""
    run: Any = runner(backend)
    return str(run.recorded(steps))


def forget(backend: Any) -> None:
    """Release the memory kept for later calls, and the calls captured on CUDA."""
    if backend.host:
        memory.forget()
    if backend.cuda and _way(backend) != "plain":
        for precision in ("full", "tf32"):
            run: Any = runner(backend, precision)
            run.forget()


def environment(backend: Any) -> dict[str, str]:
    """What may change the last bits of a number: versions, threads, and how the backend runs."""
    import platform
    from importlib import import_module
    from importlib.metadata import PackageNotFoundError, version

    from .cpu.threads import count

    def release(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    versions = {name: release(name) for name in ("gru-any", "numpy", "numba")}
    library = backend.name.partition(".")[0]  # whose wheel may have another name
    versions[library] = getattr(import_module(library), "__version__", "unknown")
    return {
        "Python": platform.python_version(),
        **versions,
        "threads": str(count()),
        "backend": f"{backend.name} on {backend.device}",
        "runner": type(runner(backend)).__name__,
    }
