"""The operations of a device that scans and captured calls need.

`ops.Ops` does it with CuPy, and `gru_any.testing.fake_cuda` on the host.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias

from ...codegen.cuda_source import Kernel
from ...typing import Array, Shape

Event: TypeAlias = Any  # a mark in a stream, of the library's own class; `done`: it was reached
Pool: TypeAlias = Any  # memory for new arrays, of the library's own class


class Graph(Protocol):
    """Captured launches."""

    def launch(self) -> None:
        """Replay them on the current stream."""


class Blas(Protocol):
    """Matrix products as cuBLAS computes them, on matrices stored column by column."""

    def __call__(
        self,
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
        /,
    ) -> None:
        """Set C (m, n) to A (m, k) B (k, n) + beta C.

        a, b, c: addresses. lda, ldb, ldc: leading dimensions. transa, transb: whether A and B are
        stored transposed. dtype: of A and B; C is float32 where they are float16 or bfloat16.
        """


class Operations(Protocol):
    """The operations of one device.

    captures: whether launches may be captured; set to False once the device has refused.
    multiprocessors: how many thread blocks run at the same time, one on each.
    shared: the bytes of shared memory that a thread block may ask for.
    """

    captures: bool

    @property
    def multiprocessors(self) -> int: ...  # noqa: D102

    @property
    def shared(self) -> int: ...  # noqa: D102

    def empty(self, shape: Shape, dtype: str) -> Array:
        """Return an uninitialized array."""

    def copy(self, array: Array) -> Array:
        """Return a contiguous copy."""

    def pointer(self, array: Array) -> int:
        """Return the address of the first element."""

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int],
        threads: int,
        arguments: Sequence[int],
        shared: int = 0,
    ) -> None:
        """Launch a kernel on the current stream, with `shared` bytes of shared memory a block."""

    def blas(self, precision: str) -> Blas:
        """Return matrix products with a handle and a workspace of their own."""

    def stream(self) -> Hashable:
        """Return a key of the current stream."""

    def handle(self) -> int:
        """Return the handle of the current stream, for CUDA's libraries."""

    def device(self) -> str:
        """Return a name of the current device, the same in all processes of this machine."""

    def nccl(self) -> Any:
        """Return NCCL, a module like `cupy.cuda.nccl`; ImportError if there is none."""

    def event(self) -> Event:
        """Record an event in the current stream."""

    def wait(self, event: Event) -> None:
        """Let the current stream wait for the event; the host goes on."""

    def on(self, number: int) -> AbstractContextManager[None]:
        """Make another stream of this thread the current one."""

    def synchronize(self) -> None:
        """Let the host wait until the device has finished everything."""

    def pool(self) -> Pool:
        """Return a memory pool; `free_all_blocks` returns its memory to the system."""

    def memory(self, pool: Pool) -> AbstractContextManager[None]:
        """Allocate this thread's new arrays from the pool."""

    def capture(self, launches: Callable[[], None]) -> Graph:
        """Capture the launches of a function as a graph, without running them."""
