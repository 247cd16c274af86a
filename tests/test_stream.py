"""A stream cut anywhere is the whole."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gru_any import GRU, Adam, Chain, Dropout, Embedding, GRUCell, Linear, asarray
from gru_any.stream import Stream

T, B, I, H = 30, 3, 4, 6
LIMIT = {"float32": 2e-6, "float64": 1e-13}


def gru(dtype="float32", reset_after=False, **settings):
    return GRU(I, H, 2, reset_after=reset_after, dtype=dtype, seed=0, **settings)


def chain(dtype="float32", **settings):
    return Chain(
        Embedding(9, I, dtype=dtype, seed=0, **settings), gru(dtype, **settings),
        Dropout(0.5, dtype=dtype, **settings), GRU(H, 5, dtype=dtype, seed=1, **settings),
        Linear(5, 2, dtype=dtype, seed=2, **settings),
    )  # fmt: skip


def data(model, rng=None):
    rng = rng or np.random.default_rng(0)
    if isinstance(model, Chain):
        return rng.integers(0, 9, (T, B))
    return rng.standard_normal((T, B, I)).astype(model.dtype)


def pieces(stream, x, cuts):
    """Steps where a piece has one, chunks elsewhere."""
    parts = []
    for part in np.split(x, sorted(cuts)):
        parts.append(stream.step(part[0])[None] if len(part) == 1 else stream(part))
    return np.concatenate(parts)


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("make", [gru, lambda dtype: gru(dtype, True), chain])
@settings(max_examples=12)
@given(cuts=st.lists(st.integers(0, T), max_size=T))
def test_any_cut_gives_the_whole(make, dtype, cuts):
    model = make(dtype)
    x = data(model)
    whole, state = model(x)
    stream = Stream(model)
    y = pieces(stream, x, cuts)
    assert np.linalg.norm(y - whole) <= LIMIT[dtype] * np.linalg.norm(whole)
    ends = stream.state if isinstance(model, Chain) else [stream.state]
    for found, expected in zip(ends, state if isinstance(model, Chain) else [state], strict=True):
        assert np.linalg.norm(found - expected) <= LIMIT[dtype] * np.linalg.norm(expected)
    again = pieces(Stream(model), x, cuts)
    assert again.tobytes() == y.tobytes()


def test_every_step_alone_over_a_long_time():
    model = GRU(I, 32, seed=0)
    x = np.random.default_rng(0).standard_normal((2000, 1, I)).astype("float32")
    whole, _ = model(x)
    stream = Stream(model)
    y = np.stack([stream.step(frame) for frame in x])
    assert np.linalg.norm(y - whole) <= 2e-6 * np.linalg.norm(whole)


def test_state_is_saved_and_restored(tmp_path):
    model = chain()
    x = data(model)
    stream = Stream(model)
    assert stream.state is None
    stream(x[:10])
    for i, h in enumerate(stream.state):
        np.save(tmp_path / f"{i}.npy", h)
    expected = stream(x[10:])
    other = Stream(model)
    other.state = [np.load(tmp_path / f"{i}.npy") for i in range(2)]
    assert np.array_equal(other(x[10:]), expected)
    other.state = None
    assert np.array_equal(other(x), Stream(model)(x))


def test_the_state_read_is_a_copy_and_the_state_given_is_not_written():
    model = gru()
    x, stream = data(model), Stream(model)
    stream(x[:5])
    kept = stream.state
    before = kept.copy()
    stream.state = kept
    expected = stream.step(x[5])
    assert np.array_equal(kept, before)
    stream.state = kept
    kept[...] = 7
    stream.state[...] = 7
    assert np.array_equal(stream.step(x[5]), expected)


def test_rows_are_reset_one_by_one():
    for model in (gru(), chain()):
        x, stream = data(model), Stream(model)
        stream.reset([True, False, True])  # nothing has come yet
        stream(x[:10])
        stream.reset([False, True, False])
        y = stream(x[10:])
        fresh = Stream(model)(x[10:])
        whole = model(x)[0][10:]
        assert np.allclose(y[:, 1], fresh[:, 1], rtol=0, atol=1e-6)
        assert np.allclose(y[:, [0, 2]], whole[:, [0, 2]], rtol=0, atol=1e-6)
        stream.reset()
        assert np.array_equal(stream(x[10:]), fresh)


def test_a_row_without_new_steps_keeps_its_state():
    model = gru()
    x, stream = data(model), Stream(model)
    stream(x[:10])
    before = stream.state
    stream(x[10:20], lengths=[10, 0, 4])
    assert np.array_equal(stream.state[:, 1], before[:, 1])
    assert not np.array_equal(stream.state[:, 2], before[:, 2])


def test_one_stream_without_a_batch():
    model = chain()
    x = np.array(data(model)[:, 0])
    stream = Stream(model)
    whole, _ = model(x[:, None])
    y = np.concatenate([stream(x[:10]), stream.step(x[10, ...])[None], stream(x[11:])])
    assert np.allclose(y, whole[:, 0], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="expected none, since there is no batch: reset"):
        stream.reset([True])


def test_changed_weights_count_after_refresh():
    model = gru()
    x, stream = data(model), Stream(model)
    (y, _), pullback = model.vjp(x)
    Adam(model.params, lr=0.1).step(model.params, pullback(y)[0])
    stream.refresh()
    assert np.allclose(stream.step(x[0]), model(x)[0][0], rtol=0, atol=1e-6)
    model.params["weight_ih_l0"] *= 2
    stream.reset()
    stream.refresh()
    assert np.allclose(stream.step(x[0]), model(x)[0][0], rtol=0, atol=1e-6)


def test_on_every_backend(backend):
    model = Chain(Embedding(9, I, seed=0), GRU(I, H, seed=0), Linear(H, 2, seed=0))
    x = data(model)[:3]
    whole = model(x)[0]
    model = model.to(backend.name, backend.device)
    stream = Stream(model)
    there = asarray(x, like=model)
    y = [backend.host(v) for v in (stream(there[:2, ...]), stream.step(there[2, ...]))]
    assert np.allclose(y[0], whole[:2], rtol=0, atol=1e-6)
    assert np.allclose(y[1], whole[2], rtol=0, atol=1e-6)
    stream.reset([False, True, True])
    state = stream.state
    assert not backend.host(state[0])[:, 1:].any()
    assert backend.host(state[0])[:, 0].any()
    stream.state = state


@pytest.mark.parametrize("settings", [{"bidirectional": True}, {"reverse": True}])
def test_what_reads_from_the_end_is_refused(settings):
    for model in (gru(**settings), Chain(gru(**settings))):
        with pytest.raises(ValueError, match="reads from the end, which has not come yet"):
            Stream(model)


def test_mistakes_are_named():
    with pytest.raises(TypeError, match="is a GRUCell, expected a GRU or a Chain"):
        Stream(GRUCell(2, 3))
    stream = Stream(gru())
    stream(data(stream.model))
    with pytest.raises(ValueError, match=r"rows is bool \(2,\), expected booleans \(B,\) = \(3,\)"):
        stream.reset([True, False])
    with pytest.raises(ValueError, match="rows is int64"):
        stream.reset([0, 1, 2])
    with pytest.raises(ValueError, match=r"state is \(2, 3, 5\).*H is 6"):
        stream.state = np.zeros((2, 3, 5), "float32")
    with pytest.raises(TypeError, match="state has dtype float64"):
        stream.state = np.zeros((2, 3, 6))
    with pytest.raises(ValueError, match="state holds 1, expected 2"):
        Stream(chain()).state = [np.zeros((2, 3, 6), "float32")]
    with pytest.raises(ValueError, match=r"h0 is \(2, 3, 6\)"):
        stream(np.ones((2, 5, I), "float32"))


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize("chained", [False, True])
def test_a_stream_is_pickled_in_the_middle(chained, protocol):
    gru = GRU(3, 5, num_layers=2, seed=0)
    model = Chain(Linear(3, 3, seed=1), gru, Linear(5, 2, seed=2)) if chained else gru
    x = np.random.default_rng(0).standard_normal((9, 2, 3)).astype("float32")
    stream, fresh = Stream(model), pickle.loads(pickle.dumps(Stream(model), protocol))
    assert fresh.state is None
    for x_t in x[:4]:
        assert np.array_equal(fresh.step(x_t), stream.step(x_t))
    copies = [
        pickle.loads(pickle.dumps(stream, protocol)),
        copy.copy(stream),
        copy.deepcopy(stream),
    ]
    rest = [stream.step(x_t) for x_t in x[4:]]
    for other in copies:  # each with a state of its own
        assert all(np.array_equal(other.step(x_t), y) for x_t, y in zip(x[4:], rest, strict=True))
    assert copies[1].model is model
    assert copies[2].model is not model
