"""The backends every test can run on, and the libraries some tests hold ours against.

GRU_ANY_REQUIRE=torch,cupy,... turns the skip of a test that needs one of them into a failure.
"""

import importlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from threading import Barrier, Timer
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings

from gru_any.backend import Mode
from gru_any.backend.cpu import tuning

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each of pytest's workers, which inherit it
os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("KERAS_BACKEND", "torch")
# jaxlib 0.10.2 compiles the gradient of a scan over a vmap wrongly for AVX-512: one row is off
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")
os.environ.pop("GRU_ANY_BACKEND", None)

BACKENDS = ["numpy", "numpy:readonly", "array_api_strict", "torch", "jax.numpy", "cupy"]
BACKENDS += ["torch:plain", "jax.numpy:plain"]  # by themselves, not by NumPy in their memory
HOST = "gru_any.testing.fake_cuda.array"  # a CUDA device that the host emulates
BACKENDS.append(HOST)
REQUIRED = set(filter(None, os.environ.get("GRU_ANY_REQUIRE", "").split(",")))
# whether the long variants run too, most of which must be compiled
THOROUGH = os.environ.get("GRU_ANY_THOROUGH", "") not in ("", "0", "false")

# the modes in which a block runs on NumPy
PATHS = [Mode.PLAIN, Mode.TRACED, *([Mode.COMPILED] if find_spec("numba") else [])]


@contextmanager
def running(path: str) -> Iterator[None]:
    """Run blocks in this way, inside of the context; "packed": compiled, with copies of weights."""
    from gru_any.backend import modes as run

    names = "packed_rows", "stored_elements", "frozen_rows", "frozen_work", "narrow_work"
    never = dict.fromkeys(names, 0)
    always = never if path == "packed" else {}
    with pytest.MonkeyPatch.context() as patch, tuned(**always):
        patch.setattr(run, "chosen", Mode.COMPILED if path == "packed" else Mode(path))
        yield


@contextmanager
def tuned(**values: int) -> Iterator[None]:
    """Replace some of the numbers that decide which way is taken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "current", tuning.current._replace(**values))
        yield


def at_once(work: Callable[[int], Any], count: int) -> None:
    """work(0), work(1), ... each in a thread of its own, begun together; errors are raised."""
    begin = Barrier(count)

    def wait_and_work(n: int) -> None:
        begin.wait()
        work(n)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(wait_and_work, range(count)))


@contextmanager
def started(
    command: Sequence[Any], *, timeout: float = 240, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """Start a command; it is killed, with all that it started, at the end or after `timeout` s."""

    def kill() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    options = {"text": True, "start_new_session": True, **options}
    with subprocess.Popen([*map(str, command)], **options) as process:
        limit = Timer(timeout, kill)  # whatever the test waits for: a line, an end, a file
        limit.start()
        try:
            yield process
        finally:
            limit.cancel()
            kill()


def finished(
    command: Sequence[Any],
    *,
    input: str | None = None,  # as subprocess calls it
    timeout: float = 240,  # long enough to compile on a busy machine
    code: int | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, within so many seconds; return what it printed.

    code: the exit status that it must have; None: any.
    """
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    if input is not None:
        pipes["stdin"] = subprocess.PIPE
    with started(command, timeout=timeout + 60, **{**pipes, **options}) as process:
        out, err = process.communicate(input, timeout)
    assert code in (None, process.returncode), f"exit status {process.returncode}\n{out}{err}"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def is_rounding(found: np.ndarray, reference: np.ndarray, exact: np.ndarray) -> bool:
    """Whether `found` is about as near to the exact values as a reference of its dtype is.

    Whose sums are added in another order, as on another processor, may be several times as far off.
    """
    unit = np.finfo(found.dtype).eps * np.abs(exact).max(initial=0)
    off, usual = (np.abs(v - exact).max(initial=0) for v in (found, reference))
    return bool(found.dtype == reference.dtype and off <= 8 * max(usual, unit))


settings.register_profile("suite", deadline=None, derandomize=True, max_examples=40)
# for who asks whether a test fails, but not for the simplest example
settings.register_profile(
    "noticed", settings.get_profile("suite"), phases=(Phase.explicit, Phase.generate)
)
settings.load_profile("suite")


def refuse(name: str, why: str) -> None:
    """Skip, or fail where the library is required."""
    if name.partition(".")[0] in REQUIRED:
        pytest.fail(f"{name} is required: {why}")
    pytest.skip(f"{name}: {why}", allow_module_level=True)


def require(name: str) -> Any:
    """Import a library, or skip the test with the reason."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        return refuse(name, str(e))


@pytest.fixture(scope="module")
def compiler() -> None:
    """Skip where there is no C++ compiler, which the host needs to play a CUDA device."""
    if shutil.which("g++") is None:
        refuse("g++", "not installed")


class Home:
    """A backend under test: where its models live, and how arrays get there and back."""

    def __init__(self, text: str) -> None:
        from gru_any.backend import select

        self.name, _, self.variant = text.partition(":")
        self.device = "device1" if self.name == "array_api_strict" else None
        self.backend = select(self.name, self.device)

    def put(self, host: np.ndarray) -> Any:
        array = self.backend.put(host)
        if self.variant == "readonly":
            array.flags.writeable = False
        return array

    def host(self, array: Any) -> np.ndarray:
        return self.backend.to_numpy(array)

    def strictly(self) -> Any:
        """array_api_strict without boolean indexing, data-dependent shapes and extensions."""
        if self.name != "array_api_strict":
            return nullcontext()
        flags = self.backend.xp.ArrayAPIStrictFlags
        return flags(boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=())


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    from gru_any.backend import BackendError

    name = request.param.partition(":")[0]
    if name == HOST and shutil.which("g++") is None:
        refuse("g++", "not installed")
    if name != "numpy":
        require(name)
    try:
        home = Home(request.param)
    except BackendError as e:
        refuse(name, str(e))
    with home.strictly(), running("plain") if home.variant == "plain" else nullcontext():
        yield home


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What NVRTC said of the CUDA kernels: of each, registers and bytes spilled."""
    found = [v for r in terminalreporter.getreports("passed") for name, v in r.user_properties
             if " sm_" in name]  # fmt: skip
    kernels = [kernel for usage in found for kernel in usage.values()]
    if kernels:
        registers, spilled = (max(column) for column in zip(*kernels, strict=True))
        terminalreporter.write_line(
            f"{len(kernels)} CUDA kernels compiled: up to {registers} registers a thread, and "
            f"{spilled} bytes spilled"
        )
