"""Work over a few threads, for compiled code that releases the interpreter lock."""

import os
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import cache, lru_cache
from itertools import islice, takewhile
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
        self.free = deque(range(most))  # the others do somebody else's work
        self._wake = [threading.Lock() for _ in range(most)]
        for lock in self._wake:
            lock.acquire()
        self._started: dict[int, threading.Thread] = {}
        self._away_from = -1

    def hire(self, wanted: int, taken: list[int]) -> list[int]:
        """Call up to so many that are free.

        taken: the caller's list of those who are no longer `free`. He gives them back, also where
        a signal ends this in the middle.
        """
        with suppress(IndexError):  # no more; without steps of Python, between which signals come
            taken.extend(islice(iter(self.free.pop, None), wanted))
        hired = list(takewhile(self._is_there, taken))
        for worker in hired:
            if not self.boxes[worker, self._awake]:
                with suppress(RuntimeError):  # it is on its way
                    self._wake[worker].release()
        return hired

    def keep_off(self, processor: int) -> None:
        """Have all run on other processors than this."""
        if processor == self._away_from:
            return
        self._away_from = processor
        with suppress(AttributeError, OSError):  # not on this system
            others = os.sched_getaffinity(0) - {processor}
            for thread in [*self._started.values()] if others else ():
                with suppress(OSError):
                    os.sched_setaffinity(thread.native_id or 0, others)

    def _is_there(self, worker: int) -> bool:
        """Start its thread if it has none; return False where it cannot be had."""
        if worker not in self._started:
            thread = threading.Thread(
                target=self._work, args=(worker,), name="gru_any", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as e:
                _warn(f"{e}: calls run on fewer threads, which is slower")
                return False
            self._started.setdefault(worker, thread)
            self._away_from = -1
        return True

    def _work(self, worker: int) -> None:
        here = threading.current_thread()
        # two would do the same work, where a signal came between the start and its note
        while self._started.setdefault(worker, here) is here:
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


@lru_cache(maxsize=64)
def alone(rows: int) -> Hands:
    """Nobody but the caller, who takes all rows."""
    return Hands(NO_BOXES, NOBODY, np.array((0, rows)), NO_TEAM, 0)


def parallel_for(call: Call, rows: int, work: int) -> None:
    """Have a call share its rows with other threads; work: in multiply-adds."""
    pieces = tuning.pieces(rows, work, count())
    if pieces < 2 or crowd.present():
        call(alone(rows))
        return

    def by_rows(helpers: int) -> tuple[list[int], HostArray]:
        pieces = 1 + helpers
        # whole groups of rows, as the products take them
        unit = 8 if rows >= 16 * pieces else 4
        edges = [min(rows, unit * round(i * rows / (pieces * unit))) for i in range(pieces)]
        return [*edges, rows], NO_TEAM

    _shared(call, pieces - 1, by_rows)


def run_team(call: Call, rows: int, most: int) -> None:
    """Have a call share each step of all rows with a team, whose members wait for one another.

    Those that are not there in time are left out, and all others where other processes hold the
    processors.
    """
    if crowd.present():
        call(alone(rows))
        return

    def by_units(helpers: int) -> tuple[list[int], HostArray]:
        return [0, rows], np.zeros(_line() * (helpers + 2), np.int64) if helpers else NO_TEAM

    _shared(call, most - 1, by_units)


@cache
def _line() -> int:
    from .barrier import LINE  # which needs Numba

    return LINE


def _shared(call: Call, wanted: int, split: Callable[[int], tuple[list[int], HostArray]]) -> None:
    """Make a call with helpers, and take note of what threads lost to others.

    split: given how many helpers there are, returns `edges` and `sync`.
    """
    workers = openmp.region(wanted) or _workers()
    taken: list[int] = []
    try:
        hired = workers.hire(wanted, taken)
        edges, sync = split(len(hired))
        numbers = np.array(hired, np.int64), np.array(edges), sync, tuning.current.wake_polls
        lost, processor = call(Hands(workers.boxes, *numbers))
    finally:
        workers.free.extend(taken)  # no function of Python, at whose start a signal may come
    crowd.note(lost * 1e-9)
    workers.keep_off(processor)
