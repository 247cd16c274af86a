"""Memory and streams of the device that the host plays, stricter than those of a device.

What one stream does to memory that another used, without having waited for it, is an error; so is
making an array while launches are recorded. Memory that is let go of becomes NaN and is lent again.
"""

import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

count: Counter[str] = Counter()  # "waits", "launches", "replays", "products", "copies"
local = threading.local()  # stream: its number; recorded: launches, while they are recorded
LOCK = threading.RLock()


class StreamError(AssertionError):
    """Two streams use the same memory and neither waited, or memory is used that is not there."""


def recording() -> list[Callable[[], None]] | None:
    """What this thread recorded so far; None where it records nothing."""
    return getattr(local, "recorded", None)


# streams: what each knows to be done, as one number of each stream --------------------------------

DONE: dict[Any, dict[Any, int]] = {"host": {}}


def stream() -> Any:
    """What this thread's current stream is called."""
    return getattr(local, "stream", 0)


def learn(who: Any, known: dict[Any, int]) -> None:
    """A stream, or the host, knows from now on what is known there."""
    mine = DONE.setdefault(who, {})
    for other, n in known.items():
        mine[other] = max(mine.get(other, 0), n)


def wait() -> None:
    """The host waits for the current stream."""
    if recording() is not None:
        raise RuntimeError("the host waits while launches are recorded")
    count["waits"] += 1
    learn("host", DONE.get(stream(), {}))


def use(read: list["Cell"], written: list["Cell"]) -> None:
    """The current stream does something to memory."""
    with LOCK:
        me = stream()
        learn(me, DONE["host"])
        known = DONE[me]
        known[me] = known.get(me, 0) + 1
        for cell in (*read, *written):
            if not cell.live:
                raise StreamError("memory is used that was given back")
            _require(known, cell.written)
        for cell in written:
            _require(known, cell.read)
            cell.written, cell.read = {me: known[me]}, {}
        for cell in read:
            cell.read[me] = known[me]


def _require(known: dict[Any, int], used: dict[Any, int]) -> None:
    for other, n in used.items():
        if known.get(other, 0) < n:
            raise StreamError(f"stream {stream()} did not wait for stream {other}")


# memory ------------------------------------------------------------------------------------------


class Cell:
    """A piece of memory and who used it last; it is lent again, never returned to the system."""

    def __init__(self, size: int) -> None:
        self.bytes, self.live = np.full(size, 255, np.uint8), False
        self.address, self.size = self.bytes.ctypes.data, size
        self.written: dict[Any, int] = {}
        self.read: dict[Any, int] = {}


_pool: dict[tuple[Any, int], list[Cell]] = {}  # spare cells: of a stream, of a size


class _Owner:
    """Gives its cell back when nothing refers to it any more."""

    def __init__(self, cell: Cell, shape: tuple[int, ...], dtype: Any) -> None:
        self.cell, self.stream, self.pool = cell, stream(), _pool  # at exit, names go first
        self.__array_interface__ = {
            "shape": shape,
            "typestr": np.dtype(dtype).str,
            "data": (cell.address, False),
            "version": 3,
        }

    def __del__(self) -> None:
        self.cell.bytes.fill(255)  # NaN in every floating dtype
        self.cell.live = False
        self.pool.setdefault((self.stream, self.cell.size), []).append(self.cell)


_cells: dict[int, Cell] = {}
_addresses: list[int] = []


def new(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array in a cell of the current stream."""
    if recording() is not None:
        raise RuntimeError("an array is made while launches are recorded")
    size = max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1)
    with LOCK:
        spare = _pool.get((stream(), size))
        cell = spare.pop() if spare else Cell(size)
        if cell.address not in _cells:
            _cells[cell.address] = cell
            _addresses.insert(bisect_right(_addresses, cell.address), cell.address)
        cell.live = True
        return np.asarray(_Owner(cell, shape, dtype))


def cell_at(address: int) -> Cell | None:
    """The cell that an address lies in."""
    n = bisect_right(_addresses, address)
    cell = _cells[_addresses[n - 1]] if n else None
    return cell if cell and address < cell.address + cell.size else None


def cell_of(host: Any) -> Cell | None:
    """The cell of an array that was made here, or of a view of one."""
    while isinstance(host, np.ndarray):
        host = host.base
    return host.cell if isinstance(host, _Owner) else None
