"""From the layers that were found to a model: the outputs, and which nodes are one GRU."""

import logging
from itertools import groupby
from typing import Any

from ...backend import select
from ...nn.chain import Chain
from ...nn.gru import GRU
from ...nn.layers import Embedding, Last, Linear
from . import last
from .axes import Array, Layer, fits, size


def assemble(walk: Any, outputs: list[str], backend: Any, device: Any) -> Any:
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
    _check_first_states(grus)
    weights = sorted(n for n in walk.unread if walk.values[n].dtype.kind == "f")
    if weights:
        raise ValueError(
            f"no node reads the initializers {', '.join(map(repr, weights))}: if they are weights, "
            "the graph does not hold all of the model; if not, take them out of the file"
        )
    used = {walk.entry, *walk.lengths, *(g.first[0] for g in grus if g.first)}
    if set(walk.types) - used:
        raise ValueError(f"the inputs {sorted(set(walk.types) - used)} are used by no layer")
    home = {"backend": select(backend, device), "dtype": walk.dtype}
    layers = [_make(list(group), home) for _, group in groupby(walk.layers, _Kind())]
    if walk.summed:
        logging.getLogger("gru_any.convert").info(
            "the two biases of ONNX' GRU were added to the one of reset_after=False, and rounded"
        )
    return layers[0] if len(layers) == 1 else Chain(*layers)


def _find_last(walk: Any, outputs: list[str]) -> None:
    """Where one output alone is a result and it is the last state, put it out by a layer Last."""
    values = [walk.values[name] for name in outputs]
    if walk.layers and not any(isinstance(v, Array) and v.kind == "layer" for v in values):
        results = [name for name in outputs if last.is_result(walk.values[name])]
        if len(results) == 1 and not last.reason(walk, walk.values[results[0]]):
            walk.values[results[0]] = last.put(walk, None, walk.values[results[0]])


def _check_output(walk: Any, name: str, v: Any) -> None:
    """An output must be what the last layer puts out, or states in their order."""
    if isinstance(v, Array) and v.order:
        raise ValueError(f"the rows of the output {name!r} are sorted by their lengths")
    if isinstance(v, Array) and v.kind == "layer" and v.key == walk.stage and not v.flipped:
        return
    rows = walk.rows_of(v) if isinstance(v, Array) and v.kind == "state" else []
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


def _check_first_states(grus: list[Layer]) -> None:
    """The GRUs that share an input as first state take its rows in order, none twice."""
    for name in {g.first[0] for g in grus if g.first}:
        parts = [g.first for g in grus if g.first and g.first[0] == name]
        ends = [0, *(stop for _, (_, stop), _ in parts)]
        axis = parts[0][2]
        if [start for _, (start, _), _ in parts] != ends[:-1] or not fits(axis, ends[-1]):
            raise ValueError(
                f"the GRUs start from rows {[rows for _, rows, _ in parts]} of {name!r}, expected "
                f"all {size(axis)} in order"
            )


class _Kind:
    """Number the layers so that those get one number that are one GRU."""

    def __init__(self) -> None:
        self.number = 0
        self.before: Any = None

    def __call__(self, layer: Layer) -> int:
        mark: Any = None
        if layer.kind == "GRU":
            settings = {k: v for k, v in layer.settings.items() if k != "input_size"}
            mark = (settings, layer.first and layer.first[0], layer.last)
        if mark is None or mark != self.before:
            self.number += 1
        self.before = mark
        return self.number


def _make(group: list[Layer], home: dict[str, Any]) -> Any:
    """One layer of ours from one node, or one GRU from several."""
    kinds: dict[str, Any] = {"GRU": GRU, "Embedding": Embedding, "Linear": Linear, "Last": Last}
    settings, params = dict(group[0].settings), group[0].params
    if group[0].kind == "GRU":
        settings["num_layers"] = len(group)
        params = {
            name.replace("_l0", f"_l{i}"): v
            for i, layer in enumerate(group)
            for name, v in layer.params.items()
        }
    layer = kinds[group[0].kind](**settings, **home)
    layer.load_params(params)
    return layer
