"""The last states of a GRU, where a graph takes them from its outputs or puts them out."""

from .axes import ROWS, SymbolicArray, Value, replaced, size
from .check import Node
from .walk import Walk


def step(walk: Walk, node: Node, v: SymbolicArray, axis: int, row: int) -> SymbolicArray | None:
    """Return the last state, if the step of y is that; None if the axis is not time."""
    place = axis % len(v.axes)
    if not v.axes[place] or v.axes[place] != walk.time:
        return None
    gru, T = walk.layers[-1], size(walk.time)
    if gru.kind != "GRU" or v.key != walk.stage:
        node.refuse("picks a last step after other layers than a GRU; pick it before them")
    if v.flipped or walk.pair or gru.settings["bidirectional"]:
        node.refuse(
            "picks a step of a sequence that was read in both directions, or is reversed: it "
            "is the last state of one direction at most; use Y_h, or read the GRU alone, "
            "load(path, node=...)"
        )
    if walk.lengths - {None}:
        node.refuse("picks a last step by its place, where rows have lengths of their own; use Y_h")
    reverse = "reverse" in gru.settings
    if row not in ((0,) if reverse else (-1, T - 1) if isinstance(T, int) else (-1,)):
        node.refuse(f"picks the step {row}, which is not the last that the GRU came to")
    return SymbolicArray("state", ((gru, 0),), replaced(v.axes, place))


def is_result(v: Value) -> bool:
    """Whether a state has no axis of layers and directions of its own, as h_n has."""
    if not isinstance(v, SymbolicArray) or v.kind != "state":
        return False
    return not any(len(a) == 1 and a[0].name == ROWS for a in v.axes)
