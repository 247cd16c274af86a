"""The operators that move elements or compute shapes, on any value of axes.py."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ...typing import HostArray
from .axes import (
    ROWS,
    Atom,
    Axis,
    Full,
    Positive,
    Range,
    Results,
    SymbolicArray,
    Value,
    Zeros,
    replaced,
    shape_text,
    size,
    symbolic,
)
from .check import Node, dtype_name


def identity(node: Node, v: Value, *rest: Value) -> Value:
    """The operators Identity and Dropout, which does nothing when a model is run."""
    off = [r is None or (isinstance(r, np.ndarray) and not r.any()) for r in rest[1:]]
    if not all(off):  # training_mode
        node.refuse("drops numbers when the model is run")
    return v


def cast(node: Node, v: Value) -> Value:
    """The operator Cast of constants and shapes; of others the reader knows the kinds."""
    if not isinstance(v, np.ndarray) or v.dtype == object:
        return v
    return v.astype(dtype_name(node.attributes["to"]))


def constant(node: Node) -> Value:
    """The operator Constant."""
    (value,) = node.attributes.values()
    if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], str)):
        node.refuse("is text")
    floats = {"value_float", "value_floats"} & set(node.attributes)
    return value if isinstance(value, np.ndarray) else np.asarray(value, "f4" if floats else "i8")


def shape(node: Node, v: Value) -> HostArray:
    """The operator Shape."""
    if isinstance(v, Zeros):
        node.refuse("asks for the shape of zeros")
    sizes = v.shape if isinstance(v, np.ndarray) else [size(axis) for axis in symbolic(v).axes]
    sizes = sizes[slice(node.attributes.get("start", 0), node.attributes.get("end"))]
    return _as_integers(np.array(sizes, dtype=object))


def _as_integers(sizes: HostArray) -> HostArray:
    """Return a shape as integers, where all entries are."""
    return sizes.astype(np.int64) if all(isinstance(s, int) for s in sizes.flat) else sizes


def transpose(node: Node, v: Value) -> Value:
    """The operator Transpose."""
    if isinstance(v, Zeros):
        return v
    perm = node.attributes.get("perm")
    if isinstance(v, np.ndarray):
        return np.transpose(v, perm or None)
    axes = symbolic(v).axes
    return symbolic(v).arranged([axes[i] for i in perm or range(len(axes))[::-1]])


def reshape(node: Node, v: Value, target: Value) -> Value:
    """The operator Reshape of a constant or of zeros; reshape.py has that of other arrays."""
    if isinstance(v, Zeros):
        return v
    v, shape = constant_of(node, v), list(constant_of(node, target).flat)
    if not all(isinstance(s, (int, np.integer)) for s in shape):
        node.refuse("gives a constant a shape that depends on the batch")
    copied = not node.attributes.get("allowzero")
    return v.reshape([v.shape[i] if s == 0 and copied else s for i, s in enumerate(shape)])


def squeeze(node: Node, v: Value, axes: Value = None) -> Value:
    """The operator Squeeze."""
    if isinstance(v, Zeros):
        return v
    places = node.attributes.get("axes") if axes is None else integers_of(node, axes)
    if isinstance(v, np.ndarray):
        return np.squeeze(v, None if places is None else tuple(places))
    if places is None:
        node.refuse("squeezes whatever is 1 when the model is run")
    v = symbolic(v)
    gone = {a % len(v.axes) for a in places}
    if any(size(v.axes[a]) != 1 for a in gone):
        node.refuse(f"squeezes an axis that is not 1: {shape_text(v.axes)}")
    return v.arranged([axis for i, axis in enumerate(v.axes) if i not in gone])


def unsqueeze(node: Node, v: Value, axes: Value = None) -> Value:
    """The operator Unsqueeze."""
    if isinstance(v, Zeros):
        return v
    places = node.attributes["axes"] if axes is None else integers_of(node, axes)
    if isinstance(v, np.ndarray):
        return np.expand_dims(v, tuple(places))
    new = list(symbolic(v).axes)
    for a in sorted(a % (len(new) + len(places)) for a in places):
        new.insert(a, ())
    return symbolic(v).arranged(new)


def cut(node: Node, v: Value, *bounds: Value) -> Value:
    """The operator Slice, also where it takes rows of a first state."""
    if isinstance(v, Zeros):
        return v
    names = ("starts", "ends", "axes", "steps")
    if bounds:
        values = (None if b is None else integers_of(node, b) for b in bounds)
        given = dict(zip(names, values, strict=False))
    else:
        given = {k: node.attributes.get(k) for k in names}
    starts, ends = given["starts"] or [], given["ends"] or []
    axes, steps = given.get("axes") or range(len(starts)), given.get("steps") or [1] * len(starts)
    slices = {a: slice(*bound) for a, *bound in zip(axes, starts, ends, steps, strict=True)}
    if isinstance(v, np.ndarray):
        return v[tuple(slices.get(a, slices.get(a - v.ndim, slice(None))) for a in range(v.ndim))]
    v = symbolic(v)
    for a, rows in slices.items():
        v = _rows(node, v, a % len(v.axes), rows)
    return v


def _rows(node: Node, v: SymbolicArray, axis: int, rows: slice) -> SymbolicArray:
    """Return some rows of an input or of a state, or the whole of any array."""
    length = size(v.axes[axis])
    if rows.step in (None, 1) and rows.start == 0 and rows.stop >= 2**31 - 1:
        return v
    if not isinstance(length, int) or rows.step not in (None, 1):
        node.refuse(f"cuts an array along an axis that must stay whole: {shape_text(v.axes)}")
    start, stop, _ = rows.indices(length)
    if (start, stop) == (0, length):
        return v
    if v.kind == "state" and [atom.name for atom in v.axes[axis]] == [ROWS]:
        axes = replaced(v.axes, axis, (Atom(ROWS, stop - start),))
        return replace(v, key=v.key[start:stop], axes=axes)
    if v.kind != "input" or axis or v.key[1]:
        node.refuse(f"cuts an array along an axis that must stay whole: {shape_text(v.axes)}")
    atom = v.axes[0][0]._replace(size=stop - start)
    return replace(v, key=(v.key[0], (start, stop)), axes=((atom,), *v.axes[1:]))


def gather(node: Node, v: Value, at: Value) -> Value:
    """The operator Gather of a constant, of a shape, or of one row of a first state."""
    axis = node.attributes.get("axis", 0)
    at = constant_of(node, at).astype(np.int64)
    if isinstance(v, np.ndarray):
        if at.size * v.size > v.shape[axis] * (at.size + v.size):
            node.refuse("makes a larger constant than the file holds")
        return np.asarray(np.take(v, at, axis))
    if isinstance(v, Zeros):
        return v
    if at.size != 1:
        node.refuse("picks rows of an array in an order of its own")
    v = symbolic(v)
    row, axis = int(at.flat[0]), axis % len(v.axes)
    length = size(v.axes[axis])
    if row < 0 and isinstance(length, int):
        row += length
    if row < 0:
        node.refuse("picks a last step")
    v = _rows(node, v, axis, slice(row, row + 1))
    if v.kind == "state" and at.ndim == 1:
        return v
    return v.arranged(replaced(v.axes, axis, *((),) * at.ndim))


def concat(node: Node, *values: Value) -> Value:
    """The operator Concat of constants, shapes, or the states of several GRUs."""
    constants = [v for v in values if isinstance(v, np.ndarray)]
    if len(constants) == len(values):
        return np.concatenate(constants, node.attributes["axis"])
    if all(isinstance(v, Zeros) for v in values):
        return values[0]
    states = [v for v in values if isinstance(v, SymbolicArray) and v.kind == "state"]
    if len(states) < len(values):
        node.refuse("joins arrays that are neither constants nor the states of GRUs")
    return _joined(node, states, node.attributes["axis"] % len(states[0].axes))


def _joined(node: Node, states: list[SymbolicArray], axis: int) -> SymbolicArray:
    """Join states along layers and directions, or along features."""
    if len({v.order for v in states}) > 1:
        node.refuse("joins states whose rows are in different orders")
    others = [[of_any_layer(other) for other in replaced(v.axes, axis)] for v in states]
    if any(other != others[0] for other in others):
        node.refuse("joins states whose other axes differ")
    along, key = [v.axes[axis] for v in states], sum((v.key for v in states), ())
    new: Axis = (Atom(ROWS, len(key)),)
    single = all(len(v.key) == 1 for v in states)
    if single and all(map(_one_row, along)):
        new = (*new, along[0][-1])
    elif not all([a.name for a in old] == [ROWS] or (not old and single) for old in along):
        node.refuse(
            "joins states neither along layers and directions nor along features: along axes of "
            f"the sizes {shape_text(along)}"
        )
    axes = tuple(() if old == (Atom(ROWS, 1),) else old for old in states[0].axes)
    return replace(states[0], key=key, axes=replaced(axes, axis, new))


def _one_row(axis: Axis) -> bool:
    """Whether an axis is the features of one row of states."""
    names = [atom.name for atom in axis if atom != Atom(ROWS, 1)]
    return len(names) == 1 and names[0].startswith("units")


def of_any_layer(axis: Axis) -> Axis:
    """Return an axis without the number of the layer whose units it is."""
    return tuple(a._replace(name="units") if a.name.startswith("units") else a for a in axis)


def arithmetic(function: Callable[..., Any]) -> Callable[..., HostArray]:
    """Return the operator on numbers and shapes that computes this function."""

    def apply(node: Node, *values: Value) -> HostArray:
        arrays = [constant_of(node, v) for v in values]
        shape = np.broadcast_shapes(*(v.shape for v in arrays))
        if math.prod(shape) > sum(v.size for v in arrays):
            node.refuse("makes a larger constant than the file holds")
        try:
            result = np.asarray(function(*arrays))
        except TypeError:
            node.refuse("computes with a size that is not known before the model runs")
        return _as_integers(result) if result.dtype == object else result

    return apply


def divided(node: Node, a: Value, b: Value) -> Value:
    """The operator Div of numbers and of known sizes, which are whole and not negative."""
    a, b = constant_of(node, a), constant_of(node, b)
    whole = a.dtype.kind in "iu" and b.dtype.kind in "iu"
    if not whole and not (a.dtype.kind == b.dtype.kind == "f"):
        node.refuse("divides a size that is not known before the model runs")
    if not b.all() or (whole and (a.min(initial=0) < 0 or b.min(initial=0) < 0)):
        node.refuse("divides by 0, or sizes below 0")
    return arithmetic(np.floor_divide if whole else np.divide)(node, a, b)


def less(node: Node, a: Value, b: Value) -> Value:
    """The operator Less; with an unknown size it can only compare 0."""
    a, b = constant_of(node, a), constant_of(node, b)
    if b.dtype == object and b.size == 1 and a.dtype != object and not a.any():
        return Positive(b.flat[0])
    return arithmetic(np.less)(node, a, b)


def both(node: Node, a: Value, b: Value) -> Value:
    """The operator And."""
    if isinstance(a, Positive) and a == b:
        return a
    return arithmetic(np.logical_and)(node, a, b)


def split(node: Node, v: Value, sizes: Value = None) -> tuple[HostArray, ...]:
    """The operator Split of a constant, into equal parts."""
    if sizes is not None or "split" in node.attributes:
        node.refuse("cuts a constant into parts of sizes of their own")
    axis = node.attributes.get("axis", 0)
    return tuple(np.split(constant_of(node, v), len(node.outputs), axis))


def spread(node: Node, v: Value, shape: Value = None) -> Value:
    """The operators ConstantOfShape and Expand: a first state of zeros, or one length for all."""
    constant = node.op == "ConstantOfShape"
    filler = node.attributes.get("value", np.zeros(1)) if constant else v
    if isinstance(filler, Zeros) or (isinstance(filler, np.ndarray) and not filler.any()):
        return Zeros()
    if isinstance(filler, np.ndarray) and filler.size == 1 and filler.dtype.kind in "iO":
        return Full(filler.flat[0])
    return node.refuse("spreads something else than zeros or one length over the batch")


def count(node: Node, start: Value, stop: Value, step: Value) -> Range:
    """The operator Range, where it counts rows."""
    first, stop, by = (constant_of(node, v) for v in (start, stop, step))
    if np.any(first != 0) or np.any(by != 1) or stop.size != 1:
        node.refuse("counts in another way than from 0 in steps of 1")
    return Range(stop.flat[0])


def product(node: Node, v: Value, axes: Value = None) -> HostArray:
    """The operator ReduceProd of a shape."""
    v = constant_of(node, v)
    if v.ndim != 1:
        node.refuse("multiplies what is no shape")
    result = np.prod(v, keepdims=bool(node.attributes.get("keepdims", 1)))
    return _as_integers(np.asarray(result, dtype=object))


def constant_of(node: Node, v: Value) -> HostArray:
    """Return a constant or a shape; refuse what is known only when the model runs."""
    if not isinstance(v, np.ndarray):
        node.refuse("takes as an argument what is not known before the model runs")
    return v


def integers_of(node: Node, v: Value) -> list[int]:
    """Return the elements of a constant; refuse free sizes among them."""
    v = constant_of(node, v)
    if v.dtype == object:
        node.refuse("cuts at a place that depends on the batch")
    return [int(i) for i in v.flat]


MOVES: dict[str, Callable[..., Results]] = {
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
    "ConstantOfShape": spread,
    "Expand": spread,
    "Add": arithmetic(np.add),
    "Sub": arithmetic(np.subtract),
    "Mul": arithmetic(np.multiply),
    "Div": divided,
    "ReduceProd": product,
    "Less": less,
    "Range": count,
    "And": both,
    "Split": split,
}
