"""Time and batch in training: both layouts give the same numbers; what is unclear is refused."""

import itertools
import json
import threading

import numpy as np
import pytest
from conftest import require
from hypothesis import given
from hypothesis import strategies as st

from gru_any import (
    GRU,
    SGD,
    Adam,
    Chain,
    Embedding,
    Last,
    Linear,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
    squared_error,
)
from gru_any.convert.torch import to_arrays
from gru_any.data import Batch, ahead, cut, side_by_side, streams
from gru_any.errors import ShapeError
from gru_any.stream import Stream
from gru_any.train import evaluate, fit


def model(batch_first, dtype="float64", **options):
    gru = GRU(3, 6, batch_first=batch_first, reset_after=True, seed=0, dtype=dtype, **options)
    return Chain(gru, Linear(6, 2, seed=1, dtype=dtype))


def arrays(T=12, B=5, seed=0):
    rng = np.random.default_rng(seed)
    x, target = (rng.standard_normal((T, B, n)) for n in (3, 2))
    return x, target, rng.random((T, B)) < 0.7


def turned(*v):
    return [np.swapaxes(a, 0, 1) for a in v]


def trained(m, batch, loss=squared_error, steps=4, **options):
    history = fit(m, loss, lambda epoch: [batch], Adam(m.params, lr=0.02), steps=steps, log_every=1,
                  bar=False, **options)  # fmt: skip
    return [r["loss"] for r in history.records], {k: v.copy() for k, v in m.params.items()}


# evaluate and fit --------------------------------------------------------------------------------


def test_chunks_of_a_batch_first_model_are_the_whole():
    rng = np.random.default_rng(0)
    m = Chain(GRU(3, 6, batch_first=True, seed=0), Linear(6, 2, seed=1))
    x, target = (rng.standard_normal((8, 32, n)).astype("float32") for n in (3, 2))
    y, _ = m(x)
    expected = np.mean((y - target) ** 2)
    for chunk in (None, 1, 4, 5, 32, 100):
        assert evaluate(m, squared_error, [Batch(x, target)], chunk) == pytest.approx(expected)


@given(
    T=st.integers(1, 9),
    B=st.integers(1, 9),
    chunk=st.integers(1, 10),
    batch_first=st.booleans(),
    named=st.sampled_from([None, True, False]),
    masked=st.booleans(),
)
def test_the_layout_changes_no_number(T, B, chunk, batch_first, named, masked):
    x, target, mask = arrays(T, B)
    m = model(batch_first)
    y, _ = model(False)(x)
    counts = mask if masked else np.ones_like(mask)
    expected = ((y - target) ** 2)[counts].mean() if counts.any() else 0
    given = batch_first if named is None else named
    laid = turned(x, target, mask) if given else (x, target, mask)
    batch = Batch(*laid[: 3 if masked else 2], batch_first=named)
    assert evaluate(m, squared_error, [batch], chunk) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("tbptt", [None, (4, 4), (2, 4), (3, 7)])
@pytest.mark.parametrize("lengths", [None, [12, 3, 0, 7, 12]])
def test_training_is_that_of_the_other_layout(tbptt, lengths):
    x, target, mask = arrays()
    first = trained(model(False), Batch(x, target, mask, lengths), tbptt=tbptt)
    for named in (None, True, False):
        v = (x, target, mask) if named is False else turned(x, target, mask)
        losses, params = trained(model(True), Batch(*v, lengths, named), tbptt=tbptt)
        assert np.allclose(losses, first[0], rtol=1e-12, atol=0)  # sums in another order
        assert all(np.allclose(params[k], first[1][k], rtol=0, atol=1e-11) for k in params)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["squared", "sigmoid"])
def test_masked_training_is_pytorchs(batch_first, masked, kind):
    torch = require("torch")
    ours = {"squared": squared_error, "sigmoid": sigmoid_cross_entropy}[kind]
    functional = torch.nn.functional
    theirs = {
        "squared": functional.mse_loss,
        "sigmoid": functional.binary_cross_entropy_with_logits,
    }[kind]
    x, target, mask = arrays()
    target = 1 / (1 + np.exp(-target))
    m = model(batch_first)
    gru, linear = torch.nn.GRU(3, 6, batch_first=batch_first).double(), torch.nn.Linear(6, 2)
    for layer, module in zip(m.layers, (gru, linear.double()), strict=True):
        module.load_state_dict({k: torch.tensor(v) for k, v in to_arrays(Chain(layer)).items()
                                for k in [k.partition(".")[2]]})  # fmt: skip
    v = turned(x, target, mask) if batch_first else [x, target, mask]
    X, Y, M = (torch.tensor(np.ascontiguousarray(a)) for a in v)
    optimiser = torch.optim.SGD([*gru.parameters(), *linear.parameters()], lr=0.3)
    losses = []
    for _ in range(6):
        optimiser.zero_grad()
        each = theirs(linear(gru(X)[0]), Y, reduction="none")
        value = each[M].mean() if masked else each.mean()
        value.backward()
        optimiser.step()
        losses.append(value.item())
    batch = Batch(*(v if masked else v[:2]))
    history = fit(m, ours, lambda epoch: [batch], SGD(m.params, lr=0.3), steps=6, log_every=1,
                  bar=False)  # fmt: skip
    assert np.allclose([r["loss"] for r in history.records], losses, rtol=0, atol=1e-10)
    for name, w in [*gru.named_parameters("0"), *linear.named_parameters("1")]:
        assert np.allclose(m.params[name], w.detach().numpy(), rtol=0, atol=1e-10)


def test_lengths_without_a_mask_leave_the_padding_out():
    x, target, _ = arrays()
    lengths = [12, 3, 0, 7, 1]
    inside = np.arange(12)[:, None] < lengths
    y, _ = model(False)(x, lengths=lengths)
    expected = ((y - target) ** 2)[inside].mean()
    for m, v in ((model(False), (x, target)), (model(True), turned(x, target))):
        for n in (lengths, tuple(lengths), np.array(lengths, np.uint8)):
            batch = Batch(*v, lengths=n)
            assert evaluate(m, squared_error, [batch]) == pytest.approx(expected)
            assert evaluate(m, squared_error, [batch], 5) == pytest.approx(expected)


def test_data_of_a_loader():
    torch = require("torch")
    x, target, _ = arrays()
    x, target = turned(x, target)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(target)), batch_size=2
    )
    m = model(True)
    fit(m, squared_error, lambda epoch: loader, SGD(m.params, lr=0.1), epochs=2, bar=False)
    other = model(True)
    parts = [Batch(x[i : i + 2], target[i : i + 2]) for i in (0, 2, 4)]
    fit(other, squared_error, lambda epoch: parts, SGD(other.params, lr=0.1), epochs=2, bar=False)
    assert all(np.array_equal(m.params[k], w) for k, w in other.params.items())


@pytest.mark.parametrize("batch_first", [False, True])
def test_one_target_a_row(batch_first):
    x, _, _ = arrays()
    labels = np.array([0, 1, 1, 0, 1])
    gru = GRU(3, 6, batch_first=batch_first, seed=0, dtype="float64")
    m = Chain(gru, Last(dtype="float64"), Linear(6, 2, seed=1, dtype="float64"))
    lengths = [12, 3, 4, 7, 12]
    batch = Batch(x, labels, None, lengths, batch_first=False)
    y, _ = m(np.swapaxes(x, 0, 1) if batch_first else x, lengths=lengths)
    value, _ = softmax_cross_entropy(y, labels)
    assert evaluate(m, softmax_cross_entropy, [batch]) == pytest.approx(value)
    before = float(value)
    trained(m, batch, softmax_cross_entropy, steps=20)
    assert evaluate(m, softmax_cross_entropy, [batch]) < before
    with pytest.raises(ValueError, match="the model has a Last"):
        evaluate(m, softmax_cross_entropy, [batch], chunk=4)
    with pytest.raises(ValueError, match="the model has a Last"):
        trained(m, batch, softmax_cross_entropy, tbptt=(4, 4))


# data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tbptt", [None, (4, 4), (2, 6), (20, 30)])
def test_a_cut_along_the_named_axis(tbptt):
    x, target, mask = arrays()
    first = cut(Batch(x, target, mask, [12, 3, 0, 7, 12]), tbptt)
    second = cut(Batch(*turned(x, target, mask), [12, 3, 0, 7, 12], True), tbptt)
    for a, b in itertools.zip_longest(first, second):
        assert a[1:] == b[1:]
        for v, w in zip(a.batch[:3], turned(*b.batch[:3]), strict=True):
            assert np.array_equal(v, w)
        assert np.array_equal(a.batch.lengths, b.batch.lengths)


def test_rows_first():
    a, b = streams(np.arange(21), 4), streams(np.arange(21), 4, batch_first=True)
    assert np.array_equal(a.x.T, b.x)
    assert np.array_equal(a.target.T, b.target)
    assert (a.batch_first, b.batch_first) == (False, True)
    parts = [np.ones((2, 3)), np.ones((4, 3))]
    for one, other in zip(side_by_side(parts), side_by_side(parts, None, True), strict=True):
        assert np.array_equal(np.swapaxes(one, 0, 1), other)


def test_streams_of_text_for_a_model_of_either_layout():
    text, found = np.random.default_rng(0).integers(0, 9, 200), []
    for first in (False, True):
        gru = GRU(4, 5, batch_first=first, seed=1)
        writer = Chain(Embedding(9, 4, seed=0), gru, Linear(5, 9, seed=2))
        for batch in (streams(text, 4), streams(text, 4, batch_first=True)):
            found.append(trained(writer.to(), batch, softmax_cross_entropy, tbptt=(10, 20)))
    for losses, params in found[1:]:
        assert np.allclose(losses, found[0][0], rtol=1e-5)
        assert all(np.allclose(params[k], w, atol=1e-5) for k, w in found[0][1].items())


def test_a_stream_of_a_batch_first_model():
    x, _, _ = arrays()
    whole, _ = model(False)(x)
    stream = Stream(model(True))
    rows = np.swapaxes(x, 0, 1)
    parts = [stream(rows[:, :5]), stream.step(rows[:, 5])[:, None], stream(rows[:, 6:])]
    assert np.allclose(np.concatenate(parts, axis=1), np.swapaxes(whole, 0, 1), atol=1e-14)


def test_without_another_thread(monkeypatch):
    def refused(self):
        raise RuntimeError("can't start new thread")

    x, target, mask = arrays()
    before = trained(model(False), Batch(x, target, mask), tbptt=(4, 4))
    monkeypatch.setattr(threading.Thread, "start", refused)
    assert list(ahead(iter(range(1, 5)))) == [1, 2, 3, 4]
    assert trained(model(False), Batch(x, target, mask), tbptt=(4, 4))[0] == before[0]


# losses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [squared_error, sigmoid_cross_entropy])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_mask_belongs_to_the_leading_axes(loss, n):
    """Also where all axes are alike, and the trailing ones would fit too."""
    rng = np.random.default_rng(n)
    y, target = rng.standard_normal((4, 4, 4)), rng.random((4, 4, 4))
    mask = rng.random((4,) * n) < 0.5
    full = np.broadcast_to(mask.reshape(*mask.shape, *[1] * (3 - n)), y.shape)
    value, grad = loss(y, target, mask=mask)
    by_hand = {
        squared_error: (y - target) ** 2,
        sigmoid_cross_entropy: np.log1p(np.exp(y)) - y * target,
    }[loss]
    assert value == pytest.approx(by_hand[full].mean(), rel=1e-12)
    assert not grad[~full].any()
    assert grad[full].all()


@pytest.mark.parametrize("shape", [(3, 4), (5,), (4, 3, 2), (4, 3, 1, 1), (3, 2)])
def test_a_mask_of_other_axes(shape):
    y = np.zeros((4, 3, 5))
    with pytest.raises(ShapeError, match=r"mask is .*, expected the leading axes of \(4, 3, 5\)"):
        squared_error(y, y, mask=np.ones(shape, bool))


@pytest.mark.parametrize("loss", [squared_error, sigmoid_cross_entropy, softmax_cross_entropy])
def test_a_mask_is_of_bool(loss):
    y = np.zeros((4, 3))
    for mask in (np.ones((4,)), np.ones((4,), int)):
        with pytest.raises(TypeError, match="expected bool: mask != 0"):
            loss(y, y, mask=mask)


def test_a_weight_that_could_belong_to_several_axes():
    y, target = np.random.default_rng(0).standard_normal((2, 3, 3, 3))
    value, _ = squared_error(y, target, weight=np.array([1.0, 2.0, 3.0]))
    assert value == pytest.approx(((y - target) ** 2 * [1, 2, 3]).mean())
    with pytest.raises(ShapeError, match=r"weight is \(3, 3\), expected \(3, 3, 3\), or \(C,\)"):
        squared_error(y, target, weight=np.ones((3, 3)))


def test_a_target_is_not_broadcast():
    with pytest.raises(ShapeError, match=r"target is \(4, 3, 1\), expected \(4, 3\)"):
        squared_error(np.zeros((4, 3)), np.zeros((4, 3, 1)))


# what is refused at the door ---------------------------------------------------------------------

X, TARGET, MASK = arrays()


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((X[:, 0], TARGET[:, 0]), ValueError, r"x is \(12, 3\), expected \(T, B, I\)"),
        ((X,), TypeError, "expected a Batch, or a tuple of 2 to 4"),
        ({"x": X, "target": TARGET}, TypeError, "a batch is a dict"),
        ((X.tolist(), TARGET), TypeError, "x is a list, expected an array"),
        ((X, np.swapaxes(TARGET, 0, 1)), ValueError, r"target is \(5, 12, 2\), expected \(T, B"),
        ((X, TARGET[0]), ValueError, "put a Last after the GRU"),
        ((X, TARGET, MASK.T), ValueError, r"mask is \(5, 12\), expected \(T, B, ...\)"),
        ((X, TARGET, MASK * 1.0), TypeError, "mask has dtype float64, expected bool"),
        ((X, TARGET, None, [1, 2]), ValueError, r"lengths is \(2,\), expected \(B,\) = \(5,\)"),
        ((X, TARGET, None, [1.0] * 5), TypeError, "lengths has dtype float64"),
        ((X, TARGET, None, [13] * 5), ValueError, "lengths holds 13 to 13, expected 0 to T = 12"),
        ((X, TARGET, None, None, "False"), TypeError, "batch_first is 'False'"),
    ],
)
def test_a_batch_that_does_not_fit(batch, error, message):
    item = Batch(*batch) if isinstance(batch, tuple) and len(batch) == 5 else batch
    with pytest.raises(error, match=message):
        evaluate(model(False), squared_error, [item])
    m = model(False)
    with pytest.raises(error, match=message):
        trained(m, item)


def test_a_chain_of_two_layouts():
    with pytest.raises(ValueError, match="would take the other's time for its batch"):
        Chain(GRU(3, 4, batch_first=True), GRU(4, 5))
    assert Chain(Linear(3, 4)).batch_first is None
    assert model(True).batch_first is True


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": True}, TypeError, "steps is True, expected a number above 0"),
        ({"steps": "5"}, TypeError, "steps is '5'"),
        ({"steps": 2.5}, ValueError, "steps is 2.5, expected an integer"),
        ({"clip": "1"}, TypeError, "clip is '1'"),
        ({"clip": np.inf}, ValueError, "clip is inf"),
        ({"patience": -1}, ValueError, "patience is -1"),
        ({"average": 1.5}, ValueError, "average is 1.5, expected 0 < average < 1"),
        ({"tbptt": (4,)}, ValueError, "tbptt is"),
        ({"tbptt": 4}, ValueError, "tbptt is 4, expected"),
        ({"tbptt": (2.0, 4)}, ValueError, "tbptt is"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"settings": {"rate": np.float32(1)}}, TypeError, r"settings\['rate'\] is"),
    ],
)
def test_settings_that_are_none(options, error, message):
    with pytest.raises(error, match=message):
        trained(model(False), Batch(X, TARGET), **options)


def test_settings_as_numpy_scalars(tmp_path):
    m = model(False)
    options = {
        "steps": np.int64(4),
        "accumulate": np.int8(1),
        "save_every": np.int64(2),
        "seed": np.int64(3),
        "tbptt": (np.int64(4), np.int32(8)),
        "clip": np.float32(1),
        "average": np.float64(0.5),
    }
    trained(m, Batch(X, TARGET), out=tmp_path, **options)
    assert (tmp_path / "checkpoint.safetensors").exists()
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] == 4
