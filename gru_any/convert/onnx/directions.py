"""Two GRUs of which one reads backwards: the two directions of one layer.

The second has `direction="reverse"`, or what it reads is reversed before it and its outputs are
reversed back, as Keras' exporter writes it.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np

from .axes import (
    Atom,
    Axis,
    FoundLayer,
    Full,
    SymbolicArray,
    Value,
    is_units,
    shape_text,
    size,
    symbolic,
)
from .check import Node
from .last import step
from .walk import COMBINED, Output, Walk

END = 2**31 - 1  # a slice to here or beyond has no end
NOT_TWINS = "joins two GRUs that are not forward and reverse, in this order and side by side"


def reverse_sequence(walk: Walk, node: Node, x: Value, lengths: Value) -> SymbolicArray:
    """The operator ReverseSequence, where it reverses the whole, or each row up to its length.

    The steps after the length stay where they are, and the operator GRU skips them.
    """
    x = symbolic(x)
    places = {"time_axis": 0, "batch_axis": 1} | node.attributes
    axis, by = x.axes[places["time_axis"]], None
    if isinstance(lengths, SymbolicArray) and lengths.kind == "input" and len(lengths.axes) == 1:
        by = lengths.key[0]
        if len(x.axes) != 3 or places["batch_axis"] == places["time_axis"]:
            node.refuse(f"reverses the rows of an array {shape_text(x.axes)}, expected (T, B, .)")
    elif not isinstance(lengths, Full) or lengths.size != size(axis):
        node.refuse("reverses something else than whole sequences")
    return _reversed(node, x, axis, by)


def cut(walk: Walk, node: Node, v: Value, *bounds: Value) -> SymbolicArray | None:
    """The operator Slice, where it reverses a sequence, or takes its last step."""
    v, names = symbolic(v), ("starts", "ends", "axes", "steps")
    given: dict[str, Any] = {"axes": 0, "steps": 1} | node.attributes
    given |= {k: b for k, b in zip(names, bounds, strict=False) if b is not None}
    found = [np.ravel(given[k]).tolist() for k in names]
    if v.kind not in ("input", "layer") or any(len(b) != 1 for b in found):
        return None
    if any(b.dtype == object for b in given.values() if isinstance(b, np.ndarray)):
        return None
    start, stop, place, by = (int(b[0]) for b in found)
    axis, length = v.axes[place], size(v.axes[place])
    whole = length if isinstance(length, int) else None
    if by == -1:
        begins = start >= END or start in (-1, whole and whole - 1)
        if not begins or stop > (-END if whole is None else -whole - 1):
            node.refuse("reverses something else than whole sequences")
        return _reversed(node, v, axis, None)
    if v.kind == "input" or by != 1 or (start == 0 and stop >= (END if whole is None else whole)):
        return None
    if (start == -1 and stop >= END) or 0 <= start == stop - 1:
        picked = step(walk, node, v, place, start)
        if picked:
            return picked.arranged([() if a == walk.time else a for a in v.axes])
    return node.refuse(COMBINED)


def _reversed(node: Node, x: SymbolicArray, axis: Axis, by: str | None) -> SymbolicArray:
    if x.flipped not in ((), axis) or (x.flipped and x.by != by):
        node.refuse("restores another axis, or by other lengths, than was reversed before")
    return replace(x, flipped=() if x.flipped else axis, by=None if x.flipped else by)


def combined(walk: Walk, node: Node, *values: Value) -> NoReturn:
    """The operators that combine elements as no layer does."""
    if not any(isinstance(v, SymbolicArray) and v.kind in ("layer", "state") for v in values):
        node.refuse("is no part of an Embedding, a GRU or a Linear layer")
    node.refuse(COMBINED)


def join(walk: Walk, node: Node, *values: Value) -> SymbolicArray | None:
    """The operator Concat, where it joins what two GRUs put out that are the two directions."""
    arrays = [v for v in values if isinstance(v, SymbolicArray)]
    kinds = {v.kind for v in arrays} if len(arrays) == len(values) else set()
    if kinds == {"state"}:
        rows = [layer for v in arrays for layer, _ in v.key]
        if walk.pair and walk.layers[-2:] in map(list, pairwise(rows)):
            merge(walk, node)
        return None
    if kinds != {"layer"}:
        return None
    stages = tuple(v.key for v in arrays)
    if stages not in walk.merged and (stages != walk.pair or not _beside(node, arrays)):
        if sorted(map(str, stages)) == sorted(map(str, walk.pair or ())):
            node.refuse(NOT_TWINS)
        node.refuse("joins what are not the two directions of a GRU")
    if stages == walk.pair:
        merge(walk, node)
    if not _beside(node, arrays):
        node.refuse("joins two directions otherwise than side by side")
    stage, (directions, units) = walk.merged[stages]
    first, axes = arrays[0], list(arrays[0].axes)
    place = node.attributes["axis"] % len(axes)
    if axes[place]:
        axes[place] = (directions, units)
    else:
        axes[place], axes[_units(first)] = (directions,), (units,)
    return replace(first, key=stage, axes=tuple(axes))


def _units(v: SymbolicArray) -> int:
    """Return the place of the axis of features."""
    return next(i for i, axis in enumerate(v.axes) if is_units(axis))


def _beside(node: Node, arrays: list[SymbolicArray]) -> bool:
    """Whether two arrays are joined by their features, or by an axis of directions."""
    a, b = arrays
    at, axis = _units(a), node.attributes["axis"] % len(a.axes)
    others = [[v for i, v in enumerate(x.axes) if i != at] for x in (a, b)]
    placed = axis == at or (not a.axes[axis] and not b.axes[axis])
    return placed and others[0] == others[1] and _units(b) == at and not (a.flipped or b.flipped)


def merge(walk: Walk, node: Node) -> Output:
    """Make one layer of the last two; return what it puts out."""
    (forward, reverse), stages = walk.layers[-2:], walk.pair
    assert stages is not None
    if "reverse" in forward.settings or reverse.settings != forward.settings | {"reverse": True}:
        node.refuse(f"{NOT_TWINS}, and else of the same attributes and biases")
    first, second = forward.first, reverse.first
    names = {state and state.name for state in (first, second)}
    if len(names) > 1 or (first and second and first.rows[1] != second.rows[0]):
        shown = " and ".join(repr(state.name) if state else "0" for state in (first, second))
        node.refuse(
            f"joins two directions whose first states are not rows, in order, of one input: {shown}"
        )
    del walk.layers[-2:]
    k, walk.pair = len(walk.layers), None
    settings = forward.settings | {"bidirectional": True}
    layer = FoundLayer("GRU", settings, forward.params | reverse.params)
    if first and second:
        layer.first = first._replace(rows=(first.rows[0], second.rows[1]))
    features = (Atom(f"directions {k}", 2), Atom(f"units {k}", settings["hidden_size"]))
    walk.merged[stages] = Output(walk.put_out(node, layer, features), features)
    walk.halves |= {forward: (layer, 0), reverse: (layer, 1)}
    return walk.merged[stages]
