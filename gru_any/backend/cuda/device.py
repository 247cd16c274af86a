"""What stands between this machine and CuPy on a CUDA device, in words."""

import importlib
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

WHEELS = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x", "cupy-rocm-5-0", "cupy-rocm-7-0")
INSTALL = 'pip install "gru-any[cuda13]" (driver 580 or newer) or "gru-any[cuda12]" (driver 525)'
# an array library on CUDA devices -> the module of what plans need of it; others register here
OPERATIONS = {"cupy": "gru_any.backend.cuda.ops"}
NO_DEVICE, OLD_DRIVER = 100, 35  # cudaErrorNoDevice, cudaErrorInsufficientDriver


def index(device: Any) -> int:
    """None, 1, "1", "cuda" or "cuda:1" -> the number of the device."""
    text = str(device if device is not None else 0)
    kind, _, number = text.rpartition(":")
    kind, number = (number, "0") if number == "cuda" else (kind, number)
    number = number.removeprefix("<CUDA Device ").removesuffix(">")
    if kind not in ("", "cuda") or not number.isdecimal():
        raise ValueError(f'device is {device!r}, expected a number, "cuda" or such as "cuda:1"')
    return int(number)


def problem(device: Any = None) -> str:
    """Why CuPy cannot be used on this device, with what mends it; "" where it can."""
    number = index(device)
    return _installed() or _devices(number) or _answers(number)


def _installed() -> str:
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


def _driver(runtime: Any) -> str:
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


def _kernel(cupy: Any) -> bool:
    return float((cupy.arange(4, dtype="float32") * 2).get()[3]) == 6.0


def _product(cupy: Any) -> bool:
    eye = cupy.asarray([[0.0, 1.0], [1.0, 0.0]], dtype="float32")
    return bool(((eye @ eye).get() == [[1, 0], [0, 1]]).all())


def current(backend: Any) -> Any:
    """A context in which new arrays of CuPy go to the backend's device."""
    return backend.device if backend.name == "cupy" else nullcontext()


def check_current(name: str, backend: Any) -> None:
    """CuPy runs kernels on the thread's current device, which must be the one of the arrays."""
    if backend.name == "cupy" and backend.xp.cuda.Device() != backend.device:
        number = backend.device.id
        raise TypeError(
            f"{name} is on device {number}, and this thread's current device is another: "
            f"cupy.cuda.Device({number}).use()"
        )
