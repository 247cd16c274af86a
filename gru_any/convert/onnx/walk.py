"""The symbolic execution of a graph: the values so far, and the checks all layers share."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...typing import HostArray, Shape
from .axes import (
    ROWS,
    Atom,
    Axis,
    FirstState,
    FoundLayer,
    Size,
    SymbolicArray,
    Value,
    is_units,
    size,
    symbolic,
)
from .check import Node, array, dtype_name

if TYPE_CHECKING:
    from onnx import GraphProto, ValueInfoProto

MEGABYTE = 2**20
ONE_ROW = Atom(ROWS, 1)
COMBINED = (
    "adds, averages, joins or takes apart what a GRU puts out, as no layer here does; read the GRU "
    "alone, load(path, node=...), and do so with its y, in which the forward half comes first"
)


class Claim(NamedTuple):
    """The number that a node wrote for a free length."""

    number: int
    node: Node


class Source(NamedTuple):
    """The input of the last GRU."""

    read: Value
    stage: int  # of what it put out
    direction: str
    features: Axis  # of what it read


class Output(NamedTuple):
    """The output of a layer: its stage and its axis of features."""

    stage: int
    features: Axis


class Walk:
    """A walk through a graph: a value for each name, and the layers so far.

    Attributes
    ----------
    part : whether the graph is a part of another
    values, types : the value of each name, and the dtype of each input of the graph
    layers : list of FoundLayer
    entry, lead : the name of the input that the layers read, and its axes without the features
    features : the axis of features that the last layer put out
    stage : how many arrays went from layer to layer
    time : the axis of time, once a GRU said which it is
    lengths : the names of the inputs that GRUs take as lengths
    states : the names of the first states, in order, of a part
    claims : by name, the free lengths for which a reshape wrote a number
    proven : names of free lengths, and the number that weights say they are
    summed : whether two biases were added to one
    vocabulary : the number that is added to negative indices
    sums : the stages of sums of two directions
    source : what the last GRU read
    pair : the stages of two GRUs that read the same in both directions
    merged : the output of a layer by the stages of its two directions
    halves : the bidirectional layer and the direction that a GRU became
    unread : the names of arrays that no node reads
    budget, room : how many bytes may still be computed with, and kept
    """

    def __init__(self, graph: "GraphProto", folder: Path, part: bool = False) -> None:
        self.part = part
        self.values: dict[str, Value] = {"": None}
        self.types: dict[str, str] = {}
        self.layers: list[FoundLayer] = []
        self.entry = self.dtype = ""
        self.lead: tuple[Axis, ...] = ()
        self.features: Axis = ()
        self.stage, self.summed = 0, False
        self.time: Axis | None = None
        self.lengths: set[str | None] = set()
        self.states: dict[str, None] = {}
        self.claims: dict[str, Claim] = {}
        self.proven: set[tuple[str, int]] = set()
        self.vocabulary: int | None = None
        self.sums: set[int] = set()
        self.source: Source | None = None
        self.pair: tuple[int, int] | None = None
        self.merged: dict[tuple[int, ...], Output] = {}
        self.halves: dict[FoundLayer, tuple[FoundLayer, int]] = {}
        for tensor in graph.initializer:
            self.values[tensor.name] = array(tensor, folder)
        for value in graph.input:
            if value.name not in self.values:
                self.values[value.name], self.types[value.name] = _input(value)
        self.unread = {t.name for t in graph.initializer} - _read_names(graph)
        whole = sum(v.nbytes for v in self.values.values() if isinstance(v, np.ndarray))
        self.budget = 16 * whole + MEGABYTE
        self.room = 2 * whole + MEGABYTE

    def spend(self, node: Node, arguments: Sequence[object]) -> None:
        """Refuse a node once the constants read exceed the budget, which bounds their growth."""
        self.budget -= sum(v.nbytes for v in arguments if isinstance(v, np.ndarray))
        if self.budget < 0:
            node.refuse("makes a larger constant than the file holds")

    def keep(self, node: Node, results: Sequence[object]) -> None:
        """Refuse a node once the constants kept exceed the room for them; views take none."""
        self.room -= sum(v.nbytes for v in results if isinstance(v, np.ndarray) and v.base is None)
        if self.room < 0:
            node.refuse("makes larger constants than the file holds")

    # the sequence that goes from layer to layer --------------------------------------------------

    def sequence(self, node: Node, v: Value, sorted_rows: bool = False) -> SymbolicArray:
        """Return the input of a layer: only the last layer's output or the first input."""
        if isinstance(v, SymbolicArray) and v.kind == "state":
            why = self.reason_against_last(v)
            return node.refuse(why) if why else self.add_last(v)
        if isinstance(v, SymbolicArray) and v.kind == "half":
            node.refuse(COMBINED)
        rows = isinstance(v, SymbolicArray) and v.kind == "input" and v.key[1]
        if not isinstance(v, SymbolicArray) or v.kind not in ("input", "layer") or rows:
            node.refuse("reads something else than the outputs of the layer before")
        if v.kind == "input" and not self.entry:
            self._enter(node, v)
        if v.key != self.latest():
            node.refuse("reads another array than the layer before put out: the graph branches")
        if v.order and not sorted_rows:
            node.refuse("reads rows that are sorted by their lengths")
        if v.flipped or self.pair:
            node.refuse("reads a sequence that runs backwards, or one of two directions alone")
        return v

    def latest(self) -> int | tuple[str, None]:
        """Return the key of what the last layer put out."""
        return self.stage or (self.entry, None)

    def open_for_twin(self, node: Node, x: Value, direction: str) -> None:
        """Check that a GRU may read x: nothing has, or only the GRU of the other direction."""
        read = replace(x, flipped=(), by=None) if isinstance(x, SymbolicArray) else x
        twins = [(read, self.stage, d) for d in ("forward", "reverse") if d != direction]
        if len(twins) == 1 and self.source and self.source[:3] == twins[0] and not self.pair:
            self.features, self.pair = self.source.features, (self.stage, self.stage + 1)
        else:
            self.sequence(node, read, sorted_rows=True)
        self.source = Source(read, self.stage + 1, direction, self.features)

    def _enter(self, node: Node, v: SymbolicArray) -> None:
        self.entry = v.key[0]
        axes = self.lead = symbolic(self.values[self.entry]).axes
        if self.types[self.entry].startswith("float"):
            self.dtype, self.lead, self.features = self.types[self.entry], axes[:-1], axes[-1]
        if not 1 <= len(self.lead) <= 2:
            node.refuse(f"reads {self.entry!r} of {len(axes)} axes, expected (T, B, .) or (T, .)")

    def put_out(self, node: Node, layer: FoundLayer, features: Axis) -> int:
        """Add a layer of the dtype of the others; return the key of its output."""
        for weight in layer.params.values():
            if weight.dtype.name != (self.dtype or weight.dtype.name):
                node.refuse(f"has weights of {weight.dtype}, what it reads is {self.dtype}")
            self.dtype = weight.dtype.name
        return self._add(layer, features)

    def _add(self, layer: FoundLayer, features: Axis) -> int:
        self.layers.append(layer)
        self.features = features
        self.stage += 1
        return self.stage

    def check_features(self, node: Node, axis: Axis, width: int) -> None:
        """Refuse features that are not all those of the layer before, in their order."""
        if axis != self.features:
            node.refuse(
                f"reads {size(axis)} features, which are not the {size(self.features)} that the "
                "layer before puts out, in their order"
            )
        if not self.fits(axis, width):
            node.refuse(f"reads {size(axis)} features, and has weights for {width}")

    def fits(self, axis: Axis, wanted: int) -> bool:
        """Return whether an axis has the length that weights ask for; a free axis takes it on."""
        found = size(axis)
        if not isinstance(found, Size):
            return found == wanted
        self.proven |= {(name, wanted) for name in found.names if len(axis) == 1}
        return True

    def check_weight(self, node: Node, name: str, v: Value, shape: Shape) -> HostArray:
        """Return a constant of this shape, in which a size of -1 may be any; refuse others."""
        if not isinstance(v, np.ndarray):
            given = isinstance(v, SymbolicArray) and v.kind == "input" and v.key[0]
            node.refuse(
                f"computes its {name} when the model is run, expected a constant"
                + (f": {given!r} would have to be an initializer" if given else "")
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

    # states --------------------------------------------------------------------------------------

    def first_state(self, first: FirstState | None) -> FirstState | None:
        """Return the first state of a layer; of a part of a graph all are one argument."""
        if first and self.part:
            self.states[first.name] = None
            self.types.pop(first.name, None)
            return None
        return first

    def rows_of(self, state: SymbolicArray) -> list[tuple[FoundLayer, int]]:
        """Return the GRU and the direction of each row of a state."""
        return [self.halves.get(layer, (layer, d)) for layer, d in state.key]

    def add_last(self, state: SymbolicArray) -> SymbolicArray:
        """Add a layer Last whose output is this state."""
        stage = self._add(FoundLayer("Last", {}, {}), state.axes[-1])
        return SymbolicArray("layer", stage, state.axes)

    def reason_against_last(self, v: SymbolicArray) -> str:
        """Return why a state is not what a layer Last would put out; empty if it is."""
        gru, rows = self.layers[-1], self.rows_of(v)
        if self.pair or gru.kind != "GRU":
            return "reads states, though the layer before is no GRU, or one of two directions alone"
        D = 1 + gru.settings["bidirectional"]
        if rows != [(gru, d) for d in range(D)]:
            return (
                "reads states that are not those of the last GRU, of both directions if it has "
                "two, forward first"
            )
        if v.order:
            return "reads rows that are sorted by their lengths"
        features = tuple(atom for atom in v.axes[-1] if atom != ONE_ROW)
        batch = [axis for axis in self.lead if axis != self.time and axis]
        lead = [axis for axis in v.axes[:-1] if axis and axis != (ONE_ROW,)]
        whole = features[:-1] == (Atom(ROWS, 2),) * (D - 1)
        if not is_units(features) or not whole or lead != batch:
            return "reads states whose axes are not batch, and directions and units side by side"
        return ""


def _read_names(graph: "GraphProto") -> set[str]:
    """Return the names that a graph and the graphs within its nodes read or put out."""
    inner = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    names = {name for node in graph.node for name in node.input} | {v.name for v in graph.output}
    return names.union(*map(_read_names, inner))


def _input(value: "ValueInfoProto") -> tuple[SymbolicArray, str]:
    """Return the symbolic array of an input of the graph, and its dtype."""
    kind, name = value.type.tensor_type, value.name
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        raise ValueError(f"the input {name!r} does not say how many axes it has")
    axes: list[Axis] = []
    for i, dim in enumerate(kind.shape.dim):
        length = dim.dim_value if dim.HasField("dim_value") else dim.dim_param
        axes.append((Atom(f"{name}[{i}]", length or f"{name}[{i}]"),))
    return SymbolicArray("input", (name, None), tuple(axes)), dtype_name(kind.elem_type)
