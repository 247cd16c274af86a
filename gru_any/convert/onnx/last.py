"""The last states of a GRU as what the next layer reads: a layer Last."""

from typing import Any

from .axes import ROWS, Array, Atom, Layer, size
from .check import Node

ONE_ROW = (Atom(ROWS, 1),)


def step(walk: Any, node: Node, v: Array, axis: int, row: int) -> Array | None:
    """One step of a sequence, where it is the last state; None if the axis is not time."""
    place = axis % len(v.axes)
    if not v.axes[place] or v.axes[place] != walk.time:
        return None
    gru, T = walk.layers[-1], size(walk.time)
    if gru.kind != "GRU" or v.key != walk.stage:
        node.refuse("picks a last step after other layers than a GRU; pick it before them")
    if v.flipped or walk.pair or gru.settings["bidirectional"]:
        node.refuse(
            "picks a step of a sequence that was read in both directions, or is turned round: it "
            "is the last state of one direction at most; use Y_h, or read the GRU alone, "
            "load(path, node=...)"
        )
    if walk.lengths - {None}:
        node.refuse("picks a last step by its place, where rows have lengths of their own; use Y_h")
    reverse = "reverse" in gru.settings
    if row not in ((0,) if reverse else (-1, T - 1) if isinstance(T, int) else (-1,)):
        node.refuse(f"picks the step {row}, which is not the last that the GRU came to")
    return Array("state", ((gru, 0),), tuple(a for i, a in enumerate(v.axes) if i != place))


def reason(walk: Any, v: Array) -> str:
    """Why a state is not what a layer Last would put out; empty if it is."""
    gru, rows = walk.layers[-1], walk.rows_of(v)
    if walk.pair or gru.kind != "GRU":
        return "reads states, though the layer before is no GRU, or one of two directions alone"
    D = 1 + gru.settings["bidirectional"]
    if rows != [(gru, d) for d in range(D)]:
        return (
            "reads states that are not those of the last GRU, of both directions if it has two, "
            "forward first"
        )
    if v.order:
        return "reads rows that are sorted by their lengths"
    features = tuple(atom for atom in v.axes[-1] if atom != ONE_ROW[0])
    units = bool(features) and features[-1].name.startswith("units")
    batch = [axis for axis in walk.lead if axis != walk.time and axis]
    lead = [axis for axis in v.axes[:-1] if axis and axis != ONE_ROW]
    if not units or features[:-1] != (Atom(ROWS, 2),) * (D - 1) or lead != batch:
        return "reads states whose axes are not batch, and directions and units side by side"
    return ""


def put(walk: Any, node: Any, v: Array) -> Array:
    """Add a layer Last whose output is v."""
    stage = walk.put_out(node, Layer("Last", {}, {}), v.axes[-1])
    return Array("layer", stage, v.axes)


def is_result(v: Any) -> bool:
    """Whether a state has no axis of layers and directions of its own, as h_n has."""
    state = isinstance(v, Array) and v.kind == "state"
    return state and not any(len(a) == 1 and a[0].name == ROWS for a in v.axes)
