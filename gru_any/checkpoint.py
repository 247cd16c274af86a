"""A model in one file: a flat dict of arrays and a small JSON header, stored as safetensors."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .backend import Backend, select, to_numpy
from .files import write_atomically
from .nn.cell import GRUCell
from .nn.chain import Chain
from .nn.gru import GRU
from .nn.layers import Dropout, Embedding, Last, Linear
from .nn.params import Layer, converted, refuse_shared
from .tensors import DamagedError, check_digest, content_of, digest, read
from .typing import Array, Device, HostArray
from .typing import Path as PathLike

FORMAT = 1
# the checkpoints of a training run: their format (1 had neither the model nor "closing"), and
# their names, newest first
RUN_FORMAT = 2
NAMES = ("checkpoint.safetensors", "checkpoint.before.safetensors")
# the parts of a description
TYPES = {"format": int, "chain": bool, "dtype": str, "layers": list, "tied": dict, "digest": str}
# what a description may raise that does not fit its arrays, or this version
ERRORS = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError)
LAYERS: dict[str, type[Layer]] = {
    c.__name__: c for c in (GRU, GRUCell, Linear, Embedding, Dropout, Last)
}


def save(path: PathLike, model: Layer | Chain) -> None:
    """Write a layer or a Chain to one file.

    The file is written under another name and then renamed, so that a full disk or a crash never
    damages a file that was there before. It carries a digest of its contents.

    Parameters
    ----------
    path : str or path
    model : GRU, GRUCell, Linear, Embedding, Dropout, Last or Chain

    Raises
    ------
    TypeError
        The model is something else.
    ValueError
        Two of its parameters share memory without being tied; see `Chain`.
    OSError
        The folder does not exist or cannot be written.

    Examples
    --------
    >>> import os, tempfile
    >>> from gru_any import GRU, load, save
    >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
    >>> save(path, GRU(3, 4, reset_after=True))
    >>> load(path).reset_after
    True
    """
    parts = model.layers if isinstance(model, Chain) else (model,)
    for part in parts:
        if type(part) not in LAYERS.values():
            way = ": save(path, model)" if isinstance(part, (str, os.PathLike)) else ""
            raise TypeError(
                f"cannot save {type(part).__name__}, only {', '.join(LAYERS)} and Chain{way}"
            )
    refuse_shared(model.params)
    arrays = {name: to_numpy(a) for name, a in model.params.items()}
    text = json.dumps(describe(model))
    text = f'{text[:-1]}, "digest": "{digest(text, arrays)}"}}'  # the library sorts no metadata
    write_atomically(path, content_of(arrays, {"gru_any": text}))


def describe(model: Layer | Chain) -> dict[str, object]:
    """Return what rebuilds the model but for its parameters, in a form fit for JSON."""
    chain = model if isinstance(model, Chain) else None
    parts = chain.layers if chain else (model,)
    return {
        "format": FORMAT,
        "chain": chain is not None,
        "dtype": model.dtype,
        "layers": [[type(part).__name__, part.settings] for part in parts],
        **({"tied": dict(chain.tied)} if chain and chain.tied else {}),
    }


def load(
    path: PathLike, backend: str | ModuleType | Backend | None = None, device: Device = None
) -> Any:
    """Read a model that `save` or `fit` wrote, onto any backend.

    From a training run it takes the weights with which `fit` ends: those with the lowest validation
    loss, else the averaged ones, else the last.

    Parameters
    ----------
    path : str or path
        A file of `save`, a checkpoint of `fit`, or the folder `out` of a run.
    backend, device
        As in `GRU`.

    Raises
    ------
    ValueError
        The file is damaged, was not written by either, or is of a newer version; or a checkpoint
        is of a version that did not store the model's description.
    OSError
        The file cannot be read.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path is {path!r}, expected the path of a file or folder")
    metadata, arrays = _newest(Path(path)) if Path(path).is_dir() else _read(path)
    backend = select(backend, device)
    try:
        if "gru_any" in metadata:
            header = json.loads(metadata["gru_any"])
        else:
            header, arrays = _final_weights(json.loads(metadata["gru_any.run"]), arrays)
        if isinstance(header, dict) and header.get("format", FORMAT) > FORMAT:
            raise ValueError(f"it has format {header['format']}, this version reads up to {FORMAT}")
        _check_types(header)
        model = _build(header, converted(arrays, backend, header["dtype"]), backend)
    except ERRORS as e:
        raise ValueError(f"{path} does not describe a model of this version: {e}") from e
    return model


def _check_types(header: object) -> None:
    """Raise ValueError where a description has unknown fields, or fields of other types."""
    if not isinstance(header, dict):
        raise ValueError(f"its description is a {type(header).__name__}, expected an object")
    if unknown := set(header) - set(TYPES):
        raise ValueError(f"its description has {sorted(unknown)}, not known here")
    for name, kind in TYPES.items():
        if not isinstance(header.get(name, kind()), kind):
            raise ValueError(f"{name} is {header[name]!r}, expected {kind.__name__}")
    for layer in header["layers"]:
        if not isinstance(layer, list) or list(map(type, layer)) != [str, dict]:
            raise ValueError(f"a layer is {layer!r}, expected its class and its settings")


def _build(header: dict[str, Any], params: dict[str, Array], backend: Backend) -> Layer | Chain:
    """Build the model from its description and parameters; raise where these do not fit."""
    tied, kinds = header.get("tied") or {}, header["layers"]
    if both := set(tied) & set(params) if set(tied.values()) <= set(params) else ():
        raise ValueError(f"{sorted(both)} are stored, and also tied to other parameters")
    aliases = {alias: params[name] for alias, name in tied.items() if name in params}
    parts: dict[str, dict[str, Array]] = {str(i): {} for i in range(len(kinds))}
    for name, array in {**params, **aliases}.items():
        number, _, entry = name.partition(".") if header["chain"] else ("0", "", name)
        if number not in parts:
            raise KeyError(f"{name} belongs to none of {len(kinds)} layers")
        parts[number][entry] = array
    layers = [
        LAYERS[kind].of(settings, part, backend, header["dtype"])
        for (kind, settings), part in zip(kinds, parts.values(), strict=True)
    ]
    return Chain(*layers, tied=tied) if header["chain"] else layers[0]


def _newest(folder: Path) -> tuple[dict[str, str], dict[str, HostArray]]:
    """Read the newest checkpoint of a run that is not damaged; the folder does not change."""
    problems = []
    for path in (folder / name for name in NAMES):
        if path.is_file():
            try:
                found = _read(path)
            except ValueError as e:
                problems.append(str(e))
                continue
            if problems:
                print(f"gru_any: {problems[0]}; reading {path}", file=sys.stderr)
            return found
    if problems:
        raise ValueError(f"no checkpoint can be used: {'; '.join(problems)}")
    raise FileNotFoundError(f"the folder {folder} holds no checkpoint of a training run")


def _final_weights(
    run: dict[str, Any], arrays: dict[str, HostArray]
) -> tuple[dict[str, Any], dict[str, HostArray]]:
    """Return the model's description, and the weights that `fit` would leave in the model."""
    if run["format"] > RUN_FORMAT:
        raise ValueError(f"it has format {run['format']}, this version reads up to {RUN_FORMAT}")
    if "description" not in run:
        raise ValueError(
            "an earlier version wrote this checkpoint, without the model's description: make the "
            "model and give its run's folder to fit, which puts the weights in"
        )
    groups: dict[str, dict[str, HostArray]] = {"averaged": {}, "lowest": {}}
    for name, array in arrays.items():
        group, _, key = name.partition("/")
        groups.setdefault(group, {})[key] = array
    last, averaged, lowest = (groups[g] for g in ("weights", "averaged", "lowest"))
    closing, best = run["closing"], run["best"]
    if closing and (best is None or closing["valid"] < best):  # the last have the lowest loss
        lowest = {}
    return run["description"], {**last, **(lowest or averaged)}


def _read(path: PathLike) -> tuple[dict[str, str], dict[str, HostArray]]:
    """Return the metadata that `save` or a run wrote, and the arrays."""
    try:
        metadata, arrays = read(path)
    except DamagedError as e:
        if Path(path).suffix == ".safetensors":
            raise
        raise DamagedError(f"{e}; gru_any.convert reads files of other libraries") from e
    if "gru_any.run" in metadata:
        check_digest(path, metadata.get("digest"), metadata["gru_any.run"], arrays)
    elif "gru_any" not in metadata:
        raise ValueError(
            f"{path} was not written by gru_any.save; to load plain weights, make the model and "
            "call its load_params, or see gru_any.convert"
        )
    elif '"digest"' in metadata["gru_any"]:  # which files of earlier versions lack
        text, _, found = metadata["gru_any"].partition(', "digest": ')
        check_digest(path, found[1:-2], text + "}", arrays)
    return metadata, arrays
