"""Arrays in safetensors files: read whole into memory, and compared with a digest."""

import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .files import read_whole
from .typing import Array, Arrays, HostArray
from .typing import Path as PathLike

MOST_HEADER = 2**23  # bytes, enough for 80,000 arrays
DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2", "C64": "<c8", "BOOL": "?"}
DTYPES |= {f"{kind}{8 * n}": f"<{kind.lower()}{n}" for kind in "IU" for n in (1, 2, 4, 8)}


class DamagedError(ValueError):
    """The contents of a file are not those that were written."""


class Unread(NamedTuple):
    """A placeholder for an array of a dtype that NumPy lacks, so that an error can name it."""

    dtype: str


Entry: TypeAlias = dict[str, Any]  # of a safetensors file: "dtype", "shape" and "data"


def read(path: PathLike) -> tuple[dict[str, str], dict[str, Array]]:
    """Return the metadata and the arrays of a safetensors file; bfloat16 as float32.

    The arrays are copies, which stay as they are whatever happens to the file.

    Raises
    ------
    DamagedError
        The file is damaged or of another kind.
    OSError
        It cannot be read.
    """
    from safetensors import SafetensorError, deserialize

    decode: Callable[[bytes], list[tuple[str, Entry]]] = deserialize
    content = read_whole(path)
    size = int.from_bytes(content[:8], "little")
    if MOST_HEADER < size < len(content):
        raise DamagedError(f"{path} has a header of {size} bytes, expected at most {MOST_HEADER}")
    try:
        entries = decode(content)
    except SafetensorError as e:
        raise DamagedError(f"{path} is damaged or no safetensors file: {e}") from e
    header = json.loads(content[8 : 8 + size])
    return header.get("__metadata__") or {}, {name: _array(entry) for name, entry in entries}


def _array(entry: Entry) -> HostArray | Unread:
    if entry["dtype"] not in DTYPES:
        return Unread(entry["dtype"])
    flat = np.frombuffer(entry["data"], DTYPES[entry["dtype"]])
    if entry["dtype"] == "BF16":
        flat = (flat.astype("<u4") << 16).view("<f4")
    return flat.reshape(entry["shape"])


def content_of(arrays: Arrays, metadata: dict[str, str] | None = None) -> bytes:
    """Return the content of a safetensors file."""
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, metadata)


def check_digest(path: PathLike, found: str | None, text: str, arrays: Arrays) -> None:
    """Raise DamagedError unless `found`, a file's own digest, is that of the text and arrays."""
    if found != digest(text, arrays):
        raise DamagedError(f"{path} is damaged: its contents do not fit its digest")


def digest(text: str, arrays: Arrays) -> str:
    """Return the SHA-256 of a text and of arrays with their names, dtypes and shapes."""
    total = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        if isinstance(array, Unread):
            raise DamagedError(f"{name} has dtype {array.dtype}, which is never written")
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return total.hexdigest()
