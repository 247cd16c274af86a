"""Work over a few threads, for compiled code that lets go of the interpreter's lock."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import count as numbers
from typing import Any

import numpy as np

GRAIN = 4_000_000  # multiply-adds that are worth waking a thread for
PATIENCE = 100_000  # so many looks, some hundred microseconds, whether a thread has woken up
ALONE = np.zeros(0, np.int64)  # for code that could wait for others: there are none


@cache
def count() -> int:
    """How many threads to use: OMP_NUM_THREADS, as BLAS does, or else one for each processor."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on this system, or not allowed
        return os.cpu_count() or 1


class _Pool:
    """Threads that Linux wakes up on another processor than that of who calls them.

    Left alone, it often puts a thread where it was woken, to wait there for who woke it.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(count(), "gru_any", self._begin)
        self._threads: list[int] = []
        self._away_from = -1
        self._here: Callable[[], int] | None = None
        if sys.platform == "linux":
            with suppress(ImportError, OSError):
                import ctypes

                self._here = getattr(ctypes.CDLL(None), "sched_getcpu", None)

    def _begin(self) -> None:
        self._threads.append(threading.get_native_id())
        self._away_from = -1

    def submit(self, call: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """As that of an executor; where no thread can be had, the future waits to be cancelled."""
        if self._here and (here := self._here()) != self._away_from:
            self._away_from = here
            with suppress(AttributeError, OSError):
                others = os.sched_getaffinity(0) - {here}
                for thread in self._threads if others else ():
                    with suppress(OSError):
                        os.sched_setaffinity(thread, others)
        future: Future[Any] = Future()
        try:
            self._pool.submit(_fulfil, future, call, arguments)
        except RuntimeError as e:  # the executor keeps the call, and another thread may take it
            if "new thread" in str(e):
                _tell(f"{e}: calls run on fewer threads, which is slower")
        return future


def _fulfil(future: "Future[Any]", call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(call(*arguments))
        except BaseException as e:
            future.set_exception(e)


@cache
def _tell(words: str) -> None:
    print(f"gru_any: {words}", file=sys.stderr)


@cache
def _pool() -> _Pool:
    return _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def split(call: Callable[[int, int], object], rows: int, work: int) -> None:
    """call(first, last) for all rows, in a few pieces at once; work is in multiply-adds."""
    pieces = min(count(), work // GRAIN, rows // 4)
    if pieces < 2:
        call(0, rows)
        return
    # whole groups of rows, as the products take them
    unit = 8 if rows >= 16 * pieces else 4
    edges = [min(rows, unit * round(i * rows / (pieces * unit))) for i in range(pieces)] + [rows]
    others = [_pool().submit(call, *edges[i : i + 2]) for i in range(1, pieces)]
    call(edges[0], edges[1])
    for i, other in enumerate(others, 1):
        if other.cancel():  # the pool is busy with somebody else's work
            call(*edges[i : i + 2])
        else:
            other.result()


def together(call: Callable[[int, np.ndarray], object], most: int) -> None:
    """call(me, sync) in up to so many threads at once, which may wait for one another.

    me: 0, 1, ...; sync: see `barrier.py`. Those that are not there in time are left out.
    """
    from .barrier import LINE, arrived

    sync, number = np.zeros(LINE * (most + 1), np.int64), numbers(1)
    try:
        others = [_pool().submit(lambda: call(next(number), sync)) for _ in range(1, most)]
        sync[0] = arrived(sync, most, PATIENCE)
        call(0, sync)
    finally:
        sync[0] = -1  # or those who have come would wait for ever, where another cannot be had
    for other in others:
        if not other.cancel():
            other.result()
