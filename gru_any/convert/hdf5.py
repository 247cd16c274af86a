"""Arrays in HDF5 files, with h5py (extra `keras`). Nothing is allocated that is not in the file."""

import io
from typing import Any

import numpy as np


def library() -> Any:
    """Import h5py, or raise ImportError that says how to get it."""
    try:
        import h5py
    except ImportError as e:
        raise ImportError('HDF5 files need h5py: pip install "gru-any[keras]"') from e
    return h5py


def read_hdf5(content: bytes, name: Any) -> dict[str, np.ndarray]:
    """Path inside of the file -> array; those that are not floating stay out.

    Raises
    ------
    ValueError
        The file is damaged or of another kind, holds links to elsewhere, or promises more numbers
        than it has.
    """
    h5py, arrays = library(), {}
    try:
        with h5py.File(io.BytesIO(content), "r") as file:
            found = list(_datasets(h5py, file, "", set()))
            total = sum(dataset.nbytes for _, dataset in found)
            if total > len(content):
                raise ValueError(f"it promises {total} bytes and has {len(content)}")
            for path, dataset in found:
                arrays[path] = dataset[()]
    except (OSError, RuntimeError, LookupError, ArithmeticError, TypeError, ValueError) as e:
        raise ValueError(f"{name} is damaged or no HDF5 file of weights: {e}") from e
    return arrays


def _datasets(h5py: Any, group: Any, prefix: str, seen: set[int]) -> Any:
    """Path and dataset, of all that hold floating numbers in this file itself."""
    for name in group:
        path = prefix + name
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{path} is a link to elsewhere")
        item = group[name]
        address = h5py.h5o.get_info(item.id).addr
        if address in seen:
            raise ValueError(f"{path} is there twice, or in a circle")
        seen.add(address)
        if isinstance(item, h5py.Group):
            yield from _datasets(h5py, item, path + "/", seen)
        elif isinstance(item, h5py.Dataset) and item.dtype.kind == "f":
            if item.is_virtual or item.external or item.id.get_storage_size() < item.nbytes:
                raise ValueError(f"{path} promises {item.shape}, which is not in this file")
            yield path, item


def write_hdf5(arrays: dict[str, np.ndarray]) -> bytes:
    """The content of a file with these arrays."""
    buffer = io.BytesIO()
    with library().File(buffer, "w") as file:
        for path, array in arrays.items():
            file[path] = array
    return buffer.getvalue()
