"""Buffers for NumPy that are reused as soon as no array refers to them.

Fresh memory can cost more than the arithmetic on it, since the system maps it page by page at the
first touch. Each array made here is a view of an owner, and so is every view of that array; the
owner's reference count therefore says whether its memory is free.
"""

import math
import sys
import threading
from collections import deque
from collections.abc import Callable

import numpy as np

from ...typing import DType, HostArray, Shape
from ..alignment import aligned
from . import tuning

LARGE = 1 << 17  # bytes, from which on results are aligned

_owners: dict[int, deque[HostArray]] = {}  # by their size


def empty(shape: Shape, dtype: DType) -> HostArray:
    """Return an uninitialised array over a free buffer. Never for arrays that a user receives."""
    size = math.prod(shape) * dtype.itemsize
    if size < tuning.current.buffer_bytes:
        return np.empty(shape, dtype)
    found = _free(_owners.setdefault(size, deque()))
    return (_new(size) if found is None else found).view(dtype).reshape(shape)


def result(shape: Shape, dtype: DType) -> HostArray:
    """Return an uninitialised array for a user; a large one is aligned, as JAX wants it."""
    if math.prod(shape) * dtype.itemsize < LARGE:
        return np.empty(shape, dtype)
    return aligned(shape, dtype)


class Scratch(threading.local):
    """Uninitialised arrays that each thread reuses in its next call, if they are small."""

    held: tuple[tuple[int, ...], list[HostArray]] = (), []

    def __init__(self, make: Callable[..., list[HostArray]]) -> None:
        self.make = make

    def arrays(self, *sizes: int) -> list[HostArray]:
        """Return arrays made by `make` for these sizes, those of the last call if they fit."""
        kept, arrays = self.held
        if kept != sizes:
            arrays = self.make(*sizes)
            if sum(v.nbytes for v in arrays) <= tuning.current.scratch_bytes:
                self.held = sizes, arrays  # at once: a signal handler may call this in between
        return arrays


def forget() -> None:
    """Release all free buffers."""
    _owners.clear()


def _free(owners: deque[HostArray]) -> HostArray | None:
    """Return a view of the first owner without other references; None where there is none.

    A thread that pops an owner off the list is the only one that looks at it.
    """
    for _ in range(len(owners)):
        try:
            owner = owners.popleft()
        except IndexError:  # another thread was faster
            break
        found = owner[:] if sys.getrefcount(owner) == _ALONE else None
        owners.append(owner)
        if found is not None:
            return found
    return None


def _new(size: int) -> HostArray:
    kept = sum(s * len(owners) for s, owners in list(_owners.items()))
    if size + kept > tuning.current.kept_bytes:
        _owners.clear()
    owner = np.empty(size, np.uint8)
    _owners.setdefault(size, deque()).append(owner)
    return owner[:]


def _references() -> int:
    """Count the references to an array that one name alone refers to."""
    owner = deque([np.empty(1)]).popleft()
    return sys.getrefcount(owner)


_ALONE = _references()
