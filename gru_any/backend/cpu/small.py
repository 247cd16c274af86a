"""Packed matrices of small weights: bfloat16, or int8 with a scale for each row."""

from collections.abc import Sequence

import numpy as np

from ...typing import DType, HostArray
from ..alignment import aligned
from ..rounding import restore, round_weights
from .packed import PackedMatrix


class SmallMatrix(PackedMatrix):
    """A matrix (N, K) of rounded weights, stored as panels alone.

    parts: the rows of each product (with their transpose), and its number of gates.
    """

    def __init__(self, matrix: HostArray, small: str, parts: Sequence[tuple[slice, int]]) -> None:
        self.shape, self.packed = matrix.shape, {}
        values, scale = round_weights("the matrix", matrix, small)
        for rows, gates in parts:
            panels = _arranged(values[rows], gates)
            if scale is not None:  # in the first rows of each panel
                head = _arranged(scale[rows, None], gates).view(np.int8)
                panels = np.concat((head.reshape(len(panels), -1, panels.shape[2]), panels), axis=1)
            self.packed[rows.start, rows.stop, True, gates] = _aligned_copy(panels)

    @property
    def matrix(self) -> HostArray:  # type: ignore[override]
        """The matrix in float32, computed anew at each access."""
        found = np.empty(self.shape, np.float32)
        for (start, stop, _, gates), panels in self.packed.items():
            head = panels.shape[1] - self.shape[1]
            values, scale = _rearranged(panels[:, head:], stop - start, gates), None
            if head:
                scales = np.ascontiguousarray(panels[:, :head]).reshape(len(panels), 1, -1)
                scale = _rearranged(scales.view(np.float32), stop - start, gates)[:, 0]
            found[start:stop] = restore(values, scale)
        return found

    @property
    def dtype(self) -> DType:
        return np.dtype(np.float32)

    @property
    def arrays(self) -> list[HostArray]:
        """The panels."""
        return list(self.packed.values())

    def source(self, rows: slice, transposed: bool) -> HostArray:
        """Return an empty matrix: there is nothing left to be packed."""
        return next(iter(self.packed.values()))[0, :0]


def _arranged(v: HostArray, gates: int) -> HostArray:
    """Copy v (N, K) into panels (P, K, gates * units), padding the last units with zeros."""
    from .gemm import VECTOR_BYTES, VECTORS

    (N, K), units = v.shape, VECTORS[gates] * VECTOR_BYTES // 4  # whose arithmetic is float32
    H, count = N // gates, -(-(N // gates) // units)
    room = np.zeros((gates, count * units, K), v.dtype)
    room[:, :H] = v.reshape(gates, H, K)
    by_panel = room.reshape(gates, count, units, K).transpose(1, 3, 0, 2)
    return _grouped(by_panel.reshape(count, K, gates * units))


def _rearranged(panels: HostArray, N: int, gates: int) -> HostArray:
    """Return the v (N, K) that `_arranged` copied into panels."""
    panels, (count, K, width) = _grouped(panels, back=True), panels.shape
    by_gate = panels.reshape(count, K, gates, width // gates).transpose(2, 0, 3, 1)
    return by_gate.reshape(gates, -1, K)[:, : N // gates].reshape(N, K)


def _grouped(panels: HostArray, back: bool = False) -> HostArray:
    """Copy panels (P, K, width) with the rows of each whole group side by side, or back."""
    from .gemm import GROUP

    (count, K, width), group = panels.shape, GROUP.get(panels.dtype.name, 1)
    found, whole = np.array(panels, order="C"), K - K % group
    apart = (width, group) if back else (group, width)
    of_groups = found[:, :whole].reshape(count, -1, *apart).swapaxes(2, 3)
    found[:, :whole] = of_groups.reshape(count, whole, width)
    return found


def _aligned_copy(v: HostArray) -> HostArray:
    """Copy an array to memory aligned to a cache line."""
    copy = aligned(v.shape, v.dtype)
    copy[...] = v
    return copy
