"""Work over a few threads, for compiled code that releases the interpreter lock."""

import os
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import count as numbers
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import numpy as np

from ...typing import HostArray
from . import cores, tuning

Result = TypeVar("Result")
NO_TEAM = np.zeros(0, np.int64)  # `sync` of a thread that shares its work with no other

crowd = cores.Crowd()


def count() -> int:
    """Return how many threads to use: one a processor, at most OMP_NUM_THREADS."""
    return min(_asked(), cores.available())


@cache
def _asked() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # then of nested regions
    return int(asked) if asked.isdigit() and int(asked) else sys.maxsize


class Job(Generic[Result]):
    """A call that another thread makes, unless it is cancelled before."""

    def __init__(self, call: Callable[..., Result], arguments: tuple[object, ...]) -> None:
        self._call, self._arguments = call, arguments
        self._claimed, self._ended = threading.Lock(), threading.Lock()
        self._ended.acquire()
        self._found: Result
        self._error: BaseException | None = None
        self.lost = 0.0  # seconds for which others held the processor, once it has ended

    def run(self, idle: list[None]) -> None:
        """Make the call; the thread says first that it is idle, then that the call has ended."""
        claimed = self.cancel()
        if claimed:
            watch = cores.Watch()
            try:
                self._found = self._call(*self._arguments)
            except BaseException as e:
                self._error = e
            self.lost = watch.lost()
        idle.append(None)
        if claimed:
            self._ended.release()

    def cancel(self) -> bool:
        """Take the call away from the others; False if one of them has begun it."""
        return self._claimed.acquire(blocking=False)

    def result(self) -> Result:
        """Wait for the end of the call, and return its result or raise its error."""
        self._ended.acquire()
        if self._error is not None:
            raise self._error
        return self._found


class _Pool:
    """Threads that Linux wakes up on another processor than that of who calls them.

    Left alone, it often puts a thread where it was woken, to wait there for who woke it. Handing a
    job over takes 12 us, there and back, and 52 us with `concurrent.futures`.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job[Any]] = SimpleQueue()
        self._started = 0
        self._idle: list[None] = []  # an entry for each thread that waits for a job
        self._threads: list[int] = []
        self._away_from = -1
        self._here: Callable[[], int] | None = None
        if sys.platform == "linux":
            with suppress(ImportError, OSError):
                import ctypes

                self._here = getattr(ctypes.CDLL(None), "sched_getcpu", None)

    def _work(self) -> None:
        self._threads.append(threading.get_native_id())
        self._away_from = -1
        while True:
            self._jobs.get().run(self._idle)

    def submit(self, call: Callable[..., Result], *arguments: object) -> Job[Result]:
        """Have a thread make this call; where none can be had, it waits to be cancelled."""
        if self._here and (here := self._here()) != self._away_from:
            self._away_from = here
            with suppress(AttributeError, OSError):
                others = os.sched_getaffinity(0) - {here}
                for thread in self._threads if others else ():
                    with suppress(OSError):
                        os.sched_setaffinity(thread, others)
        job = Job(call, arguments)
        try:
            self._idle.pop()
        except IndexError:
            if self._started < count() and not self._start():
                return job
        self._jobs.put(job)
        return job

    def _start(self) -> bool:
        self._started += 1
        try:
            threading.Thread(target=self._work, name="gru_any", daemon=True).start()
        except RuntimeError as e:
            self._started -= 1
            _warn(f"{e}: calls run on fewer threads, which is slower")
            return False
        return True


@cache
def _warn(words: str) -> None:
    if not sys.is_finalizing():
        warnings.warn(words, RuntimeWarning, stacklevel=2)


@cache
def _pool() -> _Pool:
    return _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def submit(call: Callable[..., Result], *arguments: object) -> Job[Result]:
    """Have another thread make the call; where others hold the processors, it waits."""
    return Job(call, arguments) if crowd.present() else _pool().submit(call, *arguments)


def parallel_for(call: Callable[[int, int], object], rows: int, work: int) -> None:
    """Make call(first, last) for all rows, in a few pieces at once; work: in multiply-adds."""
    pieces = tuning.pieces(rows, work, count())
    if pieces < 2 or crowd.present():
        call(0, rows)
        return
    # whole groups of rows, as the products take them
    unit = 8 if rows >= 16 * pieces else 4
    edges = [min(rows, unit * round(i * rows / (pieces * unit))) for i in range(pieces)] + [rows]
    watch, others = cores.Watch(), [submit(call, *edges[i : i + 2]) for i in range(1, pieces)]
    call(edges[0], edges[1])
    lost = [watch.lost()]
    for i, other in enumerate(others, 1):
        if other.cancel():  # the pool is busy with somebody else's work
            call(*edges[i : i + 2])
        else:
            other.result()
            lost.append(other.lost)
    crowd.note(max(lost))


def run_team(call: Callable[[int, HostArray], object], most: int) -> None:
    """Make call(me, sync) in up to so many threads at once, which may wait for one another.

    me: 0, 1, ...; sync: see `barrier.py`. Those that are not there in time are left out, and all
    others where other processes hold the processors.
    """
    if crowd.present():
        call(0, NO_TEAM)
        return
    from .barrier import LINE, count_members

    sync, number = np.zeros(LINE * (most + 1), np.int64), numbers(1)
    watch = cores.Watch()
    try:
        others = [submit(lambda: call(next(number), sync)) for _ in range(1, most)]
        sync[0] = count_members(sync, most, tuning.current.wake_polls)
        call(0, sync)
    finally:
        sync[0] = -1  # or those who have joined would wait for ever where no other can be had
    lost = [watch.lost()]
    for other in others:
        if not other.cancel():
            other.result()
            lost.append(other.lost)
    crowd.note(max(lost))
