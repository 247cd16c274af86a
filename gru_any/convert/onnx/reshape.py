"""The operator Reshape of a symbolic array: it regroups whole axes, or is refused."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .axes import Atom, Axes, Axis, Length, Size, SymbolicArray, Value, shape_text, size
from .check import Node
from .moves import constant_of
from .walk import Claim, Walk

if TYPE_CHECKING:
    from onnx import ValueInfoProto


class AxisError(Exception):
    """A reshape that cuts through an axis, or whose sizes do not fit."""


def reshape(walk: Walk, node: Node, v: Value, target: Value) -> SymbolicArray | None:
    """The operator Reshape of a symbolic array; None for anything else."""
    if not isinstance(v, SymbolicArray):
        return None
    sizes = [int(s) if isinstance(s, np.integer) else s for s in constant_of(node, target).flat]
    if not node.attributes.get("allowzero"):
        sizes = [size(v.axes[i]) if s == 0 else s for i, s in enumerate(sizes)]
    numbers = {name: claim.number for name, claim in walk.claims.items()}
    try:
        axes = _regroup(v.axes, sizes, numbers)
    except AxisError:
        node.refuse(
            f"joins or cuts axes so that they mean nothing here: "
            f"{shape_text(v.axes)} to ({', '.join(map(str, sizes))})"
        )
    for name, number in numbers.items():
        walk.claims.setdefault(name, Claim(number, node))
    return v.arranged(axes)


def check_claims(walk: Walk, declared: Iterable["ValueInfoProto"]) -> None:
    """Refuse a constant length where the inputs of the graph leave it free.

    At any other length such a reshape fails, or mixes steps and rows. Weights may prove that this
    is the only length, and so may the declared shape of an array.
    """
    proven = walk.proven.union(*(_declared(walk, info) for info in declared))
    for name, (number, node) in walk.claims.items():
        if (name, number) not in proven:
            alone = "" if walk.part else ", or read the GRU alone: load(path, node=...)"
            node.refuse(
                f"gives an axis the constant length {number}, where the inputs of the graph leave "
                f"{name!r} free; at another length it would mix steps and rows. Write the file "
                f"with 0 or -1 in place of {number}, as a dynamic axis has it, or with an input "
                f"that is {number} long{alone}"
            )


def _declared(walk: Walk, declared: "ValueInfoProto") -> Iterator[tuple[str, int]]:
    """Yield a free length and the number declared for it, where all others keep their names.

    The number of elements then leaves no other length for it, even where the shape was inferred
    from the constant itself.
    """
    v, dims = walk.values.get(declared.name), declared.type.tensor_type.shape.dim
    if not isinstance(v, SymbolicArray) or len(dims) != len(v.axes):
        return
    sizes = [size(axis) for axis in v.axes]
    if any(isinstance(s, Size) and s not in sizes for s in map(size, walk.lead)):
        return
    changed = [
        i for i, dim in enumerate(dims)
        if isinstance(sizes[i], Size) and dim.dim_param != str(sizes[i])
    ]  # fmt: skip
    if len(changed) == 1:
        yield str(sizes[changed[0]]), dims[changed[0]].dim_value


def _regroup(axes: Axes, shape: Sequence[Length], numbers: dict[str, int]) -> Axes:
    """Return the axes after a reshape to `shape`, which has at most one -1.

    Some exporters write a number for a free length, as it was when they traced the model. The name
    of this length is put into `numbers`, and stands for the number from then on.
    """
    atoms = [atom for axis in axes for atom in axis]
    if -1 not in shape:
        found = _take(atoms, shape, numbers)
        if any(atom.size != 1 for atom in atoms):
            raise AxisError
        return (*found[:-1], found[-1] + tuple(atoms)) if found else found
    i = list(shape).index(-1)
    head = _take(atoms, shape[:i], numbers)
    atoms.reverse()
    tail = [axis[::-1] for axis in _take(atoms, shape[:i:-1], numbers)]
    return (*head, tuple(atoms[::-1]), *tail[::-1])


def _take(atoms: list[Atom], shape: Sequence[Length], numbers: dict[str, int]) -> Axes:
    """Take atoms from the front of the list for each size in turn."""
    return tuple(_take_one(atoms, wanted, numbers) for wanted in shape)


def _take_one(atoms: list[Atom], wanted: Length, numbers: dict[str, int]) -> Axis:
    axis: list[Atom] = []
    if wanted == 1:
        return (atoms.pop(0),) if atoms and atoms[0].size == 1 else ()
    while not axis or size(tuple(axis)) != wanted:
        if not atoms:
            raise AxisError
        atom = atoms.pop(0)
        axis.append(atom)
        if isinstance(atom.size, str) and isinstance(wanted, int):
            if len(axis) > 1 or numbers.setdefault(atom.size, wanted) != wanted:
                raise AxisError
            break
    return tuple(axis)
