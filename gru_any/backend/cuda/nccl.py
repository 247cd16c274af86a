"""Sums over processes in the memory of their devices, by NCCL.

Every operation runs on a stream of its own, after all work of the current stream. The host goes on,
and polls whether it is done: if a process dies, it never is.
"""

import importlib
import os
import platform
import time
from collections.abc import Callable, Sequence
from threading import Thread
from typing import Any, NamedTuple

from ...typing import Array
from .device import OPERATIONS, Home, current
from .operations import Event, Operations

READY = "ready"
GRACE = 3.0  # seconds for NCCL to abort


class Offer(NamedTuple):
    """What a process tells the others before NCCL starts.

    problem : why NCCL cannot be used there, or ""
    device : its machine and device
    meeting : NCCL's unique id, from the first process
    """

    problem: str
    device: str = ""
    meeting: bytes = b""


def offer(backend: Home, first: bool) -> Offer:
    """Return this process' offer; first: whether it is the first process."""
    try:
        ops = _operations(backend)
        nccl = ops.nccl()
        with current(backend):
            device = f"{ops.device()} of {platform.node()}"
            return Offer("", device, nccl.get_unique_id() if first else b"")
    except (ImportError, RuntimeError) as e:
        return Offer(str(e))


def obstacle(offers: Sequence[Offer]) -> str:
    """Say why these processes cannot use NCCL, which needs a device for each; "" if they can."""
    ranks: dict[str, int] = {}
    for rank, each in enumerate(offers):
        if each.problem:
            return f"{each.problem}, on rank {rank}"
        if (other := ranks.setdefault(each.device, rank)) != rank:
            return f"ranks {other} and {rank} share device {each.device}"
    return ""


class Pending:
    """A running operation, polled like a request of MPI."""

    def __init__(self, event: Event, comm: Any) -> None:
        self._event, self._comm = event, comm

    def Test(self) -> bool:  # noqa: N802
        """Return whether it is done; raise NCCL's error if it failed."""
        if self._event.done:
            return True
        self._comm.check_async_error()
        return False


class Communicator:
    """NCCL's communicator of all processes, made in a thread, since NCCL may wait for ever."""

    def __init__(self, backend: Home, offers: Sequence[Offer], rank: int, seconds: float) -> None:
        self._ops, self._rank, self._size = _operations(backend), rank, len(offers)
        self._nccl, self._comm, self._state = self._ops.nccl(), None, ""
        self._seconds, self._began = seconds, time.monotonic()
        self._making = Thread(target=self._make, args=(backend, offers[0].meeting), daemon=True)
        self._making.start()

    def _make(self, backend: Home, meeting: bytes) -> None:
        # connect at once, and not within the first sums, whose calls would then wait too
        os.environ.setdefault("NCCL_RUNTIME_CONNECT", "0")
        try:
            with current(backend):
                self._comm = self._nccl.NcclCommunicator(self._size, meeting, self._rank)
            self._state = READY
        except Exception as e:
            self._state = f"{type(e).__name__}: {e}, on rank {self._rank}"

    def state(self) -> str:
        """Return `READY`, why NCCL could not start, or "" while it is starting."""
        late = time.monotonic() - self._began > self._seconds
        return self._state or (f"it did not start within {self._seconds:g} s" if late else "")

    def all_reduce(self, buffer: Array) -> Pending:
        """Sum the buffers of all processes, in place."""
        return self._start("allReduce", buffer, buffer, buffer.size, self._nccl.NCCL_SUM)

    def reduce_scatter(self, buffer: Array, own: Array) -> Pending:
        """Write this process' part of the sum of all buffers into `own`."""
        return self._start("reduceScatter", buffer, own, own.size, self._nccl.NCCL_SUM)

    def all_gather(self, buffer: Array) -> Pending:
        """Copy each process' part of its buffer into the buffers of all."""
        part = buffer.size // self._size
        own = buffer[self._rank * part : (self._rank + 1) * part]
        return self._start("allGather", own, buffer, part)

    def _start(self, name: str, sent: Array, got: Array, count: int, *how: int) -> Pending:
        call: Callable[..., None] = getattr(self._comm, name)
        kind = getattr(self._nccl, f"NCCL_{str(sent.dtype).upper()}")
        asked = self._ops.event()
        with self._ops.on(0):
            self._ops.wait(asked)
            addresses = self._ops.pointer(sent), self._ops.pointer(got)
            call(*addresses, count, kind, *how, self._ops.handle())
            return Pending(self._ops.event(), self._comm)

    def abort(self) -> None:
        """Abort running operations and free the communicator, unless that takes too long."""

        def end() -> None:
            self._making.join()
            if self._comm is not None:
                self._comm.abort()

        ending = Thread(target=end, daemon=True)
        ending.start()
        ending.join(GRACE)


def _operations(backend: Home) -> Operations:
    ops: Operations = importlib.import_module(OPERATIONS[backend.name]).operations()
    return ops
