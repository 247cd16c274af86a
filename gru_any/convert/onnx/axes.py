"""What goes through a graph: arrays, of which it is known what each axis means.

An axis is a tuple of atoms, slowest first: `(D, H)` is the axis of features of a bidirectional GRU,
`()` an axis of length 1 that means nothing. A reshape regroups atoms and never reorders them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

ROWS = "rows"  # the name of the axis of layers and directions of a state


class Atom(NamedTuple):
    """One axis as it came into being; its size is a number, or a name where any size is right."""

    name: str
    size: int | str


Axis = tuple[Atom, ...]


@dataclass(frozen=True)
class Size:
    """A product of a number and of sizes that are not known, as shapes in a graph have them."""

    factor: int
    names: tuple[str, ...]

    def __mul__(self, other: Any) -> "Size":
        if isinstance(other, Size):
            return Size(self.factor * other.factor, tuple(sorted(self.names + other.names)))
        return Size(self.factor * int(other), self.names)

    __rmul__ = __mul__

    def __str__(self) -> str:
        return "*".join(([] if self.factor == 1 else [str(self.factor)]) + list(self.names))


def size(axis: Axis) -> Any:
    """How long an axis is: an int, or a Size."""
    factor = math.prod(atom.size for atom in axis if isinstance(atom.size, int))
    names = tuple(sorted(atom.size for atom in axis if isinstance(atom.size, str)))
    return Size(factor, names) if names else factor


def words(axes: Sequence[Axis]) -> str:
    """A shape as messages show it: sizes, or the names that the graph gives them."""
    return "(" + ", ".join(str(size(axis)) for axis in axes) + ")"


def fits(axis: Axis, wanted: Any) -> bool:
    """Whether an axis has this length, or one that is not known."""
    return size(axis) == wanted or not isinstance(size(axis), int)


@dataclass(frozen=True)
class Array:
    """An array that is known only when the model runs.

    kind : "input" of the graph, output of a "layer", or "state" of GRUs
    key : the name and the rows of the input; the stage of the walk; GRU and direction of each row
    flipped : the axis along which it runs backwards, if there is one
    by : the input by whose lengths it was turned round; None if as a whole
    order : the lengths by which rows are sorted and the axis of these rows, where they are
    """

    kind: str
    key: Any
    axes: tuple[Axis, ...]
    flipped: Axis = ()
    order: Any = ()
    by: str | None = None

    def arranged(self, axes: Sequence[Axis]) -> "Array":
        """The same numbers with other axes."""
        return replace(self, axes=tuple(axes))


@dataclass(eq=False)
class Layer:
    """A layer that was found: its kind, settings and parameters, without numbers of layers."""

    kind: str
    settings: dict[str, Any]
    params: dict[str, np.ndarray]
    first: tuple[str, tuple[int, int], Axis] | None = None  # input, rows, and axis of rows of h0
    last: str | None = None  # output of the graph that holds its h_n


@dataclass(frozen=True)
class Positive:
    """Whether a size is more than 0."""

    size: Any


@dataclass(frozen=True)
class Full:
    """Lengths of which each is this size."""

    size: Any


@dataclass(frozen=True)
class Zeros:
    """Zeros, of a shape that depends on the batch."""


def kind_of(value: Any) -> str:
    """What a node was given, as messages say it."""
    if value is None:
        return "nothing"
    if isinstance(value, np.ndarray):
        return f"a constant {value.shape}" if value.dtype != object else "a shape"
    if isinstance(value, Array) and value.axes:
        return f"an array {words(value.axes)} that is known when the model runs"
    return "zeros" if isinstance(value, Zeros) else "a value that is known when the model runs"


class AxisError(Exception):
    """A reshape that cuts through an axis, or whose sizes do not fit."""


def regroup(axes: Sequence[Axis], shape: Sequence[Any], known: dict[str, int]) -> tuple[Axis, ...]:
    """The axes after a reshape to `shape`, of ints, Sizes, and at most one -1.

    Exporters write a number where they took an axis to be of that length always. Then the name of
    its size stands for this number from now on: it is put into `known`.
    """
    atoms = [atom for axis in axes for atom in axis]
    if -1 not in shape:
        axes = _take(atoms, shape, known)
        if any(atom.size != 1 for atom in atoms):
            raise AxisError
        return tuple(axes)
    i = list(shape).index(-1)
    head = _take(atoms, shape[:i], known)
    atoms.reverse()
    tail = [axis[::-1] for axis in _take(atoms, shape[:i:-1], known)]
    return (*head, tuple(atoms[::-1]), *tail[::-1])


def _take(atoms: list[Atom], shape: Sequence[Any], known: dict[str, int]) -> list[Axis]:
    """Take atoms from the front of the list for each size in turn."""
    return [_take_one(atoms, wanted, known) for wanted in shape]


def _take_one(atoms: list[Atom], wanted: Any, known: dict[str, int]) -> Axis:
    axis: list[Atom] = []
    if wanted == 1:
        return (atoms.pop(0),) if atoms and atoms[0].size == 1 else ()
    while not axis or size(tuple(axis)) != wanted:
        if not atoms:
            raise AxisError
        atom = atoms.pop(0)
        axis.append(atom)
        if isinstance(atom.size, str) and isinstance(wanted, int):
            if len(axis) > 1 or known.setdefault(atom.size, wanted) != wanted:
                raise AxisError
            break
    return tuple(axis)
