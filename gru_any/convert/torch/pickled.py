"""The tensors in a file of `torch.save`, read as data, without PyTorch: no code in it is run.

A pickle is a program for a machine with a stack. Here that machine knows no objects but containers,
numbers, text and tensors: what else a program would call is refused by its name. PyTorch writes the
pickle and the numbers of each storage into a zip file; versions before 1.6 wrote them one after the
other.
"""

import io
import math
import pickletools
from collections.abc import Callable
from typing import IO, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from ...tensors import Unread
from ...typing import HostArray, Path, Shape
from ..files import read_zip, refuse_growth

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first of the pickles before 1.6
STORAGES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16",
    "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
    "Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128",
    "Untyped": "uint8",
}  # fmt: skip
READ = {*STORAGES.values(), "uint16", "uint32", "uint64"}  # dtypes
MOST_OPERATIONS = 10**6  # about 40 make a tensor
LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
NUMBERS_AND_TEXT = (
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINSTRING", "SHORT_BINSTRING",
)  # fmt: skip


class Global(NamedTuple):
    """A function or a class by its name; it is not imported."""

    name: str


class Stored(NamedTuple):
    """A place of numbers: its name in the file, their dtype, and how many there are."""

    key: str
    dtype: str
    numel: int


class Strided(NamedTuple):
    """A tensor: where its first number is in a storage, its shape, and the step of each axis."""

    storage: Stored
    offset: int
    shape: Shape
    strides: Shape
    dtype: str


class Other(NamedTuple):
    """Stands for a tensor without plain numbers, so that an error can name its kind."""

    is_quantized: bool = False
    is_nested: bool = False
    is_meta: bool = False
    layout: str = ""


Order: TypeAlias = Literal["<", ">"]  # of the bytes of a number
Tensors: TypeAlias = dict[Any, HostArray | Unread | Other]


def read_pt(path: Path, content: bytes) -> Tensors:
    """Return the tensors of a flat state_dict by name; bfloat16 as float32.

    Raises
    ------
    ValueError
        The file is damaged, or holds something else.
    """
    order: Order
    if content.startswith(MAGIC):
        found, storages, order = _read_old(content)
    else:
        members = dict(read_zip(path, content, "file of torch.save"))
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1 or any(name.endswith("/constants.pkl") for name in members):
            raise ValueError("it is no file of torch.save: save model.state_dict()")
        base = pickles[0].removesuffix("data.pkl")
        order = ">" if members.get(base + "byteorder") == b"big" else "<"
        found = unpickle(io.BytesIO(members[pickles[0]]))
        start = base + "data/"
        storages = {k.removeprefix(start): v for k, v in members.items() if k.startswith(start)}
    if not isinstance(found, dict) or not all(
        isinstance(t, Strided | Unread | Other) for t in found.values()
    ):
        raise ValueError(
            "it holds no flat state_dict; save model.state_dict() alone, or take it out of the "
            "checkpoint and give it to from_arrays"
        )
    made: dict[Stored, HostArray | Unread] = {}
    tensors = {name: _array(name, t, storages, order, made) for name, t in found.items()}
    sizes = [a.nbytes for a in tensors.values() if isinstance(a, np.ndarray)]
    refuse_growth(path, sum(sizes), len(content))  # as many of them may be one storage
    return tensors


def _read_old(content: bytes) -> tuple[object, dict[str, bytes], Order]:
    """Read what PyTorch wrote before 1.6: five pickles, then the numbers of each storage."""
    file, counts = io.BytesIO(content), {}

    def note(stored: Stored) -> None:
        counts[stored.key] = stored

    _, _, system, found, keys = (unpickle(file, note) for _ in range(5))
    little = isinstance(system, dict) and system.get("little_endian") is not False
    if not isinstance(keys, list) or set(keys) != set(counts):
        raise ValueError("it lists other storages than it has")
    storages = {}
    for key in keys:
        count = int.from_bytes(file.read(8), "little" if little else "big")
        if count != counts[key].numel:
            raise ValueError(f"storage {key} has {count} numbers, expected {counts[key].numel}")
        storages[key] = file.read(count * _dtype(counts[key].dtype).itemsize)
    return found, storages, "<" if little else ">"


def _dtype(name: str) -> np.dtype[Any]:
    """Return NumPy's dtype of a number; for those that it lacks, that of a byte."""
    known = name if name in READ else "uint8"
    return np.dtype("uint16" if name == "bfloat16" else known)


def _array(
    name: object,
    tensor: Strided | Unread | Other,
    storages: dict[str, bytes],
    order: Order,
    made: dict[Stored, HostArray | Unread],
) -> HostArray | Unread | Other:
    """Return the array of a tensor; those of one storage share their memory."""
    if not isinstance(tensor, Strided):
        return tensor
    stored, shape, strides = (
        tensor.storage._replace(dtype=tensor.dtype),
        tensor.shape,
        tensor.strides,
    )
    if stored not in made:
        made[stored] = _numbers(storages, stored, order)
    flat = made[stored]
    if isinstance(flat, Unread):
        return flat
    steps = zip(shape, strides, strict=True)
    last = tensor.offset + sum((n - 1) * step for n, step in steps)
    count = math.prod(shape)
    if min(tensor.offset, 0, *shape, *strides) < 0 or (
        count and (count > flat.size or last >= flat.size)
    ):
        raise ValueError(f"{name} promises {shape}, more than the file holds")
    return np.lib.stride_tricks.as_strided(
        flat[tensor.offset :], shape, tuple(step * flat.itemsize for step in strides)
    )


def _numbers(storages: dict[str, bytes], stored: Stored, order: Order) -> HostArray | Unread:
    if stored.key not in storages:
        raise ValueError(f"it lacks the storage {stored.key!r}")
    if stored.dtype not in READ:
        return Unread(stored.dtype)
    content = storages[stored.key]
    dtype = _dtype(stored.dtype).newbyteorder(order)
    if len(content) % dtype.itemsize:
        raise ValueError(f"the storage {stored.key!r} has {len(content)} bytes, of {dtype}")
    flat = np.frombuffer(content, dtype)
    if stored.dtype == "bfloat16":
        flat = (flat.astype("<u4") << 16).view("<f4")
    return flat


# the pickle --------------------------------------------------------------------------------------


def unpickle(file: IO[bytes], note: Callable[[Stored], None] = lambda stored: None) -> object:
    """Run one pickle; `note` is told of each storage.

    Raises
    ------
    ValueError, LookupError, TypeError
        It is damaged, or makes something else than containers and tensors.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def popped(count: int) -> list[Any]:
        """Take the last values off the stack."""
        if count > len(stack) - (marks[-1] if marks else 0):
            raise ValueError("the pickle takes more off its stack than is there")
        found = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return found

    def popped_to_mark() -> list[Any]:
        start = marks.pop()
        found = stack[start:]
        del stack[start:]
        return found

    argument: Any
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        op = opcode.name
        if number > MOST_OPERATIONS:
            raise ValueError("the pickle has so many operations that it could fill the memory")
        if op in ("PROTO", "FRAME"):
            continue
        if op == "STOP":
            (result,) = popped(1)
            return result
        if op == "MARK":
            marks.append(len(stack))
        elif op in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if op == "MEMOIZE" else argument] = stack[-1]
        elif op in ("SETITEM", "SETITEMS"):
            items = popped(2) if op == "SETITEM" else popped_to_mark()
            _set_items(stack[-1], items)
        elif op in ("APPEND", "APPENDS"):
            items = popped(1) if op == "APPEND" else popped_to_mark()
            if not isinstance(stack[-1], list):
                raise TypeError("the pickle appends to what is no list")
            stack[-1].extend(items)
        elif op == "BUILD":  # such as the _metadata of a state_dict
            popped(1)
        elif op == "TUPLE":
            stack.append(tuple(popped_to_mark()))
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif op == "BINPERSID":
            stored = _stored(*popped(1))
            note(stored)
            stack.append(stored)
        elif op == "REDUCE":
            function, arguments = popped(2)
            stack.append(_call(function, arguments))
        elif op == "STACK_GLOBAL":
            stack.append(Global(".".join(popped(2))))
        else:
            stack.append(_constant(op, argument, popped))
    raise ValueError("the pickle does not end")


def _constant(op: str, argument: Any, popped: Callable[[int], list[Any]]) -> object:
    """Return the value that an operation without other effects puts onto the stack."""
    if op in NUMBERS_AND_TEXT:
        return argument
    if op in LITERALS:
        return LITERALS[op]
    if op in TUPLES:
        return tuple(popped(TUPLES[op]))
    if op == "EMPTY_DICT":
        return {}
    if op == "EMPTY_LIST":
        return []
    if op == "GLOBAL":
        return Global(argument.replace(" ", "."))
    raise ValueError(f"it holds more than tensors: the operation {op} of pickle")


def _set_items(target: object, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise TypeError("the pickle puts pairs into what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int):
            raise TypeError(f"a name is a {type(key).__name__}, expected a string")
        target[key] = value


def _stored(found: object) -> Stored:
    """Return a storage from what PyTorch writes in its place."""
    if not isinstance(found, tuple) or len(found) < 5 or found[0] != "storage":
        raise ValueError("it refers to what is no storage")
    kind, key, _, count = found[1:5]
    if len(found) > 5 and found[5] is not None:
        raise ValueError("it holds a view of a storage, as PyTorch wrote before 0.4")
    if not isinstance(kind, Global) or not isinstance(key, str) or not isinstance(count, int):
        raise TypeError("a storage has no class, name and size")
    name = kind.name.rpartition(".")[2].removesuffix("Storage")
    return Stored(key, STORAGES.get(name, name), count)


def _call(function: object, arguments: object) -> object:
    """Return the result of a known function of PyTorch; ValueError for other functions."""
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise ValueError("it holds more than tensors: a call of what is no function")
    name = function.name
    if name == "collections.OrderedDict":
        made: dict[Any, Any] = {}
        _set_items(made, [v for pair in (arguments[0] if arguments else ()) for v in pair])
        return made
    if name == "torch._tensor._rebuild_from_type_v2":  # a tensor with attributes
        return _call(arguments[0], arguments[2])
    if name in ("torch.Size", "torch.serialization._get_layout", "torch.device"):
        return arguments[0]
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return arguments[0]
    if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
        return _strided(arguments, None, arguments[6:])
    if name == "torch._utils._rebuild_tensor_v3":
        return _strided(arguments, arguments[6], arguments[7:])
    for kind, other in OTHERS.items():
        if name.startswith(f"torch._utils._rebuild_{kind}"):
            return other
    raise ValueError(f"it holds more than tensors: {name}")


OTHERS = {
    "sparse": Other(layout="sparse"),
    "qtensor": Other(is_quantized=True),
    "nested_tensor": Other(is_nested=True),
    "meta_tensor": Other(is_meta=True),
}


def _strided(arguments: tuple[Any, ...], dtype: object, metadata: tuple[Any, ...]) -> Strided:
    stored, offset, shape, strides = arguments[:4]
    if dtype is not None and not isinstance(dtype, Global):
        raise TypeError("a tensor has a dtype that is none")
    if not isinstance(stored, Stored) or len(shape) != len(strides):
        raise TypeError("a tensor has no storage, or other axes than strides")
    if any(not isinstance(n, int) for n in (offset, *shape, *strides)):
        raise TypeError("the shape of a tensor is not made of integers")
    if any(metadata) and metadata[0]:
        raise ValueError("a tensor is a conjugate or negated view: save its clone()")
    name = stored.dtype if dtype is None else dtype.name.removeprefix("torch.")
    return Strided(stored, offset, tuple(shape), tuple(strides), name)
