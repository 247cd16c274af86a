"""The memory and the streams of the fake device, and the checker that watches both.

Every stream has a vector clock, which says how many operations of each other stream are known to
have finished. Every allocation keeps the clocks of its last accesses. An access that is not ordered
after those it conflicts with raises `StreamError`, although the host ran both one after the other.

Freed memory becomes NaN and is reused. During a capture, new arrays must come from a pool.
"""

import threading
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import count as integers
from typing import TypeAlias

import numpy as np

from ...typing import DType, HostArray, Shape

Stream: TypeAlias = Hashable  # a stream's name
Clock: TypeAlias = dict[Stream, int]  # how many operations of each stream have finished

count: Counter[str] = Counter()  # "waits", "launches", "replays", "products", "copies"
# of each thread: `stream`, the current one; `capture`, which takes what is enqueued; `pool` of new
# arrays; `touched`, what a replay has read and written
local = threading.local()
LOCK = threading.RLock()


class StreamError(AssertionError):
    """Two streams access the same memory and neither waited, or an access is outside of memory."""


class Capture:
    """Captured actions in order, each with its stream. Nothing runs until the replay."""

    def __init__(self) -> None:
        self.origin = ("captured", next(_serial))
        self.streams: set[Stream] = {self.origin}  # that take part
        self.actions: list[tuple[Stream, Callable[[], None]]] = []

    def add(self, action: Callable[[], None]) -> None:
        """Append an action of the current stream."""
        if current_stream() not in self.streams:
            raise StreamError(f"stream {current_stream()} takes no part in the capture")
        self.actions.append((current_stream(), action))


_serial = integers()


def capturing() -> Capture | None:
    """Return the capture of this thread, None where there is none."""
    return getattr(local, "capture", None)


def enqueue(action: Callable[[], None]) -> None:
    """Run the action now, or whenever the capture of this thread is replayed."""
    capture = capturing()
    if capture is None:
        action()
    else:
        capture.add(action)


# streams -----------------------------------------------------------------------------------------

CLOCKS: dict[Stream, Clock] = {"host": {}}
PENDING: dict[Stream, list[Callable[[], bool]]] = {}  # what streams wait for in other processes


def current_stream() -> Stream:
    """Return the name of this thread's current stream."""
    name: Stream = getattr(local, "stream", 0)
    return name


def learn(stream: Stream, known: Mapping[Stream, int]) -> None:
    """Merge what is known to have finished into the clock of a stream, or of the host."""
    mine = CLOCKS.setdefault(stream, {})
    for other, n in known.items():
        mine[other] = max(mine.get(other, 0), n)


def wait() -> None:
    """Let the host wait for the current stream."""
    if capturing() is not None:
        raise RuntimeError("the host waits while launches are recorded")
    count["waits"] += 1
    with LOCK:
        learn("host", CLOCKS.get(current_stream(), {}))


def access(read: Sequence["Allocation"], written: Sequence["Allocation"]) -> None:
    """Check and note one operation of the current stream."""
    with LOCK:
        stream = current_stream()
        learn(stream, CLOCKS["host"])
        _tick(stream)
        if not all(allocation.live for allocation in (*read, *written)):
            raise StreamError("memory is used that was given back")
        _check_and_note(stream, read, written)
        touched = getattr(local, "touched", None)
        if touched:
            touched[0].update(read)
            touched[1].update(written)


def _tick(stream: Stream) -> None:
    CLOCKS[stream][stream] = CLOCKS[stream].get(stream, 0) + 1


def _check_and_note(
    stream: Stream, read: Iterable["Allocation"], written: Iterable["Allocation"]
) -> None:
    known = CLOCKS[stream]
    for allocation in (*read, *written):
        _check_order(known, allocation.written)
    for allocation in written:
        _check_order(known, allocation.read)
        allocation.written, allocation.read = {stream: known[stream]}, {}
    for allocation in read:
        allocation.read[stream] = known[stream]


def _check_order(known: Clock, accesses: Clock) -> None:
    for other, n in accesses.items():
        if known.get(other, 0) < n:
            raise StreamError(f"stream {current_stream()} did not wait for stream {other}")


def replay(capture: Capture) -> None:
    """Run the captured actions, each on a stream of this replay; all join the first of them.

    To everything else it is one operation of the current stream.
    """
    stream, serial = current_stream(), next(_serial)
    with LOCK:
        learn((serial, capture.origin), CLOCKS["host"])
        learn((serial, capture.origin), CLOCKS.get(stream, {}))
    read: set[Allocation] = set()
    written: set[Allocation] = set()
    local.touched = read, written
    try:
        for name, action in capture.actions:
            local.stream = (serial, name)
            action()
    finally:
        local.stream, local.touched = stream, None
    with LOCK:
        learn(stream, CLOCKS[(serial, capture.origin)])
        _tick(stream)
        _check_and_note(stream, read - written, written)
        for name in capture.streams:
            CLOCKS.pop((serial, name), None)
            CLOCKS[stream].pop((serial, name), None)
            for allocation in read - written:
                allocation.read.pop((serial, name), None)


# memory ------------------------------------------------------------------------------------------


class Allocation:
    """A piece of memory and its last accesses. It is reused, never returned to the system."""

    def __init__(self, size: int) -> None:
        self.bytes, self.live = np.full(size, 255, np.uint8), False
        self.address, self.size = self.bytes.ctypes.data, size
        self.written: Clock = {}
        self.read: Clock = {}

    def take(self) -> None:
        """Mark it as owned by an array."""
        self.live = True

    def free(self) -> None:
        """Mark it as free, and fill it with bytes that are NaN in every floating dtype."""
        self.bytes.fill(255)
        self.live = False


class Pool(dict[tuple[Stream, int], list[Allocation]]):
    """The free allocations of each stream and size. kept: how many the pool holds in all."""

    kept = 0

    def free_all_blocks(self) -> None:
        """Return the free ones to the system, as CuPy does; the others are lost with the pool."""
        with LOCK:
            for free in self.values():
                for address in (allocation.address for allocation in free):
                    del _allocations[address], _addresses[bisect_left(_addresses, address)]
                self.kept -= len(free)
            self.clear()


_pool = Pool()


class _Owner:
    """The base of an array: frees its allocation when no view refers to it any more."""

    def __init__(self, allocation: Allocation, shape: Shape, dtype: DType, pool: Pool) -> None:
        self.allocation, self.stream = allocation, current_stream()
        self.pool, self.capture = pool, capturing()  # at exit, the module's names go first
        self.__array_interface__ = {
            "shape": shape,
            "typestr": f"|V{np.dtype(dtype).itemsize}",
            "data": (allocation.address, False),
            "version": 3,
        }

    def __del__(self) -> None:
        capture: Capture | None = getattr(local, "capture", None)
        if capture and capture is self.capture:
            capture.actions.append((self.stream, self.allocation.free))
        else:
            self.allocation.free()
        self.pool.setdefault((self.stream, self.allocation.size), []).append(self.allocation)


_allocations: dict[int, Allocation] = {}  # by address
_addresses: list[int] = []  # in order


def allocate(shape: Shape, dtype: DType) -> HostArray:
    """Return an uninitialized array in memory of the current stream."""
    pool = getattr(local, "pool", None)
    if capturing() is not None and pool is None:
        raise RuntimeError("an array is made while launches are recorded")
    pool = _pool if pool is None else pool
    size = max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1)
    with LOCK:
        free = pool.get((current_stream(), size))
        allocation = free.pop() if free else Allocation(size)
        if allocation.address not in _allocations:
            pool.kept += 1
            _allocations[allocation.address] = allocation
            _addresses.insert(bisect_right(_addresses, allocation.address), allocation.address)
        enqueue(allocation.take)
        return np.asarray(_Owner(allocation, shape, dtype, pool)).view(dtype)


def allocation_at(address: int) -> Allocation | None:
    """Return the allocation that an address lies in."""
    with LOCK:  # other threads insert
        n = bisect_right(_addresses, address)
        found = _allocations[_addresses[n - 1]] if n else None
    return found if found and address < found.address + found.size else None


def allocation_of(host: object) -> Allocation | None:
    """Return the allocation of an array of this device, or of a view of one."""
    while isinstance(host, np.ndarray):
        host = host.base
    return host.allocation if isinstance(host, _Owner) else None


def weak(host: HostArray) -> HostArray:
    """During a capture, return a view that does not keep the memory from being freed."""
    allocation = allocation_of(host)
    if allocation is None or not host.size or capturing() is None:
        return host
    offset = host.ctypes.data - allocation.address
    return np.ndarray(host.shape, host.dtype, allocation.bytes.data, offset, host.strides)
