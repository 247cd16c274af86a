"""Share compiled code, which releases the interpreter lock, among a few threads."""

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
from ..alignment import aligned
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
NO_TEAM = np.zeros(0, np.int64)  # `sync` where threads do not form a team

crowd = cores.Crowd()


class Hands(NamedTuple):
    """The threads that share a call, and how: the first arguments of `handoff.share`."""

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
    """Worker threads, which poll for jobs for a while after each one, and then sleep.

    Linux often wakes a thread on the processor of the thread that wakes it, where it has to wait.
    So workers may run on all processors but that of their caller.
    """

    def __init__(self, most: int) -> None:
        from .handoff import AWAKE, WORDS

        # compiled here, since a fork during it would leave the child with a lock held for ever
        self._serve = compiled(SOURCE).serve
        self.boxes, self._awake = _aligned_zeros((most, WORDS)), AWAKE
        self.free = deque(range(most))  # the others work for another caller
        self._wake = [threading.Lock() for _ in range(most)]
        for lock in self._wake:
            lock.acquire()
        self._started: dict[int, threading.Thread] = {}
        self._away_from = -1

    def hire(self, wanted: int, taken: list[int]) -> list[int]:
        """Wake up to `wanted` free workers, and return their numbers.

        taken: a list of the caller, to which the workers are moved from `free`. The caller moves
        them back, even if a signal interrupts this method.
        """
        with suppress(IndexError):  # no more; in one call, so that no signal comes in between
            taken.extend(islice(iter(self.free.pop, None), wanted))
        hired = list(takewhile(self._is_there, taken))
        for worker in hired:
            if not self.boxes[worker, self._awake]:
                with suppress(RuntimeError):  # it is waking up already
                    self._wake[worker].release()
        return hired

    def keep_off(self, processor: int) -> None:
        """Let all workers run on other processors than this one."""
        if processor == self._away_from:
            return
        self._away_from = processor
        with suppress(AttributeError, OSError):  # not on this system
            others = os.sched_getaffinity(0) - {processor}
            for thread in [*self._started.values()] if others else ():
                with suppress(OSError):
                    os.sched_setaffinity(thread.native_id or 0, others)

    def _is_there(self, worker: int) -> bool:
        """Start a worker's thread if it has none; return False if that fails."""
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
        # a second thread, started because a signal came before the first was noted, ends here
        while self._started.setdefault(worker, here) is here:
            self._wake[worker].acquire()
            self._serve(self.boxes[worker], tuning.current.idle_yields)


def _aligned_zeros(shape: tuple[int, int]) -> HostArray:
    """Return zeros of int64, aligned to a cache line."""
    zeros = aligned(shape, np.dtype(np.int64))
    zeros[...] = 0
    return zeros


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
    """Return the hands of a call that its caller runs alone, on all rows."""
    return Hands(NO_BOXES, NOBODY, np.array((0, rows)), NO_TEAM, 0)


def parallel_for(call: Call, rows: int, work: int) -> None:
    """Run a call with its rows split over threads; work: in multiply-adds."""
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
    """Run a call by a team of threads, which share the units of each step and meet at barriers.

    Threads that do not join in time are left out; while other processes keep the processors busy,
    the caller runs alone.
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
    """Run a call with helpers, and note the time that threads lost to other processes.

    split: returns `edges` and `sync` for a number of helpers.
    """
    workers = openmp.region(wanted) or _workers()
    taken: list[int] = []
    try:
        hired = workers.hire(wanted, taken)
        edges, sync = split(len(hired))
        numbers = np.array(hired, np.int64), np.array(edges), sync, tuning.current.wake_polls
        lost, processor = call(Hands(workers.boxes, *numbers))
    finally:
        workers.free.extend(taken)  # a single C call, which no signal interrupts
    crowd.note(lost * 1e-9)
    workers.keep_off(processor)
