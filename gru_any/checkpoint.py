"""A model in one file: a flat dict of arrays and a small JSON header, stored as safetensors."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from .backend import select, to_numpy
from .cell import GRUCell
from .chain import Chain
from .gru import GRU
from .layers import Dropout, Embedding, Last, Linear
from .params import Layer

FORMAT = 1
LAYERS: dict[str, type[Layer]] = {
    c.__name__: c for c in (GRU, GRUCell, Linear, Embedding, Dropout, Last)
}


def save(path: Any, model: Any) -> None:
    """Write a layer or a Chain to one file.

    The file is written under another name beside it and then renamed, so that a full disk or a
    crash never costs the file that was there.

    Parameters
    ----------
    path : str or path
    model : GRU, GRUCell, Linear, Embedding, Dropout, Last or Chain

    Raises
    ------
    TypeError
        The model is something else.
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
    from safetensors.numpy import save as to_bytes

    parts = model.layers if isinstance(model, Chain) else (model,)
    for part in parts:
        if type(part) not in LAYERS.values():
            raise TypeError(
                f"cannot save {type(part).__name__}, only {', '.join(LAYERS)} and Chain"
            )
    header = {
        "format": FORMAT,
        "chain": isinstance(model, Chain),
        "dtype": model.dtype,
        "layers": [[type(part).__name__, part.settings] for part in parts],
    }
    arrays = {name: np.ascontiguousarray(to_numpy(a)) for name, a in model.params.items()}
    write_atomically(path, to_bytes(arrays, {"gru_any": json.dumps(header)}))


def load(path: Any, backend: Any = None, device: Any = None) -> Any:
    """Read a model that `save` wrote, onto any backend.

    Parameters
    ----------
    path : str or path
    backend, device
        As in `GRU`.

    Raises
    ------
    ValueError
        The file is damaged, was not written by `save`, or is of a newer version.
    OSError
        The file cannot be read.
    """
    text, arrays = _read(path)
    backend = select(backend, device)
    try:
        header = json.loads(text)
        if header["format"] > FORMAT:
            raise ValueError(f"it has format {header['format']}, this version reads up to {FORMAT}")
        home = {"backend": backend, "dtype": header["dtype"]}
        layers = [LAYERS[kind](**settings, **home) for kind, settings in header["layers"]]
        model = Chain(*layers) if header["chain"] else layers[0]
        model.load_params(arrays)
    except (KeyError, TypeError, IndexError, ValueError) as e:
        raise ValueError(f"{path} does not describe a model of this version: {e}") from e
    return model


def _read(path: Any) -> tuple[str, dict[str, Any]]:
    """Return the header that `save` wrote, and the arrays."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as e:
        raise ValueError(f"{path} is damaged or no safetensors file: {e}") from e
    if "gru_any" not in metadata:
        raise ValueError(
            f"{path} was not written by gru_any.save; to load plain weights, make the model and "
            "call its load_params"
        )
    return metadata["gru_any"], arrays


def write_atomically(path: Any, content: bytes) -> None:
    """Write a file so that at any moment the old or the new one stands there, whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        temporary.unlink(missing_ok=True)
        if isinstance(e, OSError):
            raise OSError(e.errno, f"{path} was not written ({e.strerror})") from e
        raise
    settle(path.parent)


def settle(folder: Path) -> None:
    """Have the names in a folder written to the disk, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
