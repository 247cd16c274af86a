"""From the layers in a file of Keras to ours."""

import json
import re
import warnings
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from ... import arguments
from ...nn.chain import Chain
from ...nn.gru import GRU
from ...nn.layers import Dropout, Embedding, Last, Linear
from ...typing import HostArray, Path
from ..cells import assemble, layer_of
from ..table import Cell, check_names, floating
from .archive import (
    MODELS,
    Config,
    Part,
    Source,
    guessed,
    layers_of,
    locate,
    open_file,
    parts_of,
)
from .cells import Model, read_cell
from .functions import MERGE_MODES, Options, read_functions

RECURRENT = ("GRU", "Bidirectional", "RNN")
ONE_BY_ONE = 'layer=["...", ...] takes layers by their names'


Plain: TypeAlias = Linear | Embedding | Dropout


class Level(NamedTuple):
    """One layer of a GRU: our arrays of its directions."""

    cells: list[Cell]
    reset_after: bool
    direction: str  # "forward", "reverse" or "both"
    options: Options = ()  # further settings of the GRU


class Tensor(NamedTuple):
    """An output of a layer."""

    layer: str
    call: int  # which call of the layer
    output: int


def load(path: Path, names: list[str] | None, settings: Config) -> Model:
    """See `gru_any.convert.keras.load`."""
    source = open_file(path)
    if source.description is None:
        return _of_weights(path, source, names, settings)
    try:
        parts = list(parts_of(source.description))
        if names is None:
            _check_row(parts, source.description)
            return _row(source, parts, settings, whole=True)
        return _named(source, _chosen(parts, names), settings)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} holds no model that has a counterpart here: {e}") from e


def _of_weights(path: Path, source: Source, names: list[str] | None, settings: Config) -> Model:
    """The GRU in a file without a description."""
    parts = list(guessed(source, settings))
    known = {part.place: part for part in parts}
    if missing := set(names or ()) - set(known):
        raise KeyError(f"{path} has no weights of {sorted(missing)}, only of {sorted(known)}")
    parts = [known[name] for name in names] if names else parts
    if len({part.kind for part in parts}) != 1 or parts[0].kind not in RECURRENT:
        raise ValueError(f'{path} holds {sorted(known)}: name a GRU with layer="..."')
    if names is None:
        if len(parts) > 1 and source.idle:
            raise ValueError(
                f"{path} holds {sorted(known)}, and {source.idle} which may stand between them: "
                'name the GRU with layer="...", or several that follow each other'
            )
        _check_all_taken(source, parts)
    return _named(source, parts, settings)


def _chosen(parts: list[Part], names: list[str]) -> list[Part]:
    known = {part.name: part for part in parts}
    if missing := set(names) - set(known):
        raise KeyError(f"there is no layer {sorted(missing)}, only {sorted(known)}")
    return [known[name] for name in names]


def _named(source: Source, parts: list[Part], settings: Config) -> Model:
    """Make one GRU of these layers; a Chain, or one layer, where there are others among them."""
    if not all(part.kind in RECURRENT for part in parts):
        return _row(source, parts, settings, whole=False)
    return _one_gru(
        [
            v
            for part in parts
            for v in _levels(part, _arrays(source, part), settings, source.version)
        ]
    )


def _arrays(source: Source, part: Part) -> dict[str, HostArray]:
    """The arrays of a layer, all of them floating."""
    if re.search(r"Quantized|_from_|int4|int8|float8", json.dumps(part.config.get("dtype"))):
        raise ValueError(
            f"{part.name} is quantised: save the model before quantize(), or with float weights"
        )
    found = locate(source, part)
    return {key: floating(path, source.arrays[path]) for key, path in found.items()}


# a row of layers ---------------------------------------------------------------------------------


def _check_row(parts: list[Part], description: Config) -> None:
    """Raise where the layers do not follow one another, or one of them makes a mask."""
    for part in parts:
        if part.kind == "Masking" or part.config.get("mask_zero"):
            raise ValueError(
                f"{_lost(part)}: it makes a mask out of x, in place of which a GRU here takes "
                f"lengths. {ONE_BY_ONE}; give lengths to the Chain"
            )
    _check_calls(description)


def _check_calls(description: Config) -> None:
    """Raise where a layer is not called exactly once, on the output of the layer before it."""
    before, functional = None, description["class_name"] != "Sequential"
    for layer in layers_of(description):
        if layer["class_name"] in MODELS:
            _check_calls(layer)
        if not functional:
            continue
        calls = layer["inbound_nodes"]
        found = [(tensor.layer, tensor.output) for tensor in _tensors(calls)]
        if found != ([] if before is None else [(before, 0)]) or len(calls) > 1:
            raise ValueError(
                f"layer {layer['name']!r} does not follow {before!r} alone: a model that branches "
                f"has no counterpart; {ONE_BY_ONE}"
            )
        before = layer["name"]
    if not functional:
        return
    ends = _tensors(description["config"]["output_layers"])
    if [(tensor.layer, tensor.output) for tensor in ends] != [(before, 0)]:
        raise ValueError(f"a model with several outputs has no counterpart; {ONE_BY_ONE}")


def _tensors(calls: object) -> Iterator[Tensor]:
    """Yield the tensors among the recorded arguments of a call, however nested."""
    if isinstance(calls, dict):
        if "keras_history" in calls:
            yield Tensor(*calls["keras_history"])
            return
        calls = list(calls.values())
    elif isinstance(calls, list) and len(calls) > 2 and isinstance(calls[0], str):
        yield Tensor(*calls[:3])
        calls = calls[3:]
    for inner in calls if isinstance(calls, list) else ():
        yield from _tensors(inner)


def _row(source: Source, parts: list[Part], settings: Config, whole: bool) -> Model:
    """Make a Chain of the layers, or its only layer."""
    arrays = [_arrays(source, part) for part in parts]
    dtype = next((str(a.dtype) for found in arrays for a in found.values()), "float32")
    layers: list[GRU | Linear | Embedding | Dropout | Last] = []
    row: list[Level] = []
    for part, found in zip(parts, arrays, strict=True):
        if part.kind not in RECURRENT:
            layers += [*_grus(row), _layer(part, found, dtype, whole)]
            row = []
            continue
        row += _levels(part, found, settings, source.version)
        if not _sequences(part):
            layers += [*_grus(row), Last(dtype=dtype, backend="numpy")]
            row = []
    layers += _grus(row)
    if whole:
        _check_all_taken(source, parts)
    return layers[0] if len(layers) == 1 else Chain(*layers)


def _check_all_taken(source: Source, parts: list[Part]) -> None:
    """Raise where there are arrays that none of these layers has."""
    taken = {path for part in parts for path in locate(source, part).values()}
    if unused := set(source.arrays) - taken:
        raise ValueError(f"no layer takes the arrays {sorted(unused)}")


def _layer(part: Part, arrays: dict[str, HostArray], dtype: str, whole: bool) -> Plain:
    """Make an Embedding, Dropout or Linear layer; warn of what is lost."""
    kind, config, prefix = part.kind, part.config, ""
    if kind == "TimeDistributed" and config["layer"]["class_name"] == "Dense":
        kind, config = "Dense", config["layer"]["config"]
        prefix = "layer/" if any(key.startswith("layer/") for key in arrays) else ""
    layer: Plain | None = None
    if kind == "Embedding":
        table, *_ = _exactly(part, arrays, ["vars/0"])
        n, size = table.shape
        layer = layer_of(Embedding, {"n": n, "size": size}, {"weight": table}, dtype)
    elif kind == "Dropout" and not config.get("noise_shape"):
        _exactly(part, arrays, [])
        layer = Dropout(config["rate"], dtype=dtype, backend="numpy")
    elif kind == "Dense":
        keys = [f"{prefix}vars/{i}" for i in range(1 + _flag(config, "use_bias", True))]
        lost = config.get("activation", "linear") not in ("linear", None)
        found = [] if lost and whole else _exactly(part, arrays, keys)
        if found:
            I, O = found[0].shape
            settings = {"in_features": I, "out_features": O, "bias": len(found) == 2}
            named = {name: a.T for name, a in zip(("weight", "bias"), found, strict=False)}
            layer = layer_of(Linear, settings, named, dtype)
        part = part._replace(config=config)
    if layer is None:
        raise ValueError(f"{_lost(part)}; {ONE_BY_ONE}")
    if config.get("mask_zero") or config.get("activation", "linear") not in ("linear", None):
        warnings.warn(f"{_lost(part)} and is left to you", stacklevel=6)
    return layer


def _lost(part: Part) -> str:
    kept = {k: v for k, v in part.config.items() if k in ("activation", "mask_zero", "name")}
    return f"a {part.kind} with {kept} has no counterpart"


def _exactly(part: Part, arrays: dict[str, HostArray], keys: list[str]) -> list[HostArray]:
    """The arrays with these keys; KeyError where one is missing or others are there."""
    if set(arrays) != set(keys):
        raise KeyError(
            f"the {part.kind} {part.name!r} has the arrays {sorted(arrays)}, expected {keys}"
        )
    return [arrays[key] for key in keys]


# recurrent layers --------------------------------------------------------------------------------


def _grus(levels: list[Level]) -> list[GRU]:
    """Make as few GRUs of these layers as possible."""
    groups: list[list[Level]] = []
    for level in levels:
        if groups and _fits(groups[-1][-1], level):
            groups[-1].append(level)
        else:
            groups.append([level])
    return [_one_gru(group) for group in groups]


def _fits(below: Level, above: Level) -> bool:
    """Whether two layers can be layers of one GRU."""
    same = below[1:] == above[1:] and set(below.cells[0]) == set(above.cells[0])
    return same and below.cells[0]["weight_hh"].shape == above.cells[0]["weight_hh"].shape


def _one_gru(levels: list[Level]) -> GRU:
    """A GRU of these layers."""
    if len({level[1:] for level in levels}) != 1:
        raise ValueError(
            "these layers differ in reset_after, direction, activations, merge_mode or "
            "recurrent_dropout: load them one by one"
        )
    cells = [cell for level in levels for cell in level.cells]
    _, after, direction, options = levels[0]
    gru = assemble(cells, after, direction == "both", True, copy=False, **dict(options))
    if direction != "reverse":
        return gru
    named = {f"{name}_reverse": array for name, array in gru.params.items()}
    return layer_of(GRU, gru.settings | {"reverse": True}, named, gru.dtype, copy=False)


def _sequences(part: Part) -> bool:
    """Whether a recurrent layer returns all steps; raise where they come in reverse order."""
    config = part.config["layer"]["config"] if part.kind == "Bidirectional" else part.config
    sequences = _flag(config, "return_sequences", False)
    if sequences and part.kind != "Bidirectional" and _flag(config, "go_backwards", False):
        raise ValueError(
            f"{part.name} has go_backwards and return_sequences: it returns its outputs in the "
            "order in which it read, the last step first, and no layer here reverses them. "
            f'layer="{part.name}" gives GRU(reverse=True), whose y_t belongs to x_t'
        )
    return sequences


def _levels(
    part: Part, arrays: dict[str, HostArray], settings: Config, version: int
) -> list[Level]:
    """The layers of a GRU, an RNN of GRUCells, or a Bidirectional of one of them."""
    if part.kind != "Bidirectional":
        backwards = _flag(part.config, "go_backwards", False)
        cells = _cells(part.kind, part.config, settings, backwards)
        direction = "reverse" if backwards else "forward"
        found = _read(part, arrays, cells, _places(part.config, len(cells)))
        options = [(*read_functions(v, version), *_recurrent_dropout(v)) for v in cells]
        pairs = zip(found, options, strict=True)
        return [Level([cell], after, direction, of) for (cell, after), of in pairs]
    mode = part.config.get("merge_mode", "concat")
    if mode not in MERGE_MODES:
        raise ValueError(f"merge_mode {mode!r} has no counterpart")
    merge = MERGE_MODES[mode]
    forward, backward = part.config["layer"], part.config.get("backward_layer")
    cells = _cells(forward["class_name"], forward["config"], settings, False)
    if backward:
        others = {k: v for k, v in settings.items() if k != "go_backwards"}
        cells += _cells(backward["class_name"], backward["config"], others, True)
    else:
        cells *= 2
    if len(cells) != 2:
        raise ValueError(
            "a Bidirectional of several cells reads up one direction first, which has no "
            "counterpart"
        )
    places = ["forward_layer/cell/", "backward_layer/cell/"]
    one, two = _read(part, arrays, cells, places)
    if one[1] != two[1]:
        raise ValueError("the two directions differ in reset_after, which has no counterpart")
    of_one, of_two = (read_functions(cell, version) for cell in cells)
    if of_one != of_two:
        raise ValueError("the two directions differ in their activations: no counterpart here")
    p, q = map(_recurrent_dropout, cells)
    if p != q:
        rates = (cell.get("recurrent_dropout", 0.0) for cell in cells)
        raise ValueError(
            f"the two directions have recurrent_dropout {' and '.join(map(str, rates))}: make them "
            "equal"
        )
    of_merge: Options = () if merge == "concat" else (("merge", merge),)
    return [Level([one[0], two[0]], one[1], "both", (*of_one, *p, *of_merge))]


def _recurrent_dropout(config: Config) -> Options:
    """The rate of a cell, as a setting; Keras drops nothing where it is 1."""
    p = config.get("recurrent_dropout") or 0.0
    return (("recurrent_dropout", p),) if 0 < p < 1 else ()


def _places(config: Config, count: int) -> list[str]:
    """Return the folders of the cells within a GRU or an RNN."""
    if config.get("cell", {}).get("class_name") != "StackedRNNCells":
        return ["cell/"]
    return [f"cell/cells/gru_cell{f'_{i}' if i else ''}/" for i in range(count)]


def _cells(kind: str, config: Config, settings: Config, backwards: bool) -> list[Config]:
    """The settings of the cells of a GRU or RNN, checked against those given by hand."""
    if _flag(config, "time_major", False):
        raise ValueError("time_major has no counterpart: x is (B, T, I), save the model without it")
    _agree({"go_backwards": _flag(config, "go_backwards", backwards)}, settings)
    if _flag(config, "go_backwards", backwards) != backwards:
        raise ValueError("a Bidirectional reads forward first, and one direction backwards")
    if kind == "GRU":
        cells = [config]
    elif kind == "RNN":
        cell = config["cell"]
        stacked = cell["class_name"] == "StackedRNNCells"
        entries = cell["config"]["cells"] if stacked else [cell]
        if other := {entry["class_name"] for entry in entries} - {"GRUCell"}:
            raise ValueError(f"an RNN of {sorted(other)} has no counterpart, only of GRUCell")
        cells = [entry["config"] for entry in entries]
    else:
        raise ValueError(f"a Bidirectional {kind} has no counterpart, only a GRU")
    for cell in cells:
        _agree(cell, settings)
    return [settings | cell for cell in cells]


def _agree(config: Config, settings: Config) -> None:
    """Raise where a setting given by hand is not the one of the file."""
    for name, value in settings.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} is {value!r}, but {config[name]!r} in the file")


def _read(
    part: Part, arrays: dict[str, HostArray], cells: list[Config], places: list[str]
) -> list[tuple[Cell, bool]]:
    """Return our arrays of each cell, and whether its reset gate acts after the product."""
    groups = [
        [f"{place}vars/{i}" for i in range(2 + _flag(cell, "use_bias", True))]
        for cell, place in zip(cells, places, strict=True)
    ]
    if not arrays:
        raise KeyError(
            f"the {part.kind} {part.name!r} has no arrays, expected cell/vars/0, 1 and 2"
        )
    check_names("Keras", arrays, [key for group in groups for key in group])
    found = []
    for cell, group in zip(cells, groups, strict=True):
        after = cell.get("reset_after")
        if after is None and len(group) == 2:
            raise ValueError(f"{part.name} has no bias: say reset_after=True or reset_after=False")
        after = arrays[group[2]].ndim == 2 if after is None else _flag(cell, "reset_after", True)
        found.append((read_cell([arrays[key] for key in group], after), after))
    return found


def _flag(config: Config, name: str, usual: bool) -> bool:
    return arguments.flag(name, config.get(name, usual))
