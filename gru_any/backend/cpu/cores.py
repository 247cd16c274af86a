"""How many processors this process may use, and whether other processes keep them busy.

A team of threads is as slow as its slowest member. If another process runs on a member's processor,
all others wait for that member, for some milliseconds at each barrier.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

FRESH = 0.1  # seconds for which an answer of the system is kept; reading it takes 0.1 ms
PAUSE = 10  # times the time lost, for which calls run on one thread
LONGEST_PAUSE = 1.0  # seconds


class _Answer(threading.local):
    """The system's last answer, one for each thread, since threads have their own affinity."""

    until, cores = 0.0, 1


_answer = _Answer()


def available() -> int:
    """Return how many processors the calling thread may use, as of a tenth of a second ago.

    They are limited by the affinity mask and by the CPU quota of a container, rounded down.
    """
    if (now := time.monotonic()) >= _answer.until:
        _answer.cores = max(1, int(min(_affinity(), quota())))
        _answer.until = now + FRESH
    return _answer.cores


def _affinity() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on this system, or not allowed
        return os.cpu_count() or 1


def quota(root: Path = Path("/")) -> float:
    """Return the CPU quota of this process in processors; infinity where it has none."""
    found: list[float] = []
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                found += _quotas(root, ("", "unified"), group, _version_2)
            elif "cpu" in controllers.split(","):
                found += _quotas(root, ("cpu", controllers), group, _version_1)
    return min(found, default=math.inf)


def _quotas(
    root: Path, mounts: tuple[str, ...], group: str, read: Callable[[Path], float]
) -> Iterator[float]:
    """Yield the quotas of a control group and of its parents, as far as they are visible."""
    inside = PurePosixPath(group.lstrip("/"))
    for mount in mounts:
        for folder in (inside, *inside.parents):
            with suppress(OSError, ValueError, ZeroDivisionError):
                yield read(root / "sys/fs/cgroup" / mount / folder)


def _version_2(folder: Path) -> float:
    limit, period = (folder / "cpu.max").read_text().split()
    return math.inf if limit == "max" else int(limit) / int(period)


def _version_1(folder: Path) -> float:
    limit = int((folder / "cpu.cfs_quota_us").read_text())
    return math.inf if limit < 0 else limit / int((folder / "cpu.cfs_period_us").read_text())


class Crowd:
    """Decides when calls run on one thread, because other processes keep the processors busy.

    A shared call that lost time is followed by a pause of ten times that, and by one twice as long
    if the next shared call loses time too. So the loss is bounded, and calls use threads again when
    the processors are free.
    """

    def __init__(self) -> None:
        self._until = self._pause = 0.0

    def present(self) -> bool:
        """Return whether calls should run on one thread now."""
        return time.monotonic() < self._until

    def note(self, lost: float) -> None:
        """Note the most seconds that a thread of a shared call lost."""
        if lost:
            self._pause = min(LONGEST_PAUSE, max(PAUSE * lost, 2 * self._pause))
            self._until = time.monotonic() + self._pause
        else:
            self._pause /= 2
