"""An ONNX graph in the making, and what each layer adds to it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ...backend import to_numpy
from ...nn.gru import GRU
from ...nn.layers import Embedding, Last, Linear
from ...typing import Array, HostArray
from .check import library
from .functions import write_functions
from .gru import DIRECTIONS, swap_gates

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto, ValueInfoProto

    Dims: TypeAlias = Sequence[int | str]

Written: TypeAlias = GRU | Embedding | Linear | Last


class Graph:
    """A graph in the making."""

    def __init__(self, dtype: str, layers: list[Written], lengths: bool = True) -> None:
        self.helper, self.dtype = library().helper, dtype
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, TensorProto] = {}
        self.outputs: list[ValueInfoProto] = []
        self.grus: list[GRU] = []  # those added so far
        first = next(layer for layer in layers if isinstance(layer, GRU))
        self.batch_first = first.batch_first
        self.lead = ["B", "T"] if self.batch_first else ["T", "B"]
        head = layers[0]
        if isinstance(head, Embedding):
            x = self.declare("x", "int64", self.lead)
        else:
            width = head.in_features if isinstance(head, Linear) else first.input_size
            x = self.declare("x", dtype, [*self.lead, width])
        self.inputs, self.lengths = [x], "lengths" if lengths else ""
        if not lengths:
            return
        self.inputs.append(self.declare("lengths", "int32", ["B"]))
        # a row of length 0 keeps its state, of which the operator says nothing
        none = self.weight("none", np.zeros(1, np.int32))
        self.empty = self.node(
            "Unsqueeze", [self.node("Equal", ["lengths", none]), self.numbers(1)]
        )

    def declare(self, name: str, dtype: str, shape: "Dims | None") -> "ValueInfoProto":
        """Return an input or output of a graph; shape None: any."""
        kind = self.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        declared: ValueInfoProto = self.helper.make_tensor_value_info(name, kind, shape)
        return declared

    def node(self, op: str, inputs: list[str], output: str = "", **attributes: object) -> str:
        """Add an operation; return the name of its (first) output."""
        outputs = output.split() or [f"{op}_{len(self.nodes)}"]
        self.nodes.append(
            self.helper.make_node(op, inputs, outputs, f"{op}_{len(self.nodes)}", **attributes)
        )
        return outputs[0]

    def weight(self, name: str, v: Array) -> str:
        """Add an array; return its name."""
        array = np.ascontiguousarray(to_numpy(v))
        self.weights[name] = library().numpy_helper.from_array(array, name)
        return name

    def numbers(self, *values: int) -> str:
        """Add integers for a shape or an axis; return their name."""
        return self.weight("numbers" + "_".join(map(str, values)), np.array(values, np.int64))

    def linear(self, layer: Linear, x: str, prefix: str) -> str:
        """Add a Linear layer; return its output."""
        weight = self.weight(f"{prefix}weight", to_numpy(layer.params["weight"]).T)
        y = self.node("MatMul", [x, weight])
        if not layer.bias:
            return y
        return self.node("Add", [y, self.weight(f"{prefix}bias", layer.params["bias"])])

    def gru(self, gru: GRU, x: str, prefix: str, mark: str) -> str:
        """Add a GRU of any number of layers, its first and its last state; return y."""
        D, L, H = len(gru.suffixes), gru.num_layers, gru.hidden_size
        h0, h_n = f"h0{mark}", f"h_n{mark}"
        self.inputs.append(self.declare(h0, self.dtype, [L * D, "B", H]))
        self.outputs.append(self.declare(h_n, self.dtype, [L * D, "B", H]))
        self.grus.append(gru)
        y, states = self.node("Transpose", [x], perm=[1, 0, 2]) if self.batch_first else x, []
        for i in range(L):
            h = self.rows(h0, i * D, i * D + D) if L > 1 else h0
            last = f"{h_n}.{i}" if L > 1 or self.lengths else h_n
            y = self.layer(gru, i, [y, h], last, prefix)
            states.append(last)
        if L > 1:
            last = self.node("Concat", states, "" if self.lengths else h_n, axis=0)
        if self.lengths:
            self.node("Where", [self.empty, h0, last], h_n)
        return self.node("Transpose", [y], perm=[1, 0, 2]) if self.batch_first else y

    def last(self) -> str:
        """Add the last states of the top layer of the GRU just added; return (B, D*H)."""
        gru = self.grus[-1]
        D, H, end = len(gru.suffixes), gru.hidden_size, gru.num_layers * len(gru.suffixes)
        h_n = self.outputs[-1].name
        top = self.node("Transpose", [self.rows(h_n, end - D, end)], perm=[1, 0, 2])
        return self.node("Reshape", [top, self.numbers(0, D * H)])

    def rows(self, states: str, start: int, stop: int) -> str:
        """Add the states of some layers and directions, out of (L*D, B, H)."""
        return self.node("Slice", [states, *(self.numbers(n) for n in (start, stop, 0))])

    def layer(self, gru: GRU, i: int, inputs: list[str], last: str, prefix: str) -> str:
        """Add one layer of a GRU; return its output (T, B, D*H)."""
        x, h = inputs
        y = self.node(
            "GRU",
            [x, *self.weights_of(gru, i, gru.suffixes, prefix), self.lengths, h],
            f"{prefix}Y_l{i} {last}",
            hidden_size=gru.hidden_size,
            direction=next(k for k, v in DIRECTIONS.items() if v == gru.suffixes),
            linear_before_reset=int(gru.reset_after),
            **write_functions(gru, len(gru.suffixes)),
        )
        if len(gru.suffixes) == 1:
            return self.node("Squeeze", [y, self.numbers(1)])
        y = self.node("Transpose", [y], perm=[0, 2, 1, 3])
        return self.node("Reshape", [y, self.numbers(0, 0, 2 * gru.hidden_size)])

    def weights_of(self, gru: GRU, i: int, suffixes: list[str], prefix: str) -> list[str]:
        """Add the operator's W, R and B of these directions of a layer; B is "" without biases."""
        mark = "".join(suffixes) if len(suffixes) < len(gru.suffixes) else ""

        def stacked(*names: str) -> HostArray:
            arrays = [[to_numpy(gru.params[f"{n}_l{i}{s}"]) for n in names] for s in suffixes]
            return np.stack([np.concatenate([swap_gates(v) for v in both]) for both in arrays])

        arrays = {"W": stacked("weight_ih"), "R": stacked("weight_hh")}
        if gru.bias:
            both = stacked("bias_ih", "bias_hh") if gru.reset_after else stacked("bias_ih")
            both = both if gru.reset_after else np.concatenate((both, np.zeros_like(both)), axis=1)
            arrays["B"] = both
        names = [self.weight(f"{prefix}{name}_l{i}{mark}", v) for name, v in arrays.items()]
        return names if gru.bias else [*names, ""]
