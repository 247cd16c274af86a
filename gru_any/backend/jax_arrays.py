"""Conversion of results from NumPy to arrays of JAX.

JAX takes 30 microseconds and more to accept an array, which is longer than a small step of a GRU. A
compiled function takes all results of a call at once in less, but has to be compiled for their
shapes, which pays off for shapes that come often.
"""

from collections import Counter
from collections.abc import Callable

import numpy as np

from ..typing import Array, Device, DType, HostArray, Shape

SMALL = 1 << 17  # bytes, up to which an array is copied
OFTEN = 32  # calls with the same shapes before a function is compiled for these
SHAPES = 512  # most shapes that are counted


class Adopter:
    """Converts NumPy arrays to arrays of JAX on a host device."""

    def __init__(self, device: Device) -> None:
        import jax

        there = jax.sharding.SingleDeviceSharding(device)
        self.device, self.from_dlpack = device, jax.numpy.from_dlpack
        self.same: Callable[[list[HostArray]], list[Array]] = jax.jit(
            lambda several: several, in_shardings=there, out_shardings=there, donate_argnums=0
        )  # a donated copy is the result, and not copied once more
        self.seen: Counter[tuple[tuple[Shape, DType], ...]] = Counter()

    def __call__(self, arrays: list[HostArray]) -> list[Array]:
        """Convert several arrays; a large one is not copied, if its address suits JAX."""
        key = tuple([(v.shape, v.dtype) for v in arrays if v.nbytes <= SMALL])
        if not (self.seen[key] > OFTEN or self._often(key)):
            return [self.one(v) for v in arrays]
        if len(key) == len(arrays):
            return self.same(arrays)
        small = iter(self.same([v for v in arrays if v.nbytes <= SMALL]))
        return [next(small) if v.nbytes <= SMALL else self.one(v) for v in arrays]

    def one(self, v: HostArray) -> Array:
        """Convert one array."""
        return self.from_dlpack(np.ascontiguousarray(v), device=self.device)

    def _often(self, key: tuple[tuple[Shape, DType], ...]) -> bool:
        self.seen[key] += 1
        if len(self.seen) > SHAPES:
            self.seen.clear()
        return self.seen[key] > OFTEN
