"""The values in a graph: constants, and arrays of which the reader knows what each axis means.

An axis is a tuple of atoms, slowest first: `(D, H)` is the axis of features of a bidirectional GRU,
`()` an axis of length 1 without a meaning. A reshape regroups atoms and never reorders them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np

from ...typing import HostArray

ROWS = "rows"  # the name of the axis of layers and directions of a state


@dataclass(frozen=True)
class Size:
    """A product of a number and of free sizes, as it occurs in the shapes of a graph."""

    factor: int
    names: tuple[str, ...]

    def __mul__(self, other: "Size | int") -> "Size":
        if isinstance(other, Size):
            return Size(self.factor * other.factor, tuple(sorted(self.names + other.names)))
        return Size(self.factor * int(other), self.names)

    __rmul__ = __mul__

    def __str__(self) -> str:
        return "*".join(([] if self.factor == 1 else [str(self.factor)]) + list(self.names))


Length: TypeAlias = int | Size


class Atom(NamedTuple):
    """An axis of an input, a weight or an operator; its size is a number, or a name if free."""

    name: str
    size: int | str


Axis: TypeAlias = tuple[Atom, ...]
Axes: TypeAlias = tuple[Axis, ...]


def size(axis: Axis) -> Length:
    """Return the length of an axis."""
    factor = math.prod(atom.size for atom in axis if isinstance(atom.size, int))
    names = tuple(sorted(atom.size for atom in axis if isinstance(atom.size, str)))
    return Size(factor, names) if names else factor


def shape_text(axes: Sequence[Axis]) -> str:
    """Return a shape as messages show it: sizes, or the names that the graph gives them."""
    return "(" + ", ".join(str(size(axis)) for axis in axes) + ")"


def is_units(axis: Axis) -> bool:
    """Whether the last atom of an axis is the hidden units of a GRU."""
    return bool(axis) and axis[-1].name.startswith("units")


def replaced(axes: Axes, place: int, *new: Axis) -> Axes:
    """Return the axes with others, or none, in the place of one."""
    return (*axes[:place], *new, *axes[place + 1 :])


class Order(NamedTuple):
    """The name of the lengths by which the rows of a batch are sorted, and the axis of the rows."""

    lengths: str
    axis: Axis


@dataclass(frozen=True)
class SymbolicArray:
    """An array whose elements are known only when the model runs.

    kind : "input" of the graph, output of a "layer", "state" of GRUs, "half" of an output, or one
        of the integers of index.py and sort.py
    key : which one it is: of an input its name and rows (None for all), of an output the stage of
        the walk, of a state the GRU and direction of each row
    flipped : the axis along which it runs backwards, if there is one
    by : the input by whose lengths it was flipped; None if as a whole
    order : how the rows of the batch are sorted, where they are
    """

    kind: str
    key: Any
    axes: Axes
    flipped: Axis = ()
    order: Order | None = None
    by: str | None = None

    def arranged(self, axes: Sequence[Axis]) -> Self:
        """Return this array with other names of its axes."""
        return replace(self, axes=tuple(axes))


class FirstState(NamedTuple):
    """The input that holds the first state of a GRU, its rows there, and the axis of all rows."""

    name: str
    rows: tuple[int, int]
    axis: Axis


@dataclass(eq=False)
class FoundLayer:
    """A layer in the graph. Parameters of a GRU are named as in a GRU of one layer.

    last : the output of the graph that holds its h_n
    """

    kind: str
    settings: dict[str, Any]
    params: dict[str, HostArray]
    first: FirstState | None = None
    last: str | None = None


@dataclass(frozen=True)
class Positive:
    """Whether a size is more than 0."""

    size: Length


@dataclass(frozen=True)
class Full:
    """Lengths, all of which are this size."""

    size: Length


@dataclass(frozen=True)
class Range:
    """The numbers from 0 to below a size."""

    size: Length


@dataclass(frozen=True)
class Zeros:
    """Zeros, of a shape that depends on the batch."""


# a shape is an array of objects where it has free sizes; None stands for an argument left out
Value: TypeAlias = HostArray | SymbolicArray | Zeros | Full | Positive | Range | None
Results: TypeAlias = Value | tuple[Value, ...]  # of a node with one output, or with several


def symbolic(v: object) -> SymbolicArray:
    """Return v, or raise TypeError where it is no SymbolicArray."""
    if not isinstance(v, SymbolicArray):
        raise TypeError
    return v


def kind_of(value: object) -> str:
    """Return a phrase for an error message: the kind and shape of a value."""
    if value is None:
        return "nothing"
    if isinstance(value, np.ndarray):
        return f"a constant {value.shape}" if value.dtype != object else "a shape"
    if isinstance(value, SymbolicArray) and value.axes:
        return f"an array {shape_text(value.axes)} that is known when the model runs"
    return "zeros" if isinstance(value, Zeros) else "a value that is known when the model runs"
