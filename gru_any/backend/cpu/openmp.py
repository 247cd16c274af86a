"""Run our compiled code on the OpenMP threads of another library, such as PyTorch.

PyTorch's threads poll for some milliseconds after each of its operations, and threads of ours would
compete with them for the processors. So inside of the context `lent` our work runs on those
threads: a call starts a parallel region of the OpenMP that this process has loaded.
"""

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable
from functools import cache
from types import TracebackType
from typing import NamedTuple

import numpy as np

from ...typing import HostArray


class _Found(NamedTuple):
    """Functions of OpenMP."""

    region: int  # the address of the one that starts a parallel region
    threads: Callable[[], int]  # how many there are in it


class Lent(threading.local):
    """A context in which a thread shares its work with OpenMP's threads, if there are enough."""

    open = False
    forked = False  # in a child, where OpenMP's threads are missing

    def __enter__(self) -> None:
        self.open = not Lent.forked

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self.open = False


class Region:
    """The threads of a parallel region, which `handoff.share` will start."""

    def __init__(self, address: int, most: int) -> None:
        from .handoff import REGION, WORDS

        self.boxes: HostArray = np.zeros((most, WORDS), np.int64)
        self.boxes[:, REGION] = address
        self.free: deque[int] = deque()

    def hire(self, wanted: int, taken: list[int]) -> list[int]:
        """Return the numbers of the threads that take part; `taken` stays empty."""
        return list(range(wanted))

    def keep_off(self, processor: int) -> None:
        """Do nothing: their processors are OpenMP's affair."""


def region(wanted: int) -> Region | None:
    """Return a region with so many threads beside the caller; None where there is none."""
    if not lent.open or (found := _openmp()) is None or found.threads() <= wanted:
        return None
    return Region(found.region, wanted)


@cache
def _openmp() -> _Found | None:
    """Return the functions of the loaded OpenMP, by GNU's interface; None where none is loaded."""
    try:
        here = ctypes.CDLL(None)
        address = ctypes.cast(here.GOMP_parallel, ctypes.c_void_p).value
        return _Found(address or 0, here.omp_get_max_threads) if address else None
    except (AttributeError, OSError, TypeError):  # the last on Windows
        return None


def _note_fork() -> None:
    Lent.forked, lent.open = True, False


lent = Lent()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
