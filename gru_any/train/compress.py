"""Gradients as numbers of 16 bits on the wire, summed in float32.

MPI adds no 16-bit numbers. So each rank gets one part of the buffer from all others, adds it in
float32, and sends the sum to all: two messages, which together are half as long as those of a sum
in float32.
"""

import numpy as np

from ..typing import HostArray

DTYPES = ("float16", "bfloat16")


def encode(values: HostArray, dtype: str) -> HostArray:
    """Return the bits of float32 numbers in half precision, rounded to nearest even: uint16."""
    if dtype == "float16":
        with np.errstate(over="ignore"):  # to infinity, which the run then reports
            return values.astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    quiet = (bits >> 16) | 0x40  # a NaN, which rounding could make infinite
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def decode(bits: HostArray, dtype: str) -> HostArray:
    """Return the float32 numbers whose bits in half precision these are."""
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Wire:
    """The messages of one buffer of gradients.

    sent, got : arrays (size, elements of a part) of uint16
        What goes to each rank, and what comes from each.
    """

    def __init__(self, buffer: HostArray, size: int, dtype: str) -> None:
        self.buffer, self.dtype = buffer, dtype
        self.sent, self.got = (np.zeros((size, buffer.size // size), np.uint16) for _ in range(2))

    def pack(self) -> None:
        """Put the gradients into `sent`."""
        self.sent.reshape(-1)[...] = encode(self.buffer, self.dtype)

    def add(self) -> HostArray:
        """Return the sum of the parts in `got`, in half precision."""
        return encode(decode(self.got, self.dtype).sum(axis=0), self.dtype)

    def share(self) -> HostArray:
        """Return the sum of the parts in `got` as all ranks will decode it: rounded, in float32."""
        return decode(self.add(), self.dtype)

    def unpack(self) -> None:
        """Put the sums in `got` into the buffer."""
        self.buffer[...] = decode(self.got, self.dtype).reshape(-1)
