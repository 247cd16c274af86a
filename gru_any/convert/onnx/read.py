"""From an ONNX file to a model: each node is visited in order, and its outputs are found."""

import logging
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...nn.chain import Chain
from ...nn.gru import GRU
from ...typing import Device, Path
from .assemble import assemble
from .axes import Results, SymbolicArray, Value, kind_of
from .check import Node, NodeError, nodes, parse
from .layers import LAYERS
from .moves import MOVES
from .part import listed, part
from .reshape import check_claims
from .walk import Walk

if TYPE_CHECKING:
    from onnx import GraphProto


def read(
    path: Path, backend: object = None, device: Device = None, node: str | None = None
) -> GRU | Chain:
    """See `gru_any.convert.onnx.load`."""
    if node is not None:
        return assemble(_read_part(path, node), [], backend, device)
    graph = parse(path)
    operators = {n.op_type for n in graph.node}
    if "Scan" in operators:
        raise ValueError(
            f"{path} runs a graph step by step, by a Scan, as save(..., resets=True) writes it, "
            "which is not read: keep the model by gru_any.save, or in a file without resets"
        )
    if not {"GRU", "Loop"} & operators:
        raise ValueError(
            f"{path} holds no GRU; where an exporter writes its steps one by one, take the weights "
            "from the library's own file"
        )
    walk = _walked(graph, path)
    return assemble(walk, [o.name for o in graph.output], backend, device)


def _walked(graph: "GraphProto", path: Path, part: bool = False) -> Walk:
    folder = pathlib.Path(path).parent
    walk = Walk(graph, folder, part)
    for node in nodes(graph, folder):
        visit(walk, node)
    check_claims(walk, (*graph.value_info, *graph.output))
    return walk


def _read_part(path: Path, node: str) -> Walk:
    """Read the layers of some nodes; their first states are one argument."""
    gru_nodes = ""

    def choose(whole: "GraphProto") -> "GraphProto":
        nonlocal gru_nodes
        gru_nodes = listed(whole.node)
        return part(whole, node)

    graph = parse(path, choose)
    try:
        walk = _walked(graph, path, part=True)
    except ValueError as e:
        raise ValueError(f"{e}; node={node!r} was read, where {gru_nodes}") from e
    logging.getLogger("gru_any.convert").info(
        "of the graph, x is %r, the lengths are %s, the first states %s",
        walk.entry,
        ", ".join(repr(n) for n in walk.lengths if n) or "not given",
        ", ".join(map(repr, walk.states)) or "0",
    )
    return walk


def visit(walk: Walk, node: Node) -> None:
    """Find the values that a node puts out."""
    results = _apply(walk, node, [walk.values[name] for name in node.inputs])
    results = results if isinstance(results, tuple) else (results,)
    if any(node.outputs[len(results) :]):
        node.refuse(f"has the outputs {node.outputs}, of which only {len(results)} are known")
    walk.keep(node, results)
    for name, value in zip(node.outputs, results, strict=False):
        if name and name in walk.values:
            node.refuse(f"makes {name!r} a second time")
        if name:
            walk.values[name] = value


def _apply(walk: Walk, node: Node, arguments: Sequence[Value]) -> Results:
    running = node.op == "Loop" or any(isinstance(v, SymbolicArray) for v in arguments)
    layer = LAYERS.get(node.op) if running else None
    if not layer and node.op not in MOVES:
        node.refuse(
            "is no part of an Embedding, a GRU or a Linear layer"
            + ("" if walk.part else "; a GRU can be read alone: load(path, node=...)")
        )
    walk.spend(node, arguments)
    try:
        found = layer(walk, node, *arguments) if layer else None
        return found if found is not None else MOVES[node.op](node, *arguments)
    except NodeError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as e:
        given = ", ".join(kind_of(v) for v in arguments) or "nothing"
        raise NodeError(f"{node.label} has arguments that do not fit: {given}") from e
