"""In which mode a backend runs the steps, and why not in a faster one."""

import os
from functools import cache
from typing import TYPE_CHECKING

from .contract import Mode, Runner
from .cpu import buffers as memory
from .cpu.jit_cache import problem, trial
from .libraries import NUMPY, Backend
from .reference import Plain
from .transfer import Neighbour, neighbour

if TYPE_CHECKING:
    from .cuda.runner import CUDA

# what GRU_ANY_CUDA may name, from the simplest to what should be the fastest
CUDA_MODES = (Mode.PLAIN, Mode.EAGER, Mode.BLOCKS, Mode.GRAPH, Mode.PERSISTENT, Mode.WHOLE)
COMPLEX = "complex128"  # serves complex-step differentiation alone, always in plain mode
OFF, ON = ("", "0", "false", "no", "off"), ("1", "true", "yes", "on")

# modes set by tests and scripts, which override the environment
chosen: Mode | None = None
chosen_on_cuda: Mode | None = None


def switch(name: str) -> bool:
    """Read an environment variable that is on or off.

    Raises
    ------
    ValueError
        It is neither on nor off.
    """
    value = os.environ.get(name, "").strip().lower()
    if value not in OFF + ON:
        raise ValueError(f"the environment variable {name} is {value!r}, expected 1 or 0")
    return value in ON


def _asked() -> Mode:
    """Read the fastest mode that the environment allows NumPy."""
    if switch("GRU_ANY_PLAIN"):
        return Mode.PLAIN
    return Mode.TRACED if switch("GRU_ANY_NO_NUMBA") else Mode.COMPILED


def _asked_on_cuda() -> Mode:
    """Read the fastest mode that the environment allows CuPy."""
    asked = os.environ.get("GRU_ANY_CUDA") or Mode.PERSISTENT
    if switch("GRU_ANY_PLAIN"):
        return Mode.PLAIN
    if asked not in CUDA_MODES:
        raise ValueError(f"GRU_ANY_CUDA is {asked!r}, expected one of {', '.join(CUDA_MODES)}")
    return Mode(asked)


_asked_once, _asked_once_on_cuda = cache(_asked), cache(_asked_on_cuda)


def _allowed(backend: Backend) -> Mode:
    """Return the fastest mode that the user allows this backend."""
    if backend.host or backend.traced:
        return chosen or _asked_once()
    return (chosen_on_cuda or _asked_once_on_cuda()) if backend.cuda else Mode.PLAIN


def serves(backend: Backend) -> bool:
    """Return whether NumPy or CuPy may run the calls of other libraries in its memory."""
    if backend.host:  # the same at less cost, as each call asks
        return (chosen or _asked_once()) != Mode.PLAIN
    return _allowed(backend) != Mode.PLAIN


def serving(backend: Backend, dtype: str) -> Neighbour | None:
    """Return the backend that runs this one's calls; None where it runs them itself."""
    found, _ = neighbour(backend, dtype)
    return found if found and dtype != COMPLEX and serves(found.backend) else None


def runner(backend: Backend, precision: str = "full", dtype: str = "float32") -> Runner:
    """Return the runner of a backend, for a model of this dtype.

    On NumPy it is compiled where Numba is installed and works. GRU_ANY_NO_NUMBA=1 does without
    Numba, and GRU_ANY_PLAIN=1 evaluates the equations as they stand. GRU_ANY_CUDA names the fastest
    mode that CuPy may take: plain, eager, blocks, graph, persistent or whole. Each variable is read
    once, by the first call that needs it.

    precision: "full", or "tf32" where products on CUDA may use it.
    """
    mode = Mode.PLAIN if dtype == COMPLEX else _allowed(backend)
    if mode == Mode.COMPILED and problem():
        mode = Mode.TRACED
    if mode == Mode.TRACED and backend.traced:
        mode = Mode.SCAN
    return _runner(backend, mode, precision if backend.cuda or backend.traced else "full")


@cache
def _runner(backend: Backend, mode: Mode, precision: str) -> Runner:
    if mode == Mode.PLAIN:
        return Plain(backend.xp, backend.device)
    if backend.constants != backend:
        from .dual_runner import DualRunner

        return DualRunner(backend.xp, backend.device, _runner(backend.constants, mode, precision))
    if backend.cuda:
        return _on_cuda(backend, mode, precision)
    if backend.traced:
        return _inside_of_jax(backend, mode, precision)
    if mode == Mode.TRACED:
        from .cpu.numpy_runner import NumPy

        return NumPy(backend.xp, backend.device)
    from .cpu.fallback import Numba

    return Numba(backend.xp, backend.device)


def _inside_of_jax(backend: Backend, mode: Mode, precision: str) -> Runner:
    from .jax_scan import Scan

    if mode == Mode.COMPILED:
        try:
            from .jax_host import OnHost
        except ImportError:  # a JAX without its `buffer_callback`
            pass
        else:
            return OnHost(backend.xp, backend.device, precision, _runner(NUMPY, mode, "full"))
    return Scan(backend.xp, backend.device, precision)


@cache
def _on_cuda(backend: Backend, mode: Mode, precision: str) -> "CUDA":
    from .cuda.runner import runner_on

    return runner_on(backend, mode, precision)


def path(
    backend: Backend, hidden_size: int, dtype: str = "float32", means: bool = False
) -> tuple[Mode, str]:
    """Return the mode of a call, and in words why it is not a faster one.

    means: whether steps take means over rows.
    """
    if dtype == COMPLEX:
        return Mode.PLAIN, "complex128 serves complex-step differentiation alone"
    if not (backend.host or backend.cuda):
        found, why = neighbour(backend, dtype)
        if found:
            return path(found.backend, hidden_size, found.dtype, means)
        return Mode.PLAIN, f"{backend.name} evaluates the equations as they stand, since {why}"
    mode = _allowed(backend)
    if backend.cuda and mode != Mode.PLAIN:
        name, why = _on_cuda(backend, mode, "full").path(hidden_size, dtype, means)
        return Mode(name), why
    if mode == Mode.PLAIN:
        asked = backend.host or switch("GRU_ANY_PLAIN")
        return mode, f"{'GRU_ANY_PLAIN' if asked else 'GRU_ANY_CUDA'} is set"
    if mode == Mode.TRACED:
        return mode, "GRU_ANY_NO_NUMBA is set"
    if why := problem() or trial():
        return Mode.TRACED, why
    return mode, "this is the fastest way on NumPy"


def recorded(backend: Backend, steps: int | None) -> str:
    """Say whether CUDA records a call of so many steps as a whole; "" on another backend."""
    if served := serving(backend, "float32"):
        backend = served.backend
    if not backend.cuda or (mode := _allowed(backend)) == Mode.PLAIN:
        return ""
    return _on_cuda(backend, mode, "full").recorded(steps)


def bridged(backend: Backend, dtype: str) -> str:
    """Say which backend reads this one's arrays in place to run a call; "" where it runs itself."""
    found = serving(backend, dtype)
    if not found:
        return ""
    cast = "" if found.dtype == dtype else f", cast to {found.dtype} and back"
    other = found.backend
    return (
        f"Arrays of {backend.name} on {backend.device} are read where they are, by DLPack{cast}, "
        f"and {other.name} on {other.device} runs the call."
    )


def forget(backend: Backend) -> None:
    """Release the memory kept for later calls, and the calls captured on CUDA."""
    if served := serving(backend, "float32"):
        backend = served.backend
    if backend.host:
        memory.forget()
    if backend.cuda and (mode := _allowed(backend)) != Mode.PLAIN:
        for precision in ("full", "tf32"):
            _on_cuda(backend, mode, precision).forget()


def environment(backend: Backend) -> dict[str, str]:
    """Return the versions, threads and runner, which may change the last bits of a result."""
    import platform
    from importlib import import_module
    from importlib.metadata import PackageNotFoundError, version

    from .cpu.threads import count

    def release(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    served = serving(backend, "float32")
    versions = {name: release(name) for name in ("gru-any", "numpy", "numba")}
    library = backend.name.partition(".")[0]  # whose wheel may have another name
    versions[library] = getattr(import_module(library), "__version__", "unknown")
    return {
        "Python": platform.python_version(),
        **versions,
        "threads": str(count()),
        "backend": f"{backend.name} on {backend.device}",
        "runner": type(runner(served.backend if served else backend)).__name__,
    }
