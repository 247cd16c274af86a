"""Host memory aligned to cache lines."""

import math

import numpy as np

from ..typing import DType, HostArray, Shape

ALIGNMENT = 64  # bytes: a cache line, and the alignment that XLA wants


def aligned(shape: Shape, dtype: DType) -> HostArray:
    """Return an uninitialised array that begins at a cache line.

    A product with small weights takes up to 1.2 times as long where its loads cross lines.
    """
    size = math.prod(shape) * dtype.itemsize
    owner = np.empty(size + ALIGNMENT, np.uint8)
    start = -owner.__array_interface__["data"][0] % ALIGNMENT
    return owner[start : start + size].view(dtype).reshape(shape)
