"""Errors that state shapes in the letters of the package.

T time, B batch, I input size, H hidden size, L layers, D directions.
"""

from collections.abc import Mapping
from functools import cache

from .typing import Array


class ShapeError(ValueError):
    """An array has an unexpected shape; the message says which was expected."""


def check_shape(name: str, array: Array, letters: str, sizes: Mapping[str, int]) -> None:
    """Raise ShapeError unless `array` has the shape that `letters` and `sizes` say.

    letters : such as "(T, B, I)" or "(..., I)"; a letter that is not in `sizes` may be any size.
    """
    wanted, shape = _split(letters), tuple(array.shape)
    if wanted[0] == "...":
        wanted = (*map(str, shape[: 1 - len(wanted)]), *wanted[1:])
    if len(shape) != len(wanted):
        raise ShapeError(f"{name} is {shape}, expected {letters}, {_known(wanted, sizes)}")
    for axis, (size, letter) in enumerate(zip(shape, wanted, strict=True)):
        if size != sizes.get(letter, size):
            raise ShapeError(
                f"{name} is {shape}, expected {letters} with {_known(wanted, sizes)}: "
                f"axis {axis} is {size}, {letter} is {sizes[letter]}"
            )


@cache
def _split(letters: str) -> tuple[str, ...]:
    """The letters of "(T, B, I)", one by one."""
    return tuple(letter.strip() for letter in letters.strip("()").split(",") if letter.strip())


def _known(wanted: tuple[str, ...], sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{letter} = {sizes[letter]}" for letter in wanted if letter in sizes)
