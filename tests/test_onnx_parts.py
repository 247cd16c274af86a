"""Parts of larger graphs, graphs that end in a last state, and what messages say."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import require
from test_onnx import close, session
from test_onnx_changed import MODELS, change

from gru_any import GRU, Last, Linear
from gru_any.convert import onnx as convert

onnx = require("onnx")
helper, numpy_helper = onnx.helper, onnx.numpy_helper
INTERNAL = re.compile(
    r"\b(Atom|SymbolicArray|Size|FoundLayer|FirstState|Order|Claim|Zeros|Full|Positive|Range|Step|Before|Sum|Product|Function|Cell)\("
    r"|object at 0x|object has no attribute|<class|NoneType|\bAny\b"
)


# messages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_messages_speak_of_the_graph(tmp_path, name):
    """No message shows how this library keeps what it reads."""
    rng, messages = random.Random(1), set()
    convert.save(tmp_path / "good.onnx", MODELS[name]())
    for _ in range(150):
        proto = onnx.load(tmp_path / "good.onnx")
        change(proto, rng)
        onnx.save(proto, tmp_path / "changed.onnx")
        try:
            convert.load(tmp_path / "changed.onnx")
        except ValueError as e:
            messages.add(str(e))
    assert len(messages) > 30
    assert not [m for m in messages if INTERNAL.search(m)]


# graphs to be read -------------------------------------------------------------------------------

T, B, I, H = 6, 3, 4, 5


class Graph:
    """Nodes, weights and inputs, collected one by one."""

    def __init__(self, opset=14):
        self.opset, self.rng = opset, np.random.default_rng(0)
        self.nodes, self.weights, self.inputs = [], {}, {}

    def input(self, name, array, shape=None):
        self.inputs[name] = (np.asarray(array), shape or list(np.shape(array)))
        return name

    def x(self, shape=("T", "B", I)):
        sizes = {"T": T, "B": B, "I": I}
        v = self.rng.standard_normal([sizes.get(s, s) for s in shape]).astype("f4")
        return self.input("x", v, shape)

    def weight(self, *shape, name=None, dtype="f4"):
        return self.array(self.rng.uniform(-1, 1, shape).astype(dtype), name)

    def array(self, v, name=None):
        name = name or f"w{len(self.weights)}"
        self.weights[name] = np.asarray(v)
        return name

    def ints(self, *values):
        return self.array(np.array(values, "i8"))

    def op(self, kind, *inputs, outputs=1, name="", **attributes):
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name, **attributes))
        return names[0] if outputs == 1 else names

    def gru(self, x, width=I, lengths="", h0="", direction="forward", name="", units=H, **more):
        """-> Y and Y_h."""
        D = 1 + (direction == "bidirectional")
        arrays = (D, 3 * units, width), (D, 3 * units, units), (D, 6 * units)
        weights = [more.pop(k, None) or self.weight(*a) for k, a in zip("WRB", arrays, strict=True)]
        more = {"linear_before_reset": 1} | more
        return self.op(
            "GRU", x, *weights, lengths, h0, outputs=2, name=name, hidden_size=units,
            direction=direction, **more,
        )  # fmt: skip

    def flat(self, Y, D=1):
        """Y (T, D, B, H) -> (T, B, D*H)."""
        if D == 1:
            return self.op("Squeeze", Y, self.ints(1))
        turned = self.op("Transpose", Y, perm=[0, 2, 1, 3])
        return self.op("Reshape", turned, self.ints(0, 0, -1))

    def proto(self, *outputs):
        kind = helper.np_dtype_to_tensor_dtype
        graph = helper.make_graph(
            self.nodes,
            "g",
            [
                helper.make_tensor_value_info(k, kind(v.dtype), s)
                for k, (v, s) in self.inputs.items()
            ],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            [numpy_helper.from_array(v, k) for k, v in self.weights.items()],
        )
        made = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8
        )
        return onnx.shape_inference.infer_shapes(made)

    def run(self, *outputs):
        feed = {k: v for k, (v, _) in self.inputs.items()}
        return session(self.proto(*outputs)).run(list(outputs), feed)

    def load(self, folder, *outputs, **options):
        onnx.save(self.proto(*outputs), folder / "g.onnx")
        return convert.load(folder / "g.onnx", **options)


OPSETS = pytest.mark.parametrize("opset", [14, 17])


def units(Y):
    """Y (T, D, B, H) -> (T, B, D*H)."""
    return Y.transpose(0, 2, 1, 3).reshape(len(Y), Y.shape[2], -1)


# one GRU out of a graph --------------------------------------------------------------------------


def large(opset, direction="bidirectional"):
    """Two convolutions, two GRUs stacked, an attention of sorts, a GRU alone."""
    g, D = Graph(opset), 1 + (direction == "bidirectional")
    x = g.input("image", g.rng.standard_normal((B, 3, T)).astype("f4"), ["B", 3, "T"])
    x = g.op("Relu", g.op("Conv", x, g.weight(I, 3, 3), kernel_shape=[3], pads=[1, 1]))
    x = g.op("Transpose", x, perm=[2, 0, 1])
    lengths = g.input("count", np.array([6, 2, 4], "i8"), ["B"])
    counts = g.op("Cast", lengths, to=6)
    Y1, h1 = g.gru(x, I, counts, name="/encoder/rnn/GRU", direction=direction)
    again = g.op("Cast", lengths, to=6)
    start = g.op("Tanh", h1)
    Y2, h2 = g.gru(g.flat(Y1, D), D * H, again, start, direction, name="/encoder/rnn/GRU_1")
    soft = g.op("Softmax", g.flat(Y2, D), axis=-1)
    Y3, h3 = g.gru(soft, D * H, name="/encoder/rnn2/GRU")
    g.names = x, start, soft, Y1, h1, Y2, h2, Y3, h3
    return g


@OPSETS
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_one_gru_by_the_name_of_its_node(tmp_path, opset, direction):
    g = large(opset, direction)
    x, start, soft, Y1, h1, Y2, h2, Y3, h3 = g.names
    both = g.op("Identity", g.names[7])
    values = dict(zip(g.names, g.run(*g.names), strict=True))
    for node, entry, first, lengths, Y, h in (
        ("/encoder/rnn/GRU", x, None, [6, 2, 4], Y1, h1),
        ("/encoder/rnn/GRU_1", None, start, [6, 2, 4], Y2, h2),
        ("encoder/rnn2", soft, None, None, Y3, h3),
    ):
        ours = g.load(tmp_path, both, node=node)
        assert isinstance(ours, GRU)
        assert not ours.batch_first
        read = values[entry] if entry else units(values[Y1])
        y, h_n = ours(read, values[first] if first else None, lengths)
        close(y, units(values[Y]))
        close(h_n, values[h])
    with pytest.raises(ValueError, match="is no part of"):
        g.load(tmp_path, both)


@OPSETS
def test_stacked_grus_by_a_prefix(tmp_path, opset, caplog):
    g = large(opset)
    x, start, _, _, h1, Y2, h2, *_ = g.names
    both = g.op("Identity", g.names[7])
    read, first, Y, h_1, h_2 = g.run(x, start, Y2, h1, h2)
    h0 = np.concatenate((np.zeros_like(first), first))
    with pytest.raises(ValueError, match=r"\(Tanh\) is no part .*rnn2/GRU"):
        g.load(tmp_path, both, node="encoder/rnn")
    g.nodes[next(i for i, n in enumerate(g.nodes) if n.op_type == "Tanh")].input[0] = g.input(
        "state", g.rng.standard_normal((2, B, H)).astype("f4")
    )
    read, first, Y, h_1, h_2 = g.run(x, start, Y2, h1, h2)
    with caplog.at_level("INFO", "gru_any.convert"):
        ours = g.load(tmp_path, both, node="encoder/rnn")
    assert f"x is '{x}', the lengths are 'count', the first states '{start}'" in caplog.text
    assert (ours.num_layers, len(ours.suffixes)) == (2, 2)
    h0 = np.concatenate((np.zeros_like(first), first))
    y, h_n = ours(read, h0, [6, 2, 4])
    close(y, units(Y))
    close(h_n, np.concatenate((h_1, h_2)))


def test_one_gru_of_a_file_with_its_weights_beside(tmp_path):
    """As PyTorch's newer exporter names nodes and keeps weights."""
    data = Path(__file__).parent / "data" / "onnx" / "torch_dynamo_chain.onnx"
    whole = convert.load(data)
    (gru,) = (layer for layer in whole.layers if isinstance(layer, GRU))
    alone = convert.load(data, node="node_GRU")
    assert {*alone.params} == {*gru.params}
    assert all(np.array_equal(alone.params[k], v) for k, v in gru.params.items())


def test_names_that_go_round_in_circles(tmp_path):
    g = Graph()
    x, lengths = g.x(), g.input("lengths", np.array([6, 2, 4], "i4"), ["B"])
    once = g.op("Identity", lengths)
    Y, _ = g.gru(x, lengths=once, name="rnn")
    for circle in ({"input": ["v0_0"]}, {"output": ["lengths"]}):
        proto = g.proto(Y)
        for key, names in circle.items():
            getattr(proto.graph.node[0], key)[:] = names
        onnx.save(proto, tmp_path / "g.onnx")
        with pytest.raises(ValueError, match=r"which nothing before it makes|standard"):
            convert.load(tmp_path / "g.onnx", node="rnn")


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ("encoder", r"\((Tanh|Softmax)\) is no part of"),
        ("/encoder/rn", "no GRU node is named '/encoder/rn'"),
        ("Conv", "no GRU node is named"),
        ("", "node is ''"),
    ],
)
def test_names_that_select_no_gru(tmp_path, node, words):
    g = large(14)
    with pytest.raises(ValueError, match=words) as e:
        g.load(tmp_path, g.op("Identity", g.names[7]), node=node)
    assert not node or "'/encoder/rnn/GRU', '/encoder/rnn/GRU_1', '/encoder/rnn2/GRU'" in str(
        e.value
    )


@pytest.mark.parametrize("node", ["gru", "gru_", "/gru"])
def test_a_prefix_up_to_an_underscore(tmp_path, node):
    g = Graph()
    x = g.op("Relu", g.x())
    Y1, _ = g.gru(x, name="gru_1")
    Y2, _ = g.gru(g.flat(Y1), H, name="gru_2")
    g.gru(x, name="gru3")
    read, Y = g.run(x, Y2)
    close(g.load(tmp_path, Y2, node=node)(read)[0], units(Y))


def test_two_grus_that_read_the_same_do_not_stack(tmp_path):
    g = Graph()
    x = g.x()
    g.gru(x, name="a/one"), g.gru(x, name="a/two")
    with pytest.raises(ValueError, match=r"do not stack: none reads .* are 'a/one', 'a/two'"):
        g.load(tmp_path, g.nodes[0].output[0], node="a")


def test_weights_that_are_folded_constants(tmp_path):
    """Through Transpose, Identity, Concat, Slice and Cast; other operators stay unread."""
    g = Graph(17)
    x = g.op("Sigmoid", g.x())
    W = g.op("Transpose", g.op("Identity", g.weight(1, I, 3 * H)), perm=[0, 2, 1])
    R = g.op("Concat", g.weight(1, H, H), g.weight(1, 2 * H, H), axis=1)
    long = g.op("Cast", g.weight(1, 9 * H, dtype="f8"), to=1)
    b = g.op("Slice", long, g.ints(H), g.ints(7 * H), g.ints(1))
    Y, h = g.gru(x, W=W, R=R, B=b, name="gru")
    read, Y_, h_ = g.run(x, Y, h)
    y, h_n = g.load(tmp_path, Y, h, node="gru")(read)
    close(y, units(Y_))
    close(h_n, h_)


def test_layout_one_is_batch_first(tmp_path):
    """onnxruntime has no layout 1; the same weights with layout 0 are the oracle."""
    g = Graph()
    x = g.op("Relu", g.x(("B", "T", I)))
    g.gru(g.op("Transpose", x, perm=[1, 0, 2]), W=g.weight(1, 3 * H, I, name="W"),
          R=g.weight(1, 3 * H, H, name="R"), B=g.weight(1, 6 * H, name="B"))  # fmt: skip
    Y, h = g.nodes[-1].output
    read, Y_, h_ = g.run(x, Y, h)
    g.gru(x, W="W", R="R", B="B", layout=1, name="first")
    ours = g.load(tmp_path, g.nodes[-1].output[0], node="first")
    assert ours.batch_first
    y, h_n = ours(read)
    close(y, units(Y_).swapaxes(0, 1))
    close(h_n, h_)


@pytest.mark.filterwarnings("ignore")  # of PyTorch's exporter
def test_convolution_gru_and_linear_from_pytorch(tmp_path):
    torch = require("torch")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv1d(3, I, 3, padding=1)
            self.rnn = torch.nn.GRU(I, H, 2, bidirectional=True, batch_first=True)
            self.head = torch.nn.Linear(2 * H, 7)

        def forward(self, x):
            return self.head(self.rnn(self.conv(x).transpose(1, 2))[0])

    torch.manual_seed(0)
    net, image = Net().eval(), torch.randn(B, 3, T)
    path = tmp_path / "net.onnx"
    axes = {"image": {0: "B", 2: "T"}}
    torch.onnx.export(net, (image,), path, dynamo=False, input_names=["image"], dynamic_axes=axes)
    ours = convert.load(path, node="rnn")
    assert (ours.num_layers, len(ours.suffixes), ours.batch_first) == (2, 2, False)
    with torch.no_grad():
        read = net.conv(image).transpose(1, 2)
        expected, h_n = net.rnn(read)
    y, h = ours(read.numpy().swapaxes(0, 1).copy())
    close(y.swapaxes(0, 1), expected.numpy())
    close(h, h_n.numpy())
    proto = onnx.load(path)
    nodes = {n.name: n for n in proto.graph.node}
    exposed = [nodes["/rnn/GRU"].input[0], nodes["/rnn/GRU_1"].output[0]]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in exposed)
    _, x, Y = session(proto).run(None, {"image": image.numpy()})
    close(ours(x)[0], units(Y))


# directions --------------------------------------------------------------------------------------


def both(g, x, width, lengths="", turned="", join=-1, h0=("", "")):
    """Two nodes that are one bidirectional layer -> y (T, B, 2*H) and Y_h of each."""
    Yf, hf = g.gru(x, width, lengths, h0[0])
    back = turn(g, x, turned, lengths) if turned else x
    Yb, hb = g.gru(back, width, lengths, h0[1], "forward" if turned else "reverse")
    if turned:
        Yb = turn(g, Yb, turned, lengths)
    if join == 1:
        return g.flat(g.op("Concat", Yf, Yb, axis=1), 2), hf, hb
    return g.op("Concat", g.flat(Yf), g.flat(Yb), axis=join), hf, hb


def turn(g, x, how, lengths):
    if how == "Slice":
        return g.op("Slice", x, g.ints(-1), g.ints(-(2**63)), g.ints(0), g.ints(-1))
    steps = g.op("Cast", lengths, to=7)
    options = {"time_axis": 0, "batch_axis": 1}
    if any(x == n.output[0] for n in g.nodes if n.op_type == "GRU"):  # (T, D, B, H)
        back = g.op("ReverseSequence", g.op("Squeeze", x, g.ints(1)), steps, **options)
        return g.op("Unsqueeze", back, g.ints(1))
    return g.op("ReverseSequence", x, steps, **options)


@OPSETS
@pytest.mark.parametrize("join", [-1, 1])
@pytest.mark.parametrize(("turned", "padded"), [
    ("", False), ("", True), ("Slice", False), ("ReverseSequence", True),
])  # fmt: skip
def test_two_nodes_are_one_bidirectional_layer(tmp_path, opset, turned, padded, join):
    g = Graph(opset)
    x = g.x()
    lengths = g.input("lengths", np.array([6, 2, 4], "i4"), ["B"]) if padded else ""
    y, *h1 = both(g, x, I, lengths, turned, join)
    y, *h2 = both(g, y, 2 * H, lengths, turned, join)
    h = g.op("Concat", *h1, *h2, axis=0)
    y_, h_ = g.run(y, h)
    for outputs in ((y, h), (y,), (h,)):
        ours = g.load(tmp_path, *outputs)
        assert isinstance(ours, GRU)
        assert (ours.num_layers, len(ours.suffixes)) == (2, 2)
        y, h_n = ours(g.inputs["x"][0], None, [6, 2, 4] if padded else None)
        close(y, y_)
        close(h_n, h_)
        y = outputs[0]


@pytest.mark.parametrize("turned", ["", "Slice"])
def test_two_nodes_by_a_prefix(tmp_path, turned):
    g = Graph()
    x = g.op("Sigmoid", g.x())
    state = g.op("Tanh", g.input("state", g.rng.standard_normal((1, B, H)).astype("f4")))
    y, *h = both(g, x, I, turned=turned, h0=(state, ""))
    for i, node in enumerate(n for n in g.nodes if n.op_type == "GRU"):
        node.name = f"rnn/{i}"
    end = g.op("Softmax", y, axis=-1)
    read, first, y_, hf, hb = g.run(x, state, y, *h)
    ours = g.load(tmp_path, end, node="rnn")
    assert len(ours.suffixes) == 2
    y, h_n = ours(read, np.concatenate((first, np.zeros_like(first))))
    close(y, y_)
    close(h_n, np.concatenate((hf, hb)))
    alone, _ = g.load(tmp_path, end, node="rnn/1")(read[::-1].copy() if turned else read)
    close(alone[::-1] if turned else alone, y_[..., H:])


def test_first_states_of_two_nodes(tmp_path):
    """They are rows, in order, of one input; else there is no h0 to give."""
    g = Graph()
    x, h0 = g.x(), g.input("h0", g.rng.standard_normal((2, B, H)).astype("f4"), [2, "B", H])
    halves = [g.op("Slice", h0, g.ints(i), g.ints(i + 1), g.ints(0)) for i in (0, 1)]
    y, *_ = both(g, x, I, h0=halves)
    (y_,) = g.run(y)
    close(g.load(tmp_path, y)(g.inputs["x"][0], g.inputs["h0"][0])[0], y_)
    for h0 in (halves[::-1], (halves[0], "")):
        y, *_ = both(g, x, I, h0=h0)
        del g.nodes[2 : len(g.nodes) - 5]
        with pytest.raises(ValueError, match="whose first states are not rows, in order, of one"):
            g.load(tmp_path, y)


def reverse_first(g, x, lengths):
    Yf, Yb = g.gru(x)[0], g.gru(x, direction="reverse")[0]
    return g.op("Concat", g.flat(Yb), g.flat(Yf), axis=-1)


def two_forward(g, x, lengths):
    return g.op("Concat", g.flat(g.gru(x)[0]), g.flat(g.gru(x)[0]), axis=-1)


def joined_along_time(g, x, lengths):
    Yf, Yb = g.gru(x)[0], g.gru(x, direction="reverse")[0]
    return g.op("Concat", g.flat(Yf), g.flat(Yb), axis=0)


def never_turned_back(g, x, lengths):
    return g.flat(g.gru(turn(g, x, "Slice", ""))[0])


def turned_as_a_whole_though_padded(g, x, lengths):
    Y, _ = g.gru(turn(g, x, "Slice", ""), lengths=lengths)
    return g.flat(turn(g, Y, "Slice", ""))


def turned_by_lengths_that_the_gru_lacks(g, x, lengths):
    Y, _ = g.gru(turn(g, x, "ReverseSequence", lengths))
    return g.flat(turn(g, Y, "ReverseSequence", lengths))


def turned_from_the_second_step(g, x, lengths):
    back = g.op("Slice", x, g.ints(-2), g.ints(-(2**63)), g.ints(0), g.ints(-1))
    return g.flat(g.gru(back)[0])


def turned_up_to_some_step(g, x, lengths):
    back = g.op("Slice", x, g.ints(-1), g.ints(-6), g.ints(0), g.ints(-1))
    return g.flat(g.gru(back)[0])


def turned_features(g, x, lengths):
    back = g.op("Slice", x, g.ints(-1), g.ints(-(2**63)), g.ints(2), g.ints(-1))
    return g.flat(g.gru(back)[0])


def other_attributes(g, x, lengths):
    Yf, Yb = g.gru(x)[0], g.gru(x, direction="reverse", linear_before_reset=0)[0]
    return g.op("Concat", g.flat(Yf), g.flat(Yb), axis=-1)


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (
            reverse_first,
            r"\(Concat\) joins two GRUs that are not forward and reverse, in this order",
        ),
        (two_forward, r"\(GRU\) reads another array than the layer before .* branches"),
        (joined_along_time, r"\(Concat\) joins two GRUs that are not .* side by side"),
        (never_turned_back, "is neither what the last layer puts out nor"),
        (turned_as_a_whole_though_padded, "reversed as a whole, and ends them by lengths"),
        (turned_by_lengths_that_the_gru_lacks, "reversed by lengths, and ends them nowhere"),
        (turned_from_the_second_step, r"\(Slice\) reverses something else"),
        (turned_up_to_some_step, r"\(Slice\) reverses something else"),
        (turned_features, r"\(GRU\) reads what is reversed along another axis"),
        (other_attributes, "else of the same attributes and biases"),
    ],
)
def test_two_nodes_that_are_no_layer(tmp_path, graph, words):
    g = Graph()
    lengths = g.input("lengths", np.array([6, 2, 4], "i4"), ["B"])
    end = graph(g, g.x(), lengths)
    with pytest.raises(ValueError, match=words) as e:
        g.load(tmp_path, end)
    assert not INTERNAL.search(str(e.value))


# one result a sequence ---------------------------------------------------------------------------


def squeezed(g, Y, h, D):
    return g.op("Squeeze", h, g.ints(0))


def picked(g, Y, h, D):
    return g.op("Gather", h, g.array(np.array(-1)), axis=0)


def last_step(g, Y, h, D):
    return g.op("Gather", g.flat(Y), g.array(np.array(-1)), axis=0)


def last_step_of_rows(g, Y, h, D):
    turned = g.op("Transpose", g.flat(Y), perm=[1, 0, 2])
    return g.op("Gather", turned, g.array(np.array(-1)), axis=1)


def cut_out(g, Y, h, D):
    end = g.op("Slice", Y, g.ints(-1), g.ints(2**63 - 1), g.ints(0), g.ints(1))
    return g.op("Squeeze", end, g.ints(0, 1))


def with_one_step(g, Y, h, D):
    return g.op("Gather", g.flat(Y), g.ints(-1), axis=0)


def first_step(g, Y, h, D):
    return g.op("Gather", g.flat(Y), g.array(np.array(0)), axis=0)


def kept_as_one_layer(g, Y, h, D):
    return g.op("Gather", h, g.ints(0), axis=0)


def both_picked(g, Y, h, D):
    rows = [g.op("Gather", h, g.array(np.array(i)), axis=0) for i in (-2, -1)]
    return g.op("Concat", *rows, axis=-1)


def both_cut(g, Y, h, D):
    rows = [g.op("Slice", h, g.ints(i), g.ints(i + 1), g.ints(0)) for i in (0, 1)]
    return g.op("Squeeze", g.op("Concat", *rows, axis=2), g.ints(0))


def both_turned(g, Y, h, D):
    return g.op("Reshape", g.op("Transpose", h, perm=[1, 0, 2]), g.ints(-1, 2 * H))


LASTS = [
    (squeezed, "forward"), (squeezed, "reverse"), (picked, "forward"), (last_step, "forward"),
    (last_step_of_rows, "forward"), (cut_out, "forward"), (with_one_step, "forward"),
    (first_step, "reverse"), (kept_as_one_layer, "forward"), (both_picked, "bidirectional"),
    (both_cut, "bidirectional"), (both_turned, "bidirectional"),
]  # fmt: skip


@OPSETS
@pytest.mark.parametrize(("end", "direction"), LASTS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("head", ["", "MatMul", "Gemm"])
def test_the_last_state_as_the_result(tmp_path, opset, end, direction, padded, head):
    g, D = Graph(opset), 1 + (direction == "bidirectional")
    x = g.x()
    lengths = g.input("lengths", np.array([6, 2, 4], "i4"), ["B"]) if padded else ""
    by_place = end in (last_step, last_step_of_rows, cut_out, with_one_step, first_step)
    Y, h1 = g.gru(x, I, lengths, direction=direction)
    Y, h = g.gru(g.flat(Y, D), D * H, lengths, direction=direction)
    y = end(g, Y, h, D)
    if head == "Gemm" and end not in (kept_as_one_layer, with_one_step):  # else of three axes
        y = g.op("Gemm", y, g.weight(7, D * H), g.weight(7), transB=1)
    elif head:
        y = g.op("Add", g.op("MatMul", y, g.weight(D * H, 7)), g.weight(7))
    if padded and by_place:
        with pytest.raises(ValueError, match="picks a last step by its place"):
            g.load(tmp_path, y)
        return
    expected, first, second = g.run(y, h1, h)
    states = g.op("Concat", h1, h, axis=0)
    for outputs in ((y,), (y, states)):
        ours = g.load(tmp_path, *outputs)
        if end is kept_as_one_layer and not head:  # (1, B, H), as states are
            _, last = ours(g.inputs["x"][0], None, [6, 2, 4] if padded else None)
            close((last[-1] if isinstance(last, list) else last)[-1:], expected)
            continue
        kinds = [type(layer) for layer in ours.layers]
        assert kinds == [GRU, Last, Linear][: 2 + bool(head)]
        y_, (h_n,) = ours(g.inputs["x"][0], None, [6, 2, 4] if padded else None)
        close(y_, expected.reshape(y_.shape))
        close(h_n, np.concatenate((first, second)))


def test_the_last_states_of_two_nodes(tmp_path):
    g = Graph()
    x = g.x()
    hf, hb = g.gru(x)[1], g.gru(x, direction="reverse")[1]
    rows = [g.op("Squeeze", h, g.ints(0)) for h in (hf, hb)]
    y = g.op("MatMul", g.op("Concat", *rows, axis=1), g.weight(2 * H, 7))
    (expected,) = g.run(y)
    ours = g.load(tmp_path, y)
    assert [type(layer) for layer in ours.layers] == [GRU, Last, Linear]
    close(ours(g.inputs["x"][0])[0], expected)


@pytest.mark.filterwarnings("ignore")  # of PyTorch's exporter
@pytest.mark.parametrize("result", ["h_n[-1]", "y[:, -1]", "both"])
def test_the_last_state_from_pytorch(tmp_path, result):
    torch = require("torch")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            two = result == "both"
            self.rnn = torch.nn.GRU(I, H, 2, bidirectional=two, batch_first=True)
            self.head = torch.nn.Linear(H * (1 + two), 7)

        def forward(self, x):
            y, h = self.rnn(x)
            if result == "both":
                return self.head(torch.cat((h[-2], h[-1]), -1))
            return self.head(y[:, -1] if "y" in result else h[-1])

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(B, T, I)
    path = tmp_path / "net.onnx"
    torch.onnx.export(
        net, (x,), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "B", 1: "T"}}
    )
    ours = convert.load(path)
    assert [type(layer) for layer in ours.layers] == [GRU, Last, Linear]
    assert ours.batch_first
    close(ours(x.numpy())[0], net(x).detach().numpy())
    (theirs,) = session(str(path)).run(None, {"x": x.numpy()})
    close(ours(x.numpy())[0], theirs)


def sum_of_directions(g, Y, h):
    halves = [g.op("Gather", Y, g.array(np.array(i)), axis=1) for i in (0, 1)]
    return g.op("Add", *halves)


def reduced_sum(g, Y, h):
    return g.op("ReduceSum", Y, g.ints(1), keepdims=0)


def mean_of_split_halves(g, Y, h):
    parts = g.op("Split", g.flat(Y, 2), outputs=2, axis=-1)
    return g.op("Mul", g.op("Add", *parts), g.array(np.float32(0.5)))


def half_of_the_features(g, Y, h):
    return g.op("Slice", g.flat(Y, 2), g.ints(0), g.ints(H), g.ints(2))


def sum_of_states(g, Y, h):
    return g.op("Add", *(g.op("Gather", h, g.array(np.array(i)), axis=0) for i in (0, 1)))


def last_step_of_both(g, Y, h):
    return g.op("Gather", g.flat(Y, 2), g.array(np.array(-1)), axis=0)


def mean_over_time(g, Y, h):
    return g.op("ReduceMean", g.flat(Y, 2), axes=[0])


def one_of_two_states(g, Y, h):
    return g.op("MatMul", g.op("Gather", h, g.array(np.array(-1)), axis=0), g.weight(H, 7))


def states_in_another_order(g, Y, h):
    rows = [g.op("Gather", h, g.array(np.array(i)), axis=0) for i in (1, 0)]
    return g.op("MatMul", g.op("Concat", *rows, axis=-1), g.weight(2 * H, 7))


def states_mixed_with_the_batch(g, Y, h):
    return g.op("MatMul", g.op("Reshape", h, g.ints(-1, 2 * H)), g.weight(2 * H, 7))


def sum_of_slices(g, Y, h):
    flat, end = g.flat(Y, 2), 2**31 - 1
    parts = [(0, H), (H, end)]
    return g.op("Add", *(g.op("Slice", flat, g.ints(a), g.ints(b), g.ints(2)) for a, b in parts))


def mean_of_slices(g, Y, h):
    return g.op("Div", sum_of_slices(g, Y, h), g.array(np.float32(2)))


def reduced_mean(g, Y, h):
    return g.op("Squeeze", g.op("ReduceMean", Y, axes=[1]), g.ints(1))


def mean_of_two(g, Y, h):
    halves = [g.op("Gather", Y, g.array(np.array(i)), axis=1) for i in (1, 0)]
    return g.op("Mean", *halves)


def sum_and_a_head(g, Y, h):
    return g.op("Add", g.op("MatMul", sum_of_slices(g, Y, h), g.weight(H, 7)), g.weight(7))


def mean_of_states(g, Y, h):
    return g.op("ReduceMean", h, axes=[0], keepdims=0)


SUMS = [
    sum_of_directions, reduced_sum, mean_of_split_halves, sum_of_slices, mean_of_slices,
    reduced_mean, mean_of_two, sum_and_a_head, sum_of_states, mean_of_states,
]  # fmt: skip


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("graph", SUMS)
def test_the_sum_and_the_mean_of_directions(tmp_path, graph, padded):
    g = Graph()
    lengths = g.input("lengths", np.array([6, 2, 4], "i4"), ["B"]) if padded else ""
    x = g.x()
    Y, h = g.gru(x, direction="bidirectional", lengths=lengths)
    end = graph(g, Y, h)
    (expected,) = g.run(end)
    ours = g.load(tmp_path, end)
    y, _ = ours(g.inputs["x"][0], lengths=[6, 2, 4] if padded else None)
    close(y, expected)
    kinds = [type(layer) for layer in ours.layers]
    assert kinds[: kinds.index(Linear)] == ([GRU, Last] if "states" in graph.__name__ else [GRU])


def test_the_sum_of_two_nodes(tmp_path):
    g = Graph()
    x = g.x()
    ends = [g.flat(g.gru(x, direction=way)[0]) for way in ("forward", "reverse")]
    end = g.op("Add", *ends)
    (expected,) = g.run(end)
    ours = g.load(tmp_path, end)
    close(ours(g.inputs["x"][0])[0], expected)
    assert ours.layers[0].suffixes == ["", "_reverse"]


def one_half_twice(g, Y, h):
    first = g.op("Gather", Y, g.array(np.array(0)), axis=1)
    return g.op("Add", first, g.op("Identity", first))


def half_into_a_head(g, Y, h):
    return g.op("MatMul", half_of_the_features(g, Y, h), g.weight(H, 7))


def overlapping_slices(g, Y, h):
    flat = g.flat(Y, 2)
    return g.op("Add", *(g.op("Slice", flat, g.ints(a), g.ints(a + H), g.ints(2)) for a in (0, 1)))


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (one_half_twice, "COMBINED"), (half_into_a_head, "COMBINED"),
        (overlapping_slices, "COMBINED"), (mean_over_time, "COMBINED"),
        (last_step_of_both, "picks a step of a sequence that was read in both directions"),
        (one_of_two_states, "reads states that are not those of the last GRU, of both"),
        (states_in_another_order, "of both directions if it has two, forward first"),
        (states_mixed_with_the_batch, "joins or cuts axes so that they mean nothing here"),
    ],
)  # fmt: skip
def test_results_that_no_layer_has(tmp_path, graph, words):
    g = Graph()
    Y, h = g.gru(g.op("Identity", g.x()), direction="bidirectional", name="rnn")
    end = graph(g, Y, h)
    combined = r"adds, averages, joins or takes apart .* load\(path, node=\.\.\.\)"
    with pytest.raises(ValueError, match=words.replace("COMBINED", combined)) as e:
        g.load(tmp_path, end)
    assert not INTERNAL.search(str(e.value))
    read, Y, h = g.run(g.nodes[0].output[0], Y, h)
    y, h_n = g.load(tmp_path, end, node="rnn")(read)  # the way out
    close(y, units(Y))
    close(h_n, h)


# reshapes to constant lengths --------------------------------------------------------------------


def stacked(g, shape):
    """Two GRUs, the first in both directions; between them a Reshape from (T, B, 2, H)."""
    Y, _ = g.gru(g.x(), direction="bidirectional", name="rnn/0")
    turned = g.op("Transpose", Y, perm=[0, 2, 1, 3])
    return g.gru(g.op("Reshape", turned, g.ints(*shape), name="flat"), 2 * H, name="rnn/1")[1]


@pytest.mark.parametrize("shape", [(T, -1, 2 * H), (T, B, -1), (-1, B, 2 * H), (T, B, 2 * H)])
@pytest.mark.parametrize("node", [None, "rnn"])
def test_a_constant_in_place_of_a_free_length(tmp_path, shape, node):
    """With twice the steps and half the rows the graph would mix them."""
    g = Graph()
    end = stacked(g, shape)
    number, name = (T, "T") if T in shape else (B, "B")
    words = rf"node 'flat' \(Reshape\) gives an axis the constant length {number}, .* '{name}' free"
    with pytest.raises(ValueError, match=words) as e:
        g.load(tmp_path, end, node=node)
    assert ("load(path, node=...)" in str(e.value)) == (node is None)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        (("T", "B", I), (0, 0, -1)),
        (("T", "B", I), (-1, 0, 2 * H)),
        ((T, "B", I), (T, -1, 2 * H)),
        (("T", B, I), (-1, B, 2 * H)),
        ((T, B, I), (T, B, 2 * H)),
        (("T", "B", I), (T, 0, 2 * H)),  # the graph runs for T = 6 alone
    ],
)
def test_a_constant_that_is_the_length(tmp_path, sizes, shape):
    g = Graph()
    Y, _ = g.gru(g.x(sizes), direction="bidirectional")
    turned = g.op("Transpose", Y, perm=[0, 2, 1, 3])
    y = g.op("Reshape", turned, g.ints(*shape))
    ours = g.load(tmp_path, y)
    (expected,) = g.run(y)
    close(ours(g.inputs["x"][0])[0], expected)


def test_a_constant_that_an_array_in_the_middle_proves(tmp_path):
    """PyTorch's exporter declares the arrays between its nodes; h_n has no axis of time."""
    g = Graph()
    end = stacked(g, (T, 0, 2 * H))
    ours = g.load(tmp_path, end)
    close(ours(g.inputs["x"][0])[1][-1], g.run(end)[0])


def test_a_constant_that_weights_prove(tmp_path):
    g = Graph()
    y = g.op("Squeeze", g.gru(g.op("Reshape", g.x(("T", "B", "I")), g.ints(0, 0, I)))[0], g.ints(1))
    ours = g.load(tmp_path, y)
    close(ours(g.inputs["x"][0])[0], g.run(y)[0])


# weights -----------------------------------------------------------------------------------------


def integer_bias(g, x):
    return g.gru(x, B=g.array(np.ones((1, 6 * H), "i4"), "bias"))[0]


def half_bias(g, x):
    return g.gru(x, B=g.weight(1, 6 * H, name="bias", dtype="f2"))[0]


def double_recurrence(g, x):
    return g.gru(x, R=g.weight(1, 3 * H, H, name="rec", dtype="f8"))[0]


def all_double(g, x):
    arrays = [(1, 3 * H, I), (1, 3 * H, H), (1, 6 * H)]
    return g.gru(x, **{k: g.weight(*a, dtype="f8") for k, a in zip("WRB", arrays, strict=True)})[0]


def head_in_double(g, x):
    return g.op("MatMul", g.flat(g.gru(x)[0]), g.weight(H, 2, name="head", dtype="f8"))


def weights_as_inputs(g, x):
    W = g.input("W", g.rng.standard_normal((1, 3 * H, I)).astype("f4"))
    return g.gru(x, W=W)[0]


def weights_of_an_input(g, x):
    W = g.op("Transpose", g.input("W", np.zeros((1, I, 3 * H), "f4")), perm=[0, 2, 1])
    return g.gru(x, W=W)[0]


def quantised(g, x):
    q = g.array(g.rng.integers(-9, 9, (1, 3 * H, I)).astype("i1"), "W_quantized")
    W = g.op("DequantizeLinear", q, g.array(np.float32(0.1)), g.array(np.int8(0), "zero"))
    return g.gru(x, W=W)[0]


def quantised_bias(g, x):
    q = g.array(g.rng.integers(-9, 9, (1, 6 * H)).astype("i4"), "B_quantized")
    return g.gru(x, B=g.op("DequantizeLinear", q, g.array(np.float32(0.1))))[0]


def bfloat16(g, x):
    g.weights["W"] = onnx.helper.make_tensor("W", 16, (1, 3 * H, I), np.zeros(3 * H * I))
    return g.gru(x, W="W")[0]


def an_array_that_nothing_reads(g, x):
    g.weight(1, 3 * H, H, name="left_over")
    return g.gru(x)[0]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (integer_bias, r"\(GRU\) has B 'bias' of int32"),
        (half_bias, r"\(GRU\) has weights of float16, B 'bias', beside float32"),
        (double_recurrence, r"\(GRU\) has weights of float64, R 'rec', beside float32"),
        (all_double, r"\(GRU\) has weights of float64, R 'w\d', beside float32"),
        (head_in_double, r"\(MatMul\) has weights of float64, weight 'head', beside float32"),
        (weights_as_inputs, r"\(GRU\) computes its W .*: 'W' would have to be an initializer"),
        (weights_of_an_input, r"\(GRU\) computes its W .*: '.*' would have to be an initializer"),
        (quantised, "the array 'W_quantized' is int8, .* quantised"),
        (quantised_bias, r"\(DequantizeLinear\) is no part of"),
        (bfloat16, "the array 'W' is bfloat16"),
        (an_array_that_nothing_reads, "no node reads the initializers 'left_over'"),
    ],
)
def test_no_weight_is_dropped(tmp_path, graph, words, alone):
    """`alone`: the same of one node, where other dtypes in the rest of the graph do not matter."""
    g = Graph()
    x = g.op("Identity", g.x())
    end = graph(g, x)
    g.nodes[[n.op_type for n in g.nodes].index("GRU")].name = "rnn"
    onnx.save(unchecked(g, end), tmp_path / "g.onnx")
    if alone and graph in (an_array_that_nothing_reads, head_in_double):
        assert isinstance(convert.load(tmp_path / "g.onnx", node="rnn"), GRU)
        return
    if alone and graph is all_double:
        assert convert.load(tmp_path / "g.onnx", node="rnn").dtype == "float64"
        return
    with pytest.raises(ValueError, match=words) as e:
        convert.load(tmp_path / "g.onnx", **({"node": "rnn"} if alone else {}))
    assert not INTERNAL.search(str(e.value))


def unchecked(g, end):
    """A model whose dtypes do not fit, so that no shapes can be inferred."""
    ready = {k: v for k, v in g.weights.items() if isinstance(v, onnx.TensorProto)}
    g.weights = {k: v for k, v in g.weights.items() if k not in ready}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx.shape_inference, "infer_shapes", lambda model: model)
        proto = g.proto(end)
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info(end, 1, ["a", "b", "c"]))
    proto.graph.initializer.extend(ready.values())
    return proto


def test_rest_of_the_graph_is_not_read(tmp_path):
    """Operators of other domains, quantised weights and sparse ones, elsewhere."""
    g = Graph()
    x = g.op("Relu", g.x())
    Y, _ = g.gru(x, name="rnn")
    read, Y_ = g.run(x, Y)
    quantised(g, x)
    proto = unchecked(g, Y)
    proto.graph.node.add(op_type="Tuned", domain="com.vendor", input=[Y], output=["end"])
    proto.opset_import.add(domain="com.vendor", version=1)
    onnx.save(proto, tmp_path / "g.onnx")
    close(convert.load(tmp_path / "g.onnx", node="rnn")(read)[0], units(Y_))
    proto.functions.add(name="GRU", domain="")
    onnx.save(proto, tmp_path / "g.onnx")
    with pytest.raises(ValueError, match="another meaning by functions"):
        convert.load(tmp_path / "g.onnx", node="rnn")
