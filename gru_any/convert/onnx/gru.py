"""The operator GRU, and what a graph does with its lengths and states."""

from typing import Any, NamedTuple

import numpy as np

from ...typing import HostArray
from .axes import (
    ROWS,
    Atom,
    Axes,
    Axis,
    FirstState,
    FoundLayer,
    Order,
    SymbolicArray,
    Value,
    Zeros,
    shape_text,
    size,
    symbolic,
)
from .check import Node
from .functions import read_functions
from .walk import Walk

DIRECTIONS = {"forward": [""], "reverse": ["_reverse"], "bidirectional": ["", "_reverse"]}
DEFINED = {
    "direction", "hidden_size", "linear_before_reset", "layout", "clip", "activations",
    "activation_alpha", "activation_beta",
}  # fmt: skip


class GRUOutputs(NamedTuple):
    """What the operator GRU puts out: the states of all steps, and the last ones."""

    Y: SymbolicArray
    Y_h: SymbolicArray


def swap_gates(v: HostArray) -> HostArray:
    """Reorder the gates on the first axis from ONNX' z, r, h to r, z, n, or back."""
    z, r, n = np.split(v, 3)
    return np.concatenate((r, z, n))


def gru(
    walk: Walk,
    node: Node,
    x: Value,
    W: Value,
    R: Value,
    B: Value = None,
    lengths: Value = None,
    h0: Value = None,
) -> GRUOutputs:
    """The operator GRU."""
    options = _options(node)
    direction, name = _direction(node, x, lengths, options["direction"])
    walk.open_for_twin(node, x, direction)
    x, suffixes = symbolic(x), DIRECTIONS[direction]
    D, layout = len(suffixes), options["layout"]
    R = walk.check_weight(node, "R", R, (D, -1, -1))
    H = int(node.attributes.get("hidden_size", R.shape[2]))
    R = walk.check_weight(node, "R", R, (D, 3 * H, H))
    W = walk.check_weight(node, "W", W, (D, 3 * H, -1))
    after = bool(options["linear_before_reset"])
    params: dict[str, HostArray] = {}
    biases = [None] * D if B is None else walk.check_weight(node, "B", B, (D, 6 * H))
    for d, suffix in enumerate(suffixes):
        arrays = {"weight_ih": W[d], "weight_hh": R[d], **_biases(walk, biases[d], after)}
        params |= {f"{name}_l0{suffix}": swap_gates(v) for name, v in arrays.items()}
    layer = FoundLayer("GRU", {"reset_after": after, **read_functions(node, D)}, params)
    layer.first = walk.first_state(first_state(walk, node, h0, D, H, layout))
    walk.lengths.add(name)
    _check_order(node, x, lengths, h0, layout)
    return add_gru(walk, node, x, layer, direction, layout)


def _direction(node: Node, x: Value, lengths: Value, direction: str) -> tuple[str, str | None]:
    """Return the direction in which the sequence is read, and the name of the lengths."""
    name = _lengths(node, lengths)
    if not isinstance(x, SymbolicArray) or not x.flipped:
        return direction, name
    if direction != "forward":
        node.refuse(f"reads a sequence that was reversed, in the direction {direction!r}")
    if x.by != name:
        node.refuse(
            f"reads rows that were reversed {'as a whole' if x.by is None else 'by ' + x.by}, "
            f"and ends them {'nowhere' if name is None else 'by ' + name}; expected the same "
            "lengths for both"
        )
    return "reverse", name


def add_gru(
    walk: Walk, node: Node, x: SymbolicArray, layer: FoundLayer, direction: str, layout: int = 0
) -> GRUOutputs:
    """Add a layer that has reset_after and params to the walk."""
    suffixes, k = DIRECTIONS[direction], len(walk.layers)
    rows, I = layer.params[f"weight_ih_l0{suffixes[0]}"].shape
    D, H = len(suffixes), rows // 3
    time, batch = _time_and_batch(walk, node, x, layout)
    walk.check_features(node, x.axes[2], I)
    layer.settings |= {
        "input_size": I,
        "hidden_size": H,
        "bias": any("bias" in name for name in layer.params),
        "bidirectional": D == 2,
        **({"reverse": True} if direction == "reverse" else {}),
        "batch_first": len(walk.lead) == 2 and time == walk.lead[1],
    }
    directions = (Atom(f"directions {k}", 2),) if D == 2 else ()
    units, of_state = (Atom(f"units {k}", H),), (Atom(ROWS, D),)
    stage = walk.put_out(node, layer, (*directions, *units))
    y: Axes = (time, directions, batch, units)
    h: Axes = (of_state, batch, units)
    if layout:
        y, h = (batch, time, directions, units), (batch, of_state, units)
    backwards = time if x.flipped else ()
    state = SymbolicArray("state", tuple((layer, d) for d in range(D)), h, (), x.order)
    return GRUOutputs(SymbolicArray("layer", stage, y, backwards, x.order, x.by), state)


def _options(node: Node) -> dict[str, Any]:
    """Return the attributes with their defaults; refuse those that have no counterpart."""
    given = node.attributes
    if set(given) - DEFINED:
        node.refuse(f"has the attributes {sorted(set(given) - DEFINED)}, not known here")
    options = {"direction": "forward", "layout": 0, "linear_before_reset": 0} | given
    if options["direction"] not in DIRECTIONS:
        node.refuse(f"has the direction {options['direction']!r}, expected {', '.join(DIRECTIONS)}")
    if options["layout"] not in (0, 1):
        node.refuse(f"has the layout {options['layout']}, expected 0 or 1")
    return options


def _biases(walk: Walk, b: HostArray | None, after: bool) -> dict[str, HostArray]:
    """Return the biases of one direction, from ONNX' two side by side."""
    if b is None:
        return {}
    of_input, recurrent = np.split(b, 2)
    if after:
        return {"bias_ih": of_input, "bias_hh": recurrent}
    walk.summed |= bool(recurrent.any())
    return {"bias_ih": of_input + recurrent}


def _time_and_batch(walk: Walk, node: Node, x: SymbolicArray, layout: int) -> tuple[Axis, Axis]:
    """Return the axes of time and batch of x, which are the same for every GRU of a graph."""
    if len(x.axes) != 3:
        node.refuse(f"reads an array of {len(x.axes)} axes, expected 3")
    time, batch = x.axes[layout], x.axes[1 - layout]
    if {time, batch} != {*walk.lead, *([()] if len(walk.lead) == 1 else [])}:
        node.refuse(
            f"reads axes {shape_text((time, batch))} as time and batch, expected those of the "
            f"input: {shape_text(walk.lead)}"
        )
    if x.flipped not in ((), time):
        node.refuse("reads what is reversed along another axis than time")
    walk.time = time if walk.time is None else walk.time
    if time != walk.time or not time:
        node.refuse(
            f"takes the axis {shape_text([time])} for the axis of time, expected "
            f"{shape_text([walk.time])} as another GRU does"
        )
    return time, batch


def first_state(
    walk: Walk, node: Node, h0: Value, D: int, H: int, layout: int
) -> FirstState | None:
    """Return the input that is the first state, and which of its rows; None for zeros."""
    if h0 is None or isinstance(h0, Zeros) or (isinstance(h0, np.ndarray) and not h0.any()):
        return None
    if isinstance(h0, np.ndarray):
        node.refuse("starts from a constant state that is not 0; a GRU here has no such weights")
    h0 = symbolic(h0)
    if h0.kind != "input":
        node.refuse("starts from a state that the graph computes, expected an input of the graph")
    name, rows = h0.key
    axes = h0.axes
    if len(axes) != 3 or not (walk.fits(axes[2], H) and walk.fits(axes[layout], D)):
        expected = f"({D}, B, {H})" if not layout else f"(B, {D}, {H})"
        node.refuse(f"starts from a state {shape_text(axes)}, expected {expected}")
    whole = symbolic(walk.values[name]).axes[0] if rows else axes[layout]
    return FirstState(name, rows or (0, D), whole)


def _lengths(node: Node, lengths: Value) -> str | None:
    """Return the name of the input that is the lengths."""
    if lengths is None:
        return None
    if (
        not isinstance(lengths, SymbolicArray)
        or lengths.kind not in ("input", "sorted")
        or len(lengths.axes) != 1
    ):
        node.refuse("has lengths that are no input (B,) of the graph: lengths are an argument here")
    return str(lengths.key[0])


def _check_order(node: Node, x: SymbolicArray, lengths: Value, h0: Value, layout: int) -> None:
    """Refuse sorted rows beside rows that are not sorted."""
    by = lengths if isinstance(lengths, SymbolicArray) and lengths.kind == "sorted" else None
    for v in (x, h0):
        if isinstance(v, SymbolicArray):
            wanted = by and Order(by.key[0], v.axes[1 - layout])
            if v.order != wanted:
                node.refuse("reads rows, lengths and states of which only some are sorted")


def empty(walk: Walk, node: Node, lengths: Value, zero: Value) -> SymbolicArray:
    """The operator Equal, where it asks which rows have the length 0."""
    if not isinstance(zero, np.ndarray) or zero.dtype.kind != "i" or zero.any() or zero.size != 1:
        node.refuse("compares with something else than 0")
    name, lengths = _lengths(node, lengths), symbolic(lengths)
    return SymbolicArray("empty" if lengths.kind == "input" else "", name, lengths.axes)


def keep(walk: Walk, node: Node, rows: Value, h0: Value, h_n: Value) -> SymbolicArray:
    """The operator Where, where rows of length 0 keep their first state, as they do here."""
    kinds = [v.kind if isinstance(v, SymbolicArray) else "constant" for v in (rows, h0, h_n)]
    if kinds != ["empty", "input", "state"]:
        node.refuse("chooses between what is not the first and the last state of a GRU")
    rows, h0, h_n = symbolic(rows), symbolic(h0), symbolic(h_n)
    if h0.order or h_n.order:
        node.refuse("chooses between what is not the first and the last state of a GRU")
    firsts = [layer.first for layer, _ in walk.rows_of(h_n)]
    if (
        {rows.key} != walk.lengths
        or h0.key[1]
        or any(first is None or first.name != h0.key[0] for first in firsts)
    ):
        node.refuse("chooses between the states of different GRUs")
    if (
        len(rows.axes) != 2
        or not rows.axes[0]
        or rows.axes[1]
        or size(h_n.axes[0]) != size(h0.axes[0])
    ):
        node.refuse(
            f"chooses by an array {shape_text(rows.axes)}, expected an axis of the batch and one "
            "of length 1"
        )
    if h_n.axes[0][0].name != ROWS:
        node.refuse(f"chooses between states {shape_text(h_n.axes)}, expected (L*D, B, H)")
    return h_n
