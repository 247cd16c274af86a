"""The outputs of two directions, merged: by hand, by complex step, and as Keras has them."""

import numpy as np
import pytest
from conftest import require, running

from gru_any import GRU, Chain, Last, Linear, explain, gradcheck, load, save
from gru_any.convert import keras as convert

# Keras' own use of NumPy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

T, B, I, H = 5, 3, 3, 4
BY_HAND = {
    "concat": lambda a, b: np.concatenate((a, b), axis=-1),
    "sum": np.add,
    "mean": lambda a, b: (a + b) / 2,
    "mul": np.multiply,
}
MODES = pytest.mark.parametrize("mode", list(BY_HAND))
RNG = np.random.default_rng(0)
X, H0 = RNG.standard_normal((T, B, I)), RNG.uniform(-1, 1, (4, B, H))


def both(mode, layers=1, dtype="float64", **settings):
    return GRU(I, H, layers, bidirectional=True, merge=mode, dtype=dtype, seed=0, **settings)


@MODES
@pytest.mark.parametrize("after", [False, True])
def test_two_layers_by_hand(mode, after):
    """Each layer reads what was merged below, of each direction alone."""
    gru, x = both(mode, 2, reset_after=after), X
    with running("traced"):
        for layer in range(2):
            ways = []
            for d in range(2):
                one = GRU(x.shape[2], H, reverse=bool(d), reset_after=after, dtype="float64")
                named = {n: gru.params[n.replace("_l0", f"_l{layer}")] for n in one.params}
                one.load_params(named)
                ways.append(one(x, H0[2 * layer + d : 2 * layer + d + 1], [T, 2, 0])[0])
            x = BY_HAND[mode](*ways)
        y, _ = gru(X, H0, [T, 2, 0])
    assert y.shape[2] == gru.output_size
    assert np.allclose(y, x, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", ["sum", "mean", "mul"])
@pytest.mark.parametrize("model", ["gru", "chain", "last"])
def test_gradients_by_complex_step(mode, model):
    gru = both(mode, 2, recompute=2)
    home = {"dtype": "float64", "seed": 1}
    of = {
        "chain": [gru, GRU(H, 3, **home)],
        "last": [gru, Last(dtype="float64"), Linear(H, 2, **home)],
    }
    options = {"lengths": [T, 2, 0], "resets": RNG.random((T, B)) < 0.3}
    with running("plain"):
        if model == "gru":
            gradcheck(gru, X, H0, method="complex", directions=1, **options)
        else:
            gradcheck(Chain(*of[model]), X, method="complex", directions=1, **options)


def test_both_apart():
    gru, usual = both(None), both("concat")
    with running("traced"):
        for options in ({}, {"skipped": "repeat", "lengths": [T, 2, 1]}):
            y, _ = usual(X, **options)
            pair, _ = gru(X, **options)
            for v, w in zip(pair, (y[..., :H], y[..., H:]), strict=True):
                assert np.array_equal(v, w)
        dy = RNG.standard_normal((T, B, 2 * H))
        (forward, _), pullback = gru.vjp(X)
        assert isinstance(forward, tuple)
        found = pullback((dy[..., :H], dy[..., H:]))
        expected = usual.vjp(X)[1](dy)
    assert np.array_equal(found[1], expected[1])
    for name, grad in expected[0].items():
        assert np.array_equal(found[0][name], grad)
    with pytest.raises(TypeError, match="dy is a ndarray, expected a pair"):
        pullback(dy)
    with pytest.raises(ValueError, match=r"dy holds \(5, 3, 4\) and \(5, 3, 3\)"):
        pullback((dy[..., :H], dy[..., :3]))
    with pytest.raises(ValueError, match="dy is"):
        pullback((dy, dy))


@pytest.mark.parametrize("mode", ["sum", "mul", None])
def test_every_backend(backend, mode):
    host = both(mode, 2)
    gru = host.to(backend.name, backend.device)
    with running("plain"):
        (y, _), pullback = host.vjp(X)
        expected = [*(y if mode is None else [y]), *pullback(y)[1:]]
    with running("plain" if backend.variant == "plain" else "traced"):
        (y, _), pullback = gru.vjp(backend.put(X))
        found = [*(y if mode is None else [y]), *pullback(y)[1:]]
    for a, b in zip(map(backend.host, found), expected, strict=True):
        assert np.allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mode", ["concat", "sum", "ave", "mul"])
@pytest.mark.parametrize("sequences", [False, True])
def test_keras(tmp_path, mode, sequences):
    """Two layers, the last with one result a sequence or all; read, and written again."""
    require("h5py")
    keras = require("keras")
    keras.utils.set_random_seed(0)
    both = [keras.layers.Bidirectional(keras.layers.GRU(H, return_sequences=way), merge_mode=mode)
            for way in (True, sequences)]  # fmt: skip
    model = keras.Sequential([keras.Input((T, I)), *both, keras.layers.Dense(2)])
    model.save(tmp_path / "m.keras")
    x = X.transpose(1, 0, 2).astype("float32")
    expected = model(x).detach().numpy()
    ours = convert.load(tmp_path / "m.keras")
    assert ours.layers[0].merge == {"ave": "mean"}.get(mode, mode)
    assert ours.layers[0].num_layers == 2
    with running("traced"):
        assert np.allclose(ours(x)[0], expected, rtol=1e-5, atol=1e-6)
    convert.save(tmp_path / "again.keras", ours)
    again = keras.saving.load_model(tmp_path / "again.keras")
    assert np.allclose(again(x).detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_keras_apart(tmp_path):
    require("h5py")
    keras = require("keras")
    keras.utils.set_random_seed(0)
    both = keras.layers.Bidirectional(
        keras.layers.GRU(H, return_sequences=True), merge_mode=None, name="both"
    )
    entry = keras.Input((T, I))
    model = keras.Model(entry, both(entry))
    model.save(tmp_path / "m.keras")
    x = X.transpose(1, 0, 2).astype("float32")
    ours = convert.load(tmp_path / "m.keras", "both")
    with running("traced"):
        for a, b in zip(ours(x)[0], model(x), strict=True):
            assert np.allclose(a, b.detach().numpy(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="merge=None makes two outputs"):
        convert.save(tmp_path / "again.keras", ours)


def test_settings(tmp_path):
    gru = both("mul", dtype="float32")
    save(tmp_path / "it", gru)
    assert load(tmp_path / "it").settings == gru.settings
    assert "merge" not in both("concat").settings
    assert "; y holds the product of both directions." in explain(gru)
    assert "y (5, 3, 4), " in explain(gru, (5, 3, 3))
    assert "; y holds both directions as a pair of arrays." in explain(both(None))


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"merge is 'add', expected \"concat\" or"):
        both("add")
    for mode in ("sum", None):
        with pytest.raises(ValueError, match="joins two directions: set bidirectional=True"):
            GRU(I, H, merge=mode)
    with pytest.raises(ValueError, match="merge=None puts out a pair"):
        Chain(both(None), Linear(H, 2, dtype="float64"))
    with pytest.raises(ValueError, match="repeats each direction, and merge='sum'"):
        both("sum")(X, lengths=[1, 2, 3], skipped="repeat")
    with pytest.raises(ValueError, match="dy is"):
        both("sum").vjp(X)[1](np.ones((T, B, 2 * H)))


def test_other_libraries_refuse_it(tmp_path):
    from gru_any.convert import flax, onnx

    gru = both("sum", dtype="float32")
    with pytest.raises(ValueError, match="merge='sum', which would be lost"):
        flax.to_arrays(gru)
    require("onnx")
    with pytest.raises(ValueError, match="merge='sum', which would be lost"):
        onnx.save(tmp_path / "m.onnx", gru)
    torch = require("torch")
    from gru_any.convert import torch as ours

    with pytest.raises(ValueError, match="merge='sum' is none of a module"):
        ours.GRU(I, H, bidirectional=True, merge="sum", dtype=torch.float32)
