"""The sum or the mean of the two directions of a GRU: a Linear layer of (1 1) or (0.5 0.5).

Exporters write them as a reduction over the axis of directions, or as an addition of two halves.
"""

from dataclasses import replace

import numpy as np

from .axes import ROWS, Atom, Axis, FoundLayer, SymbolicArray, Value, is_units, replaced, size
from .check import Node
from .directions import merge
from .moves import integers_of, of_any_layer
from .walk import COMBINED, Walk


def half(v: SymbolicArray, place: int, d: int, kept: bool = False) -> SymbolicArray | None:
    """Return one direction, or None if the axis is not of directions. kept: keep an axis of 1."""
    axis = v.axes[place]
    if v.kind != "layer" or not axis or axis[0].size != 2 or axis[0].name[:10] != "directions":
        return None
    rest = (axis[1:],) if axis[1:] or kept else ()
    return SymbolicArray("half", (v.key, d, axis[0]), replaced(v.axes, place, *rest))


def part(v: SymbolicArray, place: int, start: int, stop: int) -> SymbolicArray | None:
    """Return some entries of an axis, where they are one of two directions."""
    axis = v.axes[place]
    width = size(axis[1:])
    if len(axis) in (1, 2) and isinstance(width, int):
        for d in (0, 1):
            if start in (d * width, (d - 2) * width) and min(stop, 2 * width) == (d + 1) * width:
                return half(v, place, d, kept=True)
    return None


def added(walk: Walk, node: Node, a: Value, b: Value, factor: float = 1.0) -> SymbolicArray:
    """The sum of two directions, times the factor."""
    if not isinstance(a, SymbolicArray) or not isinstance(b, SymbolicArray) or a.kind != b.kind:
        node.refuse(COMBINED)
    nameless = [[of_any_layer(axis) for axis in v.axes] for v in (a, b)]
    place = next((i for i, axis in enumerate(a.axes) if _only_units(axis)), None)
    if nameless[0] != nameless[1] or place is None:
        node.refuse(COMBINED)
    if a.kind == "half":
        (key, first, atom), (other, second, _) = a.key, b.key
        if key != other or {first, second} != {0, 1}:
            node.refuse(COMBINED)
        axes = replaced(a.axes, place, (atom, *a.axes[place]))
        whole = SymbolicArray("layer", key, axes)
    elif a.kind == "state":
        rows = sorted((a, b), key=lambda v: walk.rows_of(v)[0][1])
        axis = (Atom(ROWS, 2), *(atom for atom in a.axes[place] if atom.name != ROWS))
        axes = replaced(a.axes, place, axis)
        whole = replace(a, key=rows[0].key + rows[1].key, axes=axes)
    elif a.kind == "layer" and sorted((a.key, b.key)) == sorted(walk.pair or ()):
        stage, features = merge(walk, node)
        whole = SymbolicArray("layer", stage, replaced(a.axes, place, features))
    else:
        node.refuse(COMBINED)
    return _folded(walk, node, whole, place, factor)


def reduced(walk: Walk, node: Node, v: Value, axes: Value, factor: float) -> SymbolicArray:
    """The sum over the axis of directions, times the factor."""
    places = node.attributes.get("axes") if axes is None else integers_of(node, axes)
    if not isinstance(v, SymbolicArray) or places is None or len(places) != 1:
        node.refuse(COMBINED)
    place = places[0] % len(v.axes)
    kept = bool(node.attributes.get("keepdims", 1))
    if v.kind == "state" and v.axes[place] == (Atom(ROWS, 2),) and not kept:
        rest = replaced(v.axes, place)
        first, second = (replace(v, key=v.key[i : i + 1], axes=rest) for i in (0, 1))
        return added(walk, node, first, second, factor)
    forward, reverse = half(v, place, 0, kept), half(v, place, 1, kept)
    if forward is None or reverse is None or v.axes[place][1:]:
        node.refuse(COMBINED)
    return added(walk, node, forward, reverse, factor)


def scaled(walk: Walk, node: Node, v: Value, factor: Value) -> SymbolicArray | None:
    """The sum just made, times a number; None for anything else."""
    if isinstance(v, np.ndarray):
        v, factor = factor, v
    if not isinstance(v, SymbolicArray) or v.key not in walk.sums or v.key != walk.latest():
        return None
    if not isinstance(factor, np.ndarray) or factor.size != 1 or factor.dtype.kind != "f":
        return None
    layer = walk.layers[-1]
    layer.params["weight"] = layer.params["weight"] * factor.reshape(())
    walk.stage += 1
    return SymbolicArray("layer", walk.stage, v.axes)


def _folded(
    walk: Walk, node: Node, whole: SymbolicArray, place: int, factor: float
) -> SymbolicArray:
    x, width = walk.sequence(node, whole), size(whole.axes[place])
    if not isinstance(width, int):
        node.refuse(COMBINED)
    H = width // 2
    weight = np.tile(np.eye(H, dtype=walk.dtype), 2) * np.asarray(factor, walk.dtype)
    settings = {"in_features": 2 * H, "out_features": H, "bias": False}
    features = (Atom(f"outputs {len(walk.layers)}", H),)
    stage = walk.put_out(node, FoundLayer("Linear", settings, {"weight": weight}), features)
    walk.sums.add(stage)
    return SymbolicArray("layer", stage, replaced(x.axes, place, features))


def _only_units(axis: Axis) -> bool:
    """Whether an axis is the hidden units of a GRU, and nothing else of more than one."""
    return is_units(axis) and size(axis) == axis[-1].size
