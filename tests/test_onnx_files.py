"""ONNX files that others wrote, and files that are damaged, foreign or made to do harm."""

import os
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import require

from gru_any import GRU, Chain, Embedding, Linear
from gru_any.convert import onnx as convert

onnx = require("onnx")
helper, numpy_helper = onnx.helper, onnx.numpy_helper
DATA = Path(__file__).parent / "data" / "onnx"


def values(group, name):
    with np.load(DATA / f"{group}.npz") as file:
        return {k.removeprefix(f"{name}."): file[k] for k in file.files if k.startswith(f"{name}.")}


@pytest.mark.parametrize("name", [
    "torch_script_chain", "torch_script_stream", "torch_script_packed", "torch_script_unsorted",
    "torch_dynamo_chain", "torch_dynamo_stream",
])  # fmt: skip
def test_what_pytorch_exported_once_gives_its_numbers(name):
    expected = values("torch", name)
    model = convert.load(DATA / f"{name}.onnx")
    chain = isinstance(model, Chain)
    state = expected.get("h0")
    y, after = model(expected["x"], [state] if chain else state, expected.get("lengths"))
    assert chain == ("chain" in name)
    for ours, theirs in ((y, expected["y"]), (after[0] if chain else after, expected["h_n"])):
        assert ours.shape == theirs.shape
        assert np.linalg.norm(ours - theirs) <= 1e-6 * np.linalg.norm(theirs)


@pytest.mark.parametrize("name", ["keras_after", "keras_before", "keras_both", "keras_chain"])
def test_what_keras_exported_once_gives_its_numbers(name):
    """The steps of each GRU are the body of a Loop."""
    expected = values("keras", name)
    model = convert.load(DATA / f"{name}.onnx")
    grus = [layer for layer in model.layers if isinstance(layer, GRU)]
    assert {gru.reset_after for gru in grus} == {"before" not in name}
    y, _ = model(expected["x"])
    assert y.shape == expected["y"].shape
    assert np.linalg.norm(y - expected["y"]) <= 1e-6 * np.linalg.norm(expected["y"])


def test_what_this_library_wrote_once_still_opens(tmp_path):
    model = convert.load(DATA / "gru_any_chain.onnx")
    expected = values("gru_any", "chain")
    y, (h_n,) = model(expected["x"], [expected["h0"]], expected["lengths"])
    np.testing.assert_allclose(y, expected["y"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(h_n, expected["h_n"], rtol=0, atol=1e-6)
    names = [v.name for v in onnx.load(DATA / "gru_any_chain.onnx").graph.input]
    convert.save(tmp_path / "m", model)
    assert names == [v.name for v in onnx.load(tmp_path / "m").graph.input]


# damaged and harmful -----------------------------------------------------------------------------


@pytest.fixture
def proto(tmp_path):
    """A good model, to be spoilt."""
    model = Chain(Embedding(5, 3, seed=0), GRU(3, 4, 2, seed=1), Linear(4, 5, seed=2))
    convert.save(tmp_path / "good.onnx", model)
    return onnx.load(tmp_path / "good.onnx")


def refused(proto, folder, words, error=ValueError):
    """Loading it raises these words, and takes no more memory than a small model does."""
    path = folder / "bad.onnx"
    path.write_bytes(proto if isinstance(proto, bytes) else proto.SerializeToString())
    tracemalloc.start()
    try:
        with pytest.raises(error, match=words):
            convert.load(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_there_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        convert.load(tmp_path / "none.onnx")


def test_truncated_and_foreign_files(tmp_path, proto):
    whole = proto.SerializeToString()
    for content in (b"", whole[:7], whole[:-3], whole[: len(whole) // 2], b"\0" * 99, b"\xff" * 99,
                    b"PK\3\4" + bytes(50), b"\x80\x04cos\nsystem\n"):  # fmt: skip
        refused(content, tmp_path, "damaged or no ONNX file")


def test_a_file_of_more_than_two_gigabytes_is_not_read(tmp_path):
    with open(tmp_path / "large.onnx", "wb") as file:
        file.truncate(2**31 + 10)  # takes no room on the disk
    with pytest.raises(ValueError, match="larger than the 2 GB"):
        convert.load(tmp_path / "large.onnx")


@pytest.mark.parametrize("dims", [[2**40, 3], [2**62, 2**62], [-1, 3], [0, 3], [6, 3]])
def test_a_tensor_that_promises_what_it_does_not_hold(tmp_path, proto, dims):
    tensor = next(t for t in proto.graph.initializer if t.name == "0.weight")
    tensor.dims[:] = dims
    refused(proto, tmp_path, "the array '0.weight'")
    tensor.ClearField("raw_data")
    tensor.float_data[:] = [1.0] * 15
    refused(proto, tmp_path, "the array '0.weight'")


def test_a_constant_that_promises_terabytes(tmp_path, proto):
    tensor = numpy_helper.from_array(np.zeros(1, np.int64))
    tensor.dims[:] = [2**44]
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["big"], value=tensor))
    refused(proto, tmp_path, "the array '' of shape")


@pytest.mark.parametrize("location", [
    "../secret", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "C:secret", "link", "nul\0byte",
])  # fmt: skip
def test_weights_that_are_said_to_lie_elsewhere(tmp_path, proto, location):
    (tmp_path.parent / "secret").write_bytes(bytes(100))
    os.symlink(tmp_path.parent / "secret", tmp_path / "link")
    outside(proto, location=location)
    refused(proto, tmp_path, "expected the name of a file beside the model")


@pytest.mark.parametrize(
    ("entries", "error", "words"),
    [
        ({"location": "none"}, FileNotFoundError, "which holds the array"),
        ({"location": "w"}, ValueError, "needs 60 bytes"),
        ({"location": "w", "length": str(2**50)}, ValueError, "needs 60 bytes"),
        ({"location": "w", "offset": "-8"}, ValueError, "needs 60 bytes"),
        ({"location": "w", "offset": "many"}, ValueError, "lies nowhere"),
    ],
)
def test_a_second_file_that_does_not_hold_the_weights(tmp_path, proto, entries, error, words):
    (tmp_path / "w").write_bytes(bytes(59))
    outside(proto, **entries)
    refused(proto, tmp_path, words, error)


def outside(proto, **entries):
    tensor = next(t for t in proto.graph.initializer if t.name == "0.weight")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def test_a_cycle(tmp_path, proto):
    first = next(n for n in proto.graph.node if n.op_type == "GRU")
    last = next(n for n in proto.graph.node if n.op_type == "Squeeze")
    first.input[0] = last.output[0]
    refused(
        proto, tmp_path, r"\(GRU\) reads 'Squeeze_\d+', which nothing before it makes: .* cycle"
    )


def test_one_name_for_two_values(tmp_path, proto):
    proto.graph.node[-1].output[0] = "h_n_0"
    refused(proto, tmp_path, "h_n_0")


def test_other_domains_functions_and_subgraphs(tmp_path, proto):
    for change, words in (
        (foreign, "belongs to 'evil.ops'"),
        (lambda p: p.functions.add(name="f", domain=""), "functions"),
        (lambda p: p.graph.sparse_initializer.add(), "sparse weights"),
        (lambda p: p.training_info.add(), "training information"),
        (lambda p: p.opset_import[0].__setattr__("version", 99), "opset"),
        (lambda p: p.ClearField("opset_import"), "opset"),
        (lambda p: p.graph.node.insert(0, branch()), r"\(If\) has the attribute '.*_branch'"),
    ):
        bad = onnx.ModelProto.FromString(proto.SerializeToString())
        change(bad)
        refused(bad, tmp_path, words)


def foreign(proto):
    """Give a node a meaning that is defined elsewhere."""
    proto.opset_import.add(domain="evil.ops", version=1)
    proto.graph.node[0].domain = "evil.ops"


def branch():
    """A node If, with a graph in each hand."""
    value = helper.make_tensor_value_info("v", 1, [1])
    constant = helper.make_node("Constant", [], ["v"], value_floats=[1.0])
    graph = helper.make_graph([constant], "branch", [], [value])
    return helper.make_node("If", ["lengths"], ["out"], then_branch=graph, else_branch=graph)


def test_constants_that_grow(tmp_path, proto):
    """Forty nodes, each twice as large as the one before."""
    names = [f"grown{i}" for i in range(40)]
    for i, (a, b) in enumerate(zip(["1.W_l0", *names], names, strict=False)):
        proto.graph.node.insert(i, helper.make_node("Concat", [a, a], [b], axis=0))
    refused(proto, tmp_path, r"\(Concat\) makes a larger constant than the file holds")
    del proto.graph.node[:40]
    for op, shape in (("Mul", (10**4, 1)), ("Gather", (10**6,))):
        bad = onnx.ModelProto.FromString(proto.SerializeToString())
        tall = np.zeros(shape, "int64")
        wide = tall.T if op == "Mul" else np.zeros((1, 10**6), "int64")
        for array, name in ((wide, "wide"), (tall, "tall")):
            bad.graph.initializer.append(numpy_helper.from_array(array, name))
        bad.graph.node.insert(0, helper.make_node(op, ["wide", "tall"], ["square"]))
        path = tmp_path / "bad.onnx"
        onnx.save(bad, path)
        with pytest.raises(ValueError, match=rf"\({op}\) makes a larger constant"):
            convert.load(path)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (b"forward", r"attribute 'direction', b'\\xff\\xferward', expected text"),
        (b"lengths", r"inputs \[b'\\xff.* are used by no layer"),
    ],
)
def test_bytes_that_are_no_text(tmp_path, word, message):
    convert.save(tmp_path / "m.onnx", GRU(2, 3, seed=0))
    model = onnx.load(tmp_path / "m.onnx")
    (direction,) = (a for node in model.graph.node for a in node.attribute if a.name == "direction")
    direction.s = b"forward"
    content = model.SerializeToString()
    (tmp_path / "m.onnx").write_bytes(content.replace(word, b"\xff\xfe" + word[2:]))
    with pytest.raises(ValueError, match=message) as raised:
        convert.load(tmp_path / "m.onnx")
    assert "m.onnx" in str(raised.value)
    assert "codec" not in str(raised.value)


def field(number, content):
    """A field of a protobuf message that holds text or a message."""
    size, length = b"", len(content)
    while length > 127:
        size += bytes([length & 127 | 128])
        length >>= 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


VERSION = b"\x08\x0a" + field(8, b"\x10\x11")  # of the format, and of the operators


@pytest.mark.parametrize(
    "graph",
    [
        b"\x0a\x00" * 5000,  # nodes
        b"\x2a\x00" * 5000,  # weights
        field(1, b"\x0a\x00" * 50_000),  # names of inputs of one node
        field(5, b"\x10\x07" + field(7, b"\x01" * 250_000)),  # packed int64
    ],
    ids=["nodes", "weights", "names", "numbers"],
)
def test_graphs_of_very_many_parts(tmp_path, monkeypatch, graph):
    """An empty node is two bytes, and some hundred in memory."""
    monkeypatch.setattr("gru_any.convert.onnx.check.SLACK", 2**18)
    (tmp_path / "m.onnx").write_bytes(VERSION + field(7, graph))
    with pytest.raises(ValueError, match="so many parts that it could fill the memory"):
        convert.load(tmp_path / "m.onnx")


def test_the_memory_of_a_graph_is_that_of_its_parts():
    """Twice as many parts take twice as much, and numbers of 4 bytes none beside themselves."""
    from gru_any.convert.onnx.wire import parsed_size

    kind, most = onnx.ModelProto.DESCRIPTOR, 2**40
    content = (DATA / "torch_script_chain.onnx").read_bytes()
    graph = onnx.load_model_from_string(content).graph.SerializeToString()
    one, two = (parsed_size(field(7, graph * n), kind, most) for n in (1, 2))
    assert abs(two - 2 * one) < 400
    assert len(graph) < one < 60 * len(graph)
    weights = [field(7, field(5, field(9, bytes(n)))) for n in (10, 10_000)]
    assert len({parsed_size(w, kind, most) for w in weights}) == 1
    for damaged in (b"\x3a\x05\x0a", b"\x3b", b"\x3a", b"\xff" * 20, b"\x09\x00"):
        with pytest.raises(ValueError, match=r"field|number"):
            parsed_size(damaged, kind, most)


def test_constants_that_are_joined_again_and_again(tmp_path):
    """Twenty times twice the array of before."""
    names = ["W", *(f"W{i}" for i in range(20))]
    joins = [helper.make_node("Concat", [a, a], [b], axis=0) for a, b in pairwise(names)]
    convert.save(tmp_path / "m.onnx", GRU(2, 3, seed=0))
    model = onnx.load(tmp_path / "m.onnx")
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1000, 10), "f4"), "W"))
    nodes = [*joins, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=r"\(Concat\) makes larger constants than the file holds"):
        convert.load(tmp_path / "m.onnx")
