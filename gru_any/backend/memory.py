"""Memory for NumPy that is used again as soon as nobody refers to it any more.

Fresh memory can cost more than the arithmetic on it: the system hands it out page by page, at the
first touch. An array made here is a view of an owner; so is every view of it, and it is by the
references to the owner that one sees whether the memory is free.
"""

import math
import sys
from collections import deque
from typing import Any

import numpy as np

LEAST = 2**16  # bytes; for less there is no new page
MOST = 2**28  # bytes that are remembered
_owners: dict[int, deque[Any]] = {}  # by their size


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """As numpy.empty, over memory that nobody uses; for what is not given to the user."""
    size = math.prod(shape) * dtype.itemsize
    if size < LEAST:
        return np.empty(shape, dtype)
    found = _free(_owners.setdefault(size, deque()))
    return (_new(size) if found is None else found).view(dtype).reshape(shape)


def forget() -> None:
    """Let go of all memory that nobody uses."""
    _owners.clear()


def _free(owners: deque[Any]) -> Any:
    """A view of the first owner that nobody refers to; None where there is none.

    Whoever takes an owner off the list has it alone, in whatever thread.
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


def _new(size: int) -> Any:
    if size + sum(s * len(owners) for s, owners in list(_owners.items())) > MOST:
        _owners.clear()
    owner = np.empty(size, np.uint8)
    _owners.setdefault(size, deque()).append(owner)
    return owner[:]


def _references() -> int:
    """To an array that has no name but one."""
    owner = deque([np.empty(1)]).popleft()
    return sys.getrefcount(owner)


_ALONE = _references()
