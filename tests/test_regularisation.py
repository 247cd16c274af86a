"""Dropout of weights and of states, against models and loops that are given the same masks."""

import shutil

import numpy as np
import pytest
from conftest import HOST, PATHS, THOROUGH, require, running
from hypothesis import given, settings
from hypothesis import strategies as st
from vjp_calls import assert_same, drawn, results, short_blocks  # noqa: F401

from gru_any import (
    GRU,
    Adam,
    Chain,
    Linear,
    convert,
    deploy,
    explain,
    gradcheck,
    load,
    save,
    squared_error,
)
from gru_any.backend import modes
from gru_any.deploy import c
from gru_any.nn.masks import draw
from gru_any.stream import Stream
from gru_any.train.data import Batch
from gru_any.train.loop import fit
from gru_any.train.share import Share, SharedGenerator

VARIANTS = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
WAYS = [*PATHS, *(["packed"] if "compiled" in PATHS else [])]
EVERY = pytest.mark.parametrize("path", WAYS)
# compiled with one of the variants, as that takes long
SOME = pytest.mark.parametrize(
    ("path", "after"),
    [(path, after) for path in PATHS for after in (False, True)
     if THOROUGH or after or path != "compiled"],
)  # fmt: skip
KINDS = ["weight_dropout", "recurrent_dropout", "zoneout"]
KIND = pytest.mark.parametrize("kind", KINDS)
ALL = dict.fromkeys(KINDS, 0.4)  # compiled code is tested with all of them, as compiling takes long
T, B, I, H = 6, 3, 3, 4


def make(after=False, layers=2, dtype="float64", bidirectional=True, **options):
    gru = GRU(I, H, layers, reset_after=after, dtype=dtype, seed=1, bidirectional=bidirectional,
              **options)  # fmt: skip
    rng = np.random.default_rng(5)
    for v in gru.params.values():
        v[...] = rng.uniform(-0.8, 0.8, v.shape)
    return gru


def batch(gru, seed=0, T=T, B=B):
    return drawn(gru, T, B, seed)


def run(gru, *arrays, seed=7, **options):
    rng = None if seed is None else np.random.default_rng(seed)
    return results(gru, *arrays, rng=rng, **options)


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


@VARIANTS
@pytest.mark.parametrize(
    ("path", "kinds"),
    [*((path, {kind: 0.4}) for path in ("plain", "traced") for kind in KINDS),
     *((path, ALL) for path in (WAYS if THOROUGH else WAYS[:2]))],
)  # fmt: skip
def test_gradients_are_slopes(path, after, kinds):
    gru = make(after, **kinds)
    x, h0, *_ = batch(gru)
    with running(path):
        gradcheck(Training(gru), x, h0, directions=1)
        gradcheck(Training(gru), x, h0, directions=1, **flags(T, B))


@pytest.mark.parametrize("path", WAYS[:2])
@VARIANTS
@pytest.mark.parametrize("merge", ["concat", "sum", "mul"])
def test_with_other_functions_and_merged_directions(path, after, merge):
    """All at once, without corners: finite differences would step over them."""
    kinds = dict.fromkeys([*KINDS, "dropout"], 0.3)
    pair = {"activation": ("scaled_tanh", 1.1, 0.7), "gate_activation": ("scaled_tanh", 0.9, 0.6)}
    gru = make(after, merge=merge, **pair, **kinds)
    x, h0, *_ = batch(gru)
    assert gru.params["weight_ih_l1"].shape[1] == gru.output_size == (8 if merge == "concat" else 4)
    with running(path):
        gradcheck(Training(gru), x, h0, directions=1, **flags(T, B))


@VARIANTS
@given(
    kinds=st.sampled_from([{}, ALL]),
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
    gru = make(after, bidirectional=bidirectional, recompute=recompute, dropout=0.3, **kinds)
    arrays = batch(gru, seed, T, B)
    given = flags(T, B, seed) if flagged else {}
    with running("plain"):
        expected = run(gru, *arrays, seed=seed, **given)
        if flagged and T:
            alive = given["mask"] & (np.arange(T)[:, None] < given["lengths"])
            arrays[0][~alive] = np.nan
    # to compile all takes minutes: each way has some of them
    compiled = {"compiled": after and not flagged, "packed": after and flagged and kinds}
    for path in WAYS:
        if not (THOROUGH or compiled.get(path, True)):
            continue
        with running(path):
            assert_same(run(gru, *arrays, seed=seed, **given), expected, 1e-12)


@KIND
def test_zero_is_off(kind):
    """Not a bit differs, nothing is drawn, and files and reprs are those of a model without it."""
    gru, off = make(dropout=0.5), make(dropout=0.5, **{kind: 0.0})
    arrays = batch(gru)
    one, two = run(gru, *arrays), run(off, *arrays)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert off.settings == gru.settings
    assert repr(off) == repr(gru)


@KIND
def test_masks_repeat_with_the_generator(kind):
    gru = make(**{kind: 0.5})
    arrays = batch(gru)
    with running("traced"):
        one, two, other = (run(gru, *arrays, seed=s)["y"] for s in (3, 3, 4))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_every_library(backend):
    kinds = dict(ALL)
    if backend.name == "array_api_strict":
        del kinds["recurrent_dropout"]
        refusing = make(recurrent_dropout=0.3).to(backend.name, backend.device)
        with pytest.raises(TypeError, match="train on another backend"):
            run(refusing, *batch(refusing))
    gru = make(layers=1, **kinds)
    there = gru.to(backend.name, backend.device)
    arrays = batch(gru, T=3)
    with running("plain"):
        expected = run(gru, *arrays, **flags(3, B))
    with running("plain" if backend.variant == "plain" else "traced"):
        assert_same(run(there, *arrays, **flags(3, B)), expected, 1e-12)


@KIND
def test_a_model_is_saved_with_it(kind, tmp_path):
    gru = make(**{kind: 0.25})
    save(tmp_path / "model", Chain(gru))
    (found,) = load(tmp_path / "model").layers
    assert f"{kind}=0.25" in repr(found)
    arrays = batch(gru)
    with running("traced"):
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


def test_a_run_goes_on_with_its_masks(tmp_path):
    def train(folder, fails=None):
        model = Chain(make(layers=1, dtype="float32", **ALL), Linear(2 * H, 2, seed=0))

        def batches(epoch):
            if epoch == fails:
                raise RuntimeError("someone pulls the plug")
            return [Batch(x, target)]

        fit(model, squared_error, batches, Adam(model.params), steps=4, out=tmp_path / folder,
            save_every=1, bar=False)  # fmt: skip
        return model.params

    rng = np.random.default_rng(0)
    x, target = (rng.standard_normal((T, B, n)).astype("float32") for n in (I, 2))
    with running("traced"):
        whole = train("whole")
        with pytest.raises(RuntimeError, match="plug"):
            train("cut", fails=2)
        again = train("cut")
    assert all(np.array_equal(again[name], whole[name]) for name in whole)


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


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def loop(gru, x, h0, dropped=None, kept=None, share=0.0):
    """The outputs by the formulas of Keras (dropout of states) and haste (zoneout), step by step.

    dropped: the mask (B, H) of each layer and direction; kept: (T, B, H) where new states are taken
    in training; share: of the old state in inference.
    """
    y, states = x, []
    for n in range(gru.num_layers):
        outputs = []
        for suffix in gru.suffixes:
            names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
            W, U, b, c = (gru.params.get(f"{k}_l{n}{suffix}", np.zeros(3 * H)) for k in names)
            U_r, U_z, U_n = U.reshape(3, H, H)
            c_r, c_z, c_n = c.reshape(3, H)
            way, h, found = len(states), h0[len(states)], np.zeros((T, B, H))
            d = 1.0 if dropped is None else dropped[way]
            for t in range(T)[:: -1 if suffix else 1]:
                a_r, a_z, a_n = np.split(y[t] @ W.T + b, 3, axis=-1)
                r = sigmoid(a_r + (h * d) @ U_r.T + c_r)
                z = sigmoid(a_z + (h * d) @ U_z.T + c_z)
                if gru.reset_after:
                    n_t = np.tanh(a_n + r * ((h * d) @ U_n.T + c_n))
                else:
                    n_t = np.tanh(a_n + (r * (h * d)) @ U_n.T)
                new = z * h + (1 - z) * n_t
                if kept is not None:
                    new = (new - h) * kept[way][t] + h
                h = share * h + (1.0 - share) * new
                found[t] = h
            outputs.append(found)
            states.append(h)
        y = np.concatenate(outputs, axis=-1)
    return y, np.stack(states)


@SOME
def test_by_the_formulas(path, after):
    gru = make(after, recurrent_dropout=0.3, zoneout=0.4)
    x, h0, *_ = batch(gru)
    rng = np.random.default_rng(7)
    dropped = [(rng.random((B, H)) >= 0.3) / 0.7 for _ in range(4)]
    kept = [rng.random((T, B, H)) >= 0.4 for _ in range(4)]
    with running(path):
        trained, _ = gru.vjp(x, h0, rng=np.random.default_rng(7))
        inferred, calls = gru(x, h0), (gru.vjp(x, h0)[0], (gru(x, h0)[0], gru.last(x, h0)))
    for found, expected in (
        (trained, loop(gru, x, h0, dropped, kept)),
        *((found, loop(gru, x, h0, share=0.4)) for found in (inferred, *calls)),
    ):
        for ours, theirs in zip(found, expected, strict=True):
            assert np.allclose(ours, theirs, rtol=0, atol=1e-14)


@VARIANTS
def test_recurrent_dropout_is_that_of_keras(after):
    """Keras' cell, given our mask for each of its three gates."""
    keras = require("keras")
    keras.utils.set_random_seed(0)
    gru = make(after, layers=1, bidirectional=False, dtype="float32", recurrent_dropout=0.4)
    x, h0, *_ = batch(gru)
    layer = keras.layers.GRU(H, return_sequences=True, return_state=True, reset_after=after,
                             recurrent_dropout=0.4, activation="tanh")  # fmt: skip
    layer.build((B, T, I))
    layer.set_weights(convert.keras.to_arrays(gru))
    mask = (np.random.default_rng(7).random((B, H)) >= 0.4) / 0.6
    mask = keras.ops.convert_to_tensor(mask.astype("float32"))
    layer.cell.get_recurrent_dropout_mask = lambda state: [mask] * 3
    found = layer(x.transpose(1, 0, 2), initial_state=[h0[0]], training=True)
    theirs, h_n = (v.detach().numpy() for v in found)
    with running("traced"):
        (y, h), _ = gru.vjp(x, h0, rng=np.random.default_rng(7))
    assert np.allclose(y, theirs.transpose(1, 0, 2), rtol=0, atol=2e-6)
    assert np.allclose(h[0], h_n, rtol=0, atol=2e-6)


@SOME
def test_the_expectation_of_zoneout(path, after):
    """Its gradient; and every way to infer: by steps, as a stream, frozen."""
    gru = make(after, bidirectional=False, zoneout=0.4)
    x, h0, *_ = batch(gru)
    with running(path):
        y, h_n = gru(x, h0)
        gradcheck(gru, x, h0, directions=1)
        for model in (gru, deploy.freeze(gru)):
            assert np.allclose(model(x, h0)[0], y, rtol=0, atol=1e-14)
            stream = Stream(model)
            stream.state = state = h0
            for t in range(T):
                assert np.allclose(stream.step(x[t]), y[t], rtol=0, atol=1e-14)
                y_t, state = model.step(x[t], state)
                assert np.allclose(y_t, y[t], rtol=0, atol=1e-14)
            assert np.allclose(state, h_n, rtol=0, atol=1e-14)
        if path == "plain":  # as complex numbers always run
            gradcheck(gru, x, h0, method="complex", directions=1)


def test_a_team_of_threads(monkeypatch):
    """Threads that share the units wait before a buffer is written that others still read."""
    if "compiled" not in PATHS:
        pytest.skip("numba is not installed")
    from gru_any.backend.cpu import numba_runner

    gru = GRU(5, 64, reset_after=True, recurrent_dropout=0.4, seed=0)
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((600, 2, n)).astype("float32") for n in (5, 64))
    runs = []
    for members in (1, 2, 2, 2):
        monkeypatch.setattr(numba_runner.tuning, "team", lambda *_, n=members: n)
        with running("packed"):
            (y, _), pullback = gru.vjp(x, rng=np.random.default_rng(0))
            runs.append([y, pullback(dy)[1]])
    for found in runs[1:]:
        assert all(np.array_equal(one, two) for one, two in zip(runs[0], found, strict=True))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("way", "after", "dtype"),
    [("eager", False, "float64"), ("graph", True, "float64"), ("graph", False, "float16"),
     ("persistent", False, "float64"), ("persistent", True, "float16"), ("whole", True, "float64")],
)  # fmt: skip
def test_cuda(way, after, dtype, monkeypatch):
    """Thrice, so that the call is compiled, recorded and replayed, with other masks each time."""
    monkeypatch.setattr(modes, "chosen_on_cuda", way)
    modes._runner.cache_clear()
    modes._on_cuda.cache_clear()
    gru = make(after, layers=1, dtype=dtype, **ALL)
    there, exact = gru.to(HOST), gru.to(dtype="float64")
    for seed in range(3):
        arrays = batch(gru, seed)
        with running("plain"):
            wide = [v.astype("float64") for v in arrays]
            expected = run(exact, *wide, seed=seed, **flags(T, B, seed))
        found = run(there, *arrays, seed=seed, **flags(T, B, seed))
        assert_same(found, expected, 1e-13 if dtype == "float64" else 1e-2)
    modes._runner.cache_clear()
    modes._on_cuda.cache_clear()


# where models go ---------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no compiler")
def test_zoneout_in_c(tmp_path):
    gru = make(layers=1, bidirectional=False, dtype="float32", zoneout=0.4)
    x = batch(gru)[0]
    with running("traced"):
        y, _ = gru(x[:, 0])
    c.build(gru, tmp_path / "gru.so")
    model = c.load(tmp_path / "gru.so", gru)
    for t in range(T):
        assert np.allclose(model.step(x[t, 0]), y[t], rtol=0, atol=1e-6)


@pytest.mark.parametrize("library", ["onnx", "keras", "flax", "torch"])
def test_zoneout_is_refused(library, tmp_path):
    """By each library but haste, whose layer takes it beside the weights."""
    gru = make(True, layers=1, bidirectional=False, zoneout=0.4)
    assert convert.haste.to_arrays(gru)[0]["kernel"].shape == (I, 3 * H)
    write = {
        "onnx": lambda: convert.onnx.save(tmp_path / "model", Chain(gru)),
        "keras": lambda: convert.keras.to_arrays(gru),
        "flax": lambda: convert.flax.to_arrays(gru),
        "torch": lambda: convert.torch.to_arrays(gru),
    }[library]
    with pytest.raises(ValueError, match=r"zoneout=0.4 has no counterpart"):
        write()


@KIND
def test_modules_of_torch_refuse_what_they_cannot_train(kind):
    require("torch")
    gru = make(True, **{kind: 0.25})
    for model in (gru, Chain(gru, Linear(2 * H, 2, dtype="float64"))):
        with pytest.raises(ValueError, match=f"{kind}=0.25 of the model has no counterpart"):
            convert.torch.as_module(model)


@KIND
def test_explain_says_what_acts(kind):
    text = explain(make(**{kind: 0.25}))
    assert kind.replace("_", " ").capitalize() in text
    assert "0.25" in text
    assert kind.replace("_", " ").capitalize() not in explain(make())
