"""The operations of the fake device: those of `backend/cuda/operations.py`, on the host.

Kernels are compiled by g++ (see shim.py), and products are NumPy's, on raw memory.
"""

import ctypes
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np

from ...backend.cuda.operations import Blas, Operations
from ...codegen.cuda_source import Kernel
from ...typing import HostArray, Shape
from . import shim
from .array import DEVICE, Array, asarray
from .memory import (
    CLOCKS,
    LOCK,
    PENDING,
    Allocation,
    Capture,
    Pool,
    Stream,
    StreamError,
    access,
    allocate,
    allocation_at,
    capturing,
    count,
    current_stream,
    enqueue,
    learn,
    local,
    replay,
    wait,
)


class Graph:
    """A capture that can be replayed."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture

    def launch(self) -> None:
        """Replay it."""
        if capturing() is not None:
            raise RuntimeError("a graph is launched while launches are recorded")
        count["replays"] += 1
        replay(self.capture)


class Event(dict[Stream, int]):
    """The clock of a stream when the event was recorded.

    capture: the one that it belongs to
    pending: what the stream waited for in other processes
    """

    capture: Capture | None = None
    pending: Sequence[Callable[[], bool]] = ()

    @property
    def done(self) -> bool:
        """Whether the stream has reached it; if so, the host knows that."""
        if not all(done() for done in self.pending):
            return False
        with LOCK:
            learn("host", self)
        return True


class Ops:
    """The operations of the fake device."""

    multiprocessors = 2  # few, so that a thread block gets several rows in a small test
    shared = 96 * 1024

    def __init__(self) -> None:
        self.captures = True

    def empty(self, shape: Shape, dtype: str) -> Array:
        return Array(allocate(shape, np.dtype(dtype)))

    def copy(self, array: Array) -> Array:
        return asarray(array, copy=True)

    def pointer(self, array: Array) -> int:
        return array.host.ctypes.data

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int],
        threads: int,
        arguments: Sequence[int],
        shared: int = 0,
    ) -> None:
        count["launches"] += 1
        shape = (*grid, threads, shared, kernel.barrier)
        enqueue(partial(_launch, kernel, shape, tuple(arguments)))

    def blas(self, precision: str) -> Blas:
        return lambda *arguments: enqueue(partial(gemm, *arguments))

    def stream(self) -> Stream:
        return current_stream()

    def handle(self) -> int:
        return hash(current_stream())

    def device(self) -> str:
        return DEVICE

    def nccl(self) -> Any:
        raise ImportError("the fake device has no NCCL")

    def event(self) -> Event:
        event = Event()
        event.capture, event.pending = capturing(), list(PENDING.get(current_stream(), ()))

        def mark() -> None:
            event.clear()
            event.update(CLOCKS.get(current_stream(), {}))

        enqueue(mark)
        return event

    def wait(self, event: Event) -> None:
        capture = capturing()
        if event.capture is not capture:
            raise RuntimeError("a stream waits for what is on the other side of a recording")
        if capture is not None:
            capture.streams.add(current_stream())

        def known() -> None:
            with LOCK:
                learn(current_stream(), event)

        enqueue(known)

    @contextmanager
    def on(self, number: int) -> Iterator[None]:
        before, local.stream = current_stream(), (threading.get_ident(), number)
        try:
            yield
        finally:
            local.stream = before

    def synchronize(self) -> None:
        wait()
        with LOCK:
            for known in list(CLOCKS.values()):
                learn("host", known)

    def capture(self, launches: Callable[[], None]) -> Graph:
        before, capture = current_stream(), Capture()
        local.capture, local.stream = capture, capture.origin
        try:
            launches()
            return Graph(capture)
        finally:
            local.capture, local.stream = None, before

    def pool(self) -> Pool:
        return Pool()

    @contextmanager
    def memory(self, pool: Pool) -> Iterator[None]:
        before, local.pool = getattr(local, "pool", None), pool
        try:
            yield
        finally:
            local.pool = before


def operations() -> Operations:
    """Return the operations of the fake device."""
    return Ops()


@cache
def _signature(kernel: Kernel) -> tuple[list[str], list[tuple[int, bool]]]:
    """Return the parameters of a kernel, and (n, is written) for each array in its table."""
    text = kernel.source.partition(f" {kernel.name}(")[2].partition('extern "C"')[0]
    parameters = text.partition(")")[0].split(", ")
    found = re.findall(
        r"^  (const )?\w+(?: \w+)?\* const \w+ = \([^)]*\)table\[(\d+)\]", text, re.M
    )
    return parameters, [(int(n), not const) for const, n in found]


def _launch(kernel: Kernel, shape: tuple[int, ...], arguments: tuple[int, ...]) -> None:
    parameters, entries = _signature(kernel)
    assert len(parameters) == len(arguments), f"{kernel.name} takes {len(parameters)} arguments"
    read: list[Allocation] = []
    written: list[Allocation] = []
    for parameter, value in zip(parameters, arguments, strict=True):
        if "*" in parameter and value:
            (read if parameter.startswith("const ") else written).append(_at(value))
    if parameters[0] == "const long long* table":
        table = np.frombuffer(_at(arguments[0]).bytes, np.int64)
        for n, is_written in entries:
            if table[n]:
                (written if is_written else read).append(_at(int(table[n])))
    access(read, written)
    values = (ctypes.c_longlong * 5)(*shape), (ctypes.c_longlong * len(arguments))(*arguments)
    getattr(shim.library(kernel.source), f"run_{kernel.name}")(*values)


def _at(address: int) -> Allocation:
    found = allocation_at(address)
    if found is None:
        raise StreamError("a kernel is given an address outside of all memory")
    return found


def gemm(
    transa: bool,
    transb: bool,
    m: int,
    n: int,
    k: int,
    a: int,
    lda: int,
    b: int,
    ldb: int,
    beta: float,
    c: int,
    ldc: int,
    dtype: str,
) -> None:
    """Multiply as `Blas` says: C (m, n) = A B + beta C, on matrices stored column by column."""
    count["products"] += 1
    access([_at(a), _at(b)], [_at(c)])
    A = _matrix(a, *((k, m) if transa else (m, k)), lda, dtype)
    B = _matrix(b, *((n, k) if transb else (k, n)), ldb, dtype)
    number = np.result_type(dtype, np.float32)
    C = _matrix(c, m, n, ldc, number)
    A, B = A.astype(number), B.astype(number)
    product = (A.T if transa else A) @ (B.T if transb else B)
    C[...] = product + beta * C if beta else product


def _matrix(
    address: int, rows: int, columns: int, ld: int, dtype: str | np.dtype[Any]
) -> HostArray:
    """Return a matrix stored column by column, all of it within one allocation."""
    allocation, size = _at(address), np.dtype(dtype).itemsize
    assert ld >= rows, "the leading dimension is less than the rows"
    end = address + ((columns - 1) * ld + rows) * size
    assert end <= allocation.address + allocation.size, "a matrix goes beyond its memory"
    start = allocation.bytes[address - allocation.address : end - allocation.address].view(dtype)
    return np.lib.stride_tricks.as_strided(start, (rows, columns), (size, ld * size))
