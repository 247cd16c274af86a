"""From the layers in a graph to a model: what its outputs are, and which nodes are one GRU."""

import logging
from typing import Any

import numpy as np

from ...backend import select
from ...nn.chain import Chain
from ...nn.gru import GRU
from ...nn.layers import Embedding, Last, Linear
from ...nn.params import Layer, converted
from ...typing import Device
from .axes import FoundLayer, SymbolicArray, Value, size, symbolic
from .last import is_result
from .walk import Walk


def assemble(walk: Walk, outputs: list[str], backend: object, device: Device) -> GRU | Chain:
    """Make the model that the layers of a walk describe."""
    _find_last(walk, outputs)
    for name in outputs:
        _check_output(walk, name, walk.values[name])
    grus = [layer for layer in walk.layers if layer.kind == "GRU"]
    if not grus:
        raise ValueError("the graph holds no GRU")
    if walk.pair:
        raise ValueError("two GRUs read the same, and nothing joins what they put out")
    if len(walk.lengths) > 1:
        names = ", ".join(sorted(repr(n) if n else "nowhere" for n in walk.lengths))
        raise ValueError(f"the GRUs take lengths from {names}, expected the same input for all")
    _check_first_states(walk, grus)
    _check_all_used(walk, grus)
    place = {"backend": select(backend, device), "dtype": walk.dtype}
    layers = [_make(group, place) for group in _groups(walk.layers)]
    if walk.summed:
        logging.getLogger("gru_any.convert").info(
            "the two biases of ONNX' GRU were added to the one of reset_after=False, and rounded"
        )
    first = layers[0]
    return first if len(layers) == 1 and isinstance(first, GRU) else Chain(*layers)


def _check_all_used(walk: Walk, grus: list[FoundLayer]) -> None:
    """Raise where there are weights or inputs that no layer has."""
    unread = {n: v for n, v in walk.values.items() if n in walk.unread}
    weights = [n for n, v in unread.items() if isinstance(v, np.ndarray) and v.dtype.kind == "f"]
    if weights:
        raise ValueError(
            f"no node reads the initializers {', '.join(map(repr, sorted(weights)))}: if they are "
            "weights, the graph does not hold all of the model; if not, take them out of the file"
        )
    used = {walk.entry, *walk.lengths, *(g.first.name for g in grus if g.first)}
    if set(walk.types) - used:
        raise ValueError(f"the inputs {sorted(set(walk.types) - used)} are used by no layer")


def _find_last(walk: Walk, outputs: list[str]) -> None:
    """Add a layer Last where the only result is the last state."""
    values = [walk.values[name] for name in outputs]
    if walk.layers and not any(isinstance(v, SymbolicArray) and v.kind == "layer" for v in values):
        results = {k: symbolic(v) for k, v in zip(outputs, values, strict=True) if is_result(v)}
        for name, state in results.items():
            if len(results) == 1 and not walk.reason_against_last(state):
                walk.values[name] = walk.add_last(state)


def _check_output(walk: Walk, name: str, v: Value) -> None:
    """Raise where an output is neither the last layer's nor states in their order."""
    array = v if isinstance(v, SymbolicArray) else SymbolicArray("constant", None, ())
    if array.order:
        raise ValueError(f"the rows of the output {name!r} are sorted by their lengths")
    if array.kind == "layer" and array.key == walk.stage and not array.flipped:
        return
    rows = walk.rows_of(array) if array.kind == "state" else []
    states = list(dict.fromkeys(layer for layer, _ in rows))
    places = [walk.layers.index(g) if g in walk.layers else -1 for g in states]
    whole = [(g, d) for g in states for d in range(1 + g.settings["bidirectional"])]
    if not states or places != sorted({*places} - {-1}) or rows != whole:
        raise ValueError(
            f"the output {name!r} is neither what the last layer puts out nor the states of GRUs "
            "in their order"
        )
    for layer in states:
        layer.last = name


def _check_first_states(walk: Walk, grus: list[FoundLayer]) -> None:
    """Raise where GRUs that share an input as first state do not take its rows in order."""
    for name in {g.first.name for g in grus if g.first}:
        parts = [g.first for g in grus if g.first and g.first.name == name]
        ends = [0, *(part.rows[1] for part in parts)]
        axis = parts[0].axis
        if [part.rows[0] for part in parts] != ends[:-1] or not walk.fits(axis, ends[-1]):
            raise ValueError(
                f"the GRUs start from rows {[part.rows for part in parts]} of {name!r}, expected "
                f"all {size(axis)} in order"
            )


def _groups(layers: list[FoundLayer]) -> list[list[FoundLayer]]:
    """Put the layers that are one GRU together."""
    groups: list[list[FoundLayer]] = []
    for layer in layers:
        if groups and layer.kind == "GRU" and _marks(groups[-1][-1]) == _marks(layer):
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def _marks(layer: FoundLayer) -> object:
    """Return a key that is equal for layers that may be of one GRU."""
    settings = {k: v for k, v in layer.settings.items() if k != "input_size"}
    return layer.kind, settings, layer.first and layer.first.name, layer.last


def _make(group: list[FoundLayer], place: dict[str, Any]) -> Layer:
    """Make one layer of ours from one node, or one GRU from several."""
    kinds: dict[str, type[Any]] = {
        "GRU": GRU,
        "Embedding": Embedding,
        "Linear": Linear,
        "Last": Last,
    }
    settings, params = dict(group[0].settings), group[0].params
    if group[0].kind == "GRU":
        settings["num_layers"] = len(group)
        params = {
            name.replace("_l0", f"_l{i}"): v
            for i, layer in enumerate(group)
            for name, v in layer.params.items()
        }
    layer: Layer = kinds[group[0].kind].of(settings, converted(params, **place), **place)
    return layer
