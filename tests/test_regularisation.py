"""Dropout of weights and of states, against models and loops that are given the same masks."""

import numpy as np
import pytest
from conftest import PATHS, running
from hypothesis import given, settings
from hypothesis import strategies as st

from gru_any import GRU, Chain, asarray, gradcheck, load, save, to_numpy
from gru_any.nn import sweep
from gru_any.nn.masks import draw
from gru_any.train.share import Share, SharedGenerator

VARIANTS = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
WAYS = [*PATHS, *(["packed"] if "compiled" in PATHS else [])]
EVERY = pytest.mark.parametrize("path", WAYS)
KINDS = ["weight_dropout"]
KIND = pytest.mark.parametrize("kind", KINDS)
T, B, I, H = 6, 3, 3, 4


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """So that a mask is read block by block."""
    monkeypatch.setattr(sweep, "STEPS", 4)
    monkeypatch.setattr(sweep, "ROWS", 1)


def make(after=False, layers=2, dtype="float64", bidirectional=True, **options):
    gru = GRU(I, H, layers, reset_after=after, dtype=dtype, seed=1, bidirectional=bidirectional,
              **options)  # fmt: skip
    rng = np.random.default_rng(5)
    for v in gru.params.values():
        v[...] = rng.uniform(-0.8, 0.8, v.shape)
    return gru


def batch(gru, seed=0, T=T, B=B):
    """x, h0, dy and dh_n."""
    rng, D = np.random.default_rng(seed), len(gru.suffixes)
    shapes = [(T, B, I), (gru.num_layers * D, B, H), (T, B, D * H), (gru.num_layers * D, B, H)]
    return [rng.standard_normal(shape).astype(gru.dtype) for shape in shapes]


def run(gru, x, h0, dy, dh, seed=7, **options):
    """All that comes out of a training call, on the host."""
    x, h0, dy, dh = (asarray(v, like=gru) for v in (x, h0, dy, dh))
    rng = None if seed is None else np.random.default_rng(seed)
    (y, h_n), pullback = gru.vjp(x, h0, rng=rng, **options)
    grads, dx, dh0 = pullback(dy, dh)
    found = {"y": y, "h_n": h_n, "dx": dx, "dh0": dh0, **grads}
    return {name: to_numpy(v) for name, v in found.items()}


def assert_same(found, expected, limit):
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        scale = max(1.0, np.abs(theirs).max(initial=0))
        assert np.abs(found[name] - theirs).max(initial=0) <= limit * scale, name


class Training:
    """A model whose calls are training calls, with the same masks in each."""

    def __init__(self, model, seed=7):
        self.model, self.seed = model, seed
        self.params, self.backend, self.dtype = model.params, model.backend, model.dtype

    def vjp(self, *inputs, **options):
        return self.model.vjp(*inputs, rng=np.random.default_rng(self.seed), **options)

    def __call__(self, *inputs, **options):
        return self.vjp(*inputs, **options)[0]

    def to(self, *, dtype):
        return Training(self.model.to(dtype=dtype), self.seed)


def flags(T, B, seed=0):
    """Lengths, a mask with holes, and resets."""
    rng = np.random.default_rng(seed)
    return {
        "lengths": rng.integers(0, T + 1, B),
        "mask": rng.random((T, B)) < 0.7,
        "resets": rng.random((T, B)) < 0.3,
    }


# what holds for every kind -----------------------------------------------------------------------


@EVERY
@VARIANTS
@KIND
def test_gradients_are_slopes(path, after, kind):
    gru = make(after, **{kind: 0.4})
    x, h0, *_ = batch(gru)
    with running(path):
        gradcheck(Training(gru), x, h0, directions=1)
        gradcheck(Training(gru), x, h0, directions=1, **flags(T, B))


@VARIANTS
@given(
    kinds=st.sets(st.sampled_from([*KINDS, "dropout"]), min_size=1),
    bidirectional=st.booleans(),
    T=st.integers(0, 9),
    B=st.sampled_from([1, 3, 20]),
    flagged=st.booleans(),
    recompute=st.sampled_from([None, 3]),
    seed=st.integers(0, 9999),
)
@settings(max_examples=10)
def test_every_path_is_the_plain_one(after, kinds, bidirectional, T, B, flagged, recompute, seed):
    """All kinds together; with lengths, masks and resets; whatever NaN stands in a skipped step."""
    options = dict.fromkeys(kinds, 0.3)
    gru = make(after, bidirectional=bidirectional, recompute=recompute, **options)
    arrays = batch(gru, seed, T, B)
    given = flags(T, B, seed) if flagged else {}
    with running("plain"):
        expected = run(gru, *arrays, seed=seed, **given)
        if flagged and T:
            alive = given["mask"] & (np.arange(T)[:, None] < given["lengths"])
            arrays[0][~alive] = np.nan
    for path in WAYS:
        with running(path):
            assert_same(run(gru, *arrays, seed=seed, **given), expected, 1e-12)


@EVERY
@KIND
def test_zero_is_off(path, kind):
    """Not a bit differs, nothing is drawn, and files and reprs are those of a model without it."""
    gru, off = make(dropout=0.5), make(dropout=0.5, **{kind: 0.0})
    arrays = batch(gru)
    with running(path):
        one, two = run(gru, *arrays), run(off, *arrays)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert off.settings == gru.settings
    assert repr(off) == repr(gru)


@EVERY
@KIND
def test_masks_repeat_with_the_generator(path, kind):
    gru = make(**{kind: 0.5})
    arrays = batch(gru)
    with running(path):
        one, two, other = (run(gru, *arrays, seed=s)["y"] for s in (3, 3, 4))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_every_library(backend):
    gru = make(layers=1, **dict.fromkeys(KINDS, 0.3))
    there = gru.to(backend.name, backend.device)
    arrays = batch(gru, T=3)
    with running("plain"):
        expected = run(gru, *arrays, **flags(3, B))
    assert_same(run(there, *arrays, **flags(3, B)), expected, 1e-12)


@KIND
def test_a_model_is_saved_with_it(kind, tmp_path):
    gru = make(**{kind: 0.25})
    save(tmp_path / "model", Chain(gru))
    (found,) = load(tmp_path / "model").layers
    assert f"{kind}=0.25" in repr(found)
    arrays = batch(gru)
    one, two = run(gru, *arrays), run(found, *arrays)
    assert all(np.array_equal(one[name], two[name]) for name in one)


@KIND
@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_a_probability_is_below_1(kind, p):
    with pytest.raises(ValueError, match=f"0 <= {kind} < 1"):
        GRU(I, H, **{kind: p})


def test_ranks_draw_the_masks_of_one_process():
    """Each the rows of its share; masks of weights whole."""
    gru = make(dropout=0.4, **dict.fromkeys(KINDS, 0.4))
    whole = draw(gru, np.random.default_rng(0), T, B)
    for rows in (slice(0, 2), slice(2, 3)):
        rng = SharedGenerator(np.random.default_rng(0), Share(rows, B, 1.0, None), Chain(gru))
        own = draw(gru, rng, T, rows.stop - rows.start)
        for name, mask in whole.weights.items():
            assert np.array_equal(own.weights[name], mask)
        for mine, mask in zip(own.between[1:], whole.between[1:], strict=True):
            assert np.array_equal(mine, mask[:, rows])


# each kind ---------------------------------------------------------------------------------------


@EVERY
@VARIANTS
def test_weight_dropout(path, after):
    """It is the model with masked weights, whose gradients are masked likewise."""
    gru, plain = make(after, weight_dropout=0.4), make(after)
    rng, masks = np.random.default_rng(7), {}
    for name in [name for name in gru.params if name.startswith("weight_hh")]:
        masks[name] = (rng.random((3 * H, H)) >= 0.4) / 0.6
        plain.params[name] *= masks[name]
    arrays = batch(gru)
    with running(path):
        expected = run(plain, *arrays, seed=None)
        expected |= {name: expected[name] * mask for name, mask in masks.items()}
        assert_same(run(gru, *arrays), expected, 1e-14)
        without = run(make(after), *arrays, seed=None)
        assert_same(run(gru, *arrays, seed=None), without, 0)  # inference drops nothing
