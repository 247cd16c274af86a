"""Small weights: bfloat16, and int8 with a scale for each row."""

import numpy as np

from ..typing import HostArray

SMALL = ("bfloat16", "int8")


def round_weights(name: str, M: HostArray, small: str) -> tuple[HostArray, HostArray | None]:
    """Round a float32 matrix; return its values, and for int8 the scale of each row (N,).

    name: of the matrix, for an error. Rounding the result of `restore` again changes nothing.
    """
    return _int8(name, M) if small == "int8" else (_bfloat16(M), None)


def restore(values: HostArray, scale: HostArray | None) -> HostArray:
    """Return the rounded matrix as float32, exactly."""
    if scale is None:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values * scale[:, None]


def _bfloat16(M: HostArray) -> HostArray:
    """Return the upper half of each number, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(M).view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(M), bits >> 16 | 0x40, nearest).astype(np.uint16)


def _int8(name: str, M: HostArray) -> tuple[HostArray, HostArray]:
    """Return rows of -127 to 127, and their scales, whose few bits make each product exact."""
    largest = np.abs(M).max(axis=1, initial=0)
    step, exponent = np.frexp(largest.astype(np.float64) / 127)
    scale = np.ldexp(np.ceil(step * 2**17), exponent - 17)
    if not (127 * scale <= np.finfo(np.float32).max).all():
        raise ValueError(
            f"{name} holds NaN, infinity or numbers too large for int8: repair the weights, or "
            'take weights="bfloat16" or "float32"'
        )
    scale[scale < np.finfo(np.float32).tiny] = 0  # rows of zeros, or of what rounds to them
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    return np.rint(M * inverse[:, None]).astype(np.int8), scale.astype(np.float32)


class RoundedTable:
    """A table of small weights (N, K), whose rows are read by their indices."""

    def __init__(self, table: HostArray, small: str) -> None:
        self._values, self._scale = round_weights("the table", table, small)

    def take(self, rows: HostArray) -> HostArray:
        """Return the rows (M, K) of these indices (M,) as float32."""
        return restore(self._values[rows], None if self._scale is None else self._scale[rows])

    @property
    def matrix(self) -> HostArray:
        """The table in float32, made anew at each call."""
        return restore(self._values, self._scale)

    @property
    def arrays(self) -> list[HostArray]:
        """The arrays in memory."""
        return [v for v in (self._values, self._scale) if v is not None]
