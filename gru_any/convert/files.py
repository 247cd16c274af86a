"""Arrays in safetensors, npz and npy files. No more is allocated than a file holds."""

import io
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from tokenize import TokenError
from typing import IO

import numpy as np

from ..files import read_whole, write_atomically
from ..tensors import content_of, read
from ..typing import Array, Arrays, HostArray, Path

# what a file holds may be twice its size, and this many bytes: trained weights hardly compress
GROWTH, SLACK = 2, 2**24
MOST_MEMBERS = 100_000  # each takes about a kilobyte
# errors of Python's that a file may lead to, but for those that readers raise in words
PYTHONS = (ArithmeticError, IndexError, AttributeError, RecursionError, struct.error)
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, OverflowError)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an error about what it holds; what Python says of it becomes a ValueError.

    Raises
    ------
    ValueError, KeyError, TypeError
        As raised inside.
    """
    try:
        yield
    except UnicodeDecodeError as e:
        raise ValueError(
            f"{path} holds {e.object[e.start :][:20]!r} in place of text: it is damaged"
        ) from e
    except (UnicodeError, json.JSONDecodeError, *PYTHONS) as e:
        raise ValueError(f"{path} is damaged or of another kind: {e or type(e).__name__}") from e
    except (ValueError, KeyError, TypeError) as e:
        text = str(e.args[0]) if len(e.args) == 1 else str(e)
        if str(path) not in text:
            e.args = (f"{path}: {text}",)
        raise


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
    members = read_zip(path, read_whole(path), "npz file")
    return {
        name.removesuffix(".npy"): read_npy(
            io.BytesIO(content), f"{path}, {name}", len(content), whole=True
        )
        for name, content in members.items()
    }


def read_zip(path: Path, content: bytes, kind: str) -> dict[str, bytes]:
    """Return the members of a zip file by name. `kind` is what errors call the file.

    Raises
    ------
    ValueError
        It is damaged, two members have one name but for ".npy", or they grow too much.
    """
    try:
        if content.count(b"PK\1\2") > MOST_MEMBERS:
            raise zipfile.BadZipFile(f"it has more than {MOST_MEMBERS} members")
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            refuse_growth(path, sum(entry.file_size for entry in entries), len(content))
            members = {entry.filename: _member(archive, entry) for entry in entries}
    except ZIP_ERRORS as e:
        raise ValueError(f"{path} is damaged or no {kind}: {e}") from e
    if len({name.removesuffix(".npy") for name in members}) < len(entries):
        raise ValueError(f"{path} holds two arrays of one name")
    return members


def _member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Return a member, at most as large as the file says."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"{entry.filename} is neither stored nor deflated")
    with archive.open(entry) as file:
        content = file.read(entry.file_size)
    if len(content) != entry.file_size:
        raise EOFError(f"{entry.filename} has {len(content)} bytes, expected {entry.file_size}")
    return content


def refuse_growth(path: Path, promised: int, size: int) -> None:
    """Raise where what a file holds would grow more than weights do that are not compressed."""
    if promised > GROWTH * size + SLACK:
        raise ValueError(
            f"{path} promises {promised} bytes in a file of {size}, which could fill the memory: "
            "weights do not compress so well. If you trust it, read it with the library that "
            "wrote it, and give the arrays to from_arrays"
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
    except (ValueError, KeyError, SyntaxError, TokenError, RecursionError, MemoryError) as e:
        raise ValueError(f"{name} is damaged or no array: {e}") from e
    if dtype.hasobject:
        raise ValueError(f"{name} holds pickled objects, which could run code, and is not read")
    count, left = math.prod(shape), size - (file.tell() - start)
    if min(shape, default=0) < 0:
        raise ValueError(f"{name} promises {shape} of {dtype}, expected sizes of at least 0")
    if count * dtype.itemsize > left or (whole and count * dtype.itemsize < left):
        raise ValueError(f"{name} promises {shape} of {dtype}, but has {left} bytes")
    flat = np.frombuffer(file.read(count * dtype.itemsize), dtype, count)
    return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)


def write_npz(path: Path, arrays: Arrays) -> None:
    """Write arrays to an npz file, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getvalue())
