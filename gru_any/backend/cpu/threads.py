"""Work over a few threads, for compiled code that releases the interpreter lock."""

import os
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import NamedTuple, TypeAlias

import numpy as np

from ...typing import HostArray
from . import cores, openmp, tuning
from .jit_cache import compiled

SOURCE = """\
from numba import njit
from gru_any.backend.cpu import barrier, handoff


@njit("void(int64[::1], int64)", cache=CACHE, nogil=True)
def serve(box, yields):
    handoff.serve(box, yields)
"""
NOBODY = np.zeros(0, np.int64)
NO_BOXES = np.zeros((0, 0), np.int64)
NO_TEAM = np.zeros(0, np.int64)  # `sync` of a thread that shares its work with no other

crowd = cores.Crowd()


class Hands(NamedTuple):
    """Who shares a call of compiled code; the first arguments of `handoff.share`."""

    boxes: HostArray
    hired: HostArray
    edges: HostArray
    sync: HostArray
    polls: int


Call: TypeAlias = Callable[[Hands], tuple[int, int]]  # returns what `handoff.share` returns


def count() -> int:
    """Return how many threads to use: one a processor, at most OMP_NUM_THREADS."""
    return min(_asked(), cores.available())


@cache
def _asked() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # then of nested regions
    return int(asked) if asked.isdigit() and int(asked) else sys.maxsize


class _Workers:
    """Threads that look for work for a while after they had some, and then sleep.

    Linux often wakes a thread on the processor of who wakes it, to wait there for that one. So
    theirs are all but that of who hires them.
    """

    def __init__(self, most: int) -> None:
        from .handoff import AWAKE, WORDS

        # here, since a fork in the middle of it would leave the child a lock that nobody opens
        self._serve = compiled(SOURCE).serve
        self.boxes, self._awake = _aligned((most, WORDS)), AWAKE
        self._free = deque(range(most))
        self._wake = [threading.Lock() for _ in range(most)]
        self._started: dict[int, int] = {}  # the system's number of each thread
        self._away_from = -1

    def hire(self, wanted: int) -> list[int]:
        """Call up to so many that are free, to be released; others do somebody else's work."""
        found: list[int] = []
        with suppress(IndexError):
            while len(found) < wanted:
                worker = self._free.pop()
                if worker not in self._started and not self._start(worker):
                    self._free.append(worker)
                    break
                found.append(worker)
        for worker in found:
            if not self.boxes[worker, self._awake]:
                with suppress(RuntimeError):  # it is on its way
                    self._wake[worker].release()
        return found

    def release(self, found: list[int]) -> None:
        """Let others hire them."""
        self._free.extend(found)

    def keep_off(self, processor: int) -> None:
        """Have all run on other processors than this."""
        if processor == self._away_from:
            return
        self._away_from = processor
        with suppress(AttributeError, OSError):  # not on this system
            others = os.sched_getaffinity(0) - {processor}
            for thread in [*self._started.values()] if others else ():
                with suppress(OSError):
                    os.sched_setaffinity(thread, others)

    def _start(self, worker: int) -> bool:
        self._wake[worker].acquire()
        thread = threading.Thread(target=self._work, args=(worker,), name="gru_any", daemon=True)
        try:
            thread.start()
        except RuntimeError as e:
            self._wake[worker].release()
            _warn(f"{e}: calls run on fewer threads, which is slower")
            return False
        self._started[worker] = thread.native_id or 0
        self._away_from = -1
        return True

    def _work(self, worker: int) -> None:
        while True:
            self._wake[worker].acquire()
            self._serve(self.boxes[worker], tuning.current.idle_yields)


def _aligned(shape: tuple[int, int]) -> HostArray:
    """Return zeros of int64 from the start of a line of the cache on."""
    room = np.zeros(shape[0] * shape[1] + 8, np.int64)
    start = -room.ctypes.data % 64 // 8
    return room[start : start + shape[0] * shape[1]].reshape(shape)


@cache
def _warn(words: str) -> None:
    if not sys.is_finalizing():
        warnings.warn(words, RuntimeWarning, stacklevel=2)


@cache
def _workers() -> _Workers:
    return _Workers(max(os.cpu_count() or 1, count()))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.cache_clear)  # threads do not survive a fork


def alone(rows: int) -> Hands:
    """Nobody but the caller, who takes all rows."""
    return Hands(NO_BOXES, NOBODY, np.array((0, rows)), NO_TEAM, 0)


def parallel_for(call: Call, rows: int, work: int) -> None:
    """Have a call share its rows with other threads; work: in multiply-adds."""
    pieces = tuning.pieces(rows, work, count())
    if pieces < 2 or crowd.present():
        call(alone(rows))
        return
    workers = openmp.region(pieces - 1) or _workers()
    hired = workers.hire(pieces - 1)
    pieces = 1 + len(hired)
    # whole groups of rows, as the products take them
    unit = 8 if rows >= 16 * pieces else 4
    edges = [min(rows, unit * round(i * rows / (pieces * unit))) for i in range(pieces)]
    _shared(call, workers, hired, [*edges, rows], NO_TEAM)


def run_team(call: Call, rows: int, most: int) -> None:
    """Have a call share each step of all rows with a team, whose members wait for one another.

    Those that are not there in time are left out, and all others where other processes hold the
    processors.
    """
    if crowd.present():
        call(alone(rows))
        return
    from .barrier import LINE

    workers = openmp.region(most - 1) or _workers()
    hired = workers.hire(most - 1)
    sync = np.zeros(LINE * (len(hired) + 2), np.int64) if hired else NO_TEAM
    _shared(call, workers, hired, [0, rows], sync)


def _shared(
    call: Call,
    workers: _Workers | openmp.Region,
    hired: list[int],
    edges: list[int],
    sync: HostArray,
) -> None:
    """Make a call with those who are hired, and take note of what threads lost to others."""
    numbers = np.array(hired, np.int64), np.array(edges), sync, tuning.current.wake_polls
    try:
        lost, processor = call(Hands(workers.boxes, *numbers))
    finally:
        workers.release(hired)
    crowd.note(lost * 1e-9)
    workers.keep_off(processor)
