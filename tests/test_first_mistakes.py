"""What users of other libraries try first: the error names the argument and the way out."""

import numpy as np
import pytest

import gru_any
from gru_any import GRU, Adam, Chain, Dropout, Embedding, Last, Linear, softmax_cross_entropy
from gru_any.stream import Stream
from gru_any.train import fit

X = np.zeros((5, 3, 8), "float32")  # (T, B, I)
SCORES = np.zeros((3, 4), "float32")


@pytest.fixture
def gru():
    return GRU(8, 16, seed=0)


@pytest.fixture
def chain():
    return Chain(Embedding(10, 8, seed=0), GRU(8, 16, seed=1), Linear(16, 10, seed=2))


def refused(error, message, call, *arguments, **options):
    with pytest.raises(error) as e:
        call(*arguments, **options)
    assert message in str(e.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lengths": [5, 4, 3, 2, 1]}, "expected (B,) = (3,), one for each row of x; is time the"),
        ({"lengths": [5.0, 2.0, 4.0]}, "expected integers, such as lengths.astype(int)"),
        ({"mask": np.ones((3, 5), bool)}, "expected (T, B) = (5, 3); is time the other axis of x?"),
        ({"resets": np.ones((3, 5), bool)}, "is time the other axis of x? See batch_first"),
    ],
)
def test_batch_first_where_time_is_first(gru, given, message):
    refused((ValueError, TypeError), message, gru, X, **given)


def test_no_hint_at_another_layout_where_it_would_not_fit(gru):
    with pytest.raises(ValueError, match=r"row of x$"):
        gru(X, lengths=[5, 4])


def test_one_frame(gru):
    refused(ValueError, "I = 8; or (T, I) without a batch", gru, X[0, 0])


def test_layers_as_a_list_as_keras_has_them():
    refused(TypeError, "not <class 'list'>: Chain(*layers)", Chain, [GRU(8, 16), Linear(16, 2)])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([GRU(8, 16), Linear(8, 2)], "layer 1 has in_features=8, expected 16"),
        ([Embedding(9, 4), GRU(8, 16)], "layer 1 has input_size=8, expected 4"),
        ([GRU(8, 16, bidirectional=True), Dropout(), Linear(16, 2)], "expected 32, the width of"),
        ([GRU(8, 16, bidirectional=True), Last(), Linear(16, 2)], "in_features=16, expected 32"),
        ([Linear(8, 6), GRU(8, 16)], "layer 1 has input_size=8, expected 6"),
    ],
)
def test_layers_that_do_not_fit_each_other(layers, message):
    refused(ValueError, message, Chain, *layers)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"target": [0, 1, 2]},
            "target: list is no array; convert it, for example with numpy",
        ),
        ({"weight": [1, 1, 1, 1]}, "weight: list is no array"),
        ({"mask": [True, True, False]}, "mask: list is no array"),
        ({"y": (SCORES, SCORES)}, "y: tuple is no array"),
        (
            {"target": np.array([0, 1])},
            "target is (2,), expected (3,) of integers, the classes",
        ),
        ({"target": np.array([[0], [1], [2]])}, "or (3, 4) of probabilities"),
        ({"target": np.array([0, 1, -100])}, "holds -100, expected 0 to C - 1 = 3; leave out by a"),
    ],
)
def test_arguments_of_a_loss(given, message):
    arguments = {"y": SCORES, "target": np.array([0, 1, 2])} | given
    refused((TypeError, ValueError, IndexError), message, softmax_cross_entropy, **arguments)


def test_names_with_a_prefix(gru):
    wrapped = {f"module.{name}": array for name, array in gru.params.items()}
    refused(KeyError, "name.removeprefix('module.')", gru.load_params, wrapped)
    refused(KeyError, "weight_hh_l0, bias_ih_l0", lambda: gru.params["weight_ih"])
    some = {k: v for k, v in wrapped.items() if "bias" not in k}
    with pytest.raises(KeyError) as e:
        gru.load_params(some)
    assert "removeprefix" not in str(e.value)


def test_weights_of_keras(gru):
    kernels = {name: array.T for name, array in gru.params.items()}
    message = "weight_ih_l0 is (8, 48), expected (48, 8): transpose it"
    refused(ValueError, message, gru.load_params, kernels)
    other = {**gru.params, "weight_ih_l0": np.zeros((9, 48), "float32")}
    with pytest.raises(ValueError, match=r"expected \(48, 8\)$"):
        gru.load_params(other)


def test_the_model_before_the_path(gru, tmp_path):
    refused(TypeError, ": save(path, model)", gru_any.save, gru, tmp_path / "x.safetensors")
    refused(TypeError, "path is None", gru_any.load, None)


@pytest.mark.parametrize("name", ["x.pt", "x.h5", "x.onnx"])
def test_the_file_of_another_library(tmp_path, name):
    (tmp_path / name).write_bytes(b"something else")
    told = "gru_any.convert reads files of other libraries"
    refused(ValueError, told, gru_any.load, tmp_path / name)


def test_our_file_for_the_converter(gru, tmp_path):
    gru_any.save(tmp_path / "x.safetensors", gru)
    load = gru_any.convert.torch.load
    refused(KeyError, "read it by gru_any.load", load, tmp_path / "x.safetensors")
    refused(KeyError, "there are no names at all", gru_any.convert.torch.from_arrays, {})


def test_the_shape_of_explain(gru):
    refused(TypeError, "shape is a int, expected integers", gru_any.explain, gru, 5)
    refused(TypeError, "shape is a ndarray, expected integers", gru_any.explain, gru, X)
    assert "(5, 3, 16)" in gru_any.explain(gru, X.shape)


def test_gradcheck_of_what_is_no_layer(gru):
    refused(TypeError, "layer is a Params", gru_any.gradcheck, gru.params, X)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batches": [(X, X)]}, "batches(epoch) -> the batches of an epoch"),
        ({"schedule": 0.1}, "schedule(step, losses) -> the learning rate"),
        ({"loss": "mse"}, "loss(y, target, mask=None) -> value, dy"),
        ({"model": GRU(8, 16)}, "model is GRU, expected a Chain: Chain(model)"),
    ],
)
def test_arguments_of_fit(chain, given, message):
    arguments = {
        "model": chain, "loss": softmax_cross_entropy, "batches": lambda epoch: [],
        "optimiser": Adam(chain.params), "steps": 1, "bar": False,
    }  # fmt: skip
    refused(TypeError, message, fit, **arguments | given)


def test_a_file_in_place_of_the_folder(chain, tmp_path):
    (tmp_path / "x").touch()
    given = chain, softmax_cross_entropy, lambda epoch: [], Adam(chain.params)
    refused(OSError, "out is no folder: ", fit, *given, steps=1, out=tmp_path / "x")


def test_rows_of_a_stream(gru):
    stream = Stream(gru)
    refused(ValueError, "expected B booleans, True to reset", stream.reset, [0, 2])
    stream(X)
    refused(TypeError, "rows is a str", stream.reset, "all")
