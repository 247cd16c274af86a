"""The arrays and functions of the fake device: a namespace of the array API standard.

It is as strict as CuPy: nothing becomes a NumPy array without `get()`, and `count` counts whatever
has to wait for the device. See memory.py for what else is checked.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, Never

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from ...backend.cuda.device import OPERATIONS
from ...typing import DType, HostArray
from .memory import (
    CLOCKS,
    LOCK,
    Allocation,
    access,
    allocate,
    allocation_of,
    capturing,
    count,
    current_stream,
    enqueue,
    learn,
    wait,
    weak,
)

DEVICE = "host"
OPERATIONS[__name__] = "gru_any.testing.fake_cuda.ops"


class Array(NDArrayOperatorsMixin):
    """An array of the fake device. host: the NumPy array in its memory."""

    __array_priority__ = 100
    device = DEVICE

    def __init__(self, host: HostArray) -> None:
        self.host = host

    dtype = property(lambda self: self.host.dtype)
    shape = property(lambda self: self.host.shape)
    strides = property(lambda self: self.host.strides)
    itemsize = property(lambda self: self.host.itemsize)
    nbytes = property(lambda self: self.host.nbytes)
    ndim = property(lambda self: self.host.ndim)
    size = property(lambda self: self.host.size)
    T = property(lambda self: Array(self.host.T))

    def __array_namespace__(self, api_version: str | None = None) -> object:
        return sys.modules[__name__]

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: object, **kwargs: object
    ) -> object:
        if ufunc is np.matmul and capturing() is not None:
            raise NotImplementedError("CuPy refuses cuBLAS while launches are recorded")
        return _call(getattr(ufunc, method), inputs, kwargs)

    def __array_function__(
        self,
        function: Callable[..., object],
        types: object,
        args: Sequence[Any],
        kwargs: Mapping[str, object],
    ) -> object:
        return _call(function, args, kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 12, 0

    def __dlpack__(self, *, stream: object = None, **options: object) -> "Array":
        """Let the reader's stream wait, as CuPy does; the fake has no need of a capsule."""
        with LOCK:
            learn(stream, CLOCKS.get(current_stream(), {}))
        return self

    def __array__(self, dtype: object = None, copy: object = None) -> Never:
        raise TypeError("implicit conversion to a NumPy array is not allowed; use get()")

    def __getitem__(self, key: object) -> Any:
        masks = [k for k in (key if isinstance(key, tuple) else (key,)) if isinstance(k, Array)]
        if any(mask.dtype.kind == "b" for mask in masks):
            wait()  # the host has to know how many elements there are
        return _call(lambda v, k: v[k], (self, key), {})

    def __setitem__(self, key: Any, value: object) -> None:
        def assign(out: HostArray, value: HostArray) -> None:
            out[key] = value

        _call(assign, (self, value), {}, [self])

    def sum(self, **options: object) -> Any:
        """Sum the elements, like the function of the namespace."""
        return np.sum(self, **options)  # type: ignore[call-overload]

    def __len__(self) -> int:
        return len(self.host)

    def get(self) -> HostArray:
        """Return a copy on the host, which waits for it."""
        access([_allocation(self)], [])
        wait()
        return self.host.copy()

    def __float__(self) -> float:
        return float(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __bool__(self) -> bool:
        return bool(self.get())

    __index__ = __int__


def _allocation(array: Array) -> Allocation:
    found = allocation_of(array.host)
    assert found is not None
    return found


def _call(
    function: Callable[..., object],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    written: Sequence[Array] = (),
) -> Any:
    """Call a function of NumPy, and put new arrays of its result into memory of this device."""
    if capturing() is None:
        return _checked(function, args, kwargs, written)
    if function in (np.concatenate, np.stack) and len(args[0]) > 8:
        raise RuntimeError("CuPy copies from the host while launches are recorded")
    with np.errstate(all="ignore"):  # nothing has a value yet
        return _checked(function, args, kwargs, written)


def _checked(
    function: Callable[..., object],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    written: Sequence[Array],
) -> Any:
    read: list[Array] = []
    call = partial(function, *_unwrap(args, read), **_unwrap(kwargs, read))
    # a capture must not keep alive what it works on
    again = partial(function, *_unwrap(args, [], weak), **_unwrap(kwargs, [], weak))
    sources, out = [_allocation(a) for a in read], [*written, *(kwargs.get("out") or ())]
    if out:
        _enqueue(again, sources, [_allocation(a) for a in out])
        return out[0] if kwargs.get("out") else None
    result = call()
    if not isinstance(result, (tuple, list)):
        array, is_new = _wrap(result)
        if is_new:
            _fill(array, again, sources)
        return array
    wrapped = [_wrap(r) for r in result]
    for n, (array, is_new) in enumerate(wrapped):
        if is_new:
            _fill(array, partial(_item, again, n), sources)
    return type(result)(array for array, _ in wrapped)


def _item(call: Callable[[], Any], n: int) -> HostArray:
    item: HostArray = call()[n]
    return item


def _enqueue(call: Callable[[], object], read: list[Allocation], written: list[Allocation]) -> None:
    def action() -> None:
        access(read, written)
        call()

    enqueue(action)


def _fill(array: Array, value: Callable[[], Any], read: list[Allocation]) -> None:
    host = weak(array.host)

    def assign() -> None:
        host[...] = value()

    _enqueue(assign, read, [_allocation(array)])


def _wrap(result: object) -> tuple[Any, bool]:
    """Return a result as an array of this device, and whether that has to be filled."""
    if not isinstance(result, (np.ndarray, np.generic)):
        return result, False
    if allocation_of(result) is not None:  # a view
        return Array(np.asarray(result)), False
    return Array(allocate(result.shape, result.dtype)), True


def _unwrap(
    v: object, read: list[Array], view: Callable[[HostArray], HostArray] = lambda host: host
) -> Any:
    """Return nested arguments with NumPy arrays in place of ours, which are appended to `read`."""
    if isinstance(v, Array):
        read.append(v)
        return view(v.host)
    if isinstance(v, (tuple, list)):
        return type(v)(_unwrap(w, read, view) for w in v)
    if isinstance(v, dict):
        return {k: _unwrap(w, read, view) for k, w in v.items()}
    if isinstance(v, np.ndarray):
        raise TypeError("an array of NumPy among those of the device")
    return v


def asarray(v: object, dtype: DType = None, device: object = None, copy: object = None) -> Array:
    """Convert to an array of this device, as the standard says; the host does not wait."""
    if isinstance(v, Array):
        dtype = dtype or v.dtype
        converted: Array = v
        if copy or v.dtype != dtype:
            converted = _call(np.array, (v,), {"dtype": dtype})
        return converted
    host = np.asarray(v, dtype=dtype)
    if capturing() is not None:
        raise RuntimeError("a copy from the host while launches are recorded")
    count["copies"] += 1
    count["bytes copied"] += host.nbytes
    return _filled(host)


def _filled(host: HostArray) -> Array:
    array = Array(allocate(host.shape, host.dtype))
    _fill(array, lambda: host, [])
    return array


def from_dlpack(v: Any) -> Array:
    """Return an array over the same memory, for use on the current stream."""
    return Array(v.__dlpack__(stream=current_stream()).host)


def astype(v: Array, dtype: DType, copy: bool = True) -> Array:
    """Convert to a dtype, as the standard says."""
    return asarray(v, dtype=dtype, copy=copy)


def ascontiguousarray(v: Array) -> Array:
    """Return a C-contiguous array, like NumPy."""
    return v if v.host.flags.c_contiguous else asarray(v, copy=True)


def _made(name: str, *args: object, device: object = None, **kwargs: object) -> Array:
    result = getattr(np, name)(*args, **kwargs)
    return Array(allocate(result.shape, result.dtype)) if name == "empty" else _filled(result)


# as CuPy's cuda.get_current_stream()
cuda = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(synchronize=wait))
MAKERS = ("empty", "zeros", "ones", "full", "arange", "eye", "linspace")
globals().update({name: partial(_made, name) for name in MAKERS})


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(np, name)
