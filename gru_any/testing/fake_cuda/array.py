"""An array library on a CUDA device that the host plays: for checks without a device.

It is as strict as CuPy: nothing becomes an array of NumPy unasked, and what has to wait for the
device is counted (`count`). See memory.py for what else is checked.
"""

import sys
from functools import partial
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from ...backend.cuda.device import OPERATIONS
from .memory import Cell, cell_of, count, do, new, recording, unowned, use, wait

DEVICE = "host"
OPERATIONS[__name__] = "gru_any.testing.fake_cuda.ops"


class Array(NDArrayOperatorsMixin):
    """An array of this library; it never becomes one of NumPy unasked."""

    __array_priority__ = 100
    device = DEVICE

    def __init__(self, host: np.ndarray) -> None:
        self.host = host

    dtype = property(lambda self: self.host.dtype)
    shape = property(lambda self: self.host.shape)
    strides = property(lambda self: self.host.strides)
    itemsize = property(lambda self: self.host.itemsize)
    nbytes = property(lambda self: self.host.nbytes)
    ndim = property(lambda self: self.host.ndim)
    size = property(lambda self: self.host.size)
    T = property(lambda self: Array(self.host.T))

    def __array_namespace__(self, api_version: Any = None) -> Any:
        return sys.modules[__name__]

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if ufunc is np.matmul and recording() is not None:
            raise NotImplementedError("CuPy refuses cuBLAS while launches are recorded")
        return _computed(getattr(ufunc, method), inputs, kwargs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return _computed(function, args, kwargs)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError("implicit conversion to a NumPy array is not allowed; use get()")

    def __getitem__(self, key: Any) -> Any:
        masks = [k for k in (key if isinstance(key, tuple) else (key,)) if isinstance(k, Array)]
        if any(mask.dtype.kind == "b" for mask in masks):
            wait()  # for how many there are
        return _computed(lambda v, k: v[k], (self, key), {})

    def __setitem__(self, key: Any, value: Any) -> None:
        def put(out: Any, value: Any) -> None:
            out[key] = value

        _computed(put, (self, value), {}, [self])

    def sum(self, **options: Any) -> Any:
        """As the namespace's."""
        return np.sum(self, **options)

    def __len__(self) -> int:
        return len(self.host)

    def get(self) -> np.ndarray:
        """A copy on the host, which waits."""
        use([_known(self)], [])
        wait()
        return self.host.copy()

    def __float__(self) -> float:
        return float(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __bool__(self) -> bool:
        return bool(self.get())

    __index__ = __int__


def _known(array: Array) -> Cell:
    cell = cell_of(array.host)
    assert cell is not None
    return cell


def _computed(function: Any, args: Any, kwargs: Any, written: Any = ()) -> Any:
    """Call a function of NumPy; what is new in its result gets memory of this device."""
    if recording() is None:
        return _done(function, args, kwargs, written)
    if function in (np.concatenate, np.stack) and len(args[0]) > 8:
        raise RuntimeError("CuPy copies from the host while launches are recorded")
    with np.errstate(all="ignore"):  # nothing has a value yet
        return _done(function, args, kwargs, written)


def _done(function: Any, args: Any, kwargs: Any, written: Any) -> Any:
    read: list[Array] = []
    call = partial(function, *_bare(args, read), **_bare(kwargs, read))
    # a recording must not keep alive what it works on
    again = partial(function, *_bare(args, [], unowned), **_bare(kwargs, [], unowned))
    cells, out = [_known(a) for a in read], [*written, *(kwargs.get("out") or ())]
    if out:
        _write(again, cells, [_known(a) for a in out])
        return out[0] if kwargs.get("out") else None
    result = call()
    several = isinstance(result, (tuple, list))
    results = [_wrapped(r) for r in (result if several else [result])]
    for n, (array, is_new) in enumerate(results):
        if is_new:
            _fill(array, partial(_entry, again, n if several else None), cells)
    found = [array for array, _ in results]
    return type(result)(found) if several else found[0]


def _entry(call: Any, n: int | None) -> Any:
    return call() if n is None else call()[n]


def _write(call: Any, read: list[Cell], written: list[Cell]) -> None:
    def action() -> None:
        use(read, written)
        call()

    do(action)


def _fill(array: Array, value: Any, read: list[Cell]) -> None:
    host = unowned(array.host)

    def put() -> None:
        host[...] = value()

    _write(put, read, [_known(array)])


def _wrapped(result: Any) -> tuple[Any, bool]:
    """A result as an array of this device, and whether it needs to be filled."""
    if not isinstance(result, (np.ndarray, np.generic)):
        return result, False
    if cell_of(result) is not None:  # a view
        return Array(np.asarray(result)), False
    return Array(new(result.shape, result.dtype)), True


def _bare(v: Any, read: list[Array], taken: Any = lambda host: host) -> Any:
    """The same with NumPy's arrays; those of ours go to the list."""
    if isinstance(v, Array):
        read.append(v)
        return taken(v.host)
    if isinstance(v, (tuple, list)):
        return type(v)(_bare(w, read, taken) for w in v)
    if isinstance(v, dict):
        return {k: _bare(w, read, taken) for k, w in v.items()}
    if isinstance(v, np.ndarray):
        raise TypeError("an array of NumPy among those of the device")
    return v


def asarray(v: Any, dtype: Any = None, device: Any = None, copy: Any = None) -> Array:
    """As the standard says; from the host too, which does not wait."""
    if isinstance(v, Array):
        dtype = dtype or v.dtype
        return v if not copy and v.dtype == dtype else _computed(np.array, (v,), {"dtype": dtype})
    host = np.asarray(v, dtype=dtype)
    if recording() is not None:
        raise RuntimeError("a copy from the host while launches are recorded")
    count["copies"] += 1
    count["bytes copied"] += host.nbytes
    array = Array(new(host.shape, host.dtype))
    _fill(array, lambda: host, [])
    return array


def astype(v: Array, dtype: Any, copy: bool = True) -> Array:
    """As the standard says."""
    return asarray(v, dtype=dtype, copy=copy)


def ascontiguousarray(v: Array) -> Array:
    """Return a C-contiguous array, like NumPy."""
    return v if v.host.flags.c_contiguous else _computed(np.array, (v,), {"order": "C"})


def _made(name: str, *args: Any, device: Any = None, **kwargs: Any) -> Array:
    result = getattr(np, name)(*args, **kwargs)
    array = Array(new(result.shape, result.dtype))
    if name != "empty":
        _fill(array, lambda: result, [])
    return array


MAKERS = ("empty", "zeros", "ones", "full", "arange", "eye", "linspace")
globals().update({name: partial(_made, name) for name in MAKERS})


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(np, name)
