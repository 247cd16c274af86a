"""What plans are written against (see ops.py), on the device that the host plays.

Kernels are compiled by g++ (see shim.py), and products are NumPy's, on raw memory.
"""

import ctypes
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np

from ...codegen.cuda_source import Kernel
from . import shim
from .array import Array, asarray
from .memory import (
    DONE,
    LOCK,
    Cell,
    Pool,
    Recorder,
    StreamError,
    cell_at,
    count,
    do,
    learn,
    local,
    new,
    recording,
    replay,
    stream,
    use,
    wait,
)


class Graph:
    """Launches that were recorded."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def launch(self) -> None:
        """Replay them."""
        if recording() is not None:
            raise RuntimeError("a graph is launched while launches are recorded")
        count["replays"] += 1
        replay(self.recorder)


class Event(dict[Any, int]):
    """What a stream knew to be done. recorder: of the recording that it belongs to."""

    recorder: Recorder | None = None


class Ops:
    """The handful of operations that plans are written against."""

    multiprocessors = 2  # few, so that a block of a test gets several rows
    shared = 96 * 1024

    def __init__(self) -> None:
        self.records = True

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return Array(new(shape, np.dtype(dtype)))

    def copy(self, array: Array) -> Array:
        return asarray(array, copy=True)

    def pointer(self, array: Array) -> int:
        return array.host.ctypes.data

    def launch(
        self, kernel: Kernel, grid: tuple[int, int], threads: int, numbers: Any, shared: int = 0
    ) -> None:
        count["launches"] += 1
        do(partial(_launch, kernel, (*grid, threads, shared, kernel.barrier), tuple(numbers)))

    def blas(self, precision: str) -> Any:
        return lambda *arguments: do(partial(gemm, *arguments))

    def stream(self) -> Any:
        return stream()

    def event(self) -> Event:
        event = Event()
        event.recorder = recording()

        def mark() -> None:
            event.clear()
            event.update(DONE.get(stream(), {}))

        do(mark)
        return event

    def wait(self, event: Event) -> None:
        recorder = recording()
        if event.recorder is not recorder:
            raise RuntimeError("a stream waits for what is on the other side of a recording")
        if recorder is not None:
            recorder.joined.add(stream())

        def known() -> None:
            with LOCK:
                learn(stream(), event)

        do(known)

    @contextmanager
    def on(self, number: int) -> Iterator[None]:
        before, local.stream = stream(), (threading.get_ident(), number)
        try:
            yield
        finally:
            local.stream = before

    def synchronize(self) -> None:
        """Wait for all streams."""
        wait()
        with LOCK:
            for known in list(DONE.values()):
                learn("host", known)

    def record(self, steps: Callable[[], None]) -> Graph:
        before, local.recorder = stream(), Recorder()
        local.stream = local.recorder.origin
        try:
            steps()
            return Graph(local.recorder)
        finally:
            local.recorder, local.stream = None, before

    def pool(self) -> Pool:
        return Pool()

    @contextmanager
    def memory(self, pool: Any) -> Iterator[None]:
        before, local.pool = getattr(local, "pool", None), pool
        try:
            yield
        finally:
            local.pool = before


@cache
def _signature(kernel: Kernel) -> tuple[list[str], list[tuple[int, bool]]]:
    """The parameters of a kernel; entries of the table that are arrays, and whether written."""
    text = kernel.source.partition(f" {kernel.name}(")[2].partition('extern "C"')[0]
    parameters = text.partition(")")[0].split(", ")
    found = re.findall(
        r"^  (const )?\w+(?: \w+)?\* const \w+ = \([^)]*\)table\[(\d+)\]", text, re.M
    )
    return parameters, [(int(n), not const) for const, n in found]


def _launch(kernel: Kernel, shape: tuple[int, ...], numbers: tuple[int, ...]) -> None:
    parameters, entries = _signature(kernel)
    assert len(parameters) == len(numbers), f"{kernel.name} takes {len(parameters)} arguments"
    read: list[Cell] = []
    written: list[Cell] = []
    for parameter, value in zip(parameters, numbers, strict=True):
        if "*" in parameter and value:
            (read if parameter.startswith("const ") else written).append(_at(value))
    if parameters[0] == "const long long* table":
        table = np.frombuffer(_at(numbers[0]).bytes, np.int64)
        for n, is_written in entries:
            if table[n]:
                (written if is_written else read).append(_at(int(table[n])))
    use(read, written)
    values = (ctypes.c_longlong * 5)(*shape), (ctypes.c_longlong * len(numbers))(*numbers)
    getattr(shim.library(kernel.source), f"run_{kernel.name}")(*values)


def _at(address: int) -> Cell:
    cell = cell_at(address)
    if cell is None:
        raise StreamError("a kernel is given an address outside of all memory")
    return cell


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
    """C (m, n) = A B + beta C, column by column as in cuBLAS; A and B transposed if said so.

    dtype: of A and B; C is float32 where they are halves.
    """
    count["products"] += 1
    use([_at(a), _at(b)], [_at(c)])
    A = _matrix(a, *((k, m) if transa else (m, k)), lda, dtype)
    B = _matrix(b, *((n, k) if transb else (k, n)), ldb, dtype)
    number = np.result_type(dtype, np.float32)
    C = _matrix(c, m, n, ldc, number)
    A, B = A.astype(number), B.astype(number)
    product = (A.T if transa else A) @ (B.T if transb else B)
    C[...] = product + beta * C if beta else product


def _matrix(address: int, rows: int, columns: int, ld: int, dtype: Any) -> Any:
    """A matrix in memory, column by column; all of it lies within one cell."""
    cell, size = _at(address), np.dtype(dtype).itemsize
    assert ld >= rows, "the leading dimension is less than the rows"
    end = address + ((columns - 1) * ld + rows) * size
    assert end <= cell.address + cell.size, "a matrix goes beyond its memory"
    start = cell.bytes[address - cell.address : end - cell.address].view(dtype)
    return np.lib.stride_tricks.as_strided(start, (rows, columns), (size, ld * size))
