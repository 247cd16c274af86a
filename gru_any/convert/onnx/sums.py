"""The sum or the mean of the two directions of a GRU: a Linear layer of (1 1) or (0.5 0.5).

Exporters write them as a reduction over the axis of directions, or as an addition of two halves.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from .axes import ROWS, Array, Atom, Axis, Layer, size
from .check import Node
from .directions import COMBINED, merge
from .moves import of_any_layer


def half(v: Array, place: int, d: int, kept: bool = False) -> Array | None:
    """One of two directions; None where the axis is not theirs. kept: its own axis stays, as 1."""
    axis = v.axes[place]
    if v.kind != "layer" or not axis or axis[0].size != 2 or axis[0].name[:10] != "directions":
        return None
    rest = (axis[1:],) if axis[1:] or kept else ()
    return Array("half", (v.key, d, axis[0]), (*v.axes[:place], *rest, *v.axes[place + 1 :]))


def part(v: Array, place: int, start: int, stop: int) -> Array | None:
    """Some entries of an axis, where they are one of two directions."""
    axis = v.axes[place]
    width = size(axis[1:])
    for d in (0, 1) if len(axis) in (1, 2) and isinstance(width, int) else ():
        if start in (d * width, (d - 2) * width) and min(stop, 2 * width) == (d + 1) * width:
            return half(v, place, d, kept=True)
    return None


def added(walk: Any, node: Node, a: Any, b: Any, factor: float = 1.0) -> Array:
    """The sum of two directions, times the factor."""
    kinds = {getattr(v, "kind", "") for v in (a, b)}
    nameless = [[of_any_layer(axis) for axis in getattr(v, "axes", ())] for v in (a, b)]
    if len(kinds) != 1 or nameless[0] != nameless[1] or not kinds <= {"half", "state", "layer"}:
        node.refuse(COMBINED)
    place = next((i for i, axis in enumerate(a.axes) if _units(axis)), None)
    if place is None:
        node.refuse(COMBINED)
    if a.kind == "half":
        (key, first, atom), (other, second, _) = a.key, b.key
        if key != other or {first, second} != {0, 1}:
            node.refuse(COMBINED)
        whole = Array("layer", key, _replaced(a.axes, place, (atom, *a.axes[place])))
    elif a.kind == "state":
        rows = sorted((a, b), key=lambda v: walk.rows_of(v)[0][1])
        axis = (Atom(ROWS, 2), *(atom for atom in a.axes[place] if atom.name != ROWS))
        whole = replace(a, key=rows[0].key + rows[1].key, axes=_replaced(a.axes, place, axis))
    else:
        if tuple(sorted((a.key, b.key), key=str)) != tuple(sorted(walk.pair or (), key=str)):
            node.refuse(COMBINED)
        stages = walk.pair
        merge(walk, node)
        stage, features = walk.merged[stages]
        whole = Array("layer", stage, _replaced(a.axes, place, features))
    return _folded(walk, node, whole, place, factor)


def reduced(walk: Any, node: Node, v: Any, axes: Any, factor: float) -> Array:
    """The sum over the axis of directions, times the factor."""
    axes = node.attributes.get("axes") if axes is None else np.ravel(axes).tolist()
    if not isinstance(v, Array) or axes is None or len(axes) != 1:
        node.refuse(COMBINED)
    place = axes[0] % len(v.axes)
    kept = bool(node.attributes.get("keepdims", 1))
    if v.kind == "state" and v.axes[place] == (Atom(ROWS, 2),) and not kept:
        rest = _replaced(v.axes, place, None)
        rows = [replace(v, key=v.key[i : i + 1], axes=rest) for i in (0, 1)]
        return added(walk, node, rows[0], rows[1], factor)
    forward, reverse = half(v, place, 0, kept), half(v, place, 1, kept)
    if forward is None or reverse is None or v.axes[place][1:]:
        node.refuse(COMBINED)
    return added(walk, node, forward, reverse, factor)


def scaled(walk: Any, node: Node, v: Any, factor: Any) -> Array | None:
    """The sum just made, times a number; None for anything else."""
    if isinstance(v, np.ndarray):
        v, factor = factor, v
    if not isinstance(v, Array) or v.key not in walk.sums or v.key != walk.latest():
        return None
    if not isinstance(factor, np.ndarray) or factor.size != 1 or factor.dtype.kind != "f":
        return None
    layer = walk.layers[-1]
    layer.params["weight"] = layer.params["weight"] * factor.reshape(())
    walk.stage += 1
    return Array("layer", walk.stage, v.axes)


def _folded(walk: Any, node: Node, whole: Array, place: int, factor: float) -> Array:
    x = walk.sequence(node, whole)
    H = size(whole.axes[place]) // 2
    weight = np.tile(np.eye(H, dtype=walk.dtype), 2) * np.asarray(factor, walk.dtype)
    settings = {"in_features": 2 * H, "out_features": H, "bias": False}
    features = (Atom(f"outputs {len(walk.layers)}", H),)
    stage = walk.put_out(node, Layer("Linear", settings, {"weight": weight}), features)
    walk.sums.add(stage)
    return Array("layer", stage, _replaced(x.axes, place, features))


def _units(axis: Axis) -> bool:
    return bool(axis) and axis[-1].name.startswith("units") and size(axis) == axis[-1].size


def _replaced(axes: Any, place: int, axis: Axis | None) -> tuple[Axis, ...]:
    new = () if axis is None else (axis,)
    return (*axes[:place], *new, *axes[place + 1 :])
