"""Arrays from one library to another, and to the host."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.array_utils import byte_bounds

from ..typing import Array, HostArray
from .cuda import device as cuda
from .libraries import NUMPY, STRICT, Backend, BackendError, of, plain_name, refuse_masked, select

HOST = 1  # kDLCPU of DLPack
FAILURES = (  # errors of libraries that cannot share an array
    TypeError, ValueError, RuntimeError, BufferError, AttributeError, NotImplementedError,
)  # fmt: skip


def to_numpy(x: object, name: str = "x") -> HostArray:
    """Return an array of any backend as a NumPy array, without a copy where that is possible.

    bfloat16 becomes float32; lists and numbers become arrays. Errors call the array `name`.

    Raises
    ------
    TypeError
        It is no array, holds something other than numbers, or has a mask, which would be lost.
    """
    refuse_masked(name, x)
    if isinstance(x, np.ndarray | np.generic | list | tuple | int | float):
        return _numbers(name, x)
    try:
        return of(x).to_numpy(x)
    except TypeError as e:
        raise TypeError(f"{name} is a {type(x).__name__}, expected an array or a list: {e}") from e


def asarray(x: Any, like: Any) -> Array:
    """Return x where `like` lives, without a copy where that is possible.

    Parameters
    ----------
    x : array of any library, list or number
    like : a layer, a Chain or an array
        Gives library, device and, for floating numbers, the dtype. Integers stay integers.

    Raises
    ------
    TypeError
        x holds something other than numbers, or complex numbers where `like` is real; it is
        floating where `like` has integers; or it is a NumPy array with a mask, which would be lost.

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any import GRU, asarray
    >>> asarray([[0, 1.5, 2]], like=GRU(3, 4)).dtype
    dtype('float32')
    """
    refuse_masked("x", x)
    backend = like.backend if hasattr(like, "backend") else of(like)
    dtype = like.dtype if hasattr(like, "backend") else plain_name(like.dtype)
    if isinstance(x, np.ndarray) or not hasattr(x, "dtype"):
        x = _numbers("x", x)
    kind = plain_name(x.dtype).lstrip("<>=")  # such as float32, or f4 in foreign byte order
    floating = kind.startswith(("f", "c", "bf"))
    if kind.startswith("c") and not dtype.startswith("c"):
        raise TypeError(f"x has dtype {kind}, expected real numbers, since like has dtype {dtype}")
    if floating and not dtype.startswith(("f", "c", "bf")):
        raise TypeError(f"x has dtype {kind}, and like has dtype {dtype}, which would truncate it")
    there = _shared(x, backend)
    if there is None:
        return backend.put(to_numpy(x), dtype if floating else None)
    return backend.xp.astype(there, backend.dtype(dtype), copy=False) if floating else there


def overlap(x: Array, y: Array) -> bool:
    """Return whether two arrays are one object, or share memory, as far as their library tells."""
    if x is y:
        return True
    if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
        return np.shares_memory(x, y)
    start = _start(x)
    return bool(start) and start == _start(y)


def disjoint(arrays: Iterable[Array]) -> bool:
    """Return whether the addresses show that no two arrays overlap; quicker than all pairs."""
    spans = sorted(map(_span, arrays))
    return all(stop <= start for (_, stop), (start, _) in pairwise(spans))


def _span(x: Array) -> tuple[int, int]:
    """Return the first and last address; where the library does not tell, those of the object."""
    if isinstance(x, np.ndarray):
        start = x.__array_interface__["data"][0]
        return (start, start + x.nbytes) if x.flags.forc else byte_bounds(x)
    start = _start(x) or id(x)
    return start, start + 1


def _start(x: Array) -> int:
    """Return the address of the first byte on its device; 0 where the library does not tell."""
    if hasattr(x, "data_ptr"):  # PyTorch
        return int(x.data_ptr())
    return int(getattr(getattr(x, "data", None), "ptr", 0))  # CuPy


def _numbers(name: str, x: object) -> HostArray:
    try:
        found = np.asarray(x)
    except ValueError as e:  # rows of different lengths
        raise ValueError(f"{name} is no array of numbers: {e}") from None
    if found.dtype.kind not in "biufc":
        raise TypeError(f"{name} has dtype {found.dtype}, expected numbers")
    return found


def _shared(x: Array, backend: Backend) -> Array | None:
    """Return an array of the backend over the same memory, or None."""
    try:
        if of(x) == backend:
            return x
        there = backend.xp.from_dlpack(x)
        whole = plain_name(there.dtype) == plain_name(x.dtype)  # JAX cuts int64 to int32
        return there if whole and of(there) == backend else None
    except FAILURES:
        return None


class Neighbour(NamedTuple):
    """The backend that reads the memory of another one in place."""

    backend: Backend
    dtype: str  # of what it reads: float32 where it lacks a half precision
    read: Callable[[Array], Array]  # an array of the other one -> its own, over the same memory
    kind: type  # of the other one's arrays


@lru_cache(maxsize=64)
def neighbour(backend: Backend, dtype: str) -> tuple[Neighbour | None, str]:
    """Find the other backend that can read this one's memory, and so run its calls.

    That is NumPy for arrays on the host and CuPy for those on a CUDA device, whichever library they
    are of. It is tried on an array of this dtype.

    Returns
    -------
    neighbour : Neighbour or None
    why : str, why there is none
    """
    if backend.host or backend.cuda or backend.constants != backend:
        return None, "it runs its own arrays"
    if backend.name == STRICT:
        return None, "it tests what every library can do, so its calls run as they stand"
    try:
        probe = backend.zeros((2,), dtype)
        kind, number = probe.__dlpack_device__()
        if kind == HOST:
            other = NUMPY
        elif int(kind) in cuda.BY_DLPACK:
            other = select(cuda.BY_DLPACK[int(kind)], number)
        else:
            return None, f"{backend.device} is neither the host nor a CUDA device"
    except (*FAILURES, BackendError) as e:
        return None, f"its memory is not shared by DLPack ({e})"
    for shared in dict.fromkeys((dtype, "float32" if "float16" in dtype else dtype)):
        try:
            probe = backend.zeros((2,), shared)
            read = _reader(other, probe)
            if read(probe).dtype == other.dtype(shared):
                return Neighbour(other, shared, read, type(probe)), ""
        except FAILURES as e:
            why = f"{other.name} cannot read its memory ({e})"
    return None, why


def _reader(other: Backend, probe: Array) -> Callable[[Array], Array]:
    """Return the cheapest function that makes an array of `other` over the same memory."""
    by_dlpack: Callable[[Array], Array] = other.xp.from_dlpack
    if other.host:
        there, method = by_dlpack(probe), getattr(type(probe), "numpy", None)
        for quicker in (method, np.asarray):  # PyTorch's own; of most libraries, in half the time
            if quicker and np.shares_memory(quicker(probe), there):
                return quicker
    return by_dlpack
