"""Time and batch: every layout gives the same numbers, and what fits neither is refused."""

import functools
import itertools

import numpy as np
import pytest
from conftest import require
from hypothesis import assume, given, settings
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
from gru_any.inspect.values import activity, fading
from gru_any.stream import Stream
from gru_any.train.data import Batch, ahead, arranged, cut, side_by_side, streams
from gru_any.train.loop import evaluate, fit


def regression(batch_first=False, layers=1, dtype="float64"):
    options = {"dtype": dtype, "seed": 0}
    gru = GRU(3, 6, layers, batch_first=batch_first, **options)
    return Chain(gru, Linear(6, 2, **options))


def data(B=4, T=8, seed=0, masked=False, lengths=False):
    """Time first."""
    rng = np.random.default_rng(seed)
    x, target = rng.standard_normal((T, B, 3)), rng.standard_normal((T, B, 2))
    mask = rng.random((T, B)) < 0.6 if masked else None
    if masked:
        mask[0] = True
    return Batch(x, target, mask, rng.integers(1, T + 1, B) if lengths else None, False)


def turned(batch):
    """The same, batch first."""
    x, target, mask = (None if v is None else np.swapaxes(v, 0, 1) for v in batch[:3])
    return Batch(x, target, mask, batch.lengths, True)


def train(model, batch, steps=4, optimiser=None, **options):
    fit(model, squared_error, lambda epoch: [batch], optimiser or SGD(model.params, lr=0.1),
        steps=steps, bar=False, **options)  # fmt: skip
    return model.params


# one number, whatever the layout ------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 2)),
    chunk=st.integers(1, 10),
    masked=st.booleans(),
    lengths=st.booleans(),
    seed=st.integers(0, 99),
)
def test_chunks_and_layouts_give_one_loss(sizes, chunk, masked, lengths, seed):
    B, T, layers = sizes
    batch = data(B, T, seed, masked, lengths)
    model, twin, other = regression(False, layers), regression(True, layers), turned(batch)
    y, _ = model(batch.x, lengths=batch.lengths)
    square = (y - batch.target) ** 2
    counts = np.arange(T)[:, None] < (T if batch.lengths is None else np.asarray(batch.lengths))
    counts = np.broadcast_to(counts, (T, B)) if batch.mask is None else batch.mask
    assume(counts.any())
    whole = square[counts].mean()
    for m, given_batch in (
        (model, batch),
        (model, batch._replace(batch_first=None)),
        (model, other),
        (twin, other),
        (twin, other._replace(batch_first=None)),
        (twin, batch),
    ):
        for size in (None, chunk):
            found = evaluate(m, squared_error, [given_batch], chunk=size)
            assert found == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("tbptt", [None, (1, 1), (4, 4), (2, 4), (3, 7)])
def test_training_is_that_of_the_time_first_twin(tbptt, lengths):
    batch = data(masked=True, lengths=lengths)
    expected = train(regression(), batch, tbptt=tbptt)
    for model, same in ((regression(True), turned(batch)), (regression(True), batch)):
        found = train(model, same, tbptt=tbptt)
        for name, w in expected.items():
            assert np.allclose(found[name], w, rtol=0, atol=1e-14), name
    found = train(regression(), turned(batch), tbptt=tbptt)  # transposed once: the same bits
    assert all(np.array_equal(found[name], w) for name, w in expected.items())


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("tbptt", [None, (4, 4), (2, 4)])
@pytest.mark.parametrize("masked", [False, True, "all axes"])
def test_masked_regression_is_that_of_torch(batch_first, tbptt, masked):
    """T = B = C too, where a mask could be taken for one of other axes."""
    torch = require("torch")
    B = T = 8
    rng = np.random.default_rng(5)
    x, target = rng.standard_normal((2, B, T, 3))
    target = np.repeat(target[..., :1], 8, axis=-1) * np.arange(8)
    shape = {False: None, True: (B, T), "all axes": (B, T, 8)}[masked]
    mask = None if shape is None else rng.random(shape) < 0.5
    options = {"dtype": "float64", "seed": 0}
    model = Chain(GRU(3, 6, batch_first=batch_first, reset_after=True, **options),
                  Linear(6, 8, **options))  # fmt: skip
    gru = torch.nn.GRU(3, 6, batch_first=True, dtype=torch.float64)
    linear = torch.nn.Linear(6, 8, dtype=torch.float64)
    for i, layer in enumerate((gru, linear)):
        own = {k: torch.tensor(v) for k, v in model.layers[i].params.items()}
        layer.load_state_dict(own)
    theirs = [*gru.parameters(), *linear.parameters()]
    optimiser = torch.optim.SGD(theirs, lr=0.1)
    k1, k2 = tbptt or (T, T)
    X, Y = torch.tensor(x), torch.tensor(target)
    keep = torch.ones(B, T, dtype=torch.bool) if mask is None else torch.tensor(mask)
    steps, state = 0, None
    for _ in range(2):
        for at in range(0, T, k1):
            start = max(0, at + k1 - k2)
            state = None if start == 0 else state
            y, _ = gru(X[:, start : at + k1], state)
            error = (linear(y)[:, at - start :] - Y[:, at : at + k1]) ** 2
            loss = error[keep[:, at : at + k1]].mean()
            following = max(0, at + 2 * k1 - k2)
            with torch.no_grad():  # the state is that of the weights before the update
                if following > start:
                    state = gru(X[:, start:following], state)[1]
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            steps += 1
    fit(model, squared_error, lambda epoch: [Batch(x, target, mask, batch_first=True)],
        SGD(model.params, lr=0.1), steps=steps, tbptt=tbptt, bar=False)  # fmt: skip
    expected = [*gru.state_dict().items(), *linear.state_dict().items()]
    for (name, w), found in zip(expected, model.params.values(), strict=True):
        assert np.allclose(found, w.numpy(), rtol=0, atol=1e-10), name


def test_the_case_of_a_model_with_batch_first():
    model = Chain(GRU(3, 6, batch_first=True, seed=0), Linear(6, 2, seed=0))
    rng = np.random.default_rng(0)
    x, target = (rng.standard_normal((8, 32, n)).astype("float32") for n in (3, 2))
    whole = evaluate(model, squared_error, [(x, target)])
    y, _ = model(x)
    assert whole == pytest.approx(((y - target) ** 2).mean(), rel=1e-6)
    assert evaluate(model, squared_error, [(x, target)], chunk=4) == pytest.approx(whole, rel=1e-6)


def test_data_in_both_layouts():
    first, last = (streams(np.arange(41), 4, batch_first=b) for b in (True, False))
    assert (first.batch_first, last.batch_first) == (True, False)
    assert first.x[1].tolist() == last.x[:, 1].tolist() == list(range(10, 20))
    assert np.array_equal(first.target, last.target.T)
    rows = [np.ones((2, 3)), np.ones((4, 3))]
    x, mask = side_by_side(rows, batch_first=True)
    assert x.shape == (2, 4, 3)
    assert mask.tolist() == [[True, True, False, False], [True] * 4]
    text = np.random.default_rng(0).integers(0, 5, 41)
    found = []
    for model_first in (False, True):
        home = {"dtype": "float64", "seed": 0}
        model = Chain(
            Embedding(5, 3, **home),
            GRU(3, 4, batch_first=model_first, **home),
            Linear(4, 5, **home),
        )
        for batch_first in (False, True):
            batch = streams(text, 4, batch_first=batch_first)
            found += [evaluate(model, softmax_cross_entropy, [batch], n) for n in (None, 3)]
    assert found == pytest.approx([found[0]] * 8, rel=1e-12)


def test_stream_and_inspect_in_both_layouts():
    model, twin = regression(), regression(True)
    x = data().x
    stream, other = Stream(model), Stream(twin)
    for part in (slice(0, 3), slice(3, 8)):
        assert np.allclose(stream(x[part]), other(x[part].swapaxes(0, 1)).swapaxes(0, 1))
    assert np.allclose(stream.state[0], other.state[0])
    seen = [activity(m, v) for m, v in ((model, x), (twin, x.swapaxes(0, 1)))]
    assert all(np.allclose(seen[0][0][k], seen[1][0][k]) for k in "rznh")
    grus = model.layers[0], twin.layers[0]
    assert np.allclose(fading(grus[0], x), fading(grus[1], x.swapaxes(0, 1)))
    with pytest.raises(ValueError, match=r"x is \(8, 3\), expected \(T, B, I\)"):
        fading(grus[0], x[:, 0])


# what is taken for a batch ------------------------------------------------------------------------


def test_lists_tuples_and_tensors_are_batches():
    torch = require("torch")
    x, target, mask, lengths, *_ = data(masked=True, lengths=True)
    expected = train(regression(), Batch(x, target, mask, lengths))
    for batch in (
        (x, target, mask, lengths),
        [x.tolist(), target.tolist(), mask.tolist(), lengths.tolist()],
        [torch.tensor(v) for v in (x, target, mask, lengths)],
        Batch(x, target, mask, lengths.astype("uint8")),
        Batch(x, target, mask, tuple(lengths)),
    ):
        found = train(regression(), batch)
        assert all(np.array_equal(found[name], w) for name, w in expected.items())
    pairs = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(target))
    loader = torch.utils.data.DataLoader(pairs, batch_size=4)
    model = regression(True)
    fit(model, squared_error, lambda epoch: loader, SGD(model.params), epochs=1, bar=False)
    assert not np.array_equal(model.params["1.bias"], regression(True).params["1.bias"])


def test_lengths_near_their_ends():
    """Unsigned ones do not wrap around below 0."""
    batch = data(lengths=True)._replace(lengths=np.array([1, 2, 3, 8], "uint8"))
    assert [p.batch.lengths.tolist() for p in cut(batch, (4, 4))] == [[1, 2, 3, 4], [0, 0, 0, 4]]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"x": np.ones((8, 3))}, r"x is \(8, 3\), expected \(T, B, I\)"),
        ({"x": np.ones((8, 4, 3, 1))}, r"x is \(8, 4, 3, 1\), expected"),
        ({"target": np.ones((4, 8, 2))}, r"target is \(4, 8, 2\), expected \(T, B, \.\.\.\)"),
        ({"target": np.ones(4)}, r"target is \(4,\), expected .* put a Last after the GRU"),
        ({"mask": np.ones((4, 8), bool)}, r"mask is \(4, 8\), expected \(8, 4\)"),
        ({"mask": np.ones((8, 4))}, "mask has dtype float64, expected bool"),
        ({"mask": np.ones((8, 4), int)}, "mask has dtype int64, expected bool"),
        ({"lengths": [3, 2]}, r"lengths is \(2,\), expected \(B,\) = \(4,\)"),
        ({"lengths": [1.0, 2.0, 3.0, 4.0]}, "lengths has dtype float64, expected integers"),
        ({"lengths": [1, 2, 3, 9]}, "lengths holds 9, expected 0 to T = 8"),
        ({"x": [[1, 2], [3]]}, "x of a batch is no array"),
        ({"x": np.full((8, 4, 3), "a")}, "x of a batch is no array"),
        ({"resets": np.ones((4, 8), bool)}, r"resets is \(4, 8\), expected \(T, B\) = \(8, 4\)"),
        ({"resets": np.ones((8, 4, 1), bool)}, r"resets is \(8, 4, 1\), expected \(T, B\)"),
        ({"resets": np.ones((8, 4))}, "resets has dtype float64, expected bool: resets != 0"),
        ({"resets": [[1, 2], [3]]}, "resets of a batch is no array"),
        ({"batch_first": np.ones((8, 4), bool)}, "batch_first, the fifth .* resets are the sixth"),
        ({"batch_first": "yes"}, "batch_first is 'yes', expected True or False"),
    ],
)
def test_what_does_not_belong_together_is_refused(wrong, words):
    batch, model = data()._replace(**wrong), regression()
    with pytest.raises((TypeError, ValueError), match=words):
        train(model, batch)
    with pytest.raises((TypeError, ValueError), match=words):
        evaluate(model, squared_error, [batch])


def test_what_is_no_batch():
    for batch, words in (
        (np.ones((8, 4, 3)), "a batch is ndarray, expected a Batch or"),
        ((np.ones((8, 4, 3)),), "a batch is tuple"),
        ({"x": 1, "target": 2}, "a batch is dict"),
    ):
        with pytest.raises(TypeError, match=words):
            train(regression(), batch)
    with pytest.raises(ValueError, match=r"x is \(8, 4, 3\), expected \(T, B\), indices"):
        arranged(data(), False, 2)
    with pytest.raises(TypeError, match="batches is list, expected a function"):
        fit(regression(), squared_error, [data()], SGD(regression().params), steps=1)
    for name, function in (("schedule", 0.1), ("valid", 1.0)):
        with pytest.raises(TypeError, match=f"{name} is float, expected a function"):
            train(regression(), data(), **{name: function})
    with pytest.raises(ValueError, match="no target counts"):
        evaluate(regression(), squared_error, [data()._replace(mask=np.zeros((8, 4), bool))])
    with pytest.raises(TypeError, match="model is GRU, expected a Chain"):
        evaluate(GRU(3, 4), squared_error, [data()])


def test_a_chain_has_one_layout():
    with pytest.raises(ValueError, match="must share batch_first"):
        Chain(GRU(3, 4), GRU(4, 4, batch_first=True))
    assert regression(True).batch_first is True
    assert Chain(Linear(3, 2)).batch_first is regression().batch_first is False


def test_sequences_that_differ_in_more_than_time():
    for sequences in ([], [np.ones((2, 3)), np.ones((2, 1))], [np.float64(1)]):
        with pytest.raises(ValueError, match="expected one or more"):
            side_by_side(sequences)
    x, _ = side_by_side([np.ones(2, int), np.full(2, 0.5)])
    assert x[:, 1].tolist() == [0.5, 0.5]


def test_a_mask_in_part_of_the_channels_weighs_pieces_by_what_counts():
    batch = data()._replace(mask=np.random.default_rng(0).random((8, 4, 2)) < 0.4)
    batches = [batch, data(seed=1)]
    model = regression()
    squares = [(model(b.x)[0] - b.target) ** 2 for b in batches]
    total = squares[0][batch.mask].sum() + squares[1].sum()
    expected = total / (batch.mask.sum() + squares[1].size)
    for chunk in (None, 3):
        found = evaluate(model, squared_error, batches, chunk)
        assert found == pytest.approx(expected, rel=1e-12)


# losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [squared_error, sigmoid_cross_entropy])
def test_a_mask_belongs_to_the_leading_axes(loss):
    rng = np.random.default_rng(0)
    y, target = rng.random((2, 3, 3, 3))
    mask = np.array([[True, False, False], [True, True, False], [False, False, False]])
    value, grad = loss(y, target, mask=mask)
    alone, kept = loss(y[mask], target[mask])
    assert value == pytest.approx(alone, rel=1e-14)
    assert np.allclose(grad[mask], kept, rtol=1e-14)
    assert not grad[~mask].any()
    whole = np.broadcast_to(mask[..., None], y.shape)
    for other in (whole, mask[..., None]):
        assert loss(y, target, mask=other)[0] == value


@pytest.mark.parametrize("loss", [squared_error, sigmoid_cross_entropy, softmax_cross_entropy])
def test_a_mask_or_weight_that_could_be_of_other_axes(loss):
    y = np.full((3, 3, 3), 1 / 3)
    for mask in (np.ones(3, bool), np.ones((1, 3, 3, 3), bool), np.array(True)):
        with pytest.raises(ValueError, match=r"mask is .*, expected \(3, 3\)"):
            loss(y, y, mask=mask)
    for mask in (np.ones((3, 3)), np.ones((3, 3), int), np.full((3, 3), np.nan)):
        with pytest.raises(TypeError, match=r"mask has dtype .*, expected bool"):
            loss(y, y, mask=mask)
    with pytest.raises(ValueError, match=r"weight is \(3, 3\), expected"):
        loss(y, y, weight=np.ones((3, 3)))


def test_targets_that_pytorch_would_broadcast():
    y = np.zeros((3, 4))
    for target in (np.zeros((3, 4, 1)), np.zeros((3, 1)), np.zeros(4)):
        with pytest.raises(ValueError, match="target is"):
            squared_error(y, target)
    with pytest.raises(
        TypeError, match=r"target has dtype int64 and the shape of y, expected prob"
    ):
        softmax_cross_entropy(y, np.ones((3, 4), int))


# fit's own arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": True}, {"steps": "5"}, {"steps": 2.5}, {"epochs": True}, {"minutes": "1"},
        {"minutes": np.inf}, {"clip": "1"}, {"clip": np.inf}, {"clip": True}, {"average": 1.5},
        {"average": np.nan}, {"average": 1.0}, {"patience": -1}, {"patience": 1.5},
        {"tbptt": (4,)}, {"tbptt": 4}, {"tbptt": (2.5, 4)}, {"tbptt": "44"}, {"tbptt": (True, 4)},
        {"accumulate": 1.5}, {"seed": -1}, {"seed": None}, {"save_every": None},
        {"log_every": "x"}, {"bar": "False"}, {"validate_every": 0},
    ],
)  # fmt: skip
def test_arguments_that_mean_nothing_are_refused_by_name(wrong):
    model = regression()
    (name,) = wrong
    with pytest.raises((TypeError, ValueError), match=f"{name} is "):
        fit(model, squared_error, lambda epoch: [data()], SGD(model.params),
            **{"steps": 1, "bar": False, **wrong})  # fmt: skip


def test_numbers_of_numpy_reach_the_checkpoint(tmp_path):
    numbers = {"steps": np.int64(3), "clip": np.float32(1), "tbptt": np.array([4, 4]),
               "seed": np.int32(1), "save_every": np.int8(2), "average": np.float64(0.5),
               "patience": np.int64(3), "minutes": np.float32(9)}  # fmt: skip
    losses = itertools.count(9.0, -1.0)
    valid = functools.partial(next, losses)
    first = train(regression(), data(), out=tmp_path, valid=valid, **numbers)
    plain = {"steps": 3, "clip": 1, "tbptt": (4, 4), "seed": 1, "save_every": 2, "average": 0.5,
             "patience": 3, "minutes": 9}  # fmt: skip
    again = train(regression(), data(), out=tmp_path, valid=valid, **plain)
    assert all(np.array_equal(again[name], w) for name, w in first.items())


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"rows": np.int64(3)}, r"settings\['rows'\] is .*JSON cannot write"),
        ({"rate": float("nan")}, r"settings\['rate'\] is nan"),
        ({"steps": 3}, r"settings has \['steps'\], which are kept anyway"),
        ({3: 1}, "settings has the name 3"),
        ([1], "settings is list"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused_before_the_first_step(bad, words, tmp_path):
    model = regression()
    before = {k: v.copy() for k, v in model.params.items()}
    with pytest.raises((TypeError, ValueError), match=words):
        train(model, data(), out=tmp_path, settings=bad)
    assert all(np.array_equal(model.params[k], v) for k, v in before.items())


def test_where_no_thread_can_start(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    expected = train(regression(), data(), tbptt=(3, 5))
    monkeypatch.setattr("threading.Thread.start", refuse)
    found = train(regression(), data(), tbptt=(3, 5))
    assert all(np.array_equal(found[name], w) for name, w in expected.items())
    assert list(ahead(iter([1, 2]))) == [1, 2]


@pytest.mark.parametrize("error", [KeyError("mine"), RuntimeError("mine"), OSError("mine")])
@pytest.mark.parametrize("threads", [True, False])
def test_an_error_of_batches_is_raised_as_itself(error, threads, monkeypatch):
    if not threads:

        def refuse(self):
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr("threading.Thread.start", refuse)

    def batches(epoch):
        yield data()
        raise error

    model = regression()
    with pytest.raises(type(error)) as raised:
        fit(model, squared_error, batches, Adam(model.params), steps=5, bar=False)
    assert raised.value is error


# lengths, and one target a row -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple, lambda n: np.array(n, np.uint8)])
def test_lengths_without_a_mask_leave_the_padding_out(kind):
    batch, lengths = data(B=5, T=12), [12, 3, 0, 7, 1]
    inside = np.arange(12)[:, None] < lengths
    y, _ = regression()(batch.x, lengths=lengths)
    expected = ((y - batch.target) ** 2)[inside].mean()
    given = batch._replace(lengths=kind(lengths))
    for model, same in ((regression(), given), (regression(True), turned(given))):
        for chunk in (None, 5):
            assert evaluate(model, squared_error, [same], chunk) == pytest.approx(expected)


@pytest.mark.parametrize("batch_first", [False, True])
def test_one_target_a_row(batch_first):
    torch = require("torch")
    x, labels = data(B=5, T=12).x, np.array([0, 1, 1, 0, 1])
    I, home = x.shape[-1], {"dtype": "float64"}
    gru = GRU(I, 6, batch_first=batch_first, seed=0, **home)
    model = Chain(gru, Last(**home), Linear(6, 2, seed=1, **home))
    lengths = [12, 3, 4, 7, 12]
    batch = Batch(x, labels, None, lengths, batch_first=False)
    rows = np.stack([gru(x[:n, i])[0][-1] for i, n in enumerate(lengths)])
    scores = rows @ model.params["2.weight"].T + model.params["2.bias"]
    expected = torch.nn.functional.cross_entropy(torch.tensor(scores), torch.tensor(labels)).item()
    assert evaluate(model, softmax_cross_entropy, [batch]) == pytest.approx(expected, rel=1e-12)
    some = np.array([True, True, False, False, True])
    half = torch.nn.functional.cross_entropy(
        torch.tensor(scores)[some], torch.tensor(labels)[some]
    ).item()
    found = evaluate(model, softmax_cross_entropy, [batch._replace(mask=some)])
    assert found == pytest.approx(half, rel=1e-12)
    fit(model, softmax_cross_entropy, lambda epoch: [batch], SGD(model.params, lr=0.5), steps=20,
        bar=False)  # fmt: skip
    assert evaluate(model, softmax_cross_entropy, [batch]) < expected
    for cutting in (
        lambda: evaluate(model, softmax_cross_entropy, [batch], chunk=4),
        lambda: fit(model, softmax_cross_entropy, lambda epoch: [batch], SGD(model.params),
                    steps=1, tbptt=(4, 4), bar=False),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="the model has a Last"):
            cutting()
    with pytest.raises(ValueError, match=r"target is \(12, 5\), expected \(B, ...\)"):
        evaluate(model, softmax_cross_entropy, [batch._replace(target=np.zeros((12, 5), int))])
