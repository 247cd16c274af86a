"""Arrays of another library in the memory of the fake device, as PyTorch's are beside CuPy's.

The library has a stream of its own, and shares its arrays by DLPack alone, with the stream that the
reader will use: whoever does not pass it on reads what may not have been written yet.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ...backend.cuda.device import BY_DLPACK
from ...typing import DType, HostArray
from . import array
from .memory import CLOCKS, LOCK, Stream, current_stream, learn, local

KIND = 12  # kDLExtDev of DLPack
STREAM = "theirs"
BY_DLPACK[KIND] = array.__name__


class Tensor:
    """An array of this library. inner: the same memory as an array of the fake device."""

    device = "theirs:0"
    requires_grad = False

    def __init__(self, inner: array.Array) -> None:
        self.inner = inner

    dtype = property(lambda self: self.inner.dtype)
    shape = property(lambda self: self.inner.shape)
    ndim = property(lambda self: self.inner.ndim)

    def __array_namespace__(self, api_version: str | None = None) -> object:
        return sys.modules[__name__]

    def __dlpack_device__(self) -> tuple[int, int]:
        return KIND, 0

    def __dlpack__(self, *, stream: Stream = None, **options: object) -> array.Array:
        with LOCK:
            learn(stream, CLOCKS.get(STREAM, {}))
        return self.inner

    def __array__(self, dtype: DType = None, copy: object = None) -> HostArray:
        with on_stream():
            return self.inner.get()


@contextmanager
def on_stream() -> Iterator[None]:
    """Work on the stream of this library."""
    before, local.stream = current_stream(), STREAM
    try:
        yield
    finally:
        local.stream = before


def from_dlpack(v: Any) -> Tensor:
    """Return a tensor over the memory of an array of the fake device."""
    return Tensor(v.__dlpack__(stream=STREAM))


def _made(function: Callable[..., array.Array]) -> Callable[..., Tensor]:
    def made(*args: Any, **options: Any) -> Tensor:
        options.pop("device", None)
        with on_stream():
            return Tensor(function(*[getattr(v, "inner", v) for v in args], **options))

    return made


asarray, astype = _made(array.asarray), _made(array.astype)
globals().update({name: _made(getattr(array, name)) for name in ("empty", "zeros")})
globals().update({name: _made(getattr(np, name)) for name in ("permute_dims", "concat", "tanh")})
globals().update({name: np.dtype(name) for name in ("float16", "float32", "float64", "int64")})
bool = np.dtype(bool)
isdtype = np.isdtype
