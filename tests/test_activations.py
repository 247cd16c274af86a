"""Other functions than sigmoid and tanh, and the clip of what goes into them."""

import math

import numpy as np
import pytest
from conftest import PATHS, THOROUGH, require, running

from gru_any import GRU, GRUCell, equations, explain, gradcheck, load, save
from gru_any.activations import DEFINITIONS, USUAL, Activation, Activations
from gru_any.backend import NUMPY, runner

FUNCTIONS = [
    "sigmoid", "tanh", "relu", ("affine", 0.7, -0.1), ("leaky_relu", 0.2), ("elu", 0.8), "softsign",
    ("thresholded_relu", 0.3), ("scaled_tanh", 1.2, 0.7), ("hard_sigmoid", 0.3, 0.4), "softplus",
]  # fmt: skip
MADE = [Activation(*([f] if isinstance(f, str) else [f[0], f[1:]])) for f in FUNCTIONS]
CLIPPED = [f._replace(clip=0.6) for f in MADE]
FASTEST = PATHS[-1] if THOROUGH else "traced"
EACH = pytest.mark.parametrize("f", MADE, ids=[f.name for f in MADE])
VARIANTS = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
# by hand, in numbers
BY_HAND = {
    "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
    "tanh": math.tanh,
    "relu": lambda v: max(v, 0),
    "affine": lambda v: 0.7 * v - 0.1,
    "leaky_relu": lambda v: max(v, 0.2 * v),
    "elu": lambda v: v if v > 0 else 0.8 * (math.exp(v) - 1),
    "softsign": lambda v: v / (1 + abs(v)),
    "thresholded_relu": lambda v: v if v > 0.3 else 0,
    "scaled_tanh": lambda v: 1.2 * math.tanh(0.7 * v),
    "hard_sigmoid": lambda v: min(max(0.3 * v + 0.4, 0), 1),
    "softplus": lambda v: math.log(1 + math.exp(v)),
}
V = np.array([-40, -3.1, -1, -0.61, -0.59, -1e-3, 0, 1e-3, 0.29, 0.31, 0.59, 0.61, 1, 3.1, 40])


def test_there_is_each_function_of_the_operator():
    assert {f.name for f in MADE} == set(DEFINITIONS) == set(BY_HAND)


@EACH
def test_a_function_by_hand(f):
    for v in V:
        for given in (f, f._replace(clip=0.6)):
            expected = BY_HAND[f.name](v if given is f else max(-0.6, min(v, 0.6)))
            assert given(np, np.array(v)) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@EACH
def test_its_gradient_by_complex_step(f):
    """At no corner; a small y of softplus keeps its digits."""
    v, dy = V[V != 0], np.linspace(1, 2, len(V) - 1)
    for given in (f, f._replace(clip=0.6)):
        exact = dy * given(np, v + 1e-200j).imag / 1e-200
        y = given(np, v)
        rtol = 1e-9 if f.name in ("elu", "softplus") else 1e-12
        found = given.backward(np, dy, y)
        assert np.allclose(found, exact, rtol=rtol, atol=1e-16 if f.name == "softplus" else 1e-15)


@EACH
def test_infinity_and_nan(f):
    with np.errstate(invalid="ignore"):
        for given in (f, f._replace(clip=0.6)):
            low, high, unknown = given(np, np.array([-1e30, 1e30, np.nan]))
            assert not np.isnan([low, high]).any()
            assert np.isnan(unknown) or f.name == "thresholded_relu"  # nan > alpha is false


def test_what_is_clipped_gets_no_gradient_in_half_the_digits():
    """f(clip) is one number in both passes, whatever tanh rounds to."""
    for f in CLIPPED:
        for clip in np.linspace(0.05, 5, 100):
            f = f._replace(clip=float(clip))
            v = np.array([-5.1, -clip - 1e-3, clip + 1e-3, 5.1], "float32")
            y = f(np, v)
            assert y.dtype == "float32"
            assert not f.backward(np, np.ones_like(v), y).any()


# every function on every target ------------------------------------------------------------------


SOME = [f._replace(clip=0.6) if n % 2 else f for n, f in enumerate(MADE)]
SOME += [f._replace(clip=0.6) for f in MADE if f.name in ("elu", "softplus")]


def all_of_them(xp, a, h, U):
    """A step made of all functions."""
    inputs = equations.thirds(a + h @ U.T)
    ys = [f(xp, inputs[n % 3]) for n, f in enumerate(SOME)]
    new = ys[0]
    for y in ys[1:]:
        new = new + y
    return 0.05 * new, tuple(ys)


def all_of_them_backward(xp, g, h, saved, U):
    back = [f.backward(xp, g, y) for f, y in zip(SOME, saved, strict=True)]
    da = [sum(back[n + 3 :: 3], back[n]) for n in range(3)]
    da = xp.concat(tuple(da), axis=-1)
    return 0.1 * (da @ U), (da, *back)


def block(dtype, K=3, B=4, H=5):
    rng = np.random.default_rng(0)
    shapes = (K, B, 3 * H), (B, H), (3 * H, H), (K, B, H), (B, H)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def both_passes(run, dtype, put):
    a, h, U, dy, dh = map(put, block(dtype))
    packed = run.pack_weights(U, U, 1)[1]
    a = run.affine(a, put(np.eye(a.shape[-1], dtype=dtype)), None)
    path, saved = run.forward(all_of_them, a, h, (packed,), None, False, True)
    back = dy, dh, path[:-1, :, :], saved, packed, None, False, False
    parts, first, _ = run.backward(all_of_them_backward, *back)
    return [path, *saved, *parts, first]


WAYS = ["traced", *(["compiled"] if len(PATHS) == 3 else [])]


@pytest.mark.parametrize(
    ("way", "dtype"),
    [(way, dtype) for way in WAYS for dtype in ("float32", "float64")
     if THOROUGH or way == "traced" or dtype == "float32"],  # whose functions are our own
)  # fmt: skip
def test_every_function_on_the_host(way, dtype):
    with running("plain"):
        expected = both_passes(runner(NUMPY), dtype, np.asarray)
    with running(way):
        found = both_passes(runner(NUMPY), dtype, np.asarray)
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() <= (2e-6 if dtype == "float32" else 1e-14) * np.abs(b).max()


@pytest.mark.parametrize("way", ["graph", "persistent"])
def test_every_function_on_an_emulated_device(compiler, way):
    from gru_any.backend import select
    from gru_any.backend.cuda.runner import CUDA
    from gru_any.testing.fake_cuda import array as fake
    from gru_any.testing.fake_cuda.ops import Ops

    backend = select(fake.__name__)
    with running("plain"):
        expected = both_passes(runner(NUMPY), "float64", np.asarray)
    found = both_passes(CUDA(backend.xp, backend.device, Ops(), way), "float64", backend.put)
    for a, b in zip(map(backend.to_numpy, found), expected, strict=True):
        assert np.abs(a - b).max() <= 1e-14 * np.abs(b).max()


@pytest.mark.skipif(len(PATHS) < 3, reason="numba: not installed")
def test_the_functions_that_numba_gets_in_float32():
    """Against float64, from denormal numbers to where they overflow."""
    from numba import njit

    from gru_any.codegen.numba_functions import functions
    from gru_any.codegen.trace import Op

    source = functions([Op("expm1", (0,), 1), Op("log1p", (0,), 1)], "float32")
    scope = {"njit": njit, "math": math, "f": np.float32}
    exec(source, scope)
    each = njit("float32[:](float32[:])")
    loop = "def over(v):\n    w = v.copy()\n    for i in range(len(v)):\n        w[i] = {}(v[i])"
    loop += "\n    return w"
    size = np.logspace(-30, 2.4, 20_001)
    v = np.concatenate((-size[::-1], [0], size)).astype("float32")
    odd = np.array([np.inf, -np.inf, np.nan, -1], "float32")
    for name in ("exp", "expm1", "log1p"):
        names = {"np": np, name: scope[name]}
        exec(loop.format(name), names)
        over = each(names["over"])
        given = v[v > -1] if name == "log1p" else v
        with np.errstate(all="ignore"):
            exact = getattr(np, name)(given.astype("float64")).astype("float32")
            ends = getattr(np, name)(odd)
        finite = np.isfinite(exact) & (np.abs(exact) > 1e-37)
        found = over(given)
        assert np.array_equal(np.isinf(found), np.isinf(exact))
        assert np.abs(found[finite] / exact[finite] - 1).max() < 6e-7
        small = np.abs(exact) <= 1e-37
        assert np.abs(found[small] - exact[small]).max(initial=0) < 1e-37
        assert np.allclose(over(odd), ends, rtol=1e-7, equal_nan=True)


# a GRU of them -----------------------------------------------------------------------------------

HARD = {"gate_activation": ("hard_sigmoid", 0.2, 0.5), "activation": ("elu", 0.7), "clip": 0.9}
T, B, I, H = 7, 3, 3, 4


def given(D, dtype="float64", layers=2):
    """x, h0 and what else a call takes."""
    rng = np.random.default_rng(0)
    x, h0 = rng.standard_normal((T, B, I)), rng.uniform(-1, 1, (layers * D, B, H))
    options = {"lengths": [T, 4, 0], "mask": rng.random((T, B)) < 0.8,
               "resets": rng.random((T, B)) < 0.3}  # fmt: skip
    return x.astype(dtype), h0.astype(dtype), options


def everything(gru, x, h0, **options):
    """What a call and its pullback return; where they are cut into steps too."""
    rng = np.random.default_rng(1)
    y, h_n = gru(x, h0, **options)
    (again, _), pullback = gru.vjp(x, h0, **options)
    dy, dh_n = (rng.standard_normal(v.shape).astype(x.dtype) for v in (y, h_n))
    grads, dx, dh0 = pullback(dy, dh_n)
    return [y, h_n, again, dx, dh0, *grads.values()]


@VARIANTS
@pytest.mark.parametrize("number", range(len(FUNCTIONS)))
def test_gradients_of_any_pair_by_complex_step(after, number):
    """Each function as the candidate and as the gates, clipped and not, in all layers."""
    pair = {"activation": FUNCTIONS[number], "gate_activation": FUNCTIONS[(3 * number + 2) % 11]}
    x, h0, options = given(2)
    with running("plain"):
        for clip in (None, 1.5):
            gru = GRU(I, H, 2, bidirectional=True, reset_after=after, clip=clip, seed=number,
                      dtype="float64", **pair)  # fmt: skip
            gradcheck(gru, x, h0, method="complex", directions=1, **options)


@VARIANTS
@pytest.mark.parametrize("path", PATHS[1:] if THOROUGH else ["traced"])
@pytest.mark.parametrize("recompute", [None, 2])
def test_every_path_is_the_plain_one(after, path, recompute):
    gru = GRU(I, H, 2, bidirectional=True, reset_after=after, dtype="float64", recompute=recompute,
              seed=0, **HARD)  # fmt: skip
    x, h0, options = given(2)
    found = []
    for way in ("plain", path):
        with running(way):
            found.append(everything(gru, x, h0, **options))
    for a, b in zip(*found, strict=True):
        assert np.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.skipif(not THOROUGH or len(PATHS) < 3, reason="compiles for a minute")
def test_compiled_code_is_of_the_chosen_functions():
    """One after the other, in one process."""
    x = np.random.default_rng(0).standard_normal((2, 40, I))  # brief
    for kind in ({}, HARD, {**HARD, "clip": None}, {}):
        gru = GRU(I, H, dtype="float64", seed=0, **kind)
        found = []
        for way in ("plain", "compiled"):
            with running(way):
                found.append(everything(gru, x, None))
        for a, b in zip(*found, strict=True):
            assert np.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_every_backend(backend):
    kinds = [
        {**HARD, "reset_after": True},
        {"activation": "softplus", "gate_activation": "softsign"},
    ]
    for kind in kinds:
        host = GRU(I, H, seed=0, dtype="float64", backend="numpy", **kind)
        x, h0, _ = given(1, layers=1)
        lengths = [T, 4, 0]
        with running("plain"):
            (y, _), pullback = host.vjp(x, h0, lengths)
            expected = [y, *pullback(np.ones_like(y))[1:]]
        gru = host.to(backend.name, backend.device)
        with running("plain" if backend.variant == "plain" else FASTEST):
            (y, _), pullback = gru.vjp(backend.put(x), backend.put(h0), lengths)
            found = [y, *pullback(backend.put(np.ones(y.shape)))[1:]]
        for a, b in zip(map(backend.host, found), expected, strict=True):
            assert np.allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", [HARD, {"activation": "softplus", "clip": 0.5}], ids=["elu", "+"])
def test_jax_finds_the_same_gradient(kind):
    jax = require("jax")
    gru = GRU(I, H, seed=0, dtype="float64", backend="jax.numpy", reset_after=True, **kind)
    x = jax.numpy.asarray(given(1)[0])
    with running("traced"):
        (y, _), pullback = gru.vjp(x)
        grads, dx, _ = pullback(jax.numpy.ones_like(y))

    def loss(params, x):
        return gru.apply(params, x)[0].sum()

    of_params, of_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(dict(gru.params), x)
    assert np.allclose(of_x, dx, rtol=1e-10, atol=1e-12)
    for name, grad in grads.items():
        assert np.allclose(of_params[name], grad, rtol=1e-10, atol=1e-12)


@VARIANTS
def test_a_step_a_cell_a_stream_and_a_frozen_model(after):
    from gru_any.deploy import freeze
    from gru_any.stream import Stream

    x, h0, _ = given(1, "float32", layers=1)
    gru = GRU(I, H, reset_after=after, seed=0, **HARD)
    cell = GRUCell(I, H, reset_after=after, seed=0, **HARD)
    cell.load_params({name.removesuffix("_l0"): v for name, v in gru.params.items()})
    with running("traced"):
        y, _ = gru(x, h0)
        stream, frozen, h, state = Stream(gru), freeze(gru), h0[0], h0
        stream.state = h0
        assert np.allclose(frozen(x, h0)[0], y, atol=1e-6)
        for x_t, y_t in zip(x, y, strict=True):
            h, (_, state) = cell(x_t, h), frozen.step(x_t, state)
            for v in (h, state[0], stream.step(x_t)):
                assert np.allclose(v, y_t, rtol=1e-6, atol=1e-6)
        (_, pullback), (_, of_cell) = gru.vjp(x[:1], h0), cell.vjp(x[0], h0[0])
        whole, one = pullback(np.ones((1, B, H), "float32")), of_cell(np.ones((B, H), "float32"))
    for a, b in zip(whole[0].values(), one[0].values(), strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-6)


@VARIANTS
def test_a_module_of_torch(after):
    """It computes with them, and says so; PyTorch's own GRU cannot take its place."""
    torch = require("torch")
    from gru_any.convert import torch as convert

    gru = GRU(I, H, reset_after=after, seed=0, **HARD)
    module, x = convert.as_module(gru), torch.tensor(given(1, "float32")[0], requires_grad=True)
    with running("traced"):
        y, _ = module(x)
        y.sum().backward()
        (expected, _), pullback = gru.vjp(x.detach().numpy())
        grads, dx, _ = pullback(np.ones_like(expected))
    assert np.array_equal(y.detach().numpy(), expected)
    assert np.array_equal(x.grad.numpy(), dx)
    assert np.array_equal(module.weight_hh_l0.grad.numpy(), grads["weight_hh_l0"])
    assert "'activation': ('elu', 0.7)" in repr(module)
    with pytest.raises(TypeError, match=r"'elu', 0\.7.*, which PyTorch does not have"):
        convert.restore(module)
    with pytest.raises(ValueError, match="which would be lost"):
        convert.as_module(GRUCell(I, H, reset_after=True, activation="relu"))


@VARIANTS
def test_it_becomes_c(after, tmp_path, monkeypatch):
    from gru_any.deploy import c

    monkeypatch.setenv("CFLAGS", "-O1")
    x = given(1, "float32")[0][:, 0]
    for kind in (HARD, {"activation": "softplus", "gate_activation": ("affine", 0.2, 0.5)}):
        gru = GRU(I, H, 2, reset_after=after, seed=0, **kind)
        c.build(gru, tmp_path / "gru.so")
        stream = c.load(tmp_path / "gru.so")
        with running("traced"):
            y, _ = gru(x)
        for x_t, y_t in zip(x, y, strict=True):
            assert np.allclose(stream.step(x_t), y_t, atol=2e-6)


# settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [GRU, GRUCell])
def test_settings(kind, tmp_path):
    layer = kind(I, H, seed=0, activation=["leaky_relu", np.float32(0.5)], clip=3)
    assert layer.activation == ("leaky_relu", 0.5)
    assert "activation=('leaky_relu', 0.5), clip=3.0, " in repr(layer)
    save(tmp_path / "it", layer)
    again = load(tmp_path / "it")
    assert again.settings == layer.settings
    assert again.variant == layer.variant == layer.to(dtype="float64").variant
    x = given(1, "float32")[0]
    x = x if kind is GRU else x[0]
    with running("traced"):
        assert np.array_equal(again(x)[0], layer(x)[0])
    usual = kind(I, H, activation="tanh", gate_activation="sigmoid", clip=None)
    assert usual.settings == kind(I, H).settings  # files are those of before
    assert not {"activation", "clip"} & set(usual.settings)
    assert usual.variant.step in (equations.reset_after, equations.reset_before)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"activation": "swish"}, "activation is 'swish', expected one of sigmoid, tanh, relu"),
        ({"activation": None}, "activation is None, expected one of"),
        ({"gate_activation": ()}, r"gate_activation is \(\), expected one of"),
        (
            {"gate_activation": "hard_sigmoid"},
            r'expected \("hard_sigmoid", alpha, beta\): libraries',
        ),
        ({"activation": ("relu", 1.0)}, r"is \('relu', 1.0\), expected \"relu\" alone"),
        ({"activation": ("elu", -1)}, "alpha of activation is -1, expected a number of at least 0"),
        ({"activation": ("scaled_tanh", 0, 1)}, "expected an alpha that is not 0"),
        ({"activation": ("affine", 1, "2")}, "beta of activation is '2'"),
        ({"clip": 0}, "clip is 0, expected a number above 0"),
        ({"clip": True}, "clip is True, expected a number above 0"),
    ],
)
def test_what_is_refused(wrong, told):
    for kind in (GRU, GRUCell):
        with pytest.raises((ValueError, TypeError), match=told):
            kind(I, H, **wrong)


def test_the_usual_functions_are_those_of_before():
    """Not only equal: the very functions, from which the same code is made."""
    for after, step in ((True, equations.reset_after), (False, equations.reset_before)):
        assert GRU(I, H, reset_after=after, activation="tanh").variant.step is step
        equal = Activations(*(Activation(*f) for f in USUAL))
        assert equations.variant(after, equal) == equations.variant(after, equal)


def test_explain():
    """The lines of the gradient are those of the functions, with their numbers."""
    text = explain(GRU(I, H, **HARD))
    for line in (
        "r = hard_sigmoid(clip(a_r + q_r))",
        "n = elu(clip(a_n + s @ U[8:, :].T))",
        "da_n = unclipped(where(n > 0, g * (1 - z), g * (1 - z) * (n + 0.7)), n)",
        "da_r = unclipped(0.2 * where_positive(where_positive(ds * h, r), 1 - r), r)",
        "hard_sigmoid(v): alpha * v + beta, at least 0 and at most 1; alpha = 0.2, beta = 0.5",
        "clip(v): v, at least -0.9 and at most 0.9",
    ):
        assert line in text
    text = explain(GRU(I, H, activation="relu"), format="latex")
    assert r"n &= \operatorname{relu}(" in text
