"""Arrays in safetensors, npz and npy files. No more is allocated than a file holds."""

import io
import math
import pathlib
import zipfile
import zlib
from collections.abc import Iterator
from tokenize import TokenError
from typing import IO

import numpy as np

from ..files import write_atomically
from ..tensors import content_of, read
from ..typing import Array, Arrays, HostArray, Path

# how many times a compressed file may grow; trained weights hardly compress at all
GROWTH = 100


def read_safetensors(path: Path) -> dict[str, Array]:
    """Read the arrays of a safetensors file by name, of whatever dtype; bfloat16 as float32.

    Raises
    ------
    ValueError
        The file is damaged or of another kind.
    """
    return read(path)[1]


def write_safetensors(path: Path, arrays: Arrays, metadata: dict[str, str] | None = None) -> None:
    """Write arrays to a safetensors file, whole or not at all."""
    write_atomically(path, content_of(arrays, metadata))


def read_npz(path: Path) -> dict[str, HostArray]:
    """Read the arrays of an npz file by name, of whatever dtype.

    Raises
    ------
    ValueError
        The file is damaged or of another kind, holds pickled objects, or promises more elements
        than it has.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(pathlib.Path(path).read_bytes())) as archive:
            entries = archive.infolist()
            refuse_bomb(path, entries)
            arrays = dict(_members(archive, entries))
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as e:
        raise ValueError(f"{path} is damaged or no npz file: {e}") from e
    if len(arrays) < len(entries):
        raise ValueError(f"{path} holds two arrays of one name")
    return arrays


def _members(
    archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo]
) -> Iterator[tuple[str, HostArray]]:
    for entry in entries:
        with archive.open(entry) as file:
            array = read_npy(file, entry.filename, entry.file_size, whole=True)
        yield entry.filename.removesuffix(".npy"), array


def refuse_bomb(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    """Raise where the parts of a zip file would grow more than compressed weights do."""
    promised, size = sum(entry.file_size for entry in entries), pathlib.Path(path).stat().st_size
    if promised > GROWTH * size:
        raise ValueError(
            f"{path} promises {promised} bytes in a file of {size}: weights do not compress so well"
        )


def read_npy(file: IO[bytes], name: str, size: int, whole: bool = False) -> HostArray:
    """Read the array that begins here, of at most `size` bytes with its header; never a pickle.

    whole: the array must fill `size`.
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


def write_npz(path: Path, arrays: Arrays) -> None:
    """Write arrays to an npz file, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getvalue())
