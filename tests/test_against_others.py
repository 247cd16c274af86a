"""The same numbers as PyTorch (reset after) and onnxruntime (reset before), all in float64."""

import itertools

import numpy as np
import pytest
from conftest import require

from gru_any import GRU, GRUCell

OPTIONS = list(itertools.product([1, 3], [False, True], [False, True]))
SHAPES = pytest.mark.parametrize(("layers", "bidirectional", "bias"), OPTIONS)


def close(ours, theirs, tolerance=1e-10):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) <= tolerance * max(np.linalg.norm(theirs), 1e-30)


def torch_pair(layers, bidirectional, bias, I=3, H=4):
    torch = require("torch")
    torch.manual_seed(layers)
    theirs = torch.nn.GRU(I, H, layers, bias=bias, bidirectional=bidirectional).double()
    ours = GRU(
        I, H, layers, bias=bias, bidirectional=bidirectional, reset_after=True, dtype="float64"
    )
    ours.load_params({k: v.detach().numpy() for k, v in theirs.named_parameters()})
    return torch, theirs, ours


@SHAPES
@pytest.mark.parametrize("lengths", [None, [5, 70, 1, 33]], ids=["whole", "ragged"])
def test_torch_outputs_states_and_gradients(layers, bidirectional, bias, lengths):
    torch, theirs, ours = torch_pair(layers, bidirectional, bias)
    D, rng = 1 + bidirectional, np.random.default_rng(0)
    x, h0 = rng.standard_normal((70, 4, 3)), rng.standard_normal((layers * D, 4, 4))
    dy, dh = rng.standard_normal((70, 4, D * 4)), rng.standard_normal(h0.shape)
    X, H0 = torch.tensor(x, requires_grad=True), torch.tensor(h0, requires_grad=True)
    if lengths is None:
        Y, HN = theirs(X, H0)
    else:
        rnn = torch.nn.utils.rnn
        packed, HN = theirs(rnn.pack_padded_sequence(X, lengths, enforce_sorted=False), H0)
        Y, _ = rnn.pad_packed_sequence(packed, total_length=70)
    torch.autograd.backward([Y, HN], [torch.tensor(dy), torch.tensor(dh)])
    (y, h_n), pullback = ours.vjp(x, h0, lengths)
    grads, dx, dh0 = pullback(dy, dh)
    close(y, Y.detach())
    close(h_n, HN.detach())
    close(dx, X.grad)
    close(dh0, H0.grad)
    for name, parameter in theirs.named_parameters():
        close(grads[name], parameter.grad)


def test_torch_cell():
    torch = require("torch")
    theirs = torch.nn.GRUCell(3, 4).double()
    ours = GRUCell(3, 4, reset_after=True, dtype="float64")
    ours.load_params({k: v.detach().numpy() for k, v in theirs.named_parameters()})
    rng = np.random.default_rng(0)
    x, h0 = rng.standard_normal((5, 3)), rng.standard_normal((5, 4))
    close(ours(x, h0), theirs(torch.tensor(x), torch.tensor(h0)).detach())


def test_torch_starts_from_the_same_distribution():
    _, theirs, _ = torch_pair(1, False, True, I=50, H=400)
    ours = GRU(50, 400, reset_after=True, seed=0)
    for name, parameter in theirs.named_parameters():
        mine, other = ours.params[name], parameter.detach().numpy()
        assert abs(np.abs(mine).max() - np.abs(other).max()) < 1e-3
        assert abs(mine.std() / other.std() - 1) < 0.05


def onnx_gru(ours, T, B, lengths, linear_before_reset):
    """Run one layer of ours through onnxruntime's operator; its order of gates is z, r, n."""
    onnx, ort = require("onnx"), require("onnxruntime")
    helper, DOUBLE = onnx.helper, onnx.TensorProto.FLOAT

    def reordered(array):
        r, z, n = np.split(array, 3)
        return np.concatenate([z, r, n])

    def stacked(name):
        return np.stack([reordered(ours.params[f"{name}_l0{s}"]) for s in ours.suffixes])

    zeros = np.zeros((len(ours.suffixes), 3 * ours.hidden_size), "float32")
    second = stacked("bias_hh") if ours.reset_after else zeros
    bias = np.concatenate([stacked("bias_ih"), second], axis=1)
    weights = {"W": stacked("weight_ih"), "R": stacked("weight_hh"), "bias": bias}
    weights["lens"] = np.asarray(lengths, np.int32)
    node = helper.make_node(
        "GRU",
        ["x", "W", "R", "bias", "lens", "h0"],
        ["y", "h"],
        hidden_size=ours.hidden_size,
        direction="bidirectional" if len(ours.suffixes) == 2 else "forward",
        linear_before_reset=int(linear_before_reset),
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(k, DOUBLE, None) for k in ("x", "h0")],
        [helper.make_tensor_value_info(k, DOUBLE, None) for k in ("y", "h")],
        [onnx.numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def run(x, h0):
        y, h = session.run(None, {"x": x, "h0": h0})
        return y.transpose(0, 2, 1, 3).reshape(T, B, -1), h

    return run


@pytest.mark.parametrize("reset_after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [[9, 9, 9], [2, 9, 5]], ids=["whole", "ragged"])
def test_onnxruntime(reset_after, bidirectional, lengths):
    """onnxruntime's operator is float32, so the tolerance is float32's."""
    ours = GRU(3, 4, reset_after=reset_after, bidirectional=bidirectional, seed=1)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9, 3, 3)).astype("float32")
    h0 = rng.standard_normal((1 + bidirectional, 3, 4)).astype("float32")
    y, h = onnx_gru(ours, 9, 3, lengths, reset_after)(x, h0)
    ours_y, ours_h = ours(x, h0, lengths)
    close(ours_y, y, 1e-6)
    close(ours_h, h, 1e-6)
    wrong, _ = onnx_gru(ours, 9, 3, lengths, not reset_after)(x, h0)
    assert np.linalg.norm(ours_y - wrong) > 1e-2 * np.linalg.norm(y)
