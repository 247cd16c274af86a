"""Whether CuPy can use a CUDA device here, and if not, why."""

import importlib
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import ModuleType
from typing import Protocol

from ...typing import Device, Namespace

WHEELS = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x", "cupy-rocm-5-0", "cupy-rocm-7-0")
INSTALL = 'pip install "gru-any[cuda13]" (driver 580 or newer) or "gru-any[cuda12]" (driver 525)'
# an array library on CUDA devices -> the module with its `operations`; others register here
OPERATIONS = {"cupy": "gru_any.backend.cuda.ops"}
BY_DLPACK = {2: "cupy"}  # device type of DLPack (kDLCUDA) -> the library that reads it
NO_DEVICE, OLD_DRIVER = 100, 35  # cudaErrorNoDevice, cudaErrorInsufficientDriver


class Home(Protocol):
    """The attributes of a `Backend` that are needed here."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def xp(self) -> Namespace: ...  # noqa: D102

    @property
    def device(self) -> Device: ...  # noqa: D102


def index(device: Device) -> int:
    """Return the number of the device that None, 1, "1", "cuda" or "cuda:1" names."""
    text = str(device if device is not None else 0)
    kind, _, number = text.rpartition(":")
    kind, number = (number, "0") if number == "cuda" else (kind, number)
    number = number.removeprefix("<CUDA Device ").removesuffix(">")
    if kind not in ("", "cuda") or not number.isdecimal():
        raise ValueError(f'device is {device!r}, expected a number, "cuda" or such as "cuda:1"')
    return int(number)


def problem(device: Device = None) -> str:
    """Say why CuPy cannot be used on this device, and what helps; "" where it can."""
    number = index(device)
    return _installation() or _devices(number) or _answers(number)


def _installation() -> str:
    found = [name for name in WHEELS if _version(name)]
    if len(found) > 1:
        names = " ".join(found)
        return (
            f"several CuPy wheels are installed ({', '.join(found)}), and they break each other: "
            f"pip uninstall -y {names}, then {INSTALL}"
        )
    try:
        importlib.import_module("cupy")
    except ImportError as e:
        if not found:
            return f"CuPy is not installed: {INSTALL}"
        return f"CuPy is installed ({found[0]}) but cannot be imported ({e}): install it again"
    return ""


def _version(name: str) -> str:
    from importlib import metadata  # it alone costs more than the rest of the package

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _devices(number: int) -> str:
    runtime = importlib.import_module("cupy").cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except RuntimeError as e:
        status = getattr(e, "status", None)
        if status == NO_DEVICE:
            return "the CUDA driver sees no device: check nvidia-smi and CUDA_VISIBLE_DEVICES"
        if status == OLD_DRIVER:
            return _driver(runtime)
        return f"CUDA does not start ({e}): check nvidia-smi"
    if not count:
        return "the CUDA driver sees no device: check nvidia-smi and CUDA_VISIBLE_DEVICES"
    if number >= count:
        return f"device is {number}, but there are {count}: choose from 0 to {count - 1}"
    return ""


def _driver(runtime: ModuleType) -> str:
    has, needs = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    if not has:
        return "no CUDA driver is installed: install NVIDIA's driver, then check nvidia-smi"
    return (
        f"the CUDA driver is for CUDA {_dotted(has)}, this CuPy needs {_dotted(needs)}: update the "
        'driver, or pip install "gru-any[cuda12]"'
    )


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


@lru_cache
def _answers(number: int) -> str:
    """Run one kernel, which needs NVRTC, and one matrix product, which needs cuBLAS."""
    cupy = importlib.import_module("cupy")
    for what, needs in ((_kernel, "NVRTC"), (_product, "cuBLAS")):
        try:
            with cupy.cuda.Device(number):
                good = what(cupy)
        except (ImportError, RuntimeError, OSError) as e:
            return f"CuPy cannot use {needs} ({e}): {INSTALL}, which brings CUDA's libraries along"
        if not good:
            return f"device {number} gives wrong numbers; check nvidia-smi"
    return ""


def _kernel(cupy: ModuleType) -> bool:
    return float((cupy.arange(4, dtype="float32") * 2).get()[3]) == 6.0


def _product(cupy: ModuleType) -> bool:
    eye = cupy.asarray([[0.0, 1.0], [1.0, 0.0]], dtype="float32")
    return bool(((eye @ eye).get() == [[1, 0], [0, 1]]).all())


def current(backend: Home) -> AbstractContextManager[object]:
    """Return a context in which CuPy makes new arrays on the backend's device."""
    if backend.name != "cupy":
        return nullcontext()
    device: AbstractContextManager[object] = backend.device
    return device


def check_current(name: str, backend: Home) -> None:
    """Raise TypeError where the thread's current device, which runs kernels, is not the array's."""
    if backend.name == "cupy" and backend.xp.cuda.Device() != backend.device:
        number = backend.device.id
        raise TypeError(
            f"{name} is on device {number}, and this thread's current device is another: "
            f"cupy.cuda.Device({number}).use()"
        )
