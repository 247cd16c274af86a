"""The operations that plans are written against, on CuPy; testing/fake_cuda has the same."""

import importlib
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, cached_property
from typing import Any

from ...codegen.cuda_source import Kernel
from .products import Products

PLAIN_SHARED = 48 * 1024  # bytes of shared memory that a block may use unasked


class Ops:
    """On one device of CuPy. records: whether launches may be recorded as graphs."""

    def __init__(self, cupy: Any = None) -> None:
        self.cupy, self.records = cupy or importlib.import_module("cupy"), True
        self._streams = threading.local()

    @cached_property
    def multiprocessors(self) -> int:
        """How many blocks run at the same time, one on each."""
        return int(self.cupy.cuda.Device().attributes["MultiProcessorCount"])

    @cached_property
    def shared(self) -> int:
        """Bytes of shared memory that a block may ask for."""
        return int(self.cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"])

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Memory for an array."""
        return self.cupy.empty(shape, dtype=dtype)

    def copy(self, array: Any) -> Any:
        """A copy, contiguous."""
        return self.cupy.array(array, copy=True, order="C")

    def pointer(self, array: Any) -> int:
        """The address of its first entry."""
        return array.data.ptr

    @cache  # noqa: B019, it lives as long as the process
    def _function(self, kernel: Kernel, shared: int) -> Any:
        module = self._module(kernel.source)
        function = module.get_function(kernel.name)
        if shared > PLAIN_SHARED:
            function.max_dynamic_shared_size_bytes = shared
        return function

    @cache  # noqa: B019
    def _module(self, source: str) -> Any:
        return self.cupy.RawModule(code=source, options=("--std=c++17",))

    def launch(
        self, kernel: Kernel, grid: tuple[int, int], threads: int, numbers: Any, shared: int = 0
    ) -> None:
        """Launch on the current stream; CuPy hands Python's int over in 8 bytes."""
        self._function(kernel, shared)(grid, (threads,), tuple(numbers), shared_mem=shared)

    def blas(self, precision: str) -> Products:
        """Matrix products with a handle and a workspace of their own."""
        return Products(self.cupy, precision)

    def stream(self) -> Hashable:
        """What tells the current stream from others."""
        return self.cupy.cuda.get_current_stream().ptr, threading.get_ident()

    def event(self) -> Any:
        """A mark after all that the current stream was given so far."""
        event = self.cupy.cuda.Event(disable_timing=True)
        event.record()
        return event

    def wait(self, event: Any) -> None:
        """Let the current stream go on after the mark; the host does not wait."""
        self.cupy.cuda.get_current_stream().wait_event(event)

    @contextmanager
    def on(self, number: int) -> Iterator[None]:
        """On another stream of this thread, inside of the context."""
        streams = self._streams.__dict__.setdefault("own", {})
        if number not in streams:
            streams[number] = self.cupy.cuda.Stream(non_blocking=True)
        with streams[number]:
            yield

    def synchronize(self) -> None:
        """Wait until the device is done."""
        self.cupy.cuda.Device().synchronize()

    def pool(self) -> Any:
        """Memory of its own, which nothing else is given any of, until `free_all_blocks`."""
        return self.cupy.cuda.MemoryPool(self._memory)

    def _memory(self, size: int) -> Any:
        """From the system; if it has no more, CuPy's own pool returns what is spare there."""
        cuda = self.cupy.cuda
        try:
            return cuda.MemoryPointer(cuda.Memory(size), 0)
        except RuntimeError:
            self.cupy.get_default_memory_pool().free_all_blocks()
            return cuda.MemoryPointer(cuda.Memory(size), 0)

    @contextmanager
    def memory(self, pool: Any) -> Iterator[None]:
        """New arrays of this thread come from the pool, inside of the context."""
        with self.cupy.cuda.using_allocator(pool.malloc):
            yield

    def record(self, steps: Callable[[], None]) -> Any:
        """Record what `steps` launches as a graph, whose launch() replays it."""
        stream = self.cupy.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            try:
                steps()
                return stream.end_capture()
            except BaseException:
                self._abandon(stream)
                raise

    def _abandon(self, stream: Any) -> None:
        with suppress(RuntimeError):
            stream.end_capture()  # or the stream would stay in capture
        self._streams.__dict__.clear()  # and so might those that it forked into
