"""What a graph can hold and a chain of layers cannot: refused, with the reason and the node."""

import sys

import numpy as np
import pytest
from conftest import require

from gru_any import GRU, Chain, Linear
from gru_any.convert import onnx as convert

onnx = require("onnx")
helper, numpy_helper = onnx.helper, onnx.numpy_helper


@pytest.fixture
def proto(tmp_path):
    convert.save(tmp_path / "good.onnx", Chain(GRU(3, 3, 2, seed=0), Linear(3, 3, seed=1)))
    return onnx.load(tmp_path / "good.onnx")


def constant(proto, name, array):
    proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return name


def nodes(proto, op):
    return [node for node in proto.graph.node if node.op_type == op]


def starts_from_a_constant(proto):
    nodes(proto, "GRU")[0].input[5] = constant(proto, "c", np.ones((1, 2, 3), "f4"))


def starts_from_another_gru(proto):
    nodes(proto, "GRU")[1].input[5] = nodes(proto, "GRU")[0].output[1]


def has_constant_lengths(proto):
    nodes(proto, "GRU")[0].input[4] = constant(proto, "c", np.array([2, 1], "i4"))


def has_lengths_for_one_alone(proto):
    nodes(proto, "GRU")[0].input[4] = ""


def takes_the_rows_of_its_state_in_another_order(proto):
    first, second = nodes(proto, "GRU")
    a, b = first.input[5], second.input[5]
    first.input[5], second.input[5] = b, a
    order = [n for n in proto.graph.node if n.op_type != "Slice"]
    slices = [n for n in proto.graph.node if n.op_type == "Slice"]
    del proto.graph.node[:]
    proto.graph.node.extend([*slices, *order])


def adds_its_input_to_its_output(proto):
    nodes(proto, "Identity")[-1].op_type = "Add"
    nodes(proto, "Add")[-1].input.append("x")


def returns_one_step_alone(proto):
    last = nodes(proto, "Identity")[-1]
    last.op_type = "Gather"
    last.input.append(constant(proto, "c", np.array(-1)))


def has_an_attribute(name, value):
    def change(proto):
        nodes(proto, "GRU")[1].attribute.append(helper.make_attribute(name, value))

    return change


def has_another_activation_between(proto):
    nodes(proto, "Squeeze")[0].op_type = "Relu"
    nodes(proto, "Relu")[0].input.pop()


def computes_its_weights(proto):
    nodes(proto, "GRU")[0].input[1] = "x"


def has_weights_of_two_dtypes(proto):
    weight = next(t for t in proto.graph.initializer if t.name == "1.weight")
    array = numpy_helper.to_array(weight).astype("f8")
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (starts_from_a_constant, r"\(GRU\) starts from a constant state"),
        (starts_from_another_gru, r"\(GRU\) starts from a state that the graph computes"),
        (has_constant_lengths, r"\(GRU\) has lengths that are no input"),
        (has_lengths_for_one_alone, "lengths|states of different GRUs"),
        (takes_the_rows_of_its_state_in_another_order, "start from rows .* in order"),
        (adds_its_input_to_its_output, r"\(Add\) adds what is not the bias"),
        (returns_one_step_alone, r"\(Gather\) picks a last step"),
        (has_an_attribute("clip", -3.0), r"\(GRU\) has activations or a clip .* clip is -3.0"),
        (has_an_attribute("activations", ["Relu", "Cos"]), r"\(GRU\) has the activation 'Cos'"),
        (has_an_attribute("activations", ["Relu"]), r"has the activations \['Relu'\], expected 2"),
        (has_an_attribute("activations", ["Relu", "Affine"]), "Affine without alpha and beta"),
        (has_an_attribute("layout", 1), r"\(GRU\) .* axis of time"),
        (has_another_activation_between, r"\(Relu\) is no part of"),
        (computes_its_weights, r"\(GRU\) computes its W"),
        (has_weights_of_two_dtypes, r"\(MatMul\) has weights of float64"),
    ],
)
def test_refused(tmp_path, proto, change, words):
    change(proto)
    onnx.save(proto, tmp_path / "changed.onnx")
    with pytest.raises(ValueError, match=words):
        convert.load(tmp_path / "changed.onnx")


def test_without_the_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    convert.save(tmp_path / "m", GRU(3, 4, seed=0))
    monkeypatch.setitem(sys.modules, "onnx", None)
    for call in (
        lambda: convert.load(tmp_path / "m"),
        lambda: convert.save(tmp_path / "n", GRU(3, 4)),
    ):
        with pytest.raises(ImportError, match=r"gru-any\[onnx\]"):
            call()
