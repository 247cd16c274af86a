"""Arrays in safetensors, npz and npy files. Nothing is allocated before it is known to be there."""

import io
import math
import zipfile
import zlib
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, NamedTuple

import numpy as np

from ..files import write_atomically

# how many times a compressed file may grow; numbers that were trained hardly do at all
GROWTH = 100
DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2", "C64": "<c8", "BOOL": "?"}
DTYPES |= {f"{kind}{8 * n}": f"<{kind.lower()}{n}" for kind in "IU" for n in (1, 2, 4, 8)}


class Unread(NamedTuple):
    """In place of an array whose dtype NumPy does not have, so that who asks for it is told."""

    dtype: str


def read_safetensors(path: Any) -> dict[str, Any]:
    """Name -> array, of whatever dtype; bfloat16 becomes float32.

    Raises
    ------
    ValueError
        The file is damaged or of another kind.
    """
    from safetensors import SafetensorError, deserialize

    try:
        entries = deserialize(Path(path).read_bytes())
    except SafetensorError as e:
        raise ValueError(f"{path} is damaged or no safetensors file: {e}") from e
    return {name: _array(entry) for name, entry in entries}


def _array(entry: Any) -> Any:
    if entry["dtype"] not in DTYPES:
        return Unread(entry["dtype"])
    flat = np.frombuffer(entry["data"], DTYPES[entry["dtype"]])
    if entry["dtype"] == "BF16":
        flat = (flat.astype("<u4") << 16).view("<f4")
    return flat.reshape(entry["shape"])


def write_safetensors(path: Any, arrays: Any, metadata: dict[str, str] | None = None) -> None:
    """Write them to one file, whole or not at all."""
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    write_atomically(path, save(arrays, metadata))


def read_npz(path: Any) -> dict[str, np.ndarray]:
    """Name -> array of an npz file, of whatever dtype.

    Raises
    ------
    ValueError
        The file is damaged or of another kind, holds pickled objects, or promises more numbers
        than it has.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(Path(path).read_bytes())) as archive:
            entries = archive.infolist()
            refuse_bomb(path, entries)
            arrays = dict(_members(archive, entries))
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as e:
        raise ValueError(f"{path} is damaged or no npz file: {e}") from e
    if len(arrays) < len(entries):
        raise ValueError(f"{path} holds two arrays of one name")
    return arrays


def _members(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo]) -> Any:
    for entry in entries:
        with archive.open(entry) as file:
            array = read_npy(file, entry.filename, entry.file_size, whole=True)
        yield entry.filename.removesuffix(".npy"), array


def refuse_bomb(path: Any, entries: list[zipfile.ZipInfo]) -> None:
    """Raise where the parts of a zip file would grow beyond what numbers compress to."""
    promised, size = sum(entry.file_size for entry in entries), Path(path).stat().st_size
    if promised > GROWTH * size:
        raise ValueError(
            f"{path} promises {promised} bytes in a file of {size}: weights do not compress so well"
        )


def read_npy(file: IO[bytes], name: str, size: int, whole: bool = False) -> np.ndarray:
    """The array that begins here, of at most `size` bytes with its header; never a pickle.

    whole: it must fill `size`.
    """
    form = np.lib.format
    start = file.tell()
    try:
        version = form.read_magic(file)
        readers = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}
        shape, fortran, dtype = readers[version](file)
    except (ValueError, KeyError, SyntaxError, TokenError, RecursionError) as e:
        raise ValueError(f"{name} is damaged or no array: {e}") from e
    if dtype.hasobject:
        raise ValueError(f"{name} holds pickled objects, which could run code, and is not read")
    count, left = math.prod(shape), size - (file.tell() - start)
    if count * dtype.itemsize > left or (whole and count * dtype.itemsize < left):
        raise ValueError(f"{name} promises {shape} of {dtype}, but has {left} bytes")
    flat = np.frombuffer(file.read(count * dtype.itemsize), dtype, count)
    return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)


def write_npz(path: Any, arrays: Any) -> None:
    """Write them to one file, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getvalue())
