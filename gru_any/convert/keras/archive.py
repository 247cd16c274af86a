"""The files of Keras: what they say of the model, and which arrays belong to which layer.

`.keras` is a zip file of config.json and model.weights.h5, `.weights.h5` the latter alone: arrays
under `layers/PLACE/...`, PLACE being the class of the layer, numbered. `.h5` is the format of
Keras 2, which Keras 3 still writes: groups by the name of the layer, the names of its arrays and
the description of the model in attributes.
"""

import json
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count, takewhile
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ...files import read_whole
from ...typing import HostArray, Path
from ..files import read_zip
from .hdf5 import Contents, read_hdf5

# beside the layers: the state of training, which is not the model's
TRAINING = ("optimizer/", "optimizer_weights/", "metrics/", "compile_metrics/", "_compile_metrics/")
MOST_TEXT = 2**22  # characters of a description
MODELS = ("Sequential", "Functional", "Model")
VARS = {"kernel": 0, "embeddings": 0, "recurrent_kernel": 1}


Config: TypeAlias = dict[str, Any]  # of a model or a layer, as JSON has it
Places: TypeAlias = dict[str, str]  # what an array is called -> its path in the file


class Part(NamedTuple):
    """A layer. Within a model inside of the model, name and place are paths: "encoder/gru"."""

    kind: str  # its class
    config: dict[str, Any]  # the arguments that make it
    name: str = ""
    place: str = ""  # in a file of Keras 3


class Source(NamedTuple):
    """The content of a file."""

    description: Config | None  # of the model
    arrays: dict[str, HostArray]
    groups: dict[str, Places] | None  # of each layer, in the format of Keras 2
    idle: list[str]  # layers without arrays, Dropout and inputs apart
    places: dict[str, Places]  # of each layer, in the format of Keras 3
    version: int = 0  # of Keras, where the file says it: 3 of 3.1.0


def open_file(path: Path) -> Source:
    """Read a file of any of the three kinds.

    Raises
    ------
    ValueError
        It is damaged, or none of Keras.
    """
    content = read_whole(path)
    if pathlib.Path(path).suffix == ".keras" and not content.startswith(b"\x89HDF"):
        description, metadata, content = _open_archive(path, content)
        arrays = _weights(read_hdf5(content, path))
        return Source(description, arrays, None, [], _by_place(arrays), _version(metadata))
    contents = read_hdf5(content, path)
    base = "model_weights" if "model_weights" in contents.attributes else ""
    if names := _listed(contents.attributes[base], "layer_names"):
        return _older(path, contents, base + "/" if base else "", names)
    arrays = _weights(contents)
    layers = (g for g in contents.attributes if re.fullmatch(r"layers/[^/]+(/layers/[^/]+)*", g))
    used = {str(folder) for path in arrays for folder in pathlib.PurePosixPath(path).parents}
    idle = _working(g.replace("layers/", "") for g in layers if g not in used)
    return Source(None, arrays, None, idle, _by_place(arrays))


def _working(layers: Iterable[str]) -> list[str]:
    """Leave out layers that have no arrays in any model: Dropout and inputs."""
    return [name for name in layers if not re.match(r"(.*/)?(dropout|input)", name)]


def _version(attributes: Config) -> int:
    """Return the first number of Keras' version; 0 where it is not told."""
    given = attributes.get("keras_version", "")
    text = given.decode("utf-8", "replace") if isinstance(given, bytes) else str(given)
    number = text.partition(".")[0]
    return int(number) if number.isdecimal() else 0


def _open_archive(path: Path, content: bytes) -> tuple[Config, Config, bytes]:
    """Return the description, what the file says of itself, and the HDF5 file."""
    members = read_zip(path, content, ".keras file")
    try:
        metadata = _json(members.get("metadata.json", b"{}"))
        return _json(members["config.json"]), metadata, members["model.weights.h5"]
    except KeyError as e:
        raise ValueError(f"{path} is damaged or no .keras file: it lacks {e}") from e
    except UnicodeDecodeError:  # for which there are words elsewhere
        raise
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: its config.json is damaged: {e}") from e


def _json(text: str | bytes) -> Config:
    """Parse a description, of which a byte can take twenty in memory."""
    if len(text) > MOST_TEXT:
        raise ValueError(f"it has {len(text)} characters, expected at most {MOST_TEXT}")
    found: Config = json.loads(text)
    return found


def _weights(contents: Contents) -> dict[str, HostArray]:
    """The arrays of the model, without those of training and of random generators."""
    found = {}
    for path, array in contents.arrays.items():
        if path.startswith(TRAINING) or "/seed_generator/" in path:
            continue
        if not re.match(r"layers/[^/]+/.", path):
            raise ValueError(f"it holds {path!r}, expected layers/NAME/... as Keras 3 writes")
        found[path] = array
    return found


def _older(path: Path, contents: Contents, base: str, names: list[str]) -> Source:
    """Read a file in the format of Keras 2."""
    groups = {}
    for name in names:
        listed = _listed(contents.attributes.get(base + name, {}), "weight_names")
        groups[name] = {weight: f"{base}{name}/{weight}" for weight in listed}
        if missing := set(groups[name].values()) - set(contents.arrays):
            raise ValueError(f"{path} is damaged: it lists {sorted(missing)} and lacks them")
    text = contents.attributes[""].get("model_config")
    try:
        description = None if text is None else _json(text)
    except (TypeError, ValueError, RecursionError) as e:
        raise ValueError(f"{path}: its model_config is damaged: {e}") from e
    arrays = {k: a for k, a in contents.arrays.items() if not k.startswith(TRAINING)}
    idle = _working(g for g, w in groups.items() if not w)
    return Source(description, arrays, groups, idle, {}, _version(contents.attributes[""]))


def _listed(attributes: dict[str, Any], name: str) -> list[str]:
    """A list of names; a long one is cut into name0, name1, ..."""
    numbered = takewhile(attributes.__contains__, (f"{name}{i}" for i in count()))
    keys = [name] if name in attributes else numbered
    flat = [text for key in keys for text in np.ravel(attributes[key])]
    return [t.decode("utf-8") if isinstance(t, bytes) else str(t) for t in flat]


# layers ------------------------------------------------------------------------------------------


def parts_of(description: Config, name: str = "", place: str = "") -> Iterator[Part]:
    """Yield the layers of a model and of the models inside of it, without inputs."""
    if description["class_name"] not in MODELS:
        raise ValueError(f"the model is a {description['class_name']}, expected a row of layers")
    parts = [Part(layer["class_name"], dict(layer["config"])) for layer in layers_of(description)]
    for part, at in zip(parts, places_of(parts), strict=True):
        part = part._replace(name=name + str(part.config.get("name", "")), place=place + at)
        if part.kind in MODELS:
            inner = {"class_name": part.kind, "config": part.config}
            yield from parts_of(inner, part.name + "/", part.place + "/")
        elif part.kind != "InputLayer":
            yield part


def layers_of(description: Config) -> list[Config]:
    """The descriptions of the layers of a model; early versions of Keras 2 have a bare list."""
    config = description["config"]
    return list(config if isinstance(config, list) else config["layers"])


def places_of(parts: list[Part]) -> list[str]:
    """Return the folder of each part in a file of Keras 3: its class in snake case, numbered."""
    counts: Counter[str] = Counter()
    places = []
    for part in parts:
        name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", part.kind))
        name = re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
        places.append(f"{name}_{counts[name]}" if counts[name] else name)
        counts[name] += 1
    return places


def guessed(source: Source, settings: Config) -> Iterator[Part]:
    """Yield the layers of a file of weights alone, as far as the names of the arrays tell."""
    if source.groups is None:
        found = (re.match(r"(?:layers/[^/]+/)+", path) for path in source.arrays)
        places = {m[0].replace("layers/", "").rstrip("/"): None for m in found if m}
    else:
        places = {name: None for name, paths in source.groups.items() if paths}
    order = sorted(places, key=lambda n: (len(n), n)) if source.groups is None else list(places)
    for place in order:
        keys = locate(source, Part("", {}, place, place))
        config = {**settings, "use_bias": any(k.endswith("cell/vars/2") for k in keys)}
        cells = {k.split("/")[2] for k in keys if k.startswith("cell/cells/")}
        if any(k.startswith("forward_layer/") for k in keys):
            inner = {"class_name": "GRU", "config": config}
            yield Part("Bidirectional", {"layer": inner}, place, place)
        elif cells:
            config["use_bias"] = any(k.endswith("/vars/2") for k in keys)
            entries = [{"class_name": "GRUCell", "config": config}] * len(cells)
            cell: Config = {"class_name": "StackedRNNCells", "config": {"cells": entries}}
            yield Part("RNN", {**settings, "cell": cell}, place, place)
        else:
            kind = "GRU" if any(k.startswith("cell/vars/") for k in keys) else "layer"
            yield Part(kind, config, place, place)


def locate(source: Source, part: Part) -> Places:
    """Return the paths of a layer's arrays, by what Keras 3 calls them inside of the layer."""
    if source.groups is not None:
        return _locate_older(source.groups, part)
    return source.places.get(part.place, {})


def _by_place(arrays: Iterable[str]) -> dict[str, Places]:
    """Return the paths of the arrays of each layer, by their names inside of it."""
    places: dict[str, Places] = {}
    for path in arrays:
        match = re.match(r"((?:layers/[^/]+/)+)(.*)", path, re.DOTALL)
        if match and not match[2].startswith("layers/"):
            place = match[1].removesuffix("/").removeprefix("layers/").replace("/layers/", "/")
            places.setdefault(place, {})[match[2]] = path
    return places


def _locate_older(groups: dict[str, Places], part: Part) -> Places:
    """Return the places of a part's arrays, found by names such as gru/gru_cell/kernel:0."""
    top, *inner = part.name.split("/")
    cells: dict[str, Places] = {}
    for name, path in groups.get(top, {}).items():
        folder, _, leaf = name.removesuffix(":0").rpartition("/")
        if not inner or inner[-1] in folder.split("/"):
            cells.setdefault(folder, {})[leaf] = path
    recurrent = any("recurrent_kernel" in cell for cell in cells.values())
    numbers = VARS | {"bias": 2 if recurrent else 1}
    prefixes = _prefixes(list(cells), part) if recurrent else {folder: "" for folder in cells}
    return {
        f"{prefixes[folder]}vars/{numbers[leaf]}" if leaf in numbers else f"{folder}/{leaf}": path
        for folder, cell in cells.items()
        for leaf, path in cell.items()
    }


def _prefixes(folders: list[str], part: Part) -> dict[str, str]:
    """Return the folders of Keras 3 for these older folders of a recurrent layer's cells."""
    cell = part.config.get("cell", {})
    if len(folders) == 1 and cell.get("class_name") != "StackedRNNCells":
        return {folders[0]: "cell/"}
    if len(folders) == 2 and (both := _directions(*folders)):
        return both
    cells = cell.get("config", {}).get("cells", [])
    if len({cell["config"].get("trainable", True) for cell in cells}) > 1:
        raise ValueError(
            f"the cells of {part.name} differ in trainable, and this format then loses their order"
        )
    names = places_of([Part("GRUCell", {})] * len(folders))
    return {f: f"cell/cells/{name}/" for f, name in zip(folders, names, strict=True)}


def _directions(one: str, two: str) -> dict[str, str] | None:
    """Return the folders of Keras 3 for the two cells of a Bidirectional; None for other layers."""
    first, second = set(one.split("/")), set(two.split("/"))
    own = [any(name.startswith("forward_") for name in s) for s in (first - second, second - first)]
    if sorted(own) != [False, True]:
        return None
    forward, backward = (one, two) if own[0] else (two, one)
    return {forward: "forward_layer/cell/", backward: "backward_layer/cell/"}
