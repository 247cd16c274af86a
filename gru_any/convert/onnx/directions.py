"""Two GRUs of which one reads backwards: the two directions of one layer.

The second has `direction="reverse"`, or what it reads is turned round before it and its outputs are
turned back, as Keras' exporter writes it.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np

from .axes import Array, Atom, Full, Layer, size, words
from .check import Node
from .last import step

END = 2**31 - 1  # a slice to here or beyond has no end
COMBINED = (
    "adds, averages, joins or takes apart what a GRU puts out, as no layer here does; read the GRU "
    "alone, load(path, node=...), and do so with its y, in which the forward half comes first"
)


def turn(walk: Any, node: Node, x: Array, lengths: Any) -> Array:
    """The operator ReverseSequence, where it turns round the whole, or each row up to its length.

    The steps after the length stay where they are, and the operator GRU skips them.
    """
    places = {"time_axis": 0, "batch_axis": 1} | node.attributes
    axis, by = x.axes[places["time_axis"]], None
    if isinstance(lengths, Array) and lengths.kind == "input" and len(lengths.axes) == 1:
        by = lengths.key[0]
        if len(x.axes) != 3 or places["batch_axis"] == places["time_axis"]:
            node.refuse(f"turns round the rows of an array {words(x.axes)}, expected (T, B, .)")
    elif not isinstance(lengths, Full) or lengths.size != size(axis):
        node.refuse("turns round something else than whole sequences")
    return _turned(node, x, axis, by)


def cut(walk: Any, node: Node, v: Any, *bounds: Any) -> Array | None:
    """The operator Slice, where it turns a sequence round, or takes its last step."""
    names = ("starts", "ends", "axes", "steps")
    given: dict[str, Any] = {"axes": 0, "steps": 1} | node.attributes
    given |= {k: b for k, b in zip(names, bounds, strict=False) if b is not None}
    found = [np.ravel(given[k]).tolist() for k in names]
    if v.kind not in ("input", "layer") or any(len(b) != 1 for b in found):
        return None
    if any(b.dtype == object for b in given.values() if isinstance(b, np.ndarray)):
        return None
    start, stop, place, by = (int(b[0]) for b in found)
    axis = v.axes[place]
    length = size(axis) if isinstance(size(axis), int) else None
    if by == -1:
        begins = start >= END or start in (-1, length and length - 1)
        if not begins or stop > (-END if length is None else -length - 1):
            node.refuse("turns round something else than whole sequences")
        return _turned(node, v, axis, None)
    if v.kind == "input" or by != 1 or (start == 0 and stop >= (END if length is None else length)):
        return None
    if (start == -1 and stop >= END) or 0 <= start == stop - 1:
        picked = step(walk, node, v, place, start)
        if picked:
            return picked.arranged([() if a == walk.time else a for a in v.axes])
    return node.refuse(COMBINED)


def _turned(node: Node, x: Array, axis: Any, by: str | None) -> Array:
    if x.flipped not in ((), axis) or (x.flipped and x.by != by):
        node.refuse("turns back another axis, or by other lengths, than was turned round before")
    return replace(x, flipped=() if x.flipped else axis, by=None if x.flipped else by)


def combined(walk: Any, node: Node, *values: Any) -> NoReturn:
    """The operators that combine numbers as no layer does."""
    if not any(isinstance(v, Array) and v.kind in ("layer", "state") for v in values):
        node.refuse("is no part of an Embedding, a GRU or a Linear layer")
    node.refuse(COMBINED)


def join(walk: Any, node: Node, *values: Any) -> Array | None:
    """The operator Concat, where it joins what two GRUs put out that are the two directions."""
    arrays = all(isinstance(v, Array) for v in values)
    if arrays and all(v.kind == "state" for v in values):
        rows = [layer for v in values for layer, _ in v.key]
        if walk.pair and tuple(walk.layers[-2:]) in pairwise(rows):
            merge(walk, node)
        return None
    if not arrays or any(v.kind != "layer" for v in values):
        return None
    stages = tuple(v.key for v in values)
    if stages not in walk.merged and (stages != walk.pair or not _beside(node, *values)):
        if sorted(map(str, stages)) == sorted(map(str, walk.pair or ())):
            node.refuse(
                "joins two GRUs that are not forward and reverse, in this order and side by side"
            )
        node.refuse("joins what are not the two directions of a GRU")
    if stages == walk.pair:
        merge(walk, node)
    if not _beside(node, *values):
        node.refuse("joins two directions otherwise than side by side")
    stage, (directions, units) = walk.merged[stages]
    axes = list(values[0].axes)
    place = node.attributes["axis"] % len(axes)
    if axes[place]:
        axes[place] = (directions, units)
    else:
        axes[place], axes[_units(values[0])] = (directions,), (units,)
    return replace(values[0], key=stage, axes=tuple(axes))


def _units(v: Array) -> int:
    """The place of the axis of features."""
    return next(i for i, axis in enumerate(v.axes) if axis and axis[-1].name.startswith("units"))


def _beside(node: Node, a: Array, b: Array) -> bool:
    """Whether two arrays are joined by their features, or by an axis of directions."""
    at, axis = _units(a), node.attributes["axis"] % len(a.axes)
    others = [[v for i, v in enumerate(x.axes) if i != at] for x in (a, b)]
    placed = axis == at or (not a.axes[axis] and not b.axes[axis])
    return placed and others[0] == others[1] and _units(b) == at and not (a.flipped or b.flipped)


def merge(walk: Any, node: Node) -> None:
    """Make one layer of the last two."""
    forward, reverse = walk.layers[-2:]
    if "reverse" in forward.settings or reverse.settings != forward.settings | {"reverse": True}:
        node.refuse(
            "joins two GRUs that are not forward and reverse, in this order and side by side, and "
            "else of the same attributes and biases"
        )
    firsts = [layer.first for layer in (forward, reverse)]
    names = {first and first[0] for first in firsts}
    if len(names) > 1 or (firsts[0] and firsts[0][1][1] != firsts[1][1][0]):
        node.refuse(
            "joins two directions whose first states are not rows, in order, of one input: "
            f"{' and '.join(repr(first[0]) if first else '0' for first in firsts)}"
        )
    del walk.layers[-2:]
    stages, k, walk.pair = walk.pair, len(walk.layers), None
    settings = forward.settings | {"bidirectional": True}
    layer = Layer("GRU", settings, forward.params | reverse.params)
    if firsts[0]:
        name, (start, _), axis = firsts[0]
        layer.first = name, (start, firsts[1][1][1]), axis
    features = (Atom(f"directions {k}", 2), Atom(f"units {k}", settings["hidden_size"]))
    walk.merged[stages] = walk.put_out(node, layer, features), features
    walk.halves |= {forward: (layer, 0), reverse: (layer, 1)}
