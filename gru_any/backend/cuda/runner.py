"""How a CUDA device runs a block of steps: one kernel between two products, captured and replayed.

The scan is written against a handful of operations (operations.py). So it can run launch by launch,
be captured as a CUDA graph, or run on the fake device of the tests. Whole calls are captured in
calls.py.
"""

import importlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from ...codegen.cuda_cooperative import cooperative_kernel, exchanged, holds, threads, units
from ...codegen.cuda_cooperative import shared_numbers as shared_by_all
from ...codegen.cuda_persistent import LARGEST, ROWS, fits, persistent_kernel, shared_numbers
from ...codegen.cuda_source import Scan, backward_scan, forward_scan, typed
from ...codegen.schedule import extra_arrays
from ...typing import Array, DType, Namespace, Shape, Step, WeightGradients
from ..contract import Alive, Extra, Recurrent, kinds_of
from ..libraries import Backend
from ..reductions import reduced
from .calls import Calls
from .device import OPERATIONS
from .plan import Plan, place
from .products import KINDS, multiply


class CUDA(Calls):
    """Runs blocks of steps with fused kernels, in float32 and float64.

    In a float16 or bfloat16 model, what products read is stored in that dtype; arithmetic, states,
    gates and sums are float32.

    way: the fastest path that may be taken: "eager", "blocks", "graph", "persistent" or "whole".
    precision: of float32 products, "full" or "tf32".
    """

    def path(self, hidden_size: int, dtype: str, means: bool) -> tuple[str, str]:
        """Return the path that a block of this size takes, and why it takes no faster one.

        means: whether the steps take means over rows.
        """
        if self.way == "eager":
            return "eager", "GRU_ANY_CUDA is set to eager"
        if not self.ops.captures:
            return "eager", "CUDA refused to record a graph in this process"
        if self.way == "blocks":
            return "blocks", "GRU_ANY_CUDA is set to blocks"
        if self.way == "whole" and not means:
            return "whole", "GRU_ANY_CUDA asks for it, where the device's memory holds the weights"
        few = hidden_size <= LARGEST.get(dtype, LARGEST["float32"])
        if self.way == "persistent" and few and not means:
            return "persistent", "this is the fastest way on CUDA"
        if not self.whole_calls:
            return "blocks", "CUDA refused to record a whole call in this process"
        if self.way == "graph":
            return "graph", "GRU_ANY_CUDA is set to graph"
        if means:
            return "graph", "no kernel of many steps takes the means over rows of layer_norm"
        return "graph", f"a block's registers cannot hold the weights of {hidden_size} units"

    def as_contiguous(self, v: Array) -> Array:
        return self.ops.copy(v)

    def upcast(self, v: Array, dtype: DType) -> Array:
        """Upcast vectors alone: kernels and products read half precision as it is."""
        return super().upcast(v, dtype) if v.ndim == 1 else v

    def product(self, left: Array, right: Array) -> Array:
        out = self._sums((left.shape[0], right.shape[1]), left.dtype)
        self.multiply(left, right, out)
        return out

    def multiply(self, left: Array, right: Array, out: Array) -> None:
        """Fill out with left @ right by cuBLAS: CuPy refuses its own products in a capture.

        The product of half-precision matrices is float32, which CuPy would round.
        """
        if not (left.size and right.size) or str(left.dtype) not in KINDS:
            out[...] = left @ right
            return
        if right.dtype != left.dtype:  # states are float32 beside half precision
            right = self.xp.astype(right, left.dtype)
        with self.locked():
            multiply(self.ops, self.workspace.blas, left, right, out)

    def row_sum(self, v: Array) -> Array:
        return v.sum(axis=0, dtype="float32") if v.itemsize == 2 else v.sum(axis=0)

    def weight_gradients(
        self, weights: WeightGradients, h: Array, saved: Sequence[Array], parts: Sequence[Array]
    ) -> Iterator[Array]:
        return reduced(self, weights, h, saved, parts, self._sums)

    def _sums(self, shape: Shape, dtype: DType) -> Array:
        """Return an array for sums of this dtype; for half precision they are float32."""
        return self.ops.empty(shape, "float32" if dtype.itemsize == 2 else str(dtype))

    def affine(self, x: Array, W: Array, b: Array | None) -> Array:
        a = super().affine(x, W, None)
        if b is not None:
            a += b
        return a

    def forward(
        self,
        step: Step,
        a: Array,
        h: Array,
        recurrent: Recurrent,
        alive: Alive,
        reverse: bool,
        keep: bool,
        extra: Extra | None = None,
    ) -> tuple[Array, Sequence[Array] | None]:
        (K, B, _), H = a.shape, h.shape[-1]
        if not B or str(h.dtype) not in ("float32", "float64"):
            return super().forward(step, a, h, recurrent, alive, reverse, keep, extra)
        U, *vectors = recurrent
        scan = forward_scan(step, len(vectors), keep, str(h.dtype), extra=kinds_of(extra))
        path = self._empty((K + 1, B, H), h)
        path[K if reverse else 0, :, :] = h
        saved = tuple(
            self._empty((K, B, n * H), h) for n in scan.widths
        )  # float32, as 1 - z rounds to 0
        arrays = {"a": a, "path": path, **_named("c", vectors), **_named("s", saved)}
        arrays |= _further(extra)
        order = range(K - 1, -1, -1) if reverse else range(K)
        self._run(scan, arrays, alive, h, U, order, 0 if reverse else 1)
        return path, saved or None

    def backward(
        self,
        step: Step,
        dy: Array | None,
        dh: Array,
        previous: Array,
        saved: Sequence[Array],
        U: Array,
        alive: Alive,
        reverse: bool,
        taps: bool,
        extra: Extra | None = None,
    ) -> tuple[tuple[Array, ...], Array, Array | None]:
        K, B, H = previous.shape
        if not B or str(dh.dtype) not in ("float32", "float64"):
            return super().backward(step, dy, dh, previous, saved, U, alive, reverse, taps, extra)
        kinds = dy is not None, taps, str(dh.dtype)
        scan = backward_scan(step, len(saved), *kinds, extra=kinds_of(extra))
        parts = [self._empty((K, B, n * H), U) for n in scan.widths]
        arrays = {"dy": dy, "previous": previous, **_further(extra)}
        arrays |= {**_named("s", saved), **_named("p", parts)}
        order = range(K) if reverse else range(K - 1, -1, -1)
        dh = self._run(scan, arrays, alive, dh, U, order, 0)
        g = parts.pop() if taps else None
        return tuple(parts), dh, g

    def _run(
        self,
        scan: Scan,
        arrays: dict[str, Array | None],
        alive: Alive,
        state: Array,
        U: Array,
        order: range,
        shift: int,
    ) -> Array:
        """Run the steps in this order, which fills the result arrays; return the last state.

        shift: from the index of a step to that of its new state in `path`.
        """
        arrays = {
            name: None if v is None else _unit_stride(self.xp, v) for name, v in arrays.items()
        }
        mask = None if alive is None else alive.block
        kinds = [(n, str(v.dtype)) for n, v in (*arrays.items(), ("U", U)) if v is not None]
        scan = typed(scan, tuple((n, kind) for n, kind in kinds if kind != scan.number))
        (B, H), device = state.shape, (self.ops.multiprocessors, self.ops.shared)
        if self.way == "whole" and holds(scan, B, H, *device):
            return self._cooperative(scan, arrays, mask, state, U, order, shift)
        if self.way in ("persistent", "whole") and fits(scan, state.shape[1]):
            return self._persistent(scan, arrays, mask, state, U, order, shift)
        workspace, sizes, scan = self.workspace, state.shape, scan.narrow
        make = partial(Plan, self.ops, workspace.blas, scan, sizes, order, shift)
        if self.context.exclusive:
            return make()(arrays, mask, state, U)
        with self.locked():
            return workspace.plan((scan, sizes, order, shift), make)(arrays, mask, state, U)

    def _persistent(
        self,
        scan: Scan,
        arrays: dict[str, Array | None],
        mask: Array | None,
        state: Array,
        U: Array,
        order: range,
        shift: int,
    ) -> Array:
        """Run all steps in one kernel, whose thread blocks are independent of one another."""
        B, H = state.shape
        rows = min(-(-B // self.ops.multiprocessors), ROWS)
        kernel, last = persistent_kernel(scan, H, rows), self._empty(state.shape, state)
        U, state = (self.xp.ascontiguousarray(v) for v in (U, state))
        numbers = [len(order), B, order[0], order.step, shift, *place(self.ops, mask)]
        numbers += [self.ops.pointer(v) for v in (U, state, last)]
        numbers += [n for name in scan.arrays for n in place(self.ops, arrays[name])]
        shared = shared_numbers(scan, H, rows) * state.itemsize
        self.ops.launch(kernel, (-(-B // rows), 1), 3 * H, numbers, shared)
        return last

    def _cooperative(
        self,
        scan: Scan,
        arrays: dict[str, Array | None],
        mask: Array | None,
        state: Array,
        U: Array,
        order: range,
        shift: int,
    ) -> Array:
        """Run all steps in one kernel, alone on the device: its thread blocks share a barrier."""
        B, H = state.shape
        own, last = units(H, self.ops.multiprocessors), self._empty(state.shape, state)
        U, state = (self.xp.ascontiguousarray(v) for v in (U, state))
        counter = self.xp.zeros((1,), dtype=self.xp.uint32, device=self.device)
        shared = [self._empty((2, B, v.columns * H), state) for v in exchanged(scan)]
        numbers = [len(order), order[0], order.step, shift, *place(self.ops, mask)]
        numbers += [self.ops.pointer(v) for v in (U, state, last, counter, *shared)]
        numbers += [n for name in scan.arrays for n in place(self.ops, arrays[name])]
        size = shared_by_all(scan, B, H, own) * state.itemsize
        with self.locked():
            kernel = cooperative_kernel(scan, B, H, own)
            self.ops.launch(kernel, (-(-H // own), 1), threads(B, own), numbers, size)
        return last

    def _empty(self, shape: Shape, like: Array) -> Array:
        return self.xp.empty(shape, dtype=like.dtype, device=self.device)


def runner_on(backend: Backend, way: str, precision: str) -> CUDA:
    """Return the runner of an array library that is registered in `OPERATIONS`."""
    ops = importlib.import_module(OPERATIONS[backend.name]).operations()
    return CUDA(backend.xp, backend.device, ops, way, precision)


def _named(letter: str, arrays: Iterable[Array]) -> dict[str, Array]:
    return {f"{letter}{n}": v for n, v in enumerate(arrays)}


def _further(extra: Extra | None) -> dict[str, Array]:
    """Return the further arguments of a step by their names."""
    if extra is None:
        return {}
    names = [array.name for array in extra_arrays(extra.kinds)]
    return dict(zip(names, extra.arrays, strict=True))


def _unit_stride(xp: Namespace, v: Array) -> Array:
    """Make the last axis contiguous, as the kernels expect it to be."""
    return v if v.strides[-1] == v.itemsize else xp.ascontiguousarray(v)
