"""Graphs of which one thing was changed at random: understood rightly, or refused."""

import random

import numpy as np
import pytest
from conftest import require
from test_onnx import session

from gru_any import GRU, Chain, Embedding, Linear
from gru_any.convert import onnx as convert

onnx = require("onnx")

MODELS = {
    "chain": lambda: Chain(
        Embedding(9, 3, seed=1),
        GRU(3, 4, 2, bidirectional=True, reset_after=True, seed=2),
        Linear(8, 5, seed=3),
    ),
    "batch_first": lambda: Chain(
        Linear(4, 4, seed=0), GRU(4, 4, 2, batch_first=True, seed=2), Linear(4, 4, seed=3)
    ),
}


def change(proto, rng):
    """Change an input, an attribute, a number or an operator of one node."""
    graph = proto.graph
    node, kind = rng.choice(graph.node), rng.randrange(4)
    names = [v.name for v in (*graph.input, *graph.initializer)]
    numbers = [t for t in graph.initializer if t.data_type in (6, 7)]
    if kind == 0:
        node.input[rng.randrange(len(node.input))] = rng.choice([*names, *node.input])
    elif kind == 1:
        attributes = [a for n in graph.node for a in n.attribute if a.type in (2, 7)]
        attribute = rng.choice(attributes)
        if attribute.type == 2:
            attribute.i = rng.choice([0, 1, 2, -1])
        else:
            attribute.ints[:] = rng.sample(list(attribute.ints), len(attribute.ints))
    elif kind == 2:
        tensor = rng.choice(numbers)
        array = onnx.numpy_helper.to_array(tensor).copy()
        array.flat[rng.randrange(array.size)] = rng.choice([0, 1, 2, -1, 3])
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    else:
        node.op_type = rng.choice(["Add", "Mul", "Identity", "Transpose", "Squeeze", "Tanh"])


def among(found, ours):
    """Whether each number found is one of ours, wherever it stands."""
    ours, found = np.sort(ours), found.ravel()
    at = np.clip(np.searchsorted(ours, found), 1, len(ours) - 1)
    return np.all(np.minimum(abs(ours[at] - found), abs(ours[at - 1] - found)) < 2e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_changed_graph(tmp_path, name):
    model, rng, counts = MODELS[name](), random.Random(0), {"refused": 0, "equal": 0}
    convert.save(tmp_path / "good.onnx", model)
    for _ in range(60):
        proto = onnx.load(tmp_path / "good.onnx")
        change(proto, rng)
        onnx.save(proto, tmp_path / "changed.onnx")
        try:
            ours = convert.load(tmp_path / "changed.onnx")
        except ValueError:
            counts["refused"] += 1
            continue
        outputs = run(proto, ours, np.random.default_rng(0))
        if outputs is not None:
            found, expected = outputs
            assert all(among(v, expected) for v in found), proto
            counts["equal"] += 1
    assert min(counts.values()) >= 5


def run(proto, ours, rng):
    """The outputs on onnxruntime, and all numbers that ours puts out; None if it does not run."""
    grus = [layer for layer in ours.layers if isinstance(layer, GRU)]
    T, B = 5, 3
    shape = (B, T) if grus[0].batch_first else (T, B)
    embedded = isinstance(ours.layers[0], Embedding)
    x = rng.integers(0, 9, shape) if embedded else rng.standard_normal((*shape, 4)).astype("f4")
    lengths = np.array([5, 3, 2], np.int32)
    sizes = [g.num_layers * len(g.suffixes) for g in grus]
    h0 = rng.standard_normal((sum(sizes), B, 4)).astype("f4")
    feed = {"x": x, "lengths": lengths, "h0_0": h0}
    try:
        runner = session(proto)
        found = runner.run(None, {i.name: feed[i.name] for i in runner.get_inputs()})
    except Exception:  # onnxruntime's own kinds
        return None
    used = any("lengths" in n.input for n in proto.graph.node if n.op_type == "GRU")
    y, states = ours(x, np.split(h0, np.cumsum(sizes)[:-1]), lengths if used else None)
    return found, np.concatenate([v.ravel() for v in (y, *states)])
