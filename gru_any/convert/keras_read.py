"""Reading files of Keras 3: `.weights.h5`, and `.keras`, a zip file of it and of config.json."""

import io
import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..chain import Chain
from ..gru import GRU
from ..layers import Dropout, Embedding, Linear
from .cells import assemble
from .files import refuse_bomb
from .hdf5 import read_hdf5
from .keras import read_cell
from .table import EQUATIONS, check_names

RECURRENT = ("GRU", "Bidirectional")


class Part(NamedTuple):
    """A layer of Keras: its class and the arguments that make it."""

    kind: str
    config: dict[str, Any]


def load_weights(path: Any, names: list[str] | None, reset_after: bool | None) -> GRU:
    """The GRU in a `.weights.h5`."""
    arrays = _layers(read_hdf5(Path(path).read_bytes(), path))
    places = names or sorted(arrays, key=lambda n: (len(n), n))
    if missing := set(places) - set(arrays):
        raise KeyError(f"{path} has no weights of {sorted(missing)}, only of {sorted(arrays)}")
    if not names and len({re.sub(r"_\d+$", "", place) for place in places}) != 1:
        raise ValueError(f'{path} holds {sorted(arrays)}: name a GRU with layer="..."')
    parts = []
    for place in places:
        two = any(name.startswith("forward_layer/") for name in arrays[place])
        bias = next((a.ndim for n, a in arrays[place].items() if n.endswith("cell/vars/2")), None)
        if bias is None and reset_after is None:
            raise ValueError(f"{place} has no bias: say reset_after=True or reset_after=False")
        after = reset_after if bias is None else bias == 2
        parts.append((_cells(place, arrays[place], two, bool(after)), bool(after), two))
    return _one_gru(parts)


def load_archive(path: Any, names: list[str] | None) -> Any:
    """The model, or the GRU of these layers, in a `.keras` file."""
    description, content = _open_archive(path)
    arrays = _layers(read_hdf5(content, path))
    try:
        layers = list(_model(description, arrays, names))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as e:
        raise ValueError(f"{path} holds no model that has a counterpart here: {e}") from e
    return layers[0] if len(layers) == 1 else Chain(*layers)


def _model(description: Any, arrays: Any, names: list[str] | None) -> Iterator[Any]:
    """Our layers: all of them, or the GRU of those with these names."""
    parts = list(_parts(description))
    places = places_of(parts)
    if names is None:
        _check_row(description)
    else:
        known = {part.config["name"]: i for i, part in enumerate(parts)}
        if missing := set(names) - set(known):
            raise KeyError(f"there is no layer {sorted(missing)}, only {sorted(known)}")
        chosen = [known[name] for name in names]
        parts, places = [parts[i] for i in chosen], [places[i] for i in chosen]
    return _merged(parts, [arrays.get(place, {}) for place in places], names is None)


def _open_archive(path: Any) -> tuple[Any, bytes]:
    """The description and the HDF5 file."""
    try:
        with zipfile.ZipFile(io.BytesIO(Path(path).read_bytes())) as archive:
            refuse_bomb(path, archive.infolist())
            description = json.loads(archive.read("config.json"))
            return description, archive.read("model.weights.h5")
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError) as e:
        raise ValueError(f"{path} is damaged or no .keras file: {e}") from e
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: {e}") from e


def _layers(arrays: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of each layer, by what follows `layers/NAME/`."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for path, array in arrays.items():
        top, _, rest = path.partition("/")
        name, _, inner = rest.partition("/")
        if top != "layers" or not inner:
            raise ValueError(f"it holds {path!r}, expected layers/NAME/... as Keras 3 writes")
        found.setdefault(name, {})[inner] = array
    return found


def places_of(parts: list[Part]) -> list[str]:
    """Where in the HDF5 file each part's weights are: its class, numbered."""
    counts: Counter[str] = Counter()
    places = []
    for part in parts:
        name = {"GRU": "gru"}.get(part.kind, re.sub(r"(?<!^)(?=[A-Z])", "_", part.kind).lower())
        places.append(f"{name}_{counts[name]}" if counts[name] else name)
        counts[name] += 1
    return places


def _parts(description: Any) -> Iterator[Part]:
    """The layers of the model, but for those that say what goes in."""
    if description["class_name"] not in ("Sequential", "Functional"):
        raise ValueError(f"the model is a {description['class_name']}, expected a row of layers")
    for layer in description["config"]["layers"]:
        if layer["class_name"] != "InputLayer":
            yield Part(layer["class_name"], dict(layer["config"]))


def _check_row(description: Any) -> None:
    """Raise where a Functional model is no row of layers, each with the one before it alone."""
    if description["class_name"] != "Functional":
        return
    before = None
    for layer in description["config"]["layers"]:
        sources = re.findall(r'"keras_history": \["(.*?)", 0, 0\]', json.dumps(layer))
        total = json.dumps(layer).count('"keras_history"')
        if sources != ([] if before is None else [before]) or total != len(sources):
            raise ValueError(
                f"layer {layer['name']!r} does not follow {before!r} alone: a model that branches "
                'has no counterpart; take one GRU with layer="..."'
            )
        before = layer["name"]
    if description["config"]["output_layers"] not in ([before, 0, 0], [[before, 0, 0]]):
        raise ValueError("a model with several outputs has no counterpart")


def _merged(parts: list[Part], arrays: list[Any], whole: bool) -> Iterator[Any]:
    """Our layers; GRUs that follow each other and fit become one."""
    row: list[Any] = []
    dtype = next((str(a.dtype) for found in arrays for a in found.values()), "float32")
    for i, (part, found) in enumerate(zip(parts, arrays, strict=True)):
        if part.kind not in RECURRENT:
            if row:
                yield _one_gru(row)
                row = []
            yield _layer(part, found, dtype)
            continue
        new = _recurrent(part, found)
        if row and not _fits(row[-1], new):
            yield _one_gru(row)
            row = []
        row.append(new)
        if whole:
            _check_steps(part, parts[i + 1 :])
    if row:
        yield _one_gru(row)


def _one_gru(parts: list[Any]) -> GRU:
    """A GRU of several layers, each (cells, reset_after, bidirectional)."""
    if len({settings for _, *rest in parts for settings in [tuple(rest)]}) != 1:
        raise ValueError("these layers differ in reset_after or direction: load them one by one")
    _, after, two = parts[0]
    return assemble([cell for cells, *_ in parts for cell in cells], after, two, True)


def _fits(below: Any, above: Any) -> bool:
    """Whether two parts can be layers of one GRU."""
    H = [cells[0]["weight_hh"].shape for cells, *_ in (below, above)]
    return H[0] == H[1] and below[1:] == above[1:] and set(below[0][0]) == set(above[0][0])


def _recurrent(part: Part, arrays: Any) -> tuple[list[Any], bool, bool]:
    """The cells of a GRU or Bidirectional, its reset_after, and whether it has two directions."""
    if part.kind == "GRU":
        _check_gru(part.config, backwards=False)
        after = part.config.get("reset_after", True)
        return _cells("the GRU", arrays, False, after), after, False
    if part.config.get("merge_mode", "concat") != "concat":
        raise ValueError(f"merge_mode {part.config['merge_mode']!r} has no counterpart")
    inner = part.config["layer"]
    _check_inner(inner, backwards=False)
    after = inner["config"].get("reset_after", True)
    if backward := part.config.get("backward_layer"):
        _check_inner(backward, backwards=True)
        if backward["config"].get("reset_after", True) != after:
            raise ValueError("the two directions differ in reset_after, which has no counterpart")
    return _cells("the Bidirectional", arrays, True, after), after, True


def _check_inner(layer: Any, backwards: bool) -> None:
    """Raise where a direction of a Bidirectional is no GRU like ours."""
    if layer["class_name"] != "GRU":
        raise ValueError(f"a Bidirectional {layer['class_name']} has no counterpart, only a GRU")
    _check_gru(layer["config"], backwards)


def _check_gru(config: Any, backwards: bool) -> None:
    """Raise where a GRU computes something else than ours."""
    after = config.get("reset_after", True)
    for name, usual, equation in (
        ("activation", "tanh", EQUATIONS[after]),
        ("recurrent_activation", "sigmoid", EQUATIONS["z"]),
    ):
        if config.get(name, usual) != usual:
            raise ValueError(
                f"{name} {config[name]!r} in place of the {usual} in {equation} has no home here"
            )
    if config.get("go_backwards", False) != backwards:
        raise ValueError("a GRU in the reverse direction alone has no counterpart: turn x round")


def _check_steps(part: Part, after: list[Part]) -> None:
    """Raise where the last step alone goes on, and it is not the last of what we return."""
    inner = part.config if part.kind == "GRU" else part.config["layer"]["config"]
    two = part.kind == "Bidirectional"
    if not inner.get("return_sequences", False) and after and two:
        raise ValueError(
            "return_sequences=False under a Bidirectional gives the last states of both directions "
            'to the next layer, which a Chain cannot; take the GRU with layer="..."'
        )


def _cells(where: str, arrays: Any, two: bool, reset_after: bool) -> list[Any]:
    """Our arrays of each direction."""
    prefixes = ("forward_layer/cell/vars/", "backward_layer/cell/vars/") if two else ("cell/vars/",)
    count = len(arrays) // len(prefixes)
    names = [f"{prefix}{i}" for prefix in prefixes for i in range(min(count, 3))]
    if count < 2:
        raise KeyError(f"{where} has the arrays {sorted(arrays)}, expected cell/vars/0, 1 and 2")
    check_names("Keras", arrays, names)
    groups = [names[i : i + count] for i in range(0, len(names), count)]
    return [read_cell([arrays[name] for name in group], reset_after) for group in groups]


def _layer(part: Part, arrays: Any, dtype: str) -> Any:
    """An Embedding, Dropout or Linear layer."""
    found = [arrays[name] for name in sorted(arrays)]
    settings: Any = {"dtype": dtype, "backend": "numpy"}
    config = part.config
    layer: Any = None
    if part.kind == "Embedding" and not config.get("mask_zero") and len(found) == 1:
        layer = Embedding(*found[0].shape, **settings)
        layer.load_params({"weight": found[0]})
    elif part.kind == "Dropout" and not config.get("noise_shape"):
        return Dropout(config["rate"], **settings)
    elif part.kind == "Dense" and config.get("activation", "linear") == "linear" and found:
        layer = Linear(*found[0].shape, bias=len(found) == 2, **settings)
        layer.load_params(dict(zip(layer.params, (a.T for a in found), strict=True)))
    if layer is None:
        kept = {k: v for k, v in config.items() if k in ("activation", "mask_zero", "name")}
        raise ValueError(
            f"a {part.kind} with {kept} has no counterpart; the GRUs can be taken one by one with "
            'layer="..."'
        )
    return layer
