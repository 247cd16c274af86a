"""The weights of a C program: a struct, and its content as text or bytes."""

import numpy as np

from ...typing import HostArray
from .parts import Parts


def weight_members(parts: Parts, identified: bool) -> list[str]:
    """Return the declaration of each member; identified: with the fingerprint among them."""
    found = [
        f"{'int8_t' if array.dtype == np.int8 else 'float'} {name}[{array.size}];"
        for name, array in parts.fields
    ]
    if identified:
        found.insert(_floats(parts), "uint32_t id[2];")
    return found


def constant_weights(parts: Parts, name: str) -> str:
    """Print the weights as a constant."""
    members = ",\n".join(f"    .{key} = {numbers(array.ravel())}" for key, array in parts.fields)
    return f'#include "{name}.h"\n\nconst {name}_weights {name}_constants = {{\n{members}\n}};\n'


def binary_weights(parts: Parts, order: str = "<") -> bytes:
    """The struct of weights as it lies in the memory of a machine; order: "<" or "="."""
    arrays = [array.astype(array.dtype.newbyteorder(order)) for _, array in parts.fields]
    arrays.insert(_floats(parts), np.array(identity(parts), f"{order}u4"))
    found = b"".join(array.tobytes() for array in arrays)
    return found + bytes(-len(found) % 4)


def _floats(parts: Parts) -> int:
    """How many members in float32 there are: then comes the identity, which keeps all aligned."""
    return sum(array.dtype != np.int8 for _, array in parts.fields)


def identity(parts: Parts) -> tuple[int, int]:
    """Return the fingerprint as two integers of 32 bits."""
    return int(parts.fingerprint[:8], 16), int(parts.fingerprint[8:], 16)


def numbers(array: HostArray) -> str:
    """The initialiser of an array, whose floats lose nothing."""
    if array.ndim == 2:
        return "{\n" + ",\n".join(map(numbers, array)) + "\n}"
    form = "{}" if array.dtype.kind == "i" else "{:#.9g}f"
    words = [form.format(v) for v in array.tolist()]
    rows = (", ".join(words[i : i + 8]) for i in range(0, len(words), 8))
    return "{" + ",\n".join(rows) + "}"
