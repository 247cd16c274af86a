"""Results of NumPy as arrays of JAX.

JAX takes 30 microseconds and more to accept an array, which is longer than a small step of a GRU. A
compiled function takes its arguments in a third of that, but has to be compiled for each shape,
which pays off for shapes that come often.
"""

from collections import Counter

import numpy as np

from ..typing import Array, Device, DType, HostArray, Shape

SMALL = 1 << 17  # bytes that are copied rather than taken in place
OFTEN = 32  # results of a shape before a function is compiled for it
SHAPES = 512  # that are counted at most


class Adopter:
    """Makes arrays of JAX on a device of the host."""

    def __init__(self, device: Device) -> None:
        import jax

        there = jax.sharding.SingleDeviceSharding(device)
        self.device, self.from_dlpack = device, jax.numpy.from_dlpack
        self.same = jax.jit(
            lambda v: v, in_shardings=there, out_shardings=there, donate_argnums=0
        )  # a donated copy is the result, and not copied once more
        self.seen: Counter[tuple[Shape, DType]] = Counter()

    def __call__(self, v: HostArray) -> Array:
        """Return v as an array of JAX, in place where it is large and its address suits JAX."""
        if v.nbytes <= SMALL:
            key = v.shape, v.dtype
            if self.seen[key] > OFTEN or self._often(key):
                return self.same(v)
        return self.from_dlpack(np.ascontiguousarray(v), device=self.device)

    def _often(self, key: tuple[Shape, DType]) -> bool:
        self.seen[key] += 1
        if len(self.seen) > SHAPES:
            self.seen.clear()
        return self.seen[key] > OFTEN
