"""Two GRUs of which one reads backwards, as Keras' exporter writes a bidirectional one."""

from dataclasses import replace
from typing import Any

from .axes import Array, Atom, Full, Layer, size
from .check import Node


def turn(walk: Any, node: Node, x: Any, lengths: Any) -> Array:
    """The operator ReverseSequence, where it turns round the whole."""
    axis = x.axes[node.attributes.get("time_axis", 0)]
    if not isinstance(lengths, Full) or lengths.size != size(axis) or x.flipped not in ((), axis):
        node.refuse("turns round something else than whole sequences")
    return replace(x, flipped=() if x.flipped else axis)


def join(walk: Any, node: Node, *values: Any) -> Array | None:
    """The operator Concat, where it joins the outputs of two GRUs in both directions."""
    if any(not isinstance(v, Array) or v.kind != "layer" for v in values):
        return None
    halves = dict(zip(walk.pair or (), walk.layers[-2:], strict=False))
    if len(values) != 2 or {v.key for v in values} != set(halves):
        node.refuse("joins what are not the two directions of a GRU")
    forward, reverse = (halves[v.key] for v in values)
    axes, axis = values[0].axes, node.attributes["axis"]
    beside = axis in (-1, len(axes) - 1) and axes[:-1] == values[1].axes[:-1]
    if not beside or any(v.flipped for v in values) or not _twins(forward, reverse):
        node.refuse("joins two GRUs that are not forward and reverse, side by side")
    del walk.layers[-2:]
    walk.pair, k = None, len(walk.layers)
    settings = forward.settings | {"bidirectional": True}
    layer = Layer("GRU", settings, forward.params | reverse.params)
    features = (Atom(f"directions {k}", 2), Atom(f"units {k}", settings["hidden_size"]))
    return Array("layer", walk.put_out(node, layer, features), (*axes[:-1], features))


def _twins(forward: Layer, reverse: Layer) -> bool:
    """Whether two layers differ in their direction alone, and start from zeros."""
    same = reverse.settings == forward.settings | {"reverse": True}
    return same and "reverse" not in forward.settings and not (forward.first or reverse.first)
