"""Work over a few threads, for compiled code that lets go of the interpreter's lock."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

GRAIN = 4_000_000  # multiply-adds that are worth waking a thread for


@cache
def count() -> int:
    """How many threads to use: OMP_NUM_THREADS, as BLAS does, or else one for each processor."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count(), "gru_any")


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
