"""From the nodes of an ONNX graph to layers."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from . import last
from .assemble import assemble
from .axes import Array, Atom, Axis, Layer, fits, kind_of, size
from .check import Node, NodeError, array, dtype_name, nodes, parse
from .directions import COMBINED
from .layers import LAYERS
from .moves import MOVES
from .part import listed, part

MEGABYTE = 2**20


def read(path: Any, backend: Any = None, device: Any = None, node: str | None = None) -> Any:
    """See `gru_any.convert.onnx.load`."""
    folder = Path(path).parent
    if node is not None:
        return assemble(_read_part(path, folder, node), [], backend, device)
    graph = parse(path)
    if not {"GRU", "Loop"} & {n.op_type for n in graph.node}:
        raise ValueError(
            f"{path} holds no GRU; where an exporter writes its steps one by one, take the weights "
            "from the library's own file"
        )
    walk = _walked(Walk(graph, folder), graph, folder)
    return assemble(walk, [o.name for o in graph.output], backend, device)


def _walked(walk: "Walk", graph: Any, folder: Path) -> "Walk":
    for node in nodes(graph, folder):
        walk.visit(node)
    return walk


def _read_part(path: Any, folder: Path, node: str) -> "Walk":
    """The layers of some nodes; their first states are one argument, wherever they come from."""
    words = ""

    def choose(whole: Any) -> Any:
        nonlocal words
        words = listed(whole.node)
        return part(whole, node)

    graph = parse(path, choose)
    try:
        walk = _walked(Walk(graph, folder, part=True), graph, folder)
    except ValueError as e:
        raise ValueError(f"{e}; node={node!r} was read, where {words}") from e
    logging.getLogger("gru_any.convert").info(
        "of the graph, x is %r, the lengths are %s, the first states %s",
        walk.entry,
        ", ".join(repr(n) for n in walk.lengths if n) or "not given",
        ", ".join(map(repr, walk.states)) or "0",
    )
    return walk


class Walk:
    """What is known on the way through a graph: a value for each name, and the layers so far.

    Attributes
    ----------
    values : dict
        name -> constant, shape, `Array`, `Zeros`, or None for an argument left out.
    layers : list of Layer
    entry, lead : the name of the input that the layers read, and its axes without the features
    features : the axis of what the last layer put out
    stage : counts the arrays that went from layer to layer
    summed : whether two biases were added to one
    source : what the last GRU read, its stage, its direction, and the features it read
    pair : the stages of two GRUs that read the same in both directions
    sums : the stages of sums of two directions
    merged : the stage and the features of a layer for the stages of its two directions
    halves : the layer and the direction that a GRU became
    unread : the names of arrays that no node reads
    part : whether the graph is a part of another
    states : the names of the first states, of a part
    rows : so many are added to negative indices
    time : the axis of time, once a GRU said which it is
    lengths : the names of the inputs that GRUs take as lengths
    """

    def __init__(self, graph: Any, folder: Path, part: bool = False) -> None:
        self.part = part
        self.states: dict[str, None] = {}
        self.values: dict[str, Any] = {"": None}
        self.types: dict[str, str] = {}
        self.known: dict[str, int] = {}
        self.layers: list[Layer] = []
        self.entry = self.dtype = ""
        self.lead: tuple[Axis, ...] = ()
        self.features: Axis = ()
        self.stage, self.summed = 0, False
        self.source: tuple[Any, int, str, Axis] | None = None
        self.pair: tuple[int, int] | None = None
        self.sums: set[int] = set()
        self.merged: dict[tuple[int, ...], tuple[int, Axis]] = {}
        self.halves: dict[Layer, tuple[Layer, int]] = {}
        self.rows: int | None = None
        self.time: Axis | None = None
        self.lengths: set[str | None] = set()
        for tensor in graph.initializer:
            self.values[tensor.name] = array(tensor, folder)
        for value in graph.input:
            if value.name not in self.values:
                self.values[value.name], self.types[value.name] = _input(value)
        self.unread = {t.name for t in graph.initializer} - _read_names(graph)
        whole = sum(v.nbytes for v in self.values.values() if isinstance(v, np.ndarray))
        self.budget = 16 * whole + MEGABYTE

    def visit(self, node: Node) -> None:
        """Find the values that a node puts out."""
        arguments = [self.values[name] for name in node.inputs]
        results = self._apply(node, arguments)
        results = results if isinstance(results, tuple) else (results,)
        if any(node.outputs[len(results) :]):
            node.refuse(f"has the outputs {node.outputs}, of which only {len(results)} are known")
        for name, value in zip(node.outputs, results, strict=False):
            if name and name in self.values:
                node.refuse(f"makes {name!r} a second time")
            if name:
                self.values[name] = value

    def _apply(self, node: Node, arguments: list[Any]) -> Any:
        running = node.op == "Loop" or any(isinstance(v, Array) for v in arguments)
        layer = LAYERS.get(node.op) if running else None
        if not layer and node.op not in MOVES:
            node.refuse(
                "is no part of an Embedding, a GRU or a Linear layer"
                + ("" if self.part else "; a GRU can be read alone: load(path, node=...)")
            )
        self.spend(node, arguments)
        try:
            found = layer(self, node, *arguments) if layer else None
            return MOVES[node.op](node, self.known, *arguments) if found is None else found
        except NodeError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as e:
            given = ", ".join(kind_of(v) for v in arguments) or "nothing"
            raise NodeError(f"{node.words} has arguments that do not fit: {given}") from e

    def spend(self, node: Node, arguments: list[Any]) -> None:
        """Refuse constants that grow without end."""
        self.budget -= sum(v.nbytes for v in arguments if isinstance(v, np.ndarray))
        if self.budget < 0:
            node.refuse("makes a larger constant than the file holds")

    # the sequence that goes from layer to layer --------------------------------------------------

    def sequence(self, node: Node, v: Any, order: Any = ()) -> Array:
        """Refuse what is not the output of the last layer, or the input of the first."""
        if isinstance(v, Array) and v.kind == "state":
            why = last.reason(self, v)
            return node.refuse(why) if why else last.put(self, node, v)
        rows = isinstance(v, Array) and v.kind == "input" and v.key[1]
        if isinstance(v, Array) and v.kind == "half":
            node.refuse(COMBINED)
        if not isinstance(v, Array) or v.kind not in ("input", "layer") or rows:
            node.refuse("reads something else than the outputs of the layer before")
        if v.kind == "input" and not self.entry:
            self._enter(node, v)
        if v.key != self.latest():
            node.refuse("reads another array than the layer before put out: the graph branches")
        if v.order != order:
            node.refuse("reads rows that are sorted by their lengths")
        if v.flipped or self.pair:
            node.refuse("reads a sequence that runs backwards, or one of two directions alone")
        return v

    def latest(self) -> Any:
        """The key of what the last layer put out."""
        return self.stage or (self.entry, None)

    def open_for_twin(self, node: Node, x: Any, direction: str) -> None:
        """Let a GRU read x, which is new, or was just read by a GRU in the other direction."""
        read = replace(x, flipped=(), by=None) if isinstance(x, Array) else x
        twins = [(read, self.stage, d) for d in ("forward", "reverse") if d != direction]
        if len(twins) == 1 and self.source and self.source[:3] == twins[0] and not self.pair:
            self.features, self.pair = self.source[3], (self.stage, self.stage + 1)
        else:
            self.sequence(node, read, getattr(read, "order", ()))
        self.source = (read, self.stage + 1, direction, self.features)

    def starts(self, first: Any) -> Any:
        """The first state of a layer; of a part of a graph all are one argument."""
        if first and self.part:
            self.states[first[0]] = None
            self.types.pop(first[0], None)
            return None
        return first

    def rows_of(self, state: Array) -> list[tuple[Layer, int]]:
        """The GRU and the direction of each row of a state."""
        return [self.halves.get(layer, (layer, d)) for layer, d in state.key]

    def _enter(self, node: Node, v: Array) -> None:
        axes = self.values[v.key[0]].axes
        self.entry, self.lead = v.key[0], axes
        if self.types[self.entry].startswith("float"):
            self.dtype, self.lead, self.features = self.types[self.entry], axes[:-1], axes[-1]
        if not 1 <= len(self.lead) <= 2:
            node.refuse(f"reads {self.entry!r} of {len(axes)} axes, expected (T, B, .) or (T, .)")

    def put_out(self, node: Node, layer: Layer, features: Axis) -> int:
        """Add a layer; -> the key of its output."""
        for weight in layer.params.values():
            if weight.dtype.name != (self.dtype or weight.dtype.name):
                node.refuse(f"has weights of {weight.dtype}, what it reads is {self.dtype}")
            self.dtype = weight.dtype.name
        self.layers.append(layer)
        self.features = features
        self.stage += 1
        return self.stage

    def check_features(self, node: Node, axis: Axis, width: int) -> None:
        """Refuse what is not all that the layer before puts out, in its order."""
        if axis != self.features:
            node.refuse(
                f"reads {size(axis)} features, which are not the {size(self.features)} that the "
                "layer before puts out, in their order"
            )
        if not fits(axis, width):
            node.refuse(f"reads {size(axis)} features, and has weights for {width}")

    def check_weight(self, node: Node, name: str, v: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Refuse what is not a constant of this shape; a size of -1 may be any."""
        if not isinstance(v, np.ndarray):
            given = isinstance(v, Array) and v.kind == "input"
            node.refuse(
                f"computes its {name} when the model is run, expected a constant"
                + (f": {v.key[0]!r} would have to be an initializer" if given else "")
            )
        found = [n for n in node.inputs if self.values[n] is v]
        which = f"{name} {found[0]!r}" if found else name
        if v.dtype.kind != "f":
            node.refuse(f"has {which} of {v.dtype}, expected numbers of the dtype of its input")
        self.dtype = self.dtype or v.dtype.name
        if v.dtype.name != self.dtype:
            node.refuse(
                f"has weights of {v.dtype}, {which}, beside {self.dtype}; a model here has one "
                "dtype: cast all weights and inputs to it and write the file again"
            )
        if v.ndim != len(shape) or any(
            s not in (-1, n) for s, n in zip(shape, v.shape, strict=True)
        ):
            expected = ", ".join("any" if s < 0 else str(s) for s in shape)
            node.refuse(f"has {name} of shape {v.shape}, expected ({expected})")
        return v


def _read_names(graph: Any) -> set[str]:
    """The names that a graph reads or puts out, the graphs in its nodes among them."""
    inner = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    names = {name for node in graph.node for name in node.input} | {v.name for v in graph.output}
    return names.union(*map(_read_names, inner))


def _input(value: Any) -> tuple[Array, str]:
    """What is known of an input of the graph, and its dtype."""
    kind, name = value.type.tensor_type, value.name
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        raise ValueError(f"the input {name!r} does not say how many axes it has")
    axes = []
    for i, dim in enumerate(kind.shape.dim):
        axes.append((Atom(f"{name}[{i}]", _size(dim) or f"{name}[{i}]"),))
    return Array("input", (name, None), tuple(axes)), dtype_name(kind.elem_type)


def _size(dim: Any) -> int | str:
    return int(dim.dim_value) if dim.HasField("dim_value") else str(dim.dim_param)
