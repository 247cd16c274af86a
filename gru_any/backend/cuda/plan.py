"""Scans on a device: a plan for each shape, and the workspaces that plans share."""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from ...codegen.cuda_source import Scan
from ...codegen.schedule import NARROW, STATE, Gemm
from ...typing import Array
from . import tuning
from .operations import Operations


class Plan:
    """A scan over one block of steps, captured as a CUDA graph and replayed over other arrays.

    It owns the buffers of a step, a copy of U, and the table of the arrays. The first block is
    launched kernel by kernel, which compiles them; the second is captured.

    blas: as `Products`; sizes: (B, H); order: of the steps; shift: from the number of a step to
    that of the state after it in the path.
    """

    def __init__(
        self,
        ops: Operations,
        blas: Callable[..., None],
        scan: Scan,
        sizes: tuple[int, int],
        order: range,
        shift: int,
    ) -> None:
        self.ops, self.blas, self.scan, self.sizes = ops, blas, scan, sizes
        self.order, self.shift = order, shift
        B, H = sizes
        self.buffers = {
            array.name: ops.empty((B, array.columns * H), scan.dtype(array.name))
            for array in (STATE, *scan.schedule.buffers)
        }
        self.U = ops.empty((3 * H, H), scan.dtype("U"))
        self.table = ops.empty((3 * len(scan.arrays) + 3,), "int64")
        self.pointers = {name: ops.pointer(v) for name, v in self.buffers.items()}
        self.runs, self.graph = 0, None

    def __call__(
        self, arrays: dict[str, Array], alive: Array | None, state: Array, U: Array
    ) -> Array:
        """Run the block on these arrays from this state (B, H); return a copy of the last state."""
        for array in (STATE, NARROW):
            if array.name in self.buffers:
                self.buffers[array.name][...] = state
        self.U[...] = U
        of_arrays = [arrays[name] for name in self.scan.arrays]
        numbers = [self.ops.pointer(self.table)]
        numbers += [n for v in (*of_arrays, alive) for n in place(self.ops, v)]
        self.ops.launch(self.scan.set_table, (1, 1), 1, numbers)
        self._run()
        return self.ops.copy(self.buffers[STATE.name])

    def _run(self) -> None:
        self.runs += 1
        if self.graph is None and self.runs > 1 and self.ops.captures:
            self.graph = _recorded(self.ops, self.steps)
        if self.graph is None:
            self.steps()
        else:
            self.graph.launch()

    def steps(self) -> None:
        """Launch all steps; nothing here allocates memory, since it is captured."""
        B, H = self.sizes
        threads = min(tuning.current.block_threads, -(-H // 32) * 32)
        rows, number = min(B, 65535), self.buffers[STATE.name].itemsize
        table, stages = self.ops.pointer(self.table), self.scan.schedule.stages
        owned = {
            n: [self.pointers[name] for name in k.buffers] for n, k in self.scan.kernels.items()
        }
        for t in self.order:
            for n, stage in enumerate(stages):
                if isinstance(stage, Gemm):
                    self._multiply(stage)
                else:
                    numbers = [table, t, t + self.shift, B, H, *owned[n]]
                    kernel = self.scan.kernels[n]
                    # threads that meet at a barrier share a row, so that one block has all of it
                    grid = (1 if kernel.barrier else -(-H // threads), rows)
                    shared = threads * number if kernel.barrier else 0
                    self.ops.launch(kernel, grid, threads, numbers, shared)

    def _multiply(self, gemm: Gemm) -> None:
        """Compute out (B, N) = left (B, k) @ M, all row-major, where M is U[rows]^T or U[rows].

        cuBLAS is column-major, so for it this is out^T = M^T left^T.
        """
        B, H = self.sizes
        rows, transposed = gemm.product.rows, gemm.product.transposed
        height = (rows.stop - rows.start) * H
        N, k = (height, H) if transposed else (H, height)
        left, out = self.pointers[gemm.operand.array.name], self.pointers[gemm.out.name]
        M = self.ops.pointer(self.U) + rows.start * H * H * self.U.itemsize
        beta, dtype = float(gemm.add), self.scan.dtype("U")
        self.blas(transposed, False, N, B, k, M, H, left, k, beta, out, N, dtype)


def place(ops: Operations, array: Array | None) -> tuple[int, int, int]:
    """Return the address of an array (K, B, N), (B, N) or (H,), and its strides of steps and rows.

    All are 0 for None.
    """
    if array is None:
        return 0, 0, 0
    if array.ndim == 1:
        return ops.pointer(array), 0, 0
    *steps, rows, _ = (stride // array.itemsize for stride in array.strides)
    return ops.pointer(array), steps[0] if steps else 0, rows


def _recorded(ops: Operations, steps: Callable[[], None]) -> Any:
    """Capture the steps as a graph; None where the device refuses, with one warning."""
    try:
        return ops.capture(steps)
    except (RuntimeError, NotImplementedError) as e:
        ops.captures = False
        warnings.warn(
            f"gru_any: CUDA refused to record the steps, which now run one by one, slower ({e})",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


class Workspace:
    """The memory of one stream's products, and the plans that use it, one at a time."""

    def __init__(self, ops: Operations, precision: str) -> None:
        self.ops, self.precision, self.lock = ops, precision, threading.RLock()
        self.plans: OrderedDict[Hashable, Any] = OrderedDict()
        self.done: Any = None  # the end of the last use, an event, and its stream
        self.stream: Any = None

    @cached_property
    def blas(self) -> Any:
        """cuBLAS' products, with a handle and a workspace of our own."""
        return self.ops.blas(self.precision)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock; on the device, wait for what used this workspace before."""
        with self.lock:
            stream = self.ops.stream()
            if self.done is not None and stream != self.stream:
                self.ops.wait(self.done)
            try:
                yield
            finally:
                self.done, self.stream = self.ops.event(), stream

    def plan(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the plan of this key, made if need be; drop those not used for longest."""
        if key not in self.plans:
            self.plans[key] = make()
            while len(self.plans) > tuning.current.plans:
                self.plans.popitem(last=False)
        self.plans.move_to_end(key)
        return self.plans[key]
