"""Layer normalisation inside the gates, against haste's formulas in PyTorch's own functions."""

import importlib

import numpy as np
import pytest
from conftest import PATHS, THOROUGH, require, running
from vjp_calls import assert_same, drawn, results, short_blocks  # noqa: F401

from gru_any import (
    GRU,
    Adam,
    Chain,
    Linear,
    asarray,
    convert,
    deploy,
    explain,
    gradcheck,
    hvp,
    load,
    save,
    squared_error,
)
from gru_any.deploy import c
from gru_any.normalisation import normalise
from gru_any.stream import Stream
from gru_any.train.data import Batch
from gru_any.train.loop import fit

T, B, I, H = 6, 3, 3, 4
WAYS = [*PATHS[1:], *(["packed"] if "compiled" in PATHS else [])]
LIBRARIES = "flax", "equinox", "haiku", "mlx", "chainer", "haste", "keras", "torch"


def make(dtype="float64", layers=2, bidirectional=True, H=H, **options):
    """A model whose parameters, gains included, are all random."""
    gru = GRU(I, H, layers, reset_after=True, layer_norm=True, dtype=dtype, seed=1,
              bidirectional=bidirectional, **options)  # fmt: skip
    rng = np.random.default_rng(5)
    for v in gru.params.values():
        v[...] = rng.uniform(-1.5, 1.5, v.shape)
    return gru


def batch(gru, T=T, B=B, seed=0):
    return drawn(gru, T, B, seed)


def flags(seed=0, B=B):
    rng = np.random.default_rng(seed)
    return {
        "lengths": rng.integers(0, T + 1, B),
        "mask": rng.random((T, B)) < 0.7,
        "resets": rng.random((T, B)) < 0.3,
    }


@pytest.fixture
def quickly():
    """Traced, which compiles nothing; each other way is held against it below."""
    with running("compiled" if THOROUGH and "compiled" in PATHS else "traced"):
        yield


# outside oracles ---------------------------------------------------------------------------------


def theirs(torch, gru, x, h0, share=0.0):
    """The outputs by haste's formulas, r, z, n in our order; share: of zoneout's expectation."""
    norm = torch.nn.functional.layer_norm
    y, states = x, []
    for layer in range(gru.num_layers):
        outputs = []
        for suffix in gru.suffixes:
            own = {k: v for k, v in gru.tensors.items() if k.endswith(f"_l{layer}{suffix}")}
            own = {k.partition("_l")[0]: v for k, v in own.items()}
            zero = torch.zeros(3 * H, dtype=x.dtype)
            v = norm(y @ own["weight_ih"].T, (3 * H,), weight=own["gain_ih"])
            v = v + own.get("bias_ih", zero)
            h, found = h0[len(states)], [None] * T
            for t in range(T)[:: -1 if suffix else 1]:
                q = norm(h @ own["weight_hh"].T, (3 * H,), weight=own["gain_hh"])
                q_r, q_z, q_n = torch.chunk(q + own.get("bias_hh", zero), 3, 1)
                v_r, v_z, v_n = torch.chunk(v[t], 3, 1)
                r, z = torch.sigmoid(v_r + q_r), torch.sigmoid(v_z + q_z)
                new = z * h + (1 - z) * torch.tanh(v_n + r * q_n)
                h = found[t] = share * h + (1 - share) * new
            outputs.append(torch.stack(found))
            states.append(h)
        y = torch.cat(outputs, dim=-1)
    return y, torch.stack(states)


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"zoneout": 0.3}, {"recompute": 3}, {"bidirectional": False}],
    ids=str,
)
def test_haste_s_formulas(options):
    torch = require("torch")
    gru = make(**options)
    arrays = batch(gru)
    x, h0, dy, dh = (torch.tensor(v, requires_grad=n < 2) for n, v in enumerate(arrays))
    gru.tensors = {k: torch.tensor(v, requires_grad=True) for k, v in gru.params.items()}
    y, h_n = theirs(torch, gru, x, h0, gru.zoneout)
    ((y * dy).sum() + (h_n * dh).sum()).backward()
    expected = {"y": y.detach(), "h_n": h_n.detach(), "dx": x.grad, "dh0": h0.grad}
    expected |= {k: v.grad for k, v in gru.tensors.items()}
    assert_same(results(gru, *arrays), {k: v.numpy() for k, v in expected.items()}, 1e-12)


def test_a_row_by_hand():
    """2, 4, 6 have the mean 4 and the variance 8/3."""
    n, e = normalise(np, np.array([[2.0, 4.0, 6.0]]))
    assert np.array_equal(e, [[-2, 0, 2]])
    assert np.allclose(n, np.array([[-2, 0, 2]]) * (8 / 3 + 1e-5) ** -0.5, rtol=1e-15)


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("method", ["central", "complex"])
def test_gradients_are_slopes(method, flagged):
    gru = make()
    x, h0, *_ = batch(gru)
    gradcheck(gru, x, h0, method=method, directions=1, **(flags() if flagged else {}))


class Training:
    """A model whose calls are training calls, with the same masks in each."""

    def __init__(self, model):
        self.model = model
        self.params, self.backend, self.dtype = model.params, model.backend, model.dtype

    def vjp(self, *inputs, **options):
        return self.model.vjp(*inputs, rng=np.random.default_rng(7), **options)

    def __call__(self, *inputs, **options):
        return self.vjp(*inputs, **options)[0]

    def to(self, *, dtype):
        return Training(self.model.to(dtype=dtype))


@pytest.mark.usefixtures("quickly")
def test_with_all_other_options():
    pair = {"activation": ("scaled_tanh", 1.1, 0.7), "gate_activation": ("scaled_tanh", 0.9, 0.6)}
    drops = dict.fromkeys(["weight_dropout", "recurrent_dropout", "zoneout", "dropout"], 0.3)
    gru = make(merge="mean", **pair, **drops)
    x, h0, *_ = batch(gru)
    gradcheck(Training(gru), x, h0, directions=1, **flags())


# laws --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quickly")
def test_rows_of_other_lengths_are_rows_alone():
    """Whatever NaN stands at padded and skipped steps."""
    gru, given = make(), flags(3)
    arrays = batch(gru)
    alive = given["mask"] & (np.arange(T)[:, None] < given["lengths"])
    y = results(gru, *arrays, **given)["y"]
    arrays[0][~alive] = np.nan
    found = results(gru, *arrays, **given)
    assert all(np.isfinite(v).all() for v in found.values())
    assert np.array_equal(found["y"], y)
    for b in range(B):
        own, at = [v[:, b : b + 1] for v in arrays], alive[:, b]
        alone = gru(own[0][at], own[1], resets=given["resets"][at, b : b + 1])[0]
        assert np.allclose(y[at, b : b + 1], alone, atol=1e-13)


def test_the_scale_of_weights_does_not_matter():
    """What N is for; 1e-5 is left over from its definition."""
    gru, scaled = make(), make()
    for name in scaled.params:
        scaled.params[name] *= 100.0 if name.startswith("weight") else 1.0
    x, *_ = batch(gru)
    h0 = np.ones((4, B, H))  # h U^T of a state of 0 has no scale
    assert np.abs(scaled(x, h0)[0] - gru(x, h0)[0]).max() < 1e-3
    assert np.abs(scaled(x * 10, h0)[0] - gru(x, h0)[0]).max() < 1e-3


def test_no_steps():
    found = results(make(), *batch(make(), T=0))
    assert found["gain_ih_l1"].shape == (3 * H,)
    assert not found["gain_ih_l1"].any()


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("T", [0, T])
def test_gradients_of_each_row_add_up(T):
    gru = make(recurrent_dropout=0.3)
    x, h0, dy, dh = batch(gru, T=T)
    _, pullback = gru.vjp(x, h0, rng=np.random.default_rng(0))
    grads, *_ = pullback(dy, dh)
    rows, *_ = pullback.per_example(dy, dh)
    assert_same({name: v.sum(axis=0) for name, v in rows.items()}, grads, 1e-12)


@pytest.mark.usefixtures("quickly")
def test_forward_mode_and_hessian():
    gru = make(bidirectional=False)
    x, h0, dy, _ = batch(gru)
    v = {name: np.random.default_rng(3).standard_normal(p.shape) for name, p in gru.params.items()}
    _, (dot, _) = gru.jvp(x, h0, x_dot=x, params_dot=v)
    there = {k: p + 1e-6 * v[k] for k, p in gru.params.items()}
    back = {k: p - 1e-6 * v[k] for k, p in gru.params.items()}
    slope = gru.apply(there, x * (1 + 1e-6), h0)[0] - gru.apply(back, x * (1 - 1e-6), h0)[0]
    assert np.allclose(dot, slope / 2e-6, rtol=1e-6, atol=1e-6)
    model = Chain(gru)
    v = {f"0.{name}": d for name, d in v.items()}
    _, _, found = hvp(model, lambda y: squared_error(y, dy), v, x)
    one, other = ({k: p + s * v[k] for k, p in model.params.items()} for s in (1e-5, -1e-5))
    before = gradients(model, one, x, dy), gradients(model, other, x, dy)
    for name, product in found.items():
        slope = (before[0][name] - before[1][name]) / 2e-5
        assert np.allclose(product, slope, rtol=1e-5, atol=1e-6), name


def gradients(model, params, x, target):
    twin = model.to()
    twin.load_params(params)
    (y, _), pullback = twin.vjp(x)
    return pullback(squared_error(y, target)[1])[0]


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_step_by_step(dtype):
    gru = make(bidirectional=False).to(dtype=dtype)
    x, *_ = batch(gru)
    y, _ = gru(x)
    stream, state = Stream(gru), None
    for t in range(T):
        now, state = gru.step(x[t], state)
        limit = 1e-14 if dtype == "float64" else 4e-3
        assert np.abs(now - y[t]).max() <= limit
        assert np.abs(stream.step(x[t]) - now).max() <= limit


@pytest.mark.parametrize(
    ("path", "B", "H", "flagged"),
    [(path, *size) for path in WAYS for size in ((1, 5, False), (1, 64, True), (24, 5, True))
     if THOROUGH or path == "traced" or (path == "packed") == (size[0] == 24)],
)  # fmt: skip
def test_every_path_runs_the_same(path, B, H, flagged):
    """With rows of an odd width too, and of more units than a vector has."""
    gru, given = make(H=H), flags(B=B) if flagged else {}
    arrays = batch(gru, B=B)
    with running("plain"):
        expected = results(gru, *arrays, **given)
    with running(path):
        assert_same(results(gru, *arrays, **given), expected, 1e-12)


@pytest.mark.parametrize("path", WAYS if THOROUGH else WAYS[:2])
def test_every_path_drops_the_same(path):
    drops = dict.fromkeys(["recurrent_dropout", "zoneout"], 0.3)
    gru, given = make(**drops), {"rng": np.random.default_rng(2), **flags()}
    arrays = batch(gru)
    with running("plain"):
        expected = results(gru, *arrays, **given)
    with running(path):
        given["rng"] = np.random.default_rng(2)
        assert_same(results(gru, *arrays, **given), expected, 1e-12)


@pytest.mark.parametrize(("way", "B", "decision"), [
    ("packed", 9, "team"), ("compiled", 3, "team_in_place")
])  # fmt: skip
def test_a_team_of_threads(way, B, decision, monkeypatch):
    """Threads that share the units take the mean of all of them."""
    if "compiled" not in PATHS:
        pytest.skip("numba is not installed")
    from gru_any.backend.cpu import numba_runner

    gru = make(layers=1, bidirectional=False, H=64)
    x, h0, dy, dh = batch(gru, T=300 if way == "packed" else 30, B=B)
    runs = []
    for members in (1, 2, 2, 2):
        monkeypatch.setattr(numba_runner.tuning, decision, lambda *_, n=members: n)
        with running(way):
            runs.append(results(gru, x, h0, dy, dh))
    for found in runs[1:]:
        assert all(np.array_equal(found[name], v) for name, v in runs[0].items())


def test_inside_of_jit():
    """JAX's own gradient of its one scan, against the pullback."""
    jax = require("jax")
    gru = make(layers=1, bidirectional=False).to("jax.numpy")
    x, h0, dy, dh = (asarray(v, like=gru) for v in batch(gru))

    def loss(params, x, h0):
        y, h_n = gru.apply(params, x, h0)
        return (y * dy).sum() + (h_n * dh).sum()

    found = jax.jit(jax.grad(loss, (0, 1, 2)))(dict(gru.params), x, h0)
    _, pullback = gru.vjp(x, h0)
    expected = pullback(dy, dh)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.allclose(one, other, rtol=1e-11, atol=1e-12)

    def pulled(params, x, h0):
        return gru.vjp(x, h0)[1](dy, dh)

    inside = jax.jit(pulled)(dict(gru.params), x, h0)
    for one, other in zip(jax.tree.leaves(inside), jax.tree.leaves(expected), strict=True):
        assert np.allclose(one, other, rtol=1e-11, atol=1e-12)


def test_every_library(backend):
    gru = make(layers=1, bidirectional=False)
    there = gru.to(backend.name, backend.device)
    arrays = batch(gru, T=1 if "jax" in backend.name else 2, B=2)
    if backend.name == "array_api_strict":
        with pytest.raises(TypeError, match="use another backend"):
            results(there, *arrays)
        return
    lengths = [len(arrays[0]), 0]
    expected = results(gru, *arrays, lengths=lengths)
    assert_same(results(there, *arrays, lengths=lengths), expected, 1e-12)


# what is made of a model -------------------------------------------------------------------------


def test_names_and_first_values():
    gru, usual = (
        GRU(I, H, reset_after=True, layer_norm=True, seed=2),
        GRU(I, H, reset_after=True, seed=2),
    )
    for name, v in usual.params.items():
        assert np.array_equal(gru.params[name], v), "the same draws"
    assert set(gru.params) - set(usual.params) == {"gain_ih_l0", "gain_hh_l0"}
    assert gru.params["gain_hh_l0"].shape == (3 * H,)
    assert all((gru.params[name] == 1).all() for name in ("gain_ih_l0", "gain_hh_l0"))
    assert "layer_norm" not in usual.settings
    with pytest.raises(KeyError, match="belong to layer_norm=True"):
        usual.load_params(gru.params)


@pytest.mark.usefixtures("quickly")
def test_saved_and_trained(tmp_path):
    model = Chain(make("float32", layers=1), Linear(2 * H, 2, seed=0))
    rng = np.random.default_rng(0)
    x, target = (rng.standard_normal((T, B, n)).astype("float32") for n in (I, 2))
    before = {name: v.copy() for name, v in model.params.items()}
    fit(model, squared_error, lambda epoch: [Batch(x, target)], Adam(model.params), steps=3,
        bar=False)  # fmt: skip
    assert all((model.params[name] != v).any() for name, v in before.items())
    save(tmp_path / "model", model)
    again = load(tmp_path / "model")
    assert "layer_norm=True" in repr(again)
    assert np.array_equal(again(x)[0], model(x)[0])


def test_explain():
    text = explain(make())
    assert "gain_hh * N(h @ U.T)" in text
    assert "A call runs plain" not in text
    assert "gain" not in explain(GRU(I, H, reset_after=True))


def test_the_formulas_of_explain_hold():
    """Its lines are run as they stand, for one step."""
    gru = make(layers=1, bidirectional=False)
    x, h0, dy, _ = batch(gru, T=1)
    p = {name.removesuffix("_l0"): v for name, v in gru.params.items()}
    text = explain(gru).replace("h' =", "new =")
    about, _, rest = text.partition("For all steps at once")
    sides = [line.strip() for line in rest.splitlines() if " = " in line]
    names = {
        "mean": lambda v: v.mean(axis=-1, keepdims=True), "sqrt": np.sqrt, "tanh": np.tanh,
        "sigmoid": lambda v: 1 / (1 + np.exp(-v)), "thirds": lambda v: np.split(v, 3, axis=-1),
        "concat": np.concatenate, "x": x[0], "h": h0[0], "g": dy[0], "W": p["weight_ih"],
        "U": p["weight_hh"], "c": p["bias_hh"][2 * H :], **p,
        "b": p["bias_ih"] + p["bias_hh"] * (np.arange(3 * H) < 2 * H),
    }  # fmt: skip
    scale = about.partition("and s = ")[2].partition(", over")[0]
    through = about.partition("dN(dn) = ")[2].partition(".\n")[0]

    def N(v):
        names["e"] = v - v.mean(axis=-1, keepdims=True)
        names["s"] = eval(scale, names)
        return names["e"] * names["s"]

    names |= {"N": N, "dN": lambda dn: eval(through, names | {"dn": dn})}
    for line in sides:
        if line == "r, z, n, m = saved":
            continue
        exec(line, names)
    (y, _), pullback = gru.vjp(x, h0)
    assert np.allclose(names["new"], y[0], rtol=1e-14, atol=1e-14)
    assert np.allclose(names["dh"], pullback(dy)[2][0], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("path", ["plain", *WAYS])
@pytest.mark.parametrize("B", [1, 24])
def test_frozen(path, B):
    gru = make(bidirectional=False)
    x, h0, *_ = batch(gru, B=B)
    y, h_n = gru(x, h0)
    with running(path):
        frozen = deploy.freeze(gru)
        assert np.allclose(frozen(x, h0)[0], y, rtol=0, atol=1e-14)
        stream = Stream(frozen)
        stream.state = h0
        for t in range(T):
            assert np.allclose(stream.step(x[t]), y[t], rtol=0, atol=1e-14)
        assert np.allclose(stream.state, h_n, rtol=0, atol=1e-14)


@pytest.mark.skipif(not THOROUGH, reason="compiles for a minute: GRU_ANY_THOROUGH=1 does")
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_frozen_and_rounded(weights):
    """Gains and biases are not rounded, and the matrices are those of the plain path."""
    gru = make("float32", bidirectional=False)
    x, h0, *_ = batch(gru, B=24)
    frozen = deploy.freeze(gru, weights=weights)
    with running("plain"):
        exact = deploy.freeze(gru, weights=weights)(x, h0)[0]
    assert np.abs(frozen(x, h0)[0] - exact).max() < 2e-6
    assert np.abs(exact - gru(x, h0)[0]).max() > 1e-4


# refusals ----------------------------------------------------------------------------------------


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="set reset_after=True"):
        GRU(I, H, layer_norm=True)
    with pytest.raises(TypeError, match="layer_norm is 1, expected True or False"):
        GRU(I, H, reset_after=True, layer_norm=1)
    with pytest.raises(ValueError, match="layer_norm=True"):
        c.write(make("float32", bidirectional=False), tmp_path)


@pytest.mark.parametrize("library", LIBRARIES)
def test_other_libraries_have_no_home_for_it(library):
    if library == "torch":
        require("torch")
    way = importlib.import_module(f"gru_any.convert.{library}")
    with pytest.raises(ValueError, match="layer_norm=True, which would be lost"):
        way.to_arrays(make(layers=1))


def test_nor_has_onnx_or_a_module(tmp_path):
    require("onnx")
    with pytest.raises(ValueError, match="layer_norm=True, which would be lost"):
        convert.onnx.save(tmp_path / "m.onnx", make("float32"))
    require("torch")
    with pytest.raises(ValueError, match="layer_norm=True of the model has no counterpart"):
        convert.torch.as_module(make("float32"))
