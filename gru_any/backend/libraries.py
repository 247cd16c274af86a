"""Which array library, on which device, and how arrays get there and back.

The one place that knows array libraries by name. All other code takes a `Backend`, or the
namespace `xp` of one, and asks no questions.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from ..typing import Array, Device, DType, HostArray, Namespace, Shape
from .alignment import aligned
from .cuda import device as cuda

VARIABLE = "GRU_ANY_BACKEND"
STRICT = "array_api_strict"  # the standard and nothing more
USUAL = '"numpy", "cupy", "auto", "torch" or "jax.numpy"'
_NAMESPACES = {
    name: f"array_api_compat.{name}" for name in ("cupy", "torch", "dask.array")
}  # which follow the standard, where the library's own does not
_NAMES = {"jax": "jax.numpy", "jaxlib": "jax.numpy", "dask": "dask.array"}
_INSTALL = {
    "cupy": 'pip install "gru-any[cuda13]" (or [cuda12] for an older driver)',
    "torch": "pip install torch",
    "jax.numpy": "pip install jax",
    "dask.array": 'pip install "dask[array]"',
    "array_api_strict": "pip install array-api-strict",
}


class BackendError(RuntimeError):
    """A backend or device cannot be used; the message says why, and what to do."""


@dataclass(frozen=True)
class Backend:
    """An array library and one of its devices.

    Attributes
    ----------
    name : str
        "numpy", "cupy", "torch", "jax.numpy", "array_api_strict" or another module's name.
    xp : namespace
        Its Python Array API namespace.
    device
        The library's own device object.
    """

    name: str
    xp: Namespace
    device: Device

    def __reduce__(self) -> tuple[Callable[..., "Backend"], tuple[str, Device]]:
        return select, (self.name, _portable(self.name, self.device))

    def __hash__(self) -> int:
        return hash(self.name)  # cheap, as each call needs it, and there are few backends

    @property
    def constants(self) -> "Backend":
        """The backend of arrays without a derivative: this one, but for dual numbers."""
        return self

    @cached_property
    def host(self) -> bool:
        """Whether arrays can be looked at without waiting for a device."""
        return self.name == "numpy"

    @cached_property
    def cuda(self) -> bool:
        """Whether arrays live on a CUDA device, or on the emulated one."""
        return self.name in cuda.OPERATIONS

    @cached_property
    def traceable(self) -> bool:
        """Whether arguments may be tracers, inside of a function that JAX transforms."""
        return self.name == "jax.numpy"

    @cached_property
    def traced(self) -> bool:
        """Whether this is the backend of JAX's tracers."""
        return self.traceable and self.device is None

    @cached_property
    def alone(self) -> bool:
        """Whether no other backend can run what lives in this one."""
        return self.host or self.traced

    @cached_property
    def _dtypes(self) -> dict[str, DType]:
        return {}

    def dtype(self, name: str) -> DType:
        """Return the library's dtype of this name; ValueError where there is none."""
        if name not in self._dtypes:
            found = getattr(self.xp, name, None)
            if not isinstance(name, str) or found is None or name.startswith("_"):
                raise ValueError(f"dtype is {name!r}, which {self.name} does not have")
            if self.name == "jax.numpy" and name in ("float64", "complex128", "int64"):
                self._require_x64(name)
            self._dtypes[name] = np.dtype(found) if self.host or self.traceable else found
        return self._dtypes[name]

    def _require_x64(self, name: str) -> None:
        import jax

        config: Any = jax.config  # whose attributes are made at run time
        if name != "int64" and not config.jax_enable_x64:
            raise ValueError(
                f'dtype {name} in JAX needs jax.config.update("jax_enable_x64", True) first'
            )

    def put(self, host: HostArray, dtype: str | None = None) -> Array:
        """Copy a NumPy array to the device, as the dtype of this name.

        Raises
        ------
        ValueError
            It holds integers that the library's dtype does not, as JAX has no int64 by default.
        """
        host = np.asarray(host)
        known = dtype if dtype != "bfloat16" else "float32"
        stored = np.dtype(known or host.dtype.newbyteorder("="))
        if self.host and not stored.hasobject:
            found = aligned(host.shape, stored)
            found[...] = host
            return found
        host = np.array(host, dtype=stored, order="C")
        if self.host:
            return host
        with cuda.current(self):
            array = self.xp.asarray(host, device=self.device)
            if host.dtype.kind in "iu" and plain_name(array.dtype) != host.dtype.name:
                _refuse_cut(host, self.xp.iinfo(array.dtype))
            return array if dtype == known else self.xp.astype(array, self.dtype("bfloat16"))

    def zeros(self, shape: Shape, dtype: str) -> Array:
        """Return zeros of this shape and dtype on the device."""
        if self.host:
            return np.zeros(shape, self._dtypes.get(dtype) or self.dtype(dtype))
        with cuda.current(self):
            return self.xp.zeros(shape, dtype=self.dtype(dtype), device=self.device)

    def plain(self, array: Array, dtype: str) -> bool:
        """Return whether this backend is NumPy's, and `array` a plain ndarray of this dtype."""
        if not self.host or type(array) is not np.ndarray:
            return False
        return bool(array.dtype == (self._dtypes.get(dtype) or self.dtype(dtype)))

    def check(self, name: str, array: Array, dtype: str) -> None:
        """Raise TypeError where `array` is not of this library, device and dtype."""
        if self.plain(array, dtype):
            return
        self._check_home(name, array)
        if array.dtype != self.dtype(dtype):
            given, way = plain_name(array.dtype), f"gru_any.asarray({name}, like=model)"
            if given.lstrip("u").startswith(("int", "bool")):
                told = f"make it floating first, with {name} * 1.0, since {way} keeps integers"
            else:
                told = f"convert it, for example with {way}"
            raise TypeError(f"{name} has dtype {given}, expected {dtype}: {told}")
        if getattr(array, "requires_grad", False):
            raise TypeError(
                f"{name} requires grad, and these functions are outside of autograd: pass "
                f"{name}.detach()"
            )

    def integers(self, name: str, array: Array) -> Array:
        """Return an array of integers in a dtype that can count more than it holds: int32 or wider.

        uint8 has no 256, so a class of that number would be taken for class 0.

        Raises
        ------
        TypeError
            It is not of this library, device and an integer dtype.
        """
        self._check_home(name, array)
        kind = array.dtype.kind if self.host else None
        if kind not in ("i", "u") and (self.host or not self.xp.isdtype(array.dtype, "integral")):
            raise TypeError(f"{name} has dtype {plain_name(array.dtype)}, expected integers")
        bits = 8 * array.dtype.itemsize if self.host else self.xp.iinfo(array.dtype).bits
        if bits < 32:
            return self.xp.astype(array, self.dtype("int32"))
        if self.name == "torch" and "uint" in plain_name(array.dtype):  # which it cannot compare
            return self.xp.astype(array, self.dtype("int64"))
        return array

    def _check_home(self, name: str, array: Array) -> None:
        wanted = f"expected an array of {self.name} on {self.device}"
        way = f"convert it with gru_any.asarray({name}, like=model)"
        refuse_masked(name, array, wanted)
        if isinstance(array, np.matrix):
            raise TypeError(f"{name} is a {type(array).__name__}, {wanted}; np.asarray makes one")
        try:
            home = of(array)
        except TypeError:
            raise TypeError(f"{name} is a {type(array).__name__}, {wanted}: {way}") from None
        if home.name != self.name:
            raise TypeError(f"{name} is an array of {home.name}, {wanted}: {way}")
        if home.device != self.device and not (self.traced or home.traced):
            raise TypeError(f"{name} is on {home.device}, {wanted}: {way}")
        cuda.check_current(name, self)

    def to_numpy(self, array: Array) -> HostArray:
        """Copy an array of this backend to the host (NumPy arrays are returned as they are)."""
        host: HostArray
        if self.host or self.cuda:
            host = array if self.host else array.get()
            return host
        if self.name == "torch":
            array = array.detach().cpu()
            array = (array.float() if plain_name(array.dtype) == "bfloat16" else array).numpy()
        elif self.name == "array_api_strict":
            array = array.to_device(self.xp.Device("CPU_DEVICE"))
        for explicit in ("asnumpy", "unwrap_numpy"):  # dpnp and ndonnx
            if hasattr(array, explicit):
                array = getattr(array, explicit)()
        host = np.asarray(array)
        return host.astype(np.float32) if host.dtype.kind == "V" else host

    @cached_property
    def adopt(self) -> Callable[[Array], Array]:
        """The function that converts an array of NumPy or CuPy to this library, without a copy."""
        make: Callable[[Array], Array] = self.xp.from_dlpack
        if self.adopt_many:
            make = self.adopt_many.one
        elif self.name == "torch" and self.device.type == "cpu":
            make = importlib.import_module("torch").from_numpy  # in half the time of from_dlpack
        return make

    @cached_property
    def adopt_many(self) -> Any:
        """The function that converts several arrays at once; None where `adopt` is as fast."""
        if self.name != "jax.numpy" or self.device.platform != "cpu":
            return None
        from .jax_arrays import Adopter

        return Adopter(self.device)

    @cached_property
    def immutable(self) -> bool:
        """Whether arrays of the library cannot be written to."""
        return self.name == "jax.numpy"

    def deleted(self, arrays: Iterable[Array]) -> bool:
        """Return whether one of these immutable arrays was deleted, as JAX does to donated ones."""
        return any([v.is_deleted() for v in arrays])

    @cached_property
    def bridges(self) -> dict[str, Any]:
        """The bridges to another backend that runs the calls, by dtype; see `bridge`."""
        return {}

    def scatter_add(self, indices: Array, rows: Array, n: int) -> Array:
        """Sum rows (N, size) by their indices (N,); return (n, size).

        The order of summation is fixed, so the result is the same bit for bit.
        """
        if self.host:
            return _scatter_add_host(indices, rows, n)
        xp, parts, wide = self.xp, [], 1024
        for start in range(0, n, wide):
            numbers = xp.arange(
                start, min(start + wide, n), dtype=indices.dtype, device=self.device
            )
            hit = xp.expand_dims(numbers, axis=1) == xp.expand_dims(indices, axis=0)
            parts.append(xp.astype(hit, rows.dtype) @ rows)
        return xp.concat(parts, axis=0)

    def synchronize(self) -> None:
        """Wait until the device has finished all work."""
        if self.cuda:
            self.xp.cuda.get_current_stream().synchronize()
        elif self.name == "torch" and self.device.type == "cuda":
            importlib.import_module("torch").cuda.synchronize(self.device)


def is_traced(array: object) -> bool:
    """Return whether `array` is a tracer of JAX, which has a shape and a dtype but no values."""
    jax: Any = sys.modules.get("jax")
    return jax is not None and isinstance(array, jax.core.Tracer)


def _scatter_add_host(indices: HostArray, rows: HostArray, n: int) -> HostArray:
    out = np.zeros((n, rows.shape[1]), rows.dtype)
    if indices.size:
        order = np.argsort(indices, kind="stable")
        at = indices[order]
        starts = np.flatnonzero(np.concatenate(([True], at[1:] != at[:-1])))
        out[at[starts]] = np.add.reduceat(rows[order], starts, axis=0)
    return out


def _refuse_cut(host: HostArray, info: Any) -> None:
    """Raise ValueError where integers overflow a narrower dtype."""
    if host.size and (host.min() < info.min or host.max() > info.max):
        raise ValueError(
            f"an array holds {host.min()} to {host.max()}, which {plain_name(info.dtype)} does not;"
            ' in JAX, jax.config.update("jax_enable_x64", True) gives int64'
        )


def refuse_masked(
    name: str, array: object, wanted: str = "expected an array without a mask"
) -> None:
    """Raise TypeError for a masked array, whose mask NumPy would drop silently."""
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a MaskedArray, {wanted}, since the mask would be lost: give its filled(0), "
            "and to a loss mask=~numpy.ma.getmaskarray(...)"
        )


def plain_name(dtype: DType) -> str:
    """Return the name of a dtype of any library."""
    return str(dtype).rpartition(".")[2]


class _NumPy20:
    """NumPy 2.0, with the one function of the standard that came in 2.1."""

    @staticmethod
    def astype(x: HostArray, dtype: DType, /, *, copy: bool = True) -> HostArray:
        return x.astype(dtype, copy=copy)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


NUMPY = Backend("numpy", np if hasattr(np, "astype") else _NumPy20(), "cpu")


# from what the user said -------------------------------------------------------------------------


def select(backend: object = None, device: Device = None) -> Backend:
    """Return the backend of this name or module, on this device.

    Parameters
    ----------
    backend : str, module, Backend or None
        "numpy", "cupy", "auto" (CuPy where a device really answers, else NumPy), or an array-API
        library. None means the environment variable GRU_ANY_BACKEND, else "numpy".
    device : str, int or None
        Such as "cuda:1", 1 or "cpu"; None is the library's default.

    Raises
    ------
    BackendError
        It cannot be used here; the text says why, and what mends it.
    """
    if isinstance(backend, Backend):
        return backend
    if backend is None:
        backend = os.environ.get(VARIABLE) or "numpy"
    if not isinstance(backend, (str, ModuleType)):
        raise BackendError(f"backend is {backend!r}, expected a name or a module: use {USUAL}")
    if isinstance(device, bool):
        raise BackendError(f'device is {device!r}, expected a name or a number, such as "cuda:1"')
    name = backend.__name__ if isinstance(backend, ModuleType) else str(backend)
    name = {"jax": "jax.numpy"}.get(name, name.removeprefix("array_api_compat."))
    if name == "auto":
        name = "numpy" if cuda.problem(device) else "cupy"
        device = None if name == "numpy" else device
    if name == "numpy":
        if device not in (None, "cpu"):
            raise BackendError(
                f'device is {device!r}, but NumPy has only "cpu"; try backend="cupy"'
            )
        return NUMPY
    if name == "cupy" and (why := cuda.problem(device)):
        raise BackendError(why)
    xp = _namespace(name)
    return Backend(name, xp, _device(name, xp, device))


def _namespace(name: str) -> Namespace:
    try:
        xp = importlib.import_module(_NAMESPACES.get(name, name))
    except (ImportError, ValueError, TypeError) as e:
        way = _INSTALL.get(name, f"use {USUAL}")
        raise BackendError(f"backend {name!r} cannot be imported ({e}): {way}") from e
    if not all(hasattr(xp, f) for f in ("asarray", "astype", "permute_dims", "concat", "tanh")):
        raise BackendError(
            f"backend {name!r} has no Python Array API (2023.12 or newer): use {USUAL}"
        )
    return xp


def _device(name: str, xp: Namespace, device: Device) -> Device:
    """Return the library's own device object, checked by making an array there."""
    try:
        if name == "cupy":
            return xp.cuda.Device(cuda.index(device))
        if isinstance(device, int):
            device = f"cuda:{device}"
        if name == "jax.numpy" and isinstance(device, str):
            device = _jax_device(device)
        if name == "array_api_strict" and isinstance(device, str):
            # or as str(device) gives it
            device = xp.Device(device.removeprefix("array_api_strict.Device('").rstrip("')"))
        return _device_of(xp.empty(0, dtype=xp.float32, device=device))
    except Exception as e:  # libraries have classes of their own
        raise BackendError(f"{name} cannot use device {device!r}: {e}") from e


def _jax_device(device: str) -> Device:
    import jax

    kind, _, index = device.lower().removesuffix("(id=0)").partition(":")
    kind = kind.removeprefix("tfrt_").partition("_")[0]  # as str(device) gives it
    return jax.devices(kind)[int(index or 0)]


def _portable(name: str, device: Device) -> Device:
    """Return a form of the device that can be pickled and given to `select`."""
    if name == "numpy":
        return None
    if name == "jax.numpy":
        import jax

        return f"{device.platform}:{jax.devices(device.platform).index(device)}"
    return f"cuda:{device.id}" if name == "cupy" else device


def _device_of(array: Array) -> Device:
    from array_api_compat import device

    return device(array)


# from the user's arrays --------------------------------------------------------------------------


def of(*arrays: Array) -> Backend:
    """Return the backend that these arrays live on; TypeError where they are of several."""
    if all(type(array) is np.ndarray for array in arrays):
        return NUMPY
    homes = {_home(array) for array in arrays}
    traced = {home for home in homes if home.traced}
    if traced and len({home.name for home in homes}) == 1:
        return traced.pop()  # concrete arrays beside tracers are constants
    if len(homes) == 2 and len({home.constants for home in homes}) == 1:
        return next(home for home in homes if home.constants != home)
    if len(homes) > 1:
        names = " and ".join(sorted(f"{home.name} on {home.device}" for home in homes))
        raise TypeError(f"arrays of {names} in one call: bring them to one with gru_any.asarray")
    return homes.pop()


def _home(array: Array) -> Backend:
    refuse_masked("an array", array)
    if isinstance(array, np.matrix):  # whose * is another product
        raise TypeError("an array is a matrix, expected numpy.asarray of it")
    if isinstance(array, np.ndarray):
        return NUMPY
    root = type(array).__module__.partition(".")[0]
    name = _NAMES.get(root, root)
    if not hasattr(array, "shape") or not hasattr(array, "dtype") or isinstance(array, np.generic):
        raise TypeError(f"{type(array).__name__} is no array")
    if name not in _INSTALL:  # another library says itself which namespace is its own
        if not hasattr(array, "__array_namespace__"):
            raise TypeError(f"{name} is no array library with the Python Array API")
        space = array.__array_namespace__()
        own = getattr(space, "backend", None)
        if isinstance(own, Backend):  # of dual numbers
            return own
        name = space.__name__
    return _backend(name, None if is_traced(array) else _device_of(array))


def of_traced(backend: Backend) -> Backend:
    """Return the backend of the tracers of a backend's arrays."""
    return _backend(backend.name, None)


@lru_cache(maxsize=64)
def _backend(name: str, device: Device) -> Backend:
    return Backend(name, _namespace(name), device)
