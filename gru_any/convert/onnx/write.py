"""From layers to an ONNX graph."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ... import arguments
from ...backend import to_numpy
from ...files import write_atomically
from ...nn.chain import Chain
from ...nn.gru import GRU
from ...nn.layers import Dropout, Embedding, Last, Linear
from ...typing import Array, HostArray, Path
from ...version import __version__
from ..cells import refuse_options, refuse_zoneout
from .check import LARGEST, library
from .functions import write_functions
from .gru import DIRECTIONS, swap_gates
from .prove import prove

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto, ValueInfoProto

    Dims: TypeAlias = Sequence[int | str]

OPSET, IR = 14, 7
DTYPES = ("float16", "float32", "float64")
WRITTEN = "activation", "gate_activation", "clip"


Written: TypeAlias = GRU | Embedding | Linear | Last


def write(path: Path, model: GRU | Chain, lengths: bool = True) -> None:
    """See `gru_any.convert.onnx.save`."""
    content = build(model, arguments.flag("lengths", lengths))
    prove(content, model, lengths)
    write_atomically(path, content)


def build(model: GRU | Chain, lengths: bool = True) -> bytes:
    """Return the content of the file."""
    layers = _layers(model)
    onnx, graph = library(), Graph(model.dtype, layers, lengths)
    name = "x"
    for i, layer in enumerate(layers):
        prefix, mark = (f"{i}.", f"_{len(graph.grus)}") if isinstance(model, Chain) else ("", "")
        if isinstance(layer, GRU):
            name = graph.gru(layer, name, prefix, mark)
        elif isinstance(layer, Embedding):
            table = graph.weight(f"{prefix}weight", layer.params["weight"])
            name = graph.node("Gather", [table, name], axis=0)
        elif isinstance(layer, Last):
            name = graph.last()
        elif isinstance(layer, Linear):
            name = graph.linear(layer, name, prefix)
    graph.node("Identity", [name], "y")
    lead = ["B"] if any(isinstance(layer, Last) for layer in layers) else graph.lead
    graph.outputs.insert(0, graph.declare("y", graph.dtype, [*lead, _width(layers)]))
    made = onnx.helper.make_graph(
        graph.nodes, "gru_any", graph.inputs, graph.outputs, list(graph.weights.values())
    )
    proto = onnx.helper.make_model(
        made,
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR,
        producer_name="gru_any",
        producer_version=__version__,
    )
    return bytes(proto.SerializeToString(deterministic=True))


def _layers(model: GRU | Chain) -> list[Written]:
    """Return the layers to be written; raise where one cannot be."""
    layers = model.layers if isinstance(model, Chain) else (model,)
    for layer in layers:
        if type(layer) not in (GRU, Embedding, Linear, Dropout, Last):
            raise TypeError(
                f"cannot write {type(layer).__name__}, only GRU, or a Chain of Embedding, GRU, "
                "Linear, Dropout and Last"
            )
    if model.dtype not in DTYPES:
        raise TypeError(
            f"cannot write {model.dtype}, only {', '.join(DTYPES)}: model.to(dtype=...)"
        )
    grus = [layer for layer in layers if isinstance(layer, GRU)]
    if not grus:
        raise ValueError("the model has no GRU; there is nothing to write")
    for gru in grus:
        refuse_options(gru, *WRITTEN)
        refuse_zoneout(gru)
    if len({g.batch_first for g in grus}) > 1:
        raise ValueError("some GRUs are batch_first and some are not, expected the same for all")
    if sum(to_numpy(p).nbytes for p in model.params.values()) > LARGEST - 2**20:
        raise ValueError("the model has more than 2 GB, which do not fit into one ONNX file")
    return [layer for layer in layers if isinstance(layer, Written)]


def _width(layers: list[Written]) -> int:
    """Return how many features the last layer puts out."""
    last = [layer for layer in layers if not isinstance(layer, Last)][-1]
    if isinstance(last, GRU):
        return last.hidden_size * len(last.suffixes)
    return last.out_features if isinstance(last, Linear) else last.size


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

    def declare(self, name: str, dtype: str, shape: "Dims") -> "ValueInfoProto":
        """Return an input or output of the graph."""
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
            ends = [self.numbers(i * D), self.numbers(i * D + D), self.numbers(0)]
            h = self.node("Slice", [h0, *ends]) if L > 1 else h0
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
        top = self.node("Slice", [h_n, *(self.numbers(n) for n in (end - D, end, 0))])
        return self.node(
            "Reshape",
            [self.node("Transpose", [top], perm=[1, 0, 2]), self.numbers(0, D * H)],
        )

    def layer(self, gru: GRU, i: int, inputs: list[str], last: str, prefix: str) -> str:
        """Add one layer of a GRU; return its output (T, B, D*H)."""

        def stacked(*names: str) -> HostArray:
            arrays = [[to_numpy(gru.params[f"{n}_l{i}{s}"]) for n in names] for s in gru.suffixes]
            return np.stack([np.concatenate([swap_gates(v) for v in both]) for both in arrays])

        W = self.weight(f"{prefix}W_l{i}", stacked("weight_ih"))
        R = self.weight(f"{prefix}R_l{i}", stacked("weight_hh"))
        B = ""
        if gru.bias:
            both = stacked("bias_ih", "bias_hh") if gru.reset_after else stacked("bias_ih")
            both = both if gru.reset_after else np.concatenate((both, np.zeros_like(both)), axis=1)
            B = self.weight(f"{prefix}B_l{i}", both)
        y = self.node(
            "GRU",
            [inputs[0], W, R, B, self.lengths, inputs[1]],
            f"{prefix}Y_l{i} {last}",
            hidden_size=gru.hidden_size,
            direction=next(k for k, v in DIRECTIONS.items() if v == gru.suffixes),
            linear_before_reset=int(gru.reset_after),
            **write_functions(gru),
        )
        if len(gru.suffixes) == 1:
            return self.node("Squeeze", [y, self.numbers(1)])
        y = self.node("Transpose", [y], perm=[0, 2, 1, 3])
        return self.node("Reshape", [y, self.numbers(0, 0, 2 * gru.hidden_size)])
