"""Memory and streams of the device that the host plays, stricter than those of a device.

What one stream does to memory that another used, without having waited for it, is an error; so is
making an array while launches are recorded, but in memory of the recording's own. Memory that is
released becomes NaN and is reused.
"""

import threading
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable
from itertools import count as numbers
from typing import Any

import numpy as np

count: Counter[str] = Counter()  # "waits", "launches", "replays", "products", "copies"
# of each thread: the stream it works on; what it records; the pool of new arrays; what it replays
local = threading.local()
LOCK = threading.RLock()


class StreamError(AssertionError):
    """Two streams use the same memory and neither waited, or memory is used that is not there."""


class Recorder:
    """Actions in the order they were asked for, each with its stream; nothing is done yet."""

    def __init__(self) -> None:
        self.origin = ("recorded", next(_serial))
        self.joined = {self.origin}  # the streams that take part
        self.actions: list[tuple[Any, Callable[[], None]]] = []

    def add(self, action: Callable[[], None]) -> None:
        """On the current stream."""
        if stream() not in self.joined:
            raise StreamError(f"stream {stream()} takes no part in the recording")
        self.actions.append((stream(), action))


_serial = numbers()


def recording() -> Recorder | None:
    """What this thread records; None where it records nothing."""
    return getattr(local, "recorder", None)


def do(action: Callable[[], None]) -> None:
    """Now, or whenever what is recorded is replayed."""
    recorder = recording()
    if recorder is None:
        action()
    else:
        recorder.add(action)


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
        _mark(me, read, written)
        touched = getattr(local, "touched", None)
        if touched:
            touched[0].update(read)
            touched[1].update(written)


def _mark(me: Any, read: Any, written: Any) -> None:
    """What a stream read and wrote, now that it has seen all that it needs."""
    known = DONE[me]
    for cell in (*read, *written):
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


def replay(recorder: Recorder) -> None:
    """Do what was recorded, each action on a stream of this replay; all end in the first of them.

    To others it is as if the current stream had done everything.
    """
    me, mine = stream(), next(_serial)
    with LOCK:
        learn((mine, recorder.origin), DONE["host"])
        learn((mine, recorder.origin), DONE.get(me, {}))
    read: set[Cell] = set()
    written: set[Cell] = set()
    local.touched = read, written
    try:
        for name, action in recorder.actions:
            local.stream = (mine, name)
            action()
    finally:
        local.stream, local.touched = me, None
    with LOCK:
        learn(me, DONE[(mine, recorder.origin)])
        known = DONE[me]
        known[me] = known.get(me, 0) + 1
        _mark(me, read - written, written)
        for name in {(mine, name) for name in recorder.joined}:
            DONE.pop(name, None)
            known.pop(name, None)
            for cell in read - written:
                cell.read.pop(name, None)


# memory ------------------------------------------------------------------------------------------


class Cell:
    """A piece of memory and who used it last; it is lent again, never returned to the system."""

    def __init__(self, size: int) -> None:
        self.bytes, self.live = np.full(size, 255, np.uint8), False
        self.address, self.size = self.bytes.ctypes.data, size
        self.written: dict[Any, int] = {}
        self.read: dict[Any, int] = {}

    def lend(self) -> None:
        """Somebody owns it."""
        self.live = True

    def give_back(self) -> None:
        """Nobody owns it any more."""
        self.bytes.fill(255)  # NaN in every floating dtype
        self.live = False


class Pool(dict[tuple[Any, int], list[Cell]]):
    """Spare cells: of a stream, of a size. kept: how many were not returned to the system."""

    kept = 0

    def free_all_blocks(self) -> None:
        """Return the spare ones to the system, as CuPy's; there, others are lost with the pool."""
        with LOCK:
            for cell in (cell for cells in self.values() for cell in cells):
                del _cells[cell.address], _addresses[bisect_left(_addresses, cell.address)]
                self.kept -= 1
            self.clear()


_pool = Pool()


class _Owner:
    """Gives its cell back when nothing refers to it any more."""

    def __init__(self, cell: Cell, shape: tuple[int, ...], dtype: Any, pool: Any) -> None:
        self.cell, self.stream, self.pool = cell, stream(), pool  # at exit, names go first
        self.recorder: Any = recording()
        self.__array_interface__ = {
            "shape": shape,
            "typestr": f"|V{np.dtype(dtype).itemsize}",
            "data": (cell.address, False),
            "version": 3,
        }

    def __del__(self) -> None:
        recorder = getattr(local, "recorder", None)
        if recorder is not None and recorder is self.recorder:
            recorder.actions.append((self.stream, self.cell.give_back))
        else:
            self.cell.give_back()
        self.pool.setdefault((self.stream, self.cell.size), []).append(self.cell)


_cells: dict[int, Cell] = {}
_addresses: list[int] = []


def new(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array in a cell of the current stream."""
    pool = getattr(local, "pool", None)
    if recording() is not None and pool is None:
        raise RuntimeError("an array is made while launches are recorded")
    pool = _pool if pool is None else pool
    size = max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1)
    with LOCK:
        spare = pool.get((stream(), size))
        cell = spare.pop() if spare else Cell(size)
        if cell.address not in _cells:
            pool.kept += 1
            _cells[cell.address] = cell
            _addresses.insert(bisect_right(_addresses, cell.address), cell.address)
        do(cell.lend)
        return np.asarray(_Owner(cell, shape, dtype, pool)).view(dtype)


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


def unowned(host: np.ndarray) -> np.ndarray:
    """While recording the same place in memory, without keeping it from being given back."""
    cell = cell_of(host)
    if cell is None or not host.size or recording() is None:
        return host
    offset = host.ctypes.data - cell.address
    return np.ndarray(host.shape, host.dtype, cell.bytes.data, offset, host.strides)
