"""Checks of arguments: numbers and switches of any library become Python's own.

What passes can be written to JSON and compared; what could be read in two ways is refused.
"""

import math
import operator
from collections.abc import Sequence
from typing import SupportsFloat, SupportsIndex

import numpy as np

from .typing import HostArray, Rng


def size(name: str, value: object, least: int = 1) -> int:
    """Return `value` as an int of at least `least`; NumPy's integers pass, a bool does not.

    Raises
    ------
    ValueError
        It is something else, or too small.
    """
    try:
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, SupportsIndex):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}") from None
    if number < least:
        raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}")
    return number


def flag(name: str, value: object) -> bool:
    """Return `value`, True or False; "False" and 0 are refused, since they could mean either.

    Raises
    ------
    TypeError
        It is not a bool.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {value!r}, expected True or False")
    return bool(value)


def number(
    name: str, value: object, *, low: float = 0.0, below: float = math.inf, above: bool = False
) -> float:
    """Return `value` as a float with low <= value < below, or with `above` low < value < below.

    Raises
    ------
    TypeError
        It is not a real number, but for example a string, a bool or an array with axes.
    ValueError
        It is NaN, infinite or out of range.
    """
    bounds = "a number above" if above else "a number of at least"
    bounds = f"{bounds} {low:g}, not infinite"
    if below < math.inf:
        bounds = f"{low:g} {'<' if above else '<='} {name} < {below:g}"
    wrong = isinstance(value, (bool, np.bool_, np.complexfloating)) or getattr(value, "ndim", 0) > 0
    try:
        if wrong or not isinstance(value, (SupportsFloat, SupportsIndex)):
            raise TypeError
        real = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}, expected {bounds}") from None
    if not (low < real if above else low <= real) or not real < below:
        raise ValueError(f"{name} is {value!r}, expected {bounds}")
    return real


def choice(name: str, value: object, known: Sequence[str]) -> str:
    """Return `value`, one of the known words.

    Raises
    ------
    ValueError
        It is none of them.
    """
    if not isinstance(value, str) or value not in known:
        words = " or ".join(f'"{word}"' for word in known)
        raise ValueError(f"{name} is {value!r}, expected {words}")
    return value


# appended where T and B came in the wrong order
SWAPPED = "; is time the other axis of x? See batch_first"


def lengths(n: HostArray, T: int, B: int) -> HostArray:
    """Return the lengths of B sequences as int64.

    Raises
    ------
    ValueError
        There are not B of them, or one is not in 0..T.
    TypeError
        They are not integers.
    """
    if n.shape != (B,):
        way = SWAPPED if n.shape == (T,) else ""
        raise ValueError(
            f"lengths is {n.shape}, expected (B,) = ({B},), one for each row of x{way}"
        )
    if n.dtype.kind not in "iu" and n.size:
        raise TypeError(
            f"lengths has dtype {n.dtype}, expected integers, such as lengths.astype(int)"
        )
    if n.size and (n.min() < 0 or n.max() > T):
        wrong = n[(n < 0) | (n > T)][0]
        raise ValueError(f"lengths holds {wrong}, expected 0 to T = {T}, the steps of x")
    return n.astype(np.int64)


def seed(value: int | Sequence[int] | Rng | None) -> Rng:
    """Return a NumPy generator for a seed: an integer, None, or what else NumPy takes as one.

    Raises
    ------
    TypeError, ValueError
        It is a bool, a float, a string or negative.
    """
    wanted = f"seed is {value!r}, expected an integer of at least 0, or None"
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(wanted)
    try:
        return np.random.default_rng(value)
    except (TypeError, ValueError) as e:
        raise type(e)(wanted) from None


def generator(name: str, value: object) -> Rng | None:
    """Return `value`, a NumPy generator or None: a seed would repeat the same mask.

    Raises
    ------
    TypeError
        It is something else.
    """
    if value is not None and not isinstance(value, np.random.Generator):
        raise TypeError(
            f"{name} is {value!r}, expected a numpy Generator: numpy.random.default_rng(0)"
        )
    return value
