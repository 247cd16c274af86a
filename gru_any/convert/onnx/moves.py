"""The operators that move numbers or compute shapes: on constants, shapes, and arrays to come.

A constant is a NumPy array. A shape is one of objects, where an entry is not known before the model
runs. What the model computes is an `Array` or `Zeros`.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from .axes import ROWS, Array, Atom, Axis, AxisError, Full, Positive, Zeros, regroup, size, words
from .check import Node, dtype_name
from .sort import numbers

Known = dict[str, int]


def identity(node: Node, known: Known, v: Any, *rest: Any) -> Any:
    """The operators Identity and Dropout, which does nothing when a model is run."""
    if any(r is not None and np.any(r) for r in rest[1:]):  # training_mode
        node.refuse("drops numbers when the model is run")
    return v


def cast(node: Node, known: Known, v: Any) -> Any:
    """The operator Cast of constants and shapes; of others the reader knows the kinds."""
    if not isinstance(v, np.ndarray) or v.dtype == object:
        return v
    return v.astype(dtype_name(node.attributes["to"]))


def constant(node: Node, known: Known) -> Any:
    """The operator Constant."""
    (value,) = node.attributes.values()
    if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], str)):
        node.refuse("is text")
    floats = {"value_float", "value_floats"} & set(node.attributes)
    return value if isinstance(value, np.ndarray) else np.asarray(value, "f4" if floats else "i8")


def shape(node: Node, known: Known, v: Any) -> Any:
    """The operator Shape."""
    if isinstance(v, Zeros):
        node.refuse("asks for the shape of zeros")
    sizes = v.shape if isinstance(v, np.ndarray) else [size(axis) for axis in v.axes]
    sizes = list(sizes)[slice(node.attributes.get("start", 0), node.attributes.get("end"))]
    return _shape(np.array(sizes, dtype=object))


def _shape(sizes: np.ndarray) -> np.ndarray:
    """Integers, where all entries are."""
    return sizes.astype(np.int64) if all(isinstance(s, int) for s in sizes.flat) else sizes


def transpose(node: Node, known: Known, v: Any) -> Any:
    """The operator Transpose."""
    if isinstance(v, Zeros):
        return v
    rank = v.ndim if isinstance(v, np.ndarray) else len(v.axes)
    perm = node.attributes.get("perm") or range(rank)[::-1]
    if isinstance(v, np.ndarray):
        return np.transpose(v, perm)
    return v.arranged([v.axes[i] for i in perm])


def reshape(node: Node, known: Known, v: Any, target: Any) -> Any:
    """The operator Reshape."""
    if isinstance(v, Zeros):
        return v
    target = list(_constant(node, target).flat)
    if isinstance(v, np.ndarray):
        if not all(isinstance(s, (int, np.integer)) for s in target):
            node.refuse("gives a constant a shape that depends on the batch")
        copied = not node.attributes.get("allowzero")
        return v.reshape([v.shape[i] if s == 0 and copied else s for i, s in enumerate(target)])
    target = [int(s) if isinstance(s, np.integer) else s for s in target]
    if not node.attributes.get("allowzero"):
        target = [size(v.axes[i]) if s == 0 else s for i, s in enumerate(target)]
    try:
        return v.arranged(regroup(v.axes, target, known))
    except AxisError:
        node.refuse(
            f"joins or cuts axes so that they mean nothing here: "
            f"{words(v.axes)} to ({', '.join(map(str, target))})"
        )


def squeeze(node: Node, known: Known, v: Any, axes: Any = None) -> Any:
    """The operator Squeeze."""
    if isinstance(v, Zeros):
        return v
    axes = _axes(node, axes)
    if isinstance(v, np.ndarray):
        return np.squeeze(v, None if axes is None else tuple(axes))
    if axes is None:
        node.refuse("squeezes whatever is 1 when the model is run")
    axes = {a % len(v.axes) for a in axes}
    if any(size(v.axes[a]) != 1 for a in axes):
        node.refuse(f"squeezes an axis that is not 1: {words(v.axes)}")
    return v.arranged([axis for i, axis in enumerate(v.axes) if i not in axes])


def unsqueeze(node: Node, known: Known, v: Any, axes: Any = None) -> Any:
    """The operator Unsqueeze."""
    if isinstance(v, Zeros):
        return v
    axes = _axes(node, axes)
    if isinstance(v, np.ndarray):
        return np.expand_dims(v, tuple(axes))
    new: list[Axis] = list(v.axes)
    for a in sorted(a % (len(v.axes) + len(axes)) for a in axes):
        new.insert(a, ())
    return v.arranged(new)


def cut(node: Node, known: Known, v: Any, *bounds: Any) -> Any:
    """The operator Slice; of the graph's inputs it cuts out rows of a first state."""
    if isinstance(v, Zeros):
        return v
    names = ("starts", "ends", "axes", "steps")
    if bounds:
        values = (None if b is None else _ints(node, b) for b in bounds)
        given = dict(zip(names, values, strict=False))
    else:
        given = {k: node.attributes.get(k) for k in names}
    starts, ends = given["starts"] or [], given["ends"] or []
    axes, steps = given.get("axes") or range(len(starts)), given.get("steps") or [1] * len(starts)
    slices = {a: slice(*bound) for a, *bound in zip(axes, starts, ends, steps, strict=True)}
    if isinstance(v, np.ndarray):
        return v[tuple(slices.get(a, slices.get(a - v.ndim, slice(None))) for a in range(v.ndim))]
    for a, rows in slices.items():
        v = _rows(node, v, a % len(v.axes), rows)
    return v


def _rows(node: Node, v: Array, axis: int, rows: slice) -> Array:
    """Some rows of an input, or the whole of any array."""
    length = size(v.axes[axis])
    if rows.step in (None, 1) and rows.start == 0 and rows.stop >= 2**31 - 1:
        return v
    if not isinstance(length, int) or rows.step not in (None, 1):
        node.refuse(f"cuts an array along an axis that must stay whole: {words(v.axes)}")
    start, stop, _ = rows.indices(length)
    if (start, stop) == (0, length):
        return v
    if v.kind == "state" and [atom.name for atom in v.axes[axis]] == [ROWS]:
        kept = (Atom(ROWS, stop - start),)
        return replace(v, key=v.key[start:stop], axes=(*v.axes[:axis], kept, *v.axes[axis + 1 :]))
    if v.kind != "input" or axis or v.key[1]:
        node.refuse(f"cuts an array along an axis that must stay whole: {words(v.axes)}")
    atom = v.axes[0][0]._replace(size=stop - start)
    return replace(v, key=(v.key[0], (start, stop)), axes=((atom,), *v.axes[1:]))


def gather(node: Node, known: Known, v: Any, at: Any) -> Any:
    """The operator Gather of a constant, of a shape, or of one row of a first state."""
    axis = node.attributes.get("axis", 0)
    at = _constant(node, at).astype(np.int64)
    if isinstance(v, np.ndarray):
        if at.size * v.size > v.shape[axis] * (at.size + v.size):
            node.refuse("makes a larger constant than the file holds")
        return np.asarray(np.take(v, at, axis))
    if isinstance(v, Zeros):
        return v
    if at.size != 1:
        node.refuse("picks rows of an array in an order of its own")
    row, axis = int(at.flat[0]), axis % len(v.axes)
    length = size(v.axes[axis])
    if row < 0 and isinstance(length, int):
        row += length
    v = _rows(node, v, axis, slice(row, row + 1)) if row >= 0 else node.refuse("picks a last step")
    if v.kind == "state" and at.ndim == 1:
        return v
    return v.arranged((*v.axes[:axis], *((),) * at.ndim, *v.axes[axis + 1 :]))


def concat(node: Node, known: Known, *values: Any) -> Any:
    """The operator Concat of constants, shapes, or the states of several GRUs."""
    axis = node.attributes["axis"]
    if all(isinstance(v, np.ndarray) for v in values):
        return np.concatenate(values, axis)
    if all(isinstance(v, Zeros) for v in values):
        return values[0]
    if not all(isinstance(v, Array) and v.kind == "state" for v in values):
        node.refuse("joins arrays that are neither constants nor the states of GRUs")
    axis %= len(values[0].axes)
    if len({v.order for v in values}) > 1:
        node.refuse("joins states whose rows are in different orders")
    joined, key = [v.axes[axis] for v in values], sum((v.key for v in values), ())
    others = [[*map(of_any_layer, (*v.axes[:axis], *v.axes[axis + 1 :]))] for v in values]
    single, units = all(len(v.key) == 1 for v in values), joined[0][-1:]
    if any(other != others[0] for other in others):
        node.refuse("joins states whose other axes differ")
    new: Axis = (Atom(ROWS, len(key)),)
    if single and all(map(_units, joined)):
        new = (*new, *units)
    elif not all([a.name for a in axis] == [ROWS] or (not axis and single) for axis in joined):
        node.refuse(
            "joins states neither along layers and directions nor along features: along axes of "
            f"the sizes {words(joined)}"
        )
    axes = [() if axis == (Atom(ROWS, 1),) else axis for axis in values[0].axes]
    axes[axis] = new
    return replace(values[0], key=key, axes=tuple(axes))


def _units(axis: Axis) -> bool:
    """Whether an axis is the features of one row of states."""
    names = [atom.name for atom in axis if atom != Atom(ROWS, 1)]
    return len(names) == 1 and names[0].startswith("units")


def of_any_layer(axis: Axis) -> Axis:
    """An axis, of which it does not matter of which layer the units are."""
    return tuple(a._replace(name="units") if a.name.startswith("units") else a for a in axis)


def arithmetic(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator on numbers and shapes."""

    def apply(node: Node, known: Known, *values: Any) -> Any:
        values = tuple(_constant(node, v) for v in values)
        shape = np.broadcast_shapes(*(v.shape for v in values))
        if math.prod(shape) > sum(v.size for v in values):
            node.refuse("makes a larger constant than the file holds")
        try:
            result = np.asarray(function(*values))
        except TypeError:
            node.refuse("computes with a size that is not known before the model runs")
        return _shape(result) if result.dtype == object else result

    return apply


def divided(node: Node, known: Known, a: Any, b: Any) -> Any:
    """The operator Div of numbers and of known sizes, which are whole and not negative."""
    a, b = _constant(node, a), _constant(node, b)
    whole = a.dtype.kind in "iu" and b.dtype.kind in "iu"
    if not whole and not (a.dtype.kind == b.dtype.kind == "f"):
        node.refuse("divides a size that is not known before the model runs")
    if not b.all() or (whole and (a.min(initial=0) < 0 or b.min(initial=0) < 0)):
        node.refuse("divides by 0, or sizes below 0")
    return arithmetic(np.floor_divide if whole else np.divide)(node, known, a, b)


def less(node: Node, known: Known, a: Any, b: Any) -> Any:
    """The operator Less; of a size it may ask whether it is more than 0."""
    a, b = _constant(node, a), _constant(node, b)
    if b.dtype == object and b.size == 1 and a.dtype != object and not a.any():
        return Positive(b.flat[0])
    return arithmetic(np.less)(node, known, a, b)


def both(node: Node, known: Known, a: Any, b: Any) -> Any:
    """The operator And."""
    return (
        a if isinstance(a, Positive) and a == b else arithmetic(np.logical_and)(node, known, a, b)
    )


def split(node: Node, known: Known, v: Any, sizes: Any = None) -> Any:
    """The operator Split of a constant, into equal parts."""
    if sizes is not None or "split" in node.attributes:
        node.refuse("cuts a constant into parts of sizes of their own")
    parts = np.split(_constant(node, v), len(node.outputs), node.attributes.get("axis", 0))
    return tuple(parts)


def zeros(node: Node, known: Known, *values: Any) -> Any:
    """The operators ConstantOfShape and Expand: of a first state, zeros are understood."""
    filler = (
        node.attributes.get("value", np.zeros(1)) if node.op == "ConstantOfShape" else values[0]
    )
    if isinstance(filler, Zeros) or (isinstance(filler, np.ndarray) and not filler.any()):
        return Zeros()
    if isinstance(filler, np.ndarray) and filler.size == 1 and filler.dtype.kind in "iO":
        return Full(filler.flat[0])
    return node.refuse("spreads something else than zeros or one length over the batch")


def product(node: Node, known: Known, v: Any, axes: Any = None) -> Any:
    """The operator ReduceProd of a shape."""
    if _constant(node, v).ndim != 1:
        node.refuse("multiplies what is no shape")
    result = np.prod(v, keepdims=bool(node.attributes.get("keepdims", 1)))
    return _shape(np.asarray(result, dtype=object))


def _constant(node: Node, v: Any) -> np.ndarray:
    if not isinstance(v, np.ndarray):
        node.refuse("takes as an argument what is not known before the model runs")
    return v


def _ints(node: Node, v: Any) -> list[int]:
    v = _constant(node, v)
    if v.dtype == object:
        node.refuse("cuts at a place that depends on the batch")
    return [int(i) for i in v.flat]


def _axes(node: Node, axes: Any) -> list[int] | None:
    return node.attributes.get("axes") if axes is None else _ints(node, axes)


MOVES: dict[str, Callable[..., Any]] = {
    "Identity": identity,
    "Dropout": identity,
    "Cast": cast,
    "Constant": constant,
    "Shape": shape,
    "Transpose": transpose,
    "Reshape": reshape,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Slice": cut,
    "Gather": gather,
    "Concat": concat,
    "ConstantOfShape": zeros,
    "Expand": zeros,
    "Add": arithmetic(np.add),
    "Sub": arithmetic(np.subtract),
    "Mul": arithmetic(np.multiply),
    "Div": divided,
    "ReduceProd": product,
    "Less": less,
    "Range": numbers,
    "And": both,
    "Split": split,
}
