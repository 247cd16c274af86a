"""The operator GRU, and what a graph does with its lengths and states."""

from typing import Any

import numpy as np

from .axes import ROWS, Array, Atom, Axis, Layer, Zeros, fits, size, words
from .check import Node

DIRECTIONS = {"forward": [""], "reverse": ["_reverse"], "bidirectional": ["", "_reverse"]}
DEFINED = {
    "direction", "hidden_size", "linear_before_reset", "layout", "clip", "activations",
    "activation_alpha", "activation_beta",
}  # fmt: skip


def swap_gates(v: np.ndarray) -> np.ndarray:
    """From ONNX' order z, r, h on the first axis to r, z, n, and back."""
    z, r, n = np.split(v, 3)
    return np.concatenate((r, z, n))


def gru(
    walk: Any,
    node: Node,
    x: Any,
    W: Any,
    R: Any,
    B: Any = None,
    lengths: Any = None,
    h0: Any = None,
) -> tuple[Array, Array]:
    """The operator GRU -> Y and Y_h."""
    options = _options(node)
    direction, name = _direction(node, x, lengths, options["direction"])
    walk.open_for_twin(node, x, direction)
    suffixes = DIRECTIONS[direction]
    D, layout = len(suffixes), options["layout"]
    R = walk.check_weight(node, "R", R, (D, -1, -1))
    H = int(node.attributes.get("hidden_size", R.shape[2]))
    R = walk.check_weight(node, "R", R, (D, 3 * H, H))
    W = walk.check_weight(node, "W", W, (D, 3 * H, -1))
    after = bool(options["linear_before_reset"])
    params: dict[str, np.ndarray] = {}
    biases = [None] * D if B is None else walk.check_weight(node, "B", B, (D, 6 * H))
    for d, suffix in enumerate(suffixes):
        arrays = {"weight_ih": W[d], "weight_hh": R[d], **_biases(walk, biases[d], after)}
        params |= {f"{name}_l0{suffix}": swap_gates(v) for name, v in arrays.items()}
    layer = Layer("GRU", {"reset_after": after}, params)
    layer.first = walk.starts(first_state(walk, node, h0, D, H, layout))
    walk.lengths.add(name)
    _check_order(node, x, lengths, h0, layout)
    return add_gru(walk, node, x, layer, direction, layout)


def _direction(node: Node, x: Any, lengths: Any, direction: str) -> tuple[str, str | None]:
    """The direction in which the sequence is read, and the name of the lengths."""
    name = _lengths(node, lengths)
    if not getattr(x, "flipped", ()):
        return direction, name
    if direction != "forward":
        node.refuse(f"reads a sequence that was turned round, in the direction {direction!r}")
    if x.by != name:
        node.refuse(
            f"reads rows that were turned round {'as a whole' if x.by is None else 'by ' + x.by}, "
            f"and ends them {'nowhere' if name is None else 'by ' + name}; expected the same "
            "lengths for both"
        )
    return "reverse", name


def add_gru(
    walk: Any, node: Node, x: Array, layer: Layer, direction: str, layout: int = 0
) -> tuple[Array, Array]:
    """Add a layer with reset_after and params to the walk -> Y and Y_h."""
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
    y: tuple[Axis, ...] = (time, directions, batch, units)
    h: tuple[Axis, ...] = (of_state, batch, units)
    if layout:
        y, h = (batch, time, directions, units), (batch, of_state, units)
    backwards = time if x.flipped else ()
    state = Array("state", tuple((layer, d) for d in range(D)), h, (), x.order)
    return Array("layer", stage, y, backwards, x.order, x.by), state


def _options(node: Node) -> dict[str, Any]:
    """The attributes with their defaults; refuse those with no counterpart."""
    given = node.attributes
    if set(given) - DEFINED:
        node.refuse(f"has the attributes {sorted(set(given) - DEFINED)}, not known here")
    if "clip" in given:
        node.refuse(f"clips what goes into its gates at {given['clip']}; a GRU here clips nothing")
    kinds = [name.lower() for name in given.get("activations", [])]
    if kinds != ["sigmoid", "tanh"] * (len(kinds) // 2):
        node.refuse(f"has the activations {given['activations']}, expected Sigmoid and Tanh")
    options = {"direction": "forward", "layout": 0, "linear_before_reset": 0} | given
    if options["direction"] not in DIRECTIONS:
        node.refuse(f"has the direction {options['direction']!r}, expected {', '.join(DIRECTIONS)}")
    if options["layout"] not in (0, 1):
        node.refuse(f"has the layout {options['layout']}, expected 0 or 1")
    return options


def _biases(walk: Any, b: Any, after: bool) -> dict[str, np.ndarray]:
    """The biases of one direction, from ONNX' two side by side."""
    if b is None:
        return {}
    of_input, recurrent = np.split(b, 2)
    if after:
        return {"bias_ih": of_input, "bias_hh": recurrent}
    walk.summed |= bool(recurrent.any())
    return {"bias_ih": of_input + recurrent}


def _time_and_batch(walk: Any, node: Node, x: Array, layout: int) -> tuple[Axis, Axis]:
    """The axes of time and batch of x; the same for every GRU of a graph."""
    if len(x.axes) != 3:
        node.refuse(f"reads an array of {len(x.axes)} axes, expected 3")
    time, batch = x.axes[layout], x.axes[1 - layout]
    if {time, batch} != {*walk.lead, *([()] if len(walk.lead) == 1 else [])}:
        node.refuse(
            f"reads axes {words((time, batch))} as time and batch, expected those of the input: "
            f"{words(walk.lead)}"
        )
    if x.flipped not in ((), time):
        node.refuse("reads what is turned round along another axis than time")
    walk.time = time if walk.time is None else walk.time
    if time != walk.time or not time:
        node.refuse(
            f"takes the axis {words([time])} for the axis of time, expected "
            f"{words([walk.time])} as another GRU does"
        )
    return time, batch


def first_state(
    walk: Any, node: Node, h0: Any, D: int, H: int, layout: int
) -> tuple[str, tuple[int, int], Axis] | None:
    """The input that is the first state, and which of its rows; None for zeros."""
    if h0 is None or isinstance(h0, Zeros) or (isinstance(h0, np.ndarray) and not h0.any()):
        return None
    if isinstance(h0, np.ndarray):
        node.refuse("starts from a constant state that is not 0; a GRU here has no such weights")
    if h0.kind != "input":
        node.refuse("starts from a state that the graph computes, expected an input of the graph")
    name, rows = h0.key
    axes = h0.axes
    if len(axes) != 3 or not (fits(axes[2], H) and fits(axes[layout], D)):
        expected = f"({D}, B, {H})" if not layout else f"(B, {D}, {H})"
        node.refuse(f"starts from a state {words(axes)}, expected {expected}")
    return name, rows or (0, D), walk.values[name].axes[0] if rows else axes[layout]


def _lengths(node: Node, lengths: Any) -> str | None:
    """The name of the input that is the lengths."""
    if lengths is None:
        return None
    kind = getattr(lengths, "kind", "")
    if kind not in ("input", "sorted") or len(lengths.axes) != 1:
        node.refuse("has lengths that are no input (B,) of the graph: lengths are an argument here")
    return str(lengths.key[0])


def _check_order(node: Node, x: Array, lengths: Any, h0: Any, layout: int) -> None:
    """Refuse sorted rows beside rows that are not."""
    by = lengths.key[0] if getattr(lengths, "kind", "") == "sorted" else None
    wanted = [(by, x.axes[1 - layout]) if by else ()]
    found = [x.order]
    if isinstance(h0, Array):
        wanted.append((by, h0.axes[1 - layout]) if by else ())
        found.append(h0.order)
    if found != wanted:
        node.refuse("reads rows, lengths and states of which only some are sorted")


def empty(walk: Any, node: Node, lengths: Any, zero: Any) -> Array:
    """The operator Equal, where it asks which rows have the length 0."""
    if not isinstance(zero, np.ndarray) or zero.dtype.kind != "i" or zero.any() or zero.size != 1:
        node.refuse("compares with something else than 0")
    name = _lengths(node, lengths)
    return Array("empty" if lengths.kind == "input" else "", name, lengths.axes)


def keep(walk: Any, node: Node, rows: Any, h0: Any, h_n: Any) -> Array:
    """The operator Where, where rows of length 0 keep their first state, as they do here."""
    kinds = [getattr(v, "kind", "constant") for v in (rows, h0, h_n)]
    if kinds != ["empty", "input", "state"] or h0.order or h_n.order:
        node.refuse("chooses between what is not the first and the last state of a GRU")
    firsts = [layer.first for layer, _ in walk.rows_of(h_n)]
    if (
        {rows.key} != walk.lengths
        or h0.key[1]
        or any(f is None or f[0] != h0.key[0] for f in firsts)
    ):
        node.refuse("chooses between the states of different GRUs")
    if (
        len(rows.axes) != 2
        or not rows.axes[0]
        or rows.axes[1]
        or size(h_n.axes[0]) != size(h0.axes[0])
    ):
        node.refuse(
            f"chooses by an array {words(rows.axes)}, expected an axis of the batch and one of "
            "length 1"
        )
    if h_n.axes[0][0].name != ROWS:
        node.refuse(f"chooses between states {words(h_n.axes)}, expected (L*D, B, H)")
    return h_n
