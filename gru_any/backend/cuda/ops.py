"""The operations of a device, by CuPy."""

import importlib
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, cached_property
from typing import Any

from ...codegen.cuda_source import Kernel
from ...typing import Array, Namespace, Shape
from .operations import Event, Graph, Operations, Pool
from .products import Products

PLAIN_SHARED = 48 * 1024  # bytes of shared memory that a block may use without asking


class Ops:
    """The operations of CuPy's current device."""

    def __init__(self, cupy: Namespace | None = None) -> None:
        self.cupy, self.captures = cupy or importlib.import_module("cupy"), True
        self._streams = threading.local()

    @cached_property
    def multiprocessors(self) -> int:
        return int(self.cupy.cuda.Device().attributes["MultiProcessorCount"])

    @cached_property
    def shared(self) -> int:
        return int(self.cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"])

    def empty(self, shape: Shape, dtype: str) -> Array:
        return self.cupy.empty(shape, dtype=dtype)

    def copy(self, array: Array) -> Array:
        return self.cupy.array(array, copy=True, order="C")

    def pointer(self, array: Array) -> int:
        return int(array.data.ptr)

    @cache  # noqa: B019, it lives as long as the process
    def _function(self, kernel: Kernel, shared: int) -> Any:
        function = self._module(kernel.source, kernel.barrier == 2).get_function(kernel.name)
        if shared > PLAIN_SHARED:
            function.max_dynamic_shared_size_bytes = shared
        return function

    @cache  # noqa: B019
    def _module(self, source: str, whole_grid: bool) -> Any:
        # a barrier of the whole grid needs all blocks at once: a cooperative launch promises that
        options = ("--std=c++17",)
        return self.cupy.RawModule(
            code=source, options=options, enable_cooperative_groups=whole_grid
        )

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int],
        threads: int,
        arguments: Sequence[int],
        shared: int = 0,
    ) -> None:
        # CuPy passes an int of Python in 8 bytes
        self._function(kernel, shared)(grid, (threads,), tuple(arguments), shared_mem=shared)

    def blas(self, precision: str) -> Products:
        return Products(self.cupy, precision)

    def stream(self) -> Hashable:
        return self.handle(), threading.get_ident()

    def handle(self) -> int:
        return int(self.cupy.cuda.get_current_stream().ptr)

    def device(self) -> str:
        return str(self.cupy.cuda.Device().pci_bus_id)

    def nccl(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the same as below, in many words
            nccl = importlib.import_module("cupy.cuda.nccl")
        if not nccl.available:
            raise ImportError("CuPy finds no NCCL (pip install nvidia-nccl-cu13, or -cu12)")
        return nccl

    def event(self) -> Event:
        event = self.cupy.cuda.Event(disable_timing=True)
        event.record()
        return event

    def wait(self, event: Event) -> None:
        self.cupy.cuda.get_current_stream().wait_event(event)

    @contextmanager
    def on(self, number: int) -> Iterator[None]:
        streams = self._streams.__dict__.setdefault("own", {})
        if number not in streams:
            streams[number] = self.cupy.cuda.Stream(non_blocking=True)
        with streams[number]:
            yield

    def synchronize(self) -> None:
        self.cupy.cuda.Device().synchronize()

    def pool(self) -> Pool:
        return self.cupy.cuda.MemoryPool(self._memory)

    def _memory(self, size: int) -> Any:
        """Allocate from the system; if it has no more, CuPy's own pool first returns its spare."""
        cuda = self.cupy.cuda
        try:
            return cuda.MemoryPointer(cuda.Memory(size), 0)
        except RuntimeError:
            self.cupy.get_default_memory_pool().free_all_blocks()
            return cuda.MemoryPointer(cuda.Memory(size), 0)

    @contextmanager
    def memory(self, pool: Pool) -> Iterator[None]:
        with self.cupy.cuda.using_allocator(pool.malloc):
            yield

    def capture(self, launches: Callable[[], None]) -> Graph:
        stream = self.cupy.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            try:
                launches()
                graph: Graph = stream.end_capture()
                return graph
            except BaseException:
                self._abandon(stream)
                raise

    def _abandon(self, stream: Any) -> None:
        with suppress(RuntimeError):
            stream.end_capture()  # or the stream would stay in capture
        self._streams.__dict__.clear()  # and so might those that it forked into


def operations() -> Operations:
    """Return the operations of the current device."""
    return Ops()
