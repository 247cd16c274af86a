"""Arguments as they come in: numbers and switches of any library, checked and made Python's own.

What passes here can be written to JSON and compared; what could be read in two ways is refused.
"""

import math
import operator
from typing import Any

import numpy as np


def size(name: str, value: Any, least: int = 1) -> int:
    """Return an integer of at least `least`; NumPy's integers pass, a bool does not.

    Raises
    ------
    ValueError
        It is something else, or too small.
    """
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}") from None
    if number < least:
        raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}")
    return number


def flag(name: str, value: Any) -> bool:
    """Return True or False; "False" and 0 are refused, since they could mean either.

    Raises
    ------
    TypeError
        It is no bool.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {value!r}, expected True or False")
    return bool(value)


def number(
    name: str, value: Any, *, low: float = 0.0, below: float = math.inf, above: bool = False
) -> float:
    """Return a finite number with low <= value < below, or with `above` low < value < below.

    Raises
    ------
    TypeError
        It is no real number: a string, a bool, an array with axes.
    ValueError
        It is NaN, infinite or outside.
    """
    bounds = "a number above" if above else "a number of at least"
    bounds = f"{bounds} {low:g}, not infinite"
    if below < math.inf:
        bounds = f"{low:g} {'<' if above else '<='} {name} < {below:g}"
    wrong = isinstance(value, (str, bytes, bool, np.bool_, complex))
    if wrong or np.ndim(value):
        raise TypeError(f"{name} is {value!r}, expected {bounds}")
    try:
        real = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}, expected {bounds}") from None
    if not (low < real if above else low <= real) or not real < below:
        raise ValueError(f"{name} is {value!r}, expected {bounds}")
    return real


def lengths(n: np.ndarray, T: int, B: int) -> np.ndarray:
    """Return the lengths of B sequences as int64.

    Raises
    ------
    ValueError
        They are not B, or not in 0..T.
    TypeError
        They are no integers.
    """
    if n.shape != (B,):
        raise ValueError(f"lengths is {n.shape}, expected (B,) = ({B},), one for each row of x")
    if n.dtype.kind not in "iu" and n.size:
        raise TypeError(f"lengths has dtype {n.dtype}, expected integers")
    if n.size and (n.min() < 0 or n.max() > T):
        wrong = n[(n < 0) | (n > T)][0]
        raise ValueError(f"lengths holds {wrong}, expected 0 to T = {T}, the steps of x")
    return n.astype(np.int64)


def seed(value: Any) -> Any:
    """Return NumPy's generator of a seed: an integer, None, or what else NumPy makes one of.

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


def generator(name: str, value: Any) -> Any:
    """Return a NumPy generator or None: a seed in its place would repeat the same mask.

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
