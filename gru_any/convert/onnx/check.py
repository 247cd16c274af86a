"""Reading a file as a graph: whole, no larger than it says, and of ONNX' own operators."""

from __future__ import annotations  # protobuf's classes are known to a type checker alone

import math
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from ...files import read_whole
from ...typing import HostArray, Path
from ..files import SLACK
from .wire import parsed_size

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

OPSETS = range(7, 29)  # the operator GRU means the same in all of them
LARGEST = 2**31 - 1  # bytes; more does not fit into one protobuf message
KINDS = ("float16", "float32", "float64", "int32", "int64", "bool")


def library() -> ModuleType:
    """Import the package onnx, or raise ImportError that says how to get it."""
    try:
        import onnx
    except ImportError as e:
        raise ImportError(f'{e}; install it with pip install "gru-any[onnx]"') from e
    return onnx


class NodeError(ValueError):
    """A node that has no counterpart here."""


@dataclass(frozen=True)
class Node:
    """One operation of a graph."""

    label: str  # what it is called in messages
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]  # tensors as arrays

    def refuse(self, why: str) -> NoReturn:
        """Raise the error that names this node."""
        raise NodeError(f"{self.label} {why}")


@dataclass(frozen=True)
class Body:
    """The graph that a Loop repeats."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: tuple[tuple[str, HostArray], ...]
    nodes: tuple[Node, ...]


def parse(path: Path, choose: Callable[[GraphProto], GraphProto] | None = None) -> GraphProto:
    """Read a graph and check what it says of its arrays; `choose` may take a part of it first.

    Raises
    ------
    ValueError
        It is damaged, or has functions, operators of other domains or a version not known here.
    """
    onnx, path = library(), pathlib.Path(path)
    if path.is_file() and path.stat().st_size > LARGEST:
        raise ValueError(f"{path} is larger than the 2 GB that an ONNX file can have")
    content = read_whole(path)
    try:
        size = parsed_size(content, onnx.ModelProto.DESCRIPTOR, 4 * SLACK + 2 * len(content))
        if size > 4 * SLACK + 2 * len(content):
            raise ValueError("its graph has so many parts that it could fill the memory")
        model: ModelProto = onnx.load_model_from_string(content)
    except Exception as e:  # protobuf's error, whose class depends on how protobuf was built
        raise ValueError(f"{path} is damaged or no ONNX file: {e}") from e
    if not model.graph.node:
        raise ValueError(f"{path} is damaged or no ONNX file: it has no nodes")
    if choose is None:
        _refuse_extensions(model)
    if any(f.domain in ("", "ai.onnx") for f in model.functions):
        raise ValueError("the model gives ONNX' own operators another meaning by functions")
    _check_version(model)
    _check_order(model.graph)
    graph = model.graph if choose is None else choose(model.graph)
    attributes = [a for node in graph.node for a in node.attribute if a.HasField("t")]
    tensors = (*graph.initializer, *(a.t for a in attributes))
    beside = [_check_size(tensor, path.parent) for tensor in tensors]
    try:  # whether there are files beside the model is seen from its place alone
        onnx.checker.check_model(str(path) if any(beside) else content)
    except UnicodeDecodeError:  # of a name, which the checker wants to tell
        raise
    except Exception as e:
        raise ValueError(f"{path} does not follow the standard: {e}") from e
    return graph


def _refuse_extensions(model: ModelProto) -> None:
    graph = model.graph
    for part, name in (
        (model.functions, "functions"),
        (model.training_info, "training information"),
        (graph.sparse_initializer, "sparse weights"),
    ):
        if part:
            raise ValueError(f"the model has {name}, which this reader does not know")


def _check_version(model: ModelProto) -> None:
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    if len(versions) != 1 or versions[0] not in OPSETS:
        known = f"{OPSETS[0]} to {OPSETS[-1]}"
        raise ValueError(f"the model has opset {versions}, this reader knows {known}")


def _check_order(graph: GraphProto) -> None:
    """Raise where a node reads what no node before it makes."""
    made = {""} | {v.name for v in (*graph.input, *graph.initializer)}
    made |= {v.values.name for v in graph.sparse_initializer}
    for node in graph.node:
        for name in node.input:
            if name not in made:
                raise ValueError(
                    f"{_label(node)} reads {name!r}, which nothing before it makes: the graph has "
                    "a cycle, or its nodes are not in order"
                )
        made |= set(node.output)


def nodes(graph: GraphProto, folder: pathlib.Path, nested: bool = True) -> Iterator[Node]:
    """Yield the operations of a graph, in order. `nested`: a Loop may have a body."""
    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise ValueError(f"{_label(node)} belongs to {node.domain!r}, expected ONNX' operators")
        attributes = {a.name: _attribute(node, a, folder, nested) for a in node.attribute}
        yield Node(_label(node), node.op_type, (*node.input,), (*node.output,), attributes)


def _body(graph: GraphProto, folder: pathlib.Path) -> Body:
    return Body(
        tuple(v.name for v in graph.input),
        tuple(v.name for v in graph.output),
        tuple((t.name, array(t, folder)) for t in graph.initializer),
        tuple(nodes(graph, folder, nested=False)),
    )


def _label(node: NodeProto) -> str:
    return f"node {node.name or '/'.join(node.output)!r} ({node.op_type})"


def _attribute(
    node: NodeProto, attribute: AttributeProto, folder: pathlib.Path, nested: bool
) -> Any:
    onnx = library()
    if nested and node.op_type == "Loop" and attribute.type == onnx.AttributeProto.GRAPH:
        return _body(attribute.g, folder)
    if attribute.type == onnx.AttributeProto.TENSOR:
        return array(attribute.t, folder)
    kinds = ("FLOAT", "INT", "STRING", "FLOATS", "INTS", "STRINGS")
    if attribute.ref_attr_name or attribute.type not in [
        getattr(onnx.AttributeProto, k) for k in kinds
    ]:
        raise ValueError(
            f"{_label(node)} has the attribute {attribute.name!r}, a graph or of a kind that this "
            "reader does not know"
        )
    value = onnx.helper.get_attribute_value(attribute)
    try:
        if isinstance(value, list):
            return [v.decode() if isinstance(v, bytes) else v for v in value]
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as e:
        raise NodeError(
            f"{_label(node)} has the attribute {attribute.name!r}, {e.object!r}, expected text"
        ) from e


# tensors -----------------------------------------------------------------------------------------


class External(NamedTuple):
    """The bytes of a tensor in a file beside the model."""

    file: pathlib.Path
    offset: int
    size: int


def array(tensor: TensorProto, folder: pathlib.Path) -> HostArray:
    """Return the array that a tensor holds, its size checked first."""
    source = _check_size(tensor, folder)
    if source is None:
        return np.asarray(library().numpy_helper.to_array(tensor))
    with open(source.file, "rb") as data:
        data.seek(source.offset)
        content = data.read(source.size)
    return np.frombuffer(content, _dtype(tensor).newbyteorder("<")).reshape(tuple(tensor.dims))


def dtype_name(kind: int) -> str:
    """Return NumPy's name for a number of TensorProto.DataType."""
    try:
        return str(np.dtype(library().helper.tensor_dtype_to_np_dtype(kind)).name)
    except KeyError:
        return f"of the unknown kind {kind}"


def _dtype(tensor: TensorProto) -> np.dtype[Any]:
    name = dtype_name(tensor.data_type)
    if name not in KINDS:
        raise ValueError(
            f"the array {tensor.name!r} is {name}, expected one of {', '.join(KINDS)}; quantised "
            "weights and other floats are not read: write the file from the model in float32"
        )
    return np.dtype(name)


def _check_size(tensor: TensorProto, folder: pathlib.Path) -> External | None:
    """Raise where a tensor has another size than it says; return its place in a second file."""
    onnx, dims, dtype = library(), tuple(tensor.dims), _dtype(tensor)
    count = math.prod(dims)
    if any(d < 0 for d in dims) or tensor.HasField("segment"):
        raise ValueError(f"the array {tensor.name!r} has the shape {dims}")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return _external(tensor, folder, count * dtype.itemsize)
    if tensor.HasField("raw_data"):
        promised, found = count * dtype.itemsize, len(tensor.raw_data)
    else:
        field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
        promised, found = count, len(getattr(tensor, field))
    if promised != found:
        raise ValueError(
            f"the array {tensor.name!r} of shape {dims} is damaged: it holds {found}, "
            f"not {promised}"
        )
    return None


def _external(tensor: TensorProto, folder: pathlib.Path, size: int) -> External:
    """Return where a tensor lies in a file beside the model; refuse any other place."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    name = where.get("location", "")
    file = folder / name
    if not name or name in (".", "..") or set(name) & set("/\\:\0") or file.is_symlink():
        raise ValueError(
            f"the array {tensor.name!r} is said to lie in {name!r}, expected the name of a file "
            "beside the model"
        )
    try:
        offset, length = int(where.get("offset", 0)), int(where.get("length", size))
    except ValueError as e:
        raise ValueError(f"the array {tensor.name!r} lies nowhere: {e}") from e
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}, which holds the array {tensor.name!r}")
    if length != size or offset < 0 or offset + size > file.stat().st_size:
        raise ValueError(
            f"the array {tensor.name!r} needs {size} bytes; {name} promises {length} from {offset} "
            f"on and has {file.stat().st_size}"
        )
    return External(file, offset, size)
