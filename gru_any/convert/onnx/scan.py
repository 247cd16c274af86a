"""GRUs with resets, which the operator GRU lacks: it runs one step, in the body of a Scan.

So a state can be replaced before each step, and a row that has ended keeps its state; the operator
needs no lengths.
"""

from typing import TYPE_CHECKING

import numpy as np

from ...nn.gru import GRU
from .check import library
from .functions import write_functions
from .graph import Graph, Written

if TYPE_CHECKING:
    from onnx import GraphProto


class ScanGraph(Graph):
    """A graph in the making whose GRUs have resets.

    lengths, start : bool
        Whether the graph has these inputs.
    """

    def __init__(self, dtype: str, layers: list[Written], lengths: bool, start: bool) -> None:
        super().__init__(dtype, layers, lengths=False)
        if lengths:
            self.inputs.append(self.declare("lengths", "int32", ["B"]))
        self.inputs.append(self.declare("resets", "bool", self.lead))
        self.started, self.start = start, ""  # "": from zeros
        self.zero = self.weight("zero", np.zeros((1, 1, 1), dtype))
        resets = self.node("Transpose", ["resets"], perm=[1, 0]) if self.batch_first else "resets"
        self.alive = self._alive(resets) if lengths else ""
        # (T, B, 1), of steps that are read forward, and from the end
        self.resets = {"": self._column(resets)}
        if any("_reverse" in layer.suffixes for layer in layers if isinstance(layer, GRU)):
            self.resets["_reverse"] = self._column(self._before(resets))

    def _column(self, flags: str) -> str:
        return self.node("Unsqueeze", [flags, self.numbers(2)])

    def _alive(self, like: str) -> str:
        """Add which steps are within the lengths, (T, B, 1)."""
        zero, one = (self.weight(f"number{n}", np.array(n, np.int64)) for n in (0, 1))
        T = self.node("Gather", [self.node("Shape", [like]), zero], axis=0)
        steps = self.node("Unsqueeze", [self.node("Range", [zero, T, one]), self.numbers(1)])
        lengths = self.node("Cast", ["lengths"], to=library().TensorProto.INT64)
        return self._column(self.node("Less", [steps, lengths]))

    def _before(self, resets: str) -> str:
        """Add before which steps the reading from the end leaves an episode: those before a reset.

        A reset beyond the length of a row is none.
        """
        if self.alive:
            alive = self.node("Squeeze", [self.alive, self.numbers(2)])
            resets = self.node("And", [resets, alive])
        none = self.weight("none", np.zeros((1, 1), bool))
        rows = self.node("Slice", [self.node("Shape", [resets]), self.numbers(1), self.numbers(2)])
        longer = self.node("Concat", [resets, self.node("Expand", [none, rows])], axis=0)
        ends = self.numbers(1), self.numbers(np.iinfo(np.int64).max), self.numbers(0)
        return self.node("Slice", [longer, *ends])

    def gru(self, gru: GRU, x: str, prefix: str, mark: str) -> str:
        """Add a GRU, and the state that its resets set."""
        if self.started:
            self.start = f"start{mark}"
            rows = gru.num_layers * len(gru.suffixes)
            self.inputs.append(self.declare(self.start, self.dtype, [rows, "B", gru.hidden_size]))
        return super().gru(gru, x, prefix, mark)

    def layer(self, gru: GRU, i: int, inputs: list[str], last: str, prefix: str) -> str:
        """Add one layer of a GRU; return its output (T, B, D*H)."""
        (x, h0), D = inputs, len(gru.suffixes)
        ys, states = [], []
        for d, suffix in enumerate(gru.suffixes):
            name = f"{prefix}l{i}{suffix}"
            h = self.rows(h0, d, d + 1) if D > 1 else h0
            k = i * D + d
            start = self.rows(self.start, k, k + 1) if self.start else self.zero
            ys.append(self._direction(gru, i, suffix, x, h, start, name, prefix))
            states.append(f"{name}.last")
        self.node("Concat", states, last, axis=0)
        return ys[0] if D == 1 else self.node("Concat", ys, axis=2)

    def _direction(
        self, gru: GRU, i: int, suffix: str, x: str, h: str, start: str, name: str, prefix: str
    ) -> str:
        """Add the steps of a layer in one direction; return its output (T, B, H)."""
        given = {"x": x, "reset": self.resets[suffix]}
        given |= {"alive": self.alive} if self.alive else {}
        way, y = [int(suffix == "_reverse")], f"{name}.Y"
        self.node(
            "Scan",
            [h, *given.values()],
            f"{name}.last {y}",
            body=self._body(gru, i, suffix, start, name, prefix),
            num_scan_inputs=len(given),
            scan_input_directions=way * len(given),
            scan_output_directions=way,
        )
        return y

    def _body(
        self, gru: GRU, i: int, suffix: str, start: str, name: str, prefix: str
    ) -> "GraphProto":
        """Return one step: from h (1, B, H), x (B, I) and flags (B, 1) to the next h and y."""
        named = ("h", "x", "reset", "alive", "before", "row", "after", "next", "out", "y")
        h, x, reset, alive, before, row, after, following, out, y = (f"{name}.{v}" for v in named)
        make, first = self.helper.make_node, self.numbers(0)
        nodes = [
            make("Where", [reset, start, h], [before]),
            make("Unsqueeze", [x, first], [row]),
            make(
                "GRU",
                [row, *self.weights_of(gru, i, [suffix], prefix), "", before],
                ["", after],
                hidden_size=gru.hidden_size,
                linear_before_reset=int(gru.reset_after),
                **write_functions(gru, 1),
            ),
        ]
        if self.alive:
            nodes.append(make("Where", [alive, after, h], [following]))
            nodes.append(make("Where", [alive, after, self.zero], [out]))
        else:
            following = out = after
        nodes.append(make("Squeeze", [out, first], [y]))
        flags = [reset, alive] if self.alive else [reset]
        inputs = {h: self.dtype, x: self.dtype, **dict.fromkeys(flags, "bool")}
        outputs = dict.fromkeys((following, y), self.dtype)
        declared = [[self.declare(*pair, None) for pair in v.items()] for v in (inputs, outputs)]
        made: GraphProto = self.helper.make_graph(nodes, f"{name}.step", *declared)
        return made
