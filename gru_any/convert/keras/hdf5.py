"""Arrays in HDF5 files, with h5py (extra `keras`). No more is allocated than a file holds."""

from __future__ import annotations  # h5py's classes are known to a type checker alone

import io
import math
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...typing import HostArray, Path

if TYPE_CHECKING:
    from h5py import AttributeManager, Dataset, Group

# how the names of the attributes begin that are read; no other is touched
KNOWN = ("layer_names", "weight_names", "model_config", "keras_version")
MOST_ITEMS = 50_000  # each takes kilobytes
HEAP = b"GCOL\x01\x00\x00\x00"


class Contents(NamedTuple):
    """The arrays of a file by path, and the attributes of its groups by path; "" is the file.

    bfloat16 becomes float32. What is not made of numbers is an empty array of its dtype, so that an
    error can name the dtype.
    """

    arrays: dict[str, HostArray]
    attributes: dict[str, dict[str, Any]]


def library() -> ModuleType:
    """Import h5py, or raise ImportError that says how to get it."""
    try:
        import h5py
    except ImportError as e:
        raise ImportError('HDF5 files need h5py: pip install "gru-any[keras]"') from e
    module: ModuleType = h5py
    return module


def read_hdf5(content: bytes, name: Path) -> Contents:
    """Read all arrays of a file, and the attributes of its groups.

    Raises
    ------
    ValueError
        The file is damaged or of another kind, holds links to elsewhere, or promises more elements
        than it has.
    """
    h5py, arrays, attributes = library(), {}, {}
    try:
        _check_heaps(content)
        with h5py.File(io.BytesIO(content), "r") as file:
            total = 0
            for path, item in _items(h5py, file, "", set()):
                if isinstance(item, h5py.Group):
                    attributes[path] = _attributes(path, item.attrs, content)
                    continue
                total += item.id.get_storage_size()
                if total > len(content):
                    raise ValueError(f"it promises {total} bytes and has {len(content)}")
                arrays[path] = _array(h5py, item, content)
    except (OSError, RuntimeError, LookupError, ArithmeticError, TypeError, ValueError) as e:
        raise ValueError(f"{name} is damaged or no HDF5 file of weights: {e}") from e
    return Contents(arrays, attributes)


def _check_heaps(content: bytes) -> None:
    """Raise where a heap of strings is damaged, which HDF5's library may walk without end.

    A heap is its signature, its size (8 bytes) and objects: number (2), counts (6), size (8), data
    filled up to 8 bytes. Number 0 is the free space, which reaches to the end.
    """
    at = content.find(HEAP)
    while at >= 0:
        size = int.from_bytes(content[at + 8 : at + 16], "little")
        place, end = at + 16, at + size
        while place + 16 <= end:
            number = int.from_bytes(content[place : place + 2], "little")
            length = int.from_bytes(content[place + 8 : place + 16], "little")
            if number == 0:
                place += length
                break
            place += 16 + -(-length // 8) * 8
        else:
            place = max(place, end)  # what is left is too short for an object
        if place != end or end > len(content):
            raise ValueError(f"the heap of strings at byte {at} is damaged")
        at = content.find(HEAP, at + len(HEAP))


def _items(
    h5py: ModuleType, group: Group, prefix: str, seen: set[int]
) -> Iterator[tuple[str, Group | Dataset]]:
    """Yield path and item of all groups and datasets; refuse links and circles."""
    yield prefix.rstrip("/"), group
    for name in group:
        path = prefix + name
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{path} is a link to elsewhere")
        item = group[name]
        address = h5py.h5o.get_info(item.id).addr
        if address in seen:
            raise ValueError(f"{path} is there twice, or in a circle")
        seen.add(address)
        if len(seen) > MOST_ITEMS:
            raise ValueError(f"it has more than {MOST_ITEMS} groups and arrays")
        if isinstance(item, h5py.Group):
            yield from _items(h5py, item, path + "/", seen)
        elif isinstance(item, h5py.Dataset):
            _check_present(h5py, path, item)
            yield path, item


def _attributes(path: str, attributes: AttributeManager, content: bytes) -> dict[str, Any]:
    """Return the known attributes; raise where they promise more bytes than the file has."""
    known = {name: attributes.get_id(name) for name in attributes if name.startswith(KNOWN)}
    if sum(math.prod(i.shape) * i.dtype.itemsize for i in known.values()) > len(content):
        raise ValueError(f"the attributes of {path!r} promise more than {len(content)} bytes")
    for name, attribute in known.items():
        if count := math.prod(attribute.shape):
            _check_texts(content, name, count, attribute.get_storage_size())
    return {name: attributes[name] for name in known}


def _check_texts(content: bytes, name: str, count: int, size: int) -> None:
    """Raise where an attribute says that its texts are longer than the file.

    HDF5's library would make room for them first. An attribute is its version, flags and the sizes
    of its name, type and shape (2 bytes each), which follow, and `size` bytes for the texts: for
    each its length (4) and where it is. In version 1 each part is filled up to 8 bytes, and in
    version 3 there is a byte more in front of the name.
    """
    if size % count or size // count not in (12, 16):  # no texts of any length
        return
    at = content.find(name.encode() + b"\0")
    while at >= 0:
        for version, start in ((1, at - 8), (2, at - 8), (3, at - 9)):
            if start < 0 or content[start] != version:
                continue
            if version > 1 and content[start + 1] & 2:
                raise ValueError(f"the shape of the attribute {name!r} is shared with others")
            parts = [int.from_bytes(content[start + i :][:2], "little") for i in (2, 4, 6)]
            if version == 1:
                parts = [-(-n // 8) * 8 for n in parts]
            shape, data = at + sum(parts[:2]), at + sum(parts)
            if _count(content[shape:data]) != count:  # another attribute of this name
                continue
            lengths = [content[data + i :][:4] for i in range(0, size, size // count)]
            if any(int.from_bytes(n, "little") > len(content) for n in lengths):
                raise ValueError(f"a text of the attribute {name!r} is longer than the file")
        at = content.find(name.encode() + b"\0", at + 1)


def _count(shape: bytes) -> int:
    """Return how many elements a shape has: its version, rank, flags, and each size (8 bytes)."""
    if len(shape) < 4:
        return -1
    start = 8 if shape[0] == 1 else 4
    sizes = (shape[i : i + 8] for i in range(start, start + 8 * shape[1], 8))
    return math.prod(int.from_bytes(n, "little") for n in sizes)


def _check_present(h5py: ModuleType, path: str, item: Dataset) -> None:
    """Raise where the elements of a dataset are not in this file, not all of them, or packed."""
    if not _is_array(h5py, item):
        return
    made, stored = item.id.get_create_plist(), item.id.get_storage_size()
    filters = {made.get_filter(i)[0] for i in range(made.get_nfilters())}
    if filters - {h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}:
        raise ValueError(
            f"{path} is compressed, which could fill the memory: write the file anew without "
            "(h5repack -f NONE)"
        )
    chunk = math.prod(item.chunks or ()) * item.dtype.itemsize
    if item.is_virtual or item.external or stored < max(item.nbytes, chunk if stored else 0):
        raise ValueError(f"{path} promises {item.shape}, which is not in this file")


def _is_array(h5py: ModuleType, item: Group | Dataset) -> bool:
    """Whether an item is made of numbers; bfloat16 and float8 are opaque bytes to HDF5."""
    is_data = isinstance(item, h5py.Dataset) and item.shape is not None
    return is_data and (item.dtype.kind in "fciub" or item.dtype.str in ("|V1", "|V2"))


def _array(h5py: ModuleType, item: Dataset, content: bytes) -> HostArray:
    if not _is_array(h5py, item):
        return np.empty(0, item.dtype)
    array = np.asarray(item[()])
    if item.dtype.str != "|V2" or "dtype" not in item.attrs:
        return array
    _check_texts(content, "dtype", 1, item.attrs.get_id("dtype").get_storage_size())
    if item.attrs["dtype"] == "bfloat16":  # as Keras marks it
        return (array.view("<u2").astype("<u4") << 16).view("<f4")
    return array


def write_hdf5(arrays: dict[str, HostArray]) -> bytes:
    """Return the content of a file with these arrays."""
    buffer = io.BytesIO()
    with library().File(buffer, "w") as file:
        for path, array in arrays.items():
            file[path] = array
    return buffer.getvalue()
