"""Forward mode and products with the Hessian: the complex step, JAX, differences, and laws."""

import numpy as np
import pytest
from conftest import HOST, PATHS, THOROUGH, Home, require, running
from hypothesis import given
from hypothesis import strategies as st
from replaced import replaced
from test_per_example import GIVEN, KINDS, case, close, numbers

from gru_any import (
    GRU,
    Chain,
    Dropout,
    Embedding,
    Last,
    Linear,
    asarray,
    deploy,
    equations,
    hvp,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
    squared_error,
    to_numpy,
)

STEP = 1e-30


@pytest.fixture(autouse=True)
def traced():
    """NumPy's calls, which need no compiling, where a test does not say otherwise."""
    with running("traced"):
        yield


def directions(gru, x, h0, seed=10):
    """A random direction, as keyword arguments of jvp."""
    params = {k: numbers(*v.shape, seed=seed + n) for n, (k, v) in enumerate(gru.params.items())}
    dots = {"x_dot": numbers(*x.shape, seed=seed), "h0_dot": numbers(*h0.shape, seed=seed + 1)}
    return dots | {"params_dot": params}


def stepped(gru, step, x, h0, along):
    """What the direction leads to: parameters, x and h0."""
    params = {k: v + step * along["params_dot"][k] for k, v in gru.params.items()}
    return params, x + step * along["x_dot"], h0 + step * along["h0_dot"]


@pytest.mark.parametrize("options", GIVEN)
@pytest.mark.parametrize("kind", KINDS)
def test_jvp_is_the_complex_step(kind, options):
    gru, (x, h0, *_), options = case(kind, options)
    along = directions(gru, x, h0)
    values, dots = gru.jvp(x, h0, **along, **options)
    params, *inputs = stepped(gru, 1j * STEP, x, h0, along)
    found = gru.to(dtype="complex128").apply(params, *inputs, **options)
    for value, dot, expected in zip(values, dots, found, strict=True):
        close(value, expected.real)
        close(dot, expected.imag / STEP)


@pytest.mark.parametrize("options", GIVEN)
@pytest.mark.parametrize("kind", KINDS)
def test_the_derivative_of_the_pullback_by_complex_jvp(kind, options):
    """Of f = dy(s) y + dh(s) h_n: grads_dot, dx_dot, dh0_dot times a second direction u.

    The derivative of jvp along u is taken by the complex step: no backward pass is in it.
    """
    gru, (x, h0, dy, dh), options = case(kind, options)
    along, other = directions(gru, x, h0), directions(gru, x, h0, seed=50)
    dy_dot, dh_dot = numbers(*dy.shape, seed=5), numbers(*dh.shape, seed=6)
    values, dots, pullback = gru.forward_over_reverse(x, h0, **along, **options)
    (grads, dx, dh0), (grads_dot, dx_dot, dh0_dot) = pullback(dy, dh, dy_dot, dh_dot)
    for found, expected in zip((*values, *dots), sum(gru.jvp(x, h0, **along, **options), ()),
                               strict=True):  # fmt: skip
        close(found, expected)
    expected = gru.vjp(x, h0, **options)[1](dy, dh)
    for found, wanted in zip((*grads.values(), dx, dh0), (*expected[0].values(), *expected[1:]),
                             strict=True):  # fmt: skip
        close(found, wanted)
    found = sum(float(np.sum(grads_dot[k] * other["params_dot"][k])) for k in grads)
    found += float(np.sum(dx_dot * other["x_dot"]) + np.sum(dh0_dot * other["h0_dot"]))
    params, *inputs = stepped(gru, 1j * STEP, x, h0, along)
    there = gru.to(dtype="complex128")
    there.params.update(params)
    complex_other = {k: v + 0j for k, v in other.items() if k != "params_dot"}
    complex_other["params_dot"] = {k: v + 0j for k, v in other["params_dot"].items()}
    _, (y, h) = there.jvp(*inputs, **complex_other, **options)
    total = np.sum(y * (dy + 1j * STEP * dy_dot)) + np.sum(h * (dh + 1j * STEP * dh_dot))
    assert found == pytest.approx(float(total.imag) / STEP, rel=1e-11)


@pytest.mark.parametrize("kind", KINDS if THOROUGH else ["after"])
def test_against_jax(kind):
    jax = require("jax")
    gru, (x, h0, dy, dh), options = case(kind, "mask")
    there, along = gru.to("jax.numpy"), directions(gru, x, h0)

    def loss(params, x, h0):
        y, h = there.apply(params, x, h0, **options)
        return (y * y * dy).sum() + (h * dh).sum(), (y, h)

    @jax.jit
    def both(*point_and_dots):
        return jax.jvp(jax.grad(loss, (0, 1, 2), has_aux=True), *point_and_dots)

    dots = along["params_dot"], along["x_dot"], along["h0_dot"]
    (expected, outputs), (expected_dot, outputs_dot) = both((dict(gru.params), x, h0), dots)
    values, tangents, pullback = gru.forward_over_reverse(x, h0, **along, **options)
    found = pullback(2 * values[0] * dy, dh, 2 * tangents[0] * dy)
    leaves = jax.tree.leaves
    pairs = (((values, tangents), (outputs, outputs_dot)), (found, (expected, expected_dot)))
    for ours, theirs in pairs:
        for a, b in zip(leaves(ours), leaves(theirs), strict=True):
            close(a, np.asarray(b), 1e-10)


def flat(tree):
    """The arrays in nested tuples and dicts."""
    if isinstance(tree, dict):
        tree = [tree[name] for name in sorted(tree)]
    return [v for part in tree for v in flat(part)] if isinstance(tree, (tuple, list)) else [tree]


# to compile takes long: one model for each way, and what it is given
WAYS = {
    "plain": ("both ways", "mask"),
    "compiled": ("after", "lengths"),
    "packed": ("no bias", "mask"),
}


@pytest.mark.parametrize("kind", KINDS if THOROUGH else [None])
@pytest.mark.parametrize("path", [path for path in WAYS if path in ("packed", *PATHS)])
def test_all_ways_give_the_same(path, kind):
    if path == "compiled" and not THOROUGH:
        pytest.skip("compiles for a minute: GRU_ANY_THOROUGH=1 does")
    if path != "plain":
        require("numba")
    gru, (x, h0, dy, dh), options = case(*((kind, "mask") if kind else WAYS[path]))
    along, outputs = directions(gru, x, h0), []
    for way in ("traced", path):
        with running(way):
            *found, pullback = gru.forward_over_reverse(x, h0, **along, **options)
            outputs.append(flat([*found, *pullback(dy, dh, dy, dh)]))
    for found, expected in zip(*outputs, strict=True):
        close(found, expected)


@pytest.mark.parametrize("path", ["plain", "traced"])
@pytest.mark.parametrize("kind", ["plain", "after"])
def test_other_equations_are_followed(path, kind, monkeypatch):
    """With another step and its gradient in place of ours, all derivatives are theirs."""
    gru, (x, h0, dy, dh), options = case(kind, "mask")
    along, usual = directions(gru, x, h0), gru.jvp(x, h0, **directions(gru, x, h0))[1]
    for name, function in replaced(gru.reset_after):
        monkeypatch.setattr(equations, name, function)

    def moved(step):
        there = gru.to()
        params, x1, h1 = stepped(gru, step, x, h0, along)
        there.params.update(params)
        outputs, pullback = there.vjp(x1, h1, **options)
        return flat([outputs, pullback(dy, dh)])

    with running(path):
        _, dots, pullback = gru.forward_over_reverse(x, h0, **along, **options)
        found, up, down = flat([dots, pullback(dy, dh)[1]]), moved(1e-6), moved(-1e-6)
    assert np.abs(dots[0] - usual[0]).max() > 0.01
    for ours, a, b in zip(found, up, down, strict=True):
        close(ours, (a - b) / 2e-6, 1e-8)


@pytest.mark.parametrize("way", ["eager", "graph", "persistent"] if THOROUGH else ["persistent"])
def test_on_the_emulated_device(way, monkeypatch, compiler):
    from gru_any.backend import modes

    monkeypatch.setattr(modes, "chosen_on_cuda", modes.Mode(way))
    gru, (x, h0, dy, dh), options = case("after", "mask")
    along, there = directions(gru, x, h0), gru.to(HOST)
    *expected, pullback = gru.forward_over_reverse(x, h0, **along, **options)
    expected += [pullback(dy, dh, dy)]
    put = there.backend.put
    along = {k: put(v) if k != "params_dot" else {n: put(w) for n, w in v.items()}
             for k, v in along.items()}  # fmt: skip
    *found, pullback = there.forward_over_reverse(put(x), put(h0), **along, **options)
    found += [pullback(put(dy), put(dh), put(dy))]
    for ours, theirs in zip(flat(found), flat(expected), strict=True):
        close(to_numpy(ours), theirs)


def test_inside_of_jit():
    jax = require("jax")
    gru, (x, h0, dy, dh), options = case("no bias", "mask")
    there, along = gru.to("jax.numpy"), directions(gru, x, h0)
    *expected, pullback = gru.forward_over_reverse(x, h0, **along, **options)
    expected += [pullback(dy, dh, dy)]

    @jax.jit
    def both(x, h0, along, dy, dh):
        *found, pullback = there.forward_over_reverse(x, h0, **along, **options)
        return [*found, pullback(dy, dh, dy)]

    arrays = jax.tree.map(jax.numpy.asarray, (x, h0, along, dy, dh))
    for ours, theirs in zip(flat(both(*arrays)), flat(expected), strict=True):
        close(np.asarray(ours), theirs, 1e-10)


def test_on_every_library(backend):
    gru, (x, h0, dy, dh), options = case("after", "mask")
    along = directions(gru, x, h0)
    *outputs, pullback = gru.forward_over_reverse(x, h0, **along, **options)
    there = gru.to(backend.name, backend.device)
    put = backend.put
    along = {k: put(v) if k != "params_dot" else {n: put(w) for n, w in v.items()}
             for k, v in along.items()}  # fmt: skip
    *found, back = there.forward_over_reverse(put(x), put(h0), **along, **options)
    for ours, theirs in zip(sum(found, ()), sum(outputs, ()), strict=True):
        assert type(ours) is type(put(x))
        close(backend.host(ours), theirs)
    ours, theirs = back(put(dy), put(dh)), pullback(dy, dh)
    for a, b in zip(ours, theirs, strict=True):
        for name in b[0]:
            close(backend.host(a[0][name]), b[0][name])
        close(backend.host(a[1]), b[1])


@pytest.mark.parametrize(("name", "dtype"), [("numpy", "float32"), ("numpy", "float16"),
                                             (HOST, "float16")])  # fmt: skip
def test_small_dtypes(name, dtype, monkeypatch, compiler):
    """Half precision: arithmetic in float32, as everywhere."""
    from gru_any.backend import modes

    monkeypatch.setattr(modes, "chosen_on_cuda", modes.Mode.EAGER)
    gru, (x, h0, dy, dh), options = case("both ways", "lengths", dtype)
    there, along = gru.to(name), directions(gru, x, h0)
    wide = gru.to(dtype="float64")

    def put(v):
        return asarray(v.astype(dtype), like=there)

    given = {k: put(v) for k, v in along.items() if k != "params_dot"}
    given["params_dot"] = {k: put(v) for k, v in along["params_dot"].items()}
    _, dots, back = there.forward_over_reverse(put(x), put(h0), **given, **options)
    found = (*dots, *back(put(dy), put(dh))[1][1:])
    x, h0, dy, dh = (v.astype("float64") for v in (x, h0, dy, dh))
    _, dots, back = wide.forward_over_reverse(x, h0, **along, **options)
    for ours, theirs in zip(found, (*dots, *back(dy, dh)[1][1:]), strict=True):
        assert str(ours.dtype) == dtype
        close(to_numpy(ours).astype(float), theirs, 3e-6 if dtype == "float32" else 3e-2)


REGULARISED = {"zoneout": 0.3, "recurrent_dropout": 0.2, "weight_dropout": 0.3, "dropout": 0.2}


@pytest.mark.parametrize("path", ["plain", "traced"])
@pytest.mark.parametrize(
    "names", [["zoneout"], ["recurrent_dropout", "weight_dropout"], REGULARISED]
)
@pytest.mark.parametrize("reset_after", [False, True])
def test_regularised(path, names, reset_after):
    """The derivative of a pullback whose masks a generator draws, and gradients of each row."""
    settings = {name: REGULARISED[name] for name in names} | {"reset_after": reset_after}
    rng = np.random.default_rng(0)
    options = {"lengths": [7, 0, 4], "resets": rng.random((7, 3)) < 0.3}
    x, h0, dy, dh = numbers(7, 3, 2), numbers(2, 3, 4), numbers(7, 3, 4), numbers(2, 3, 4, seed=1)
    gru = GRU(2, 4, 2, dtype="float64", seed=0, **settings)
    along = directions(gru, x, h0)

    def moved(step):
        there = GRU(2, 4, 2, dtype="float64", seed=0, **settings)
        params, x1, h1 = stepped(gru, step, x, h0, along)
        there.params.update(params)
        outputs, pullback = there.vjp(x1, h1, rng=np.random.default_rng(5), **options)
        return flat([outputs, pullback(dy, dh)]), flat(there(x1, h1, **options)), pullback

    with running(path):
        _, dots, pullback = gru.forward_over_reverse(
            x, h0, rng=np.random.default_rng(5), **along, **options
        )
        found, plain = flat([dots, pullback(dy, dh)[1]]), gru.jvp(x, h0, **along, **options)[1]
        up, down, here = moved(1e-6), moved(-1e-6), moved(0)
    for ours, a, b in zip(found, up[0], down[0], strict=True):
        close(ours, (a - b) / 2e-6, 1e-8)
    for ours, a, b in zip(plain, up[1], down[1], strict=True):
        close(ours, (a - b) / 2e-6, 1e-8)
    total, each = here[2](dy, dh)[0], here[2].per_example(dy, dh)[0]
    for name in total:
        close(each[name].sum(axis=0), total[name])


# whole models, with a loss -----------------------------------------------------------------------

O = {"dtype": "float64"}
HARD = np.random.default_rng(7).integers(0, 2, (7, 3))
MODELS = {
    "softmax": (
        lambda: Chain(Embedding(5, 3, seed=0, **O), GRU(3, 4, 2, dropout=0.4, seed=1, **O),
                      Linear(4, 2, seed=2, **O)),
        lambda y: softmax_cross_entropy(y, HARD, np.array([1.0, 3.0]), mask=HARD < 2),
    ),
    "squared": (
        lambda: Chain(Embedding(5, 3, seed=0, **O), Dropout(0.3, **O),
                      GRU(3, 4, bidirectional=True, reset_after=True, seed=1, **O), Last(**O),
                      Linear(8, 2, bias=False, seed=2, **O)),
        lambda y: squared_error(y, numbers(3, 2), np.array([1.0, 2.0])),
    ),
    "sigmoid, tied": (
        lambda: Chain(Embedding(5, 3, seed=0, **O), GRU(3, 3, seed=1, **O),
                      Linear(3, 5, seed=2, **O), tied={"2.weight": "0.weight"}),
        lambda y: sigmoid_cross_entropy(y, np.random.default_rng(0).random(y.shape), mask=HARD > 0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("path", ["plain", "traced"])
def test_products_with_the_hessian_of_a_model(kind, path):
    make, loss = MODELS[kind]
    model, x = make(), np.random.default_rng(0).integers(0, 5, (7, 3))
    v = {k: numbers(*p.shape, seed=n) for n, (k, p) in enumerate(model.params.items())}
    given = {"lengths": [7, 1, 4]}

    def gradient(step):
        moved = make()
        for k in v:
            moved.params[k] = model.params[k] + step * v[k]
        (y, _), pullback = moved.vjp(x, rng=np.random.default_rng(1), **given)
        value, dy = loss(y)
        return value, pullback(dy)[0]

    with running(path):
        rng = np.random.default_rng(1)
        value, grads, product = hvp(model, loss, v, x, rng=rng, **given)
        expected, up, down = gradient(0), gradient(1e-5), gradient(-1e-5)
    assert float(value) == pytest.approx(float(expected[0]), rel=1e-12)
    for k in v:
        close(grads[k], expected[1][k])
        close(product[k], (up[1][k] - down[1][k]) / 2e-5, 1e-8)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid, tied"] if THOROUGH else ["sigmoid, tied"])
@pytest.mark.parametrize("name", ["array_api_strict", "torch", HOST])
def test_products_on_other_libraries(name, kind, compiler):
    require(name)
    backend = Home(name)
    model, x = MODELS[kind][0](), np.random.default_rng(0).integers(0, 5, (7, 3))
    v = {k: numbers(*p.shape, seed=n) for n, (k, p) in enumerate(model.params.items())}
    there, put = model.to(backend.name, backend.device), backend.put
    target = np.random.default_rng(0).random((7, 3, 5))
    weight = np.array([1.0, 3.0])

    def loss(put):
        if kind == "softmax":
            return lambda y: softmax_cross_entropy(y, put(HARD), put(weight), mask=put(HARD < 2))
        return lambda y: sigmoid_cross_entropy(y, put(target), mask=put(HARD > 0))

    expected = hvp(model, loss(np.asarray), v, x)
    found = hvp(there, loss(put), {k: put(w) for k, w in v.items()}, put(x))
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-12)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        for k in v:
            close(backend.host(ours[k]), theirs[k])


def test_linear_loss_of_a_model_with_states():
    """The chain's states take part, forward and backward, as in the complex step of each part."""
    model = Chain(GRU(2, 3, seed=0, **O), Linear(3, 2, seed=1, **O), GRU(2, 2, seed=2, **O))
    x, state = numbers(5, 2, 2), [numbers(1, 2, 3), numbers(1, 2, 2)]
    along = {"x_dot": numbers(5, 2, 2, seed=1), "state_dot": [numbers(1, 2, 3, seed=2), None]}
    (y, states), (y_dot, states_dot), pullback = model.forward_over_reverse(x, state, **along)

    def moved(s):
        given = x + s * along["x_dot"], [state[0] + s * along["state_dot"][0], state[1]]
        outputs, back = model.vjp(*given)
        return outputs, back(np.ones_like(y) * (1 + s), [np.ones_like(h) for h in states])

    up, down = moved(1e-5), moved(-1e-5)
    close(y_dot, (up[0][0] - down[0][0]) / 2e-5, 1e-9)
    for n in range(2):
        close(states_dot[n], (up[0][1][n] - down[0][1][n]) / 2e-5, 1e-9)
    ones = [np.ones_like(h) for h in states]
    _, (grads_dot, dx_dot, dstate_dot) = pullback(np.ones_like(y), ones, np.ones_like(y))
    for k in grads_dot:
        close(grads_dot[k], (up[1][0][k] - down[1][0][k]) / 2e-5, 1e-8)
    close(dx_dot, (up[1][1] - down[1][1]) / 2e-5, 1e-8)
    close(dstate_dot[0], (up[1][2][0] - down[1][2][0]) / 2e-5, 1e-8)


# laws --------------------------------------------------------------------------------------------

SCALES = st.floats(-3, 3).filter(lambda v: v == 0 or abs(v) > 1e-3)


@given(st.sampled_from([*KINDS]), SCALES, SCALES, st.integers(0, 99))
def test_jvp_is_linear_and_vjp_its_transpose(kind, a, b, seed):
    gru, (x, h0, dy, dh), _ = case(kind, "all")
    one, two = directions(gru, x, h0, seed), directions(gru, x, h0, seed + 500)
    mixed = {k: a * one[k] + b * two[k] for k in ("x_dot", "h0_dot")}
    first, second = one["params_dot"], two["params_dot"]
    mixed["params_dot"] = {k: a * v + b * second[k] for k, v in first.items()}
    each = [gru.jvp(x, h0, **dots)[1] for dots in (one, two, mixed)]
    for u, v, w in zip(*each, strict=True):
        close(w, a * u + b * v, 1e-11)
    grads, dx, dh0 = gru.vjp(x, h0)[1](dy, dh)
    left = np.sum(dy * each[0][0]) + np.sum(dh * each[0][1])
    right = np.sum(dx * one["x_dot"]) + np.sum(dh0 * one["h0_dot"])
    right += sum(np.sum(grads[k] * v) for k, v in one["params_dot"].items())
    assert left == pytest.approx(right, rel=1e-10, abs=1e-10)


@given(st.sampled_from([*KINDS]), st.integers(0, 99))
def test_the_hessian_is_symmetric(kind, seed):
    gru, (x, h0, *_), _ = case(kind, "lengths")
    u, v = (directions(gru, x, h0, seed + n)["params_dot"] for n in (0, 500))
    t = numbers(*gru(x, h0)[0].shape, seed=seed)
    Hu, Hv = (hvp(gru, lambda y: squared_error(y, t), w, x, h0)[2] for w in (u, v))
    left, right = sum(np.sum(v[k] * Hu[k]) for k in u), sum(np.sum(u[k] * Hv[k]) for k in u)
    assert left == pytest.approx(right, rel=1e-10, abs=1e-12)


# edges -------------------------------------------------------------------------------------------


def test_what_is_not_given_is_zero():
    gru, (x, h0, dy, dh), _ = case("both ways", "all")
    along = directions(gru, x, h0)
    zeros = {k: np.zeros_like(v) for k, v in along["params_dot"].items()}
    part = {"weight_hh_l1": along["params_dot"]["weight_hh_l1"]}
    _, found, back = gru.forward_over_reverse(x, h0, params_dot=part)
    _, expected, other = gru.forward_over_reverse(
        x, h0, x_dot=np.zeros_like(x), h0_dot=np.zeros_like(h0), params_dot={**zeros, **part}
    )
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    for a, b in zip(back(dy, dh)[1][1:], other(dy, dh, np.zeros_like(dy))[1][1:], strict=True):
        close(a, b)
    _, (y_dot, h_dot) = gru.jvp(x, h0_dot=along["h0_dot"])
    for a, b in zip((y_dot, h_dot), gru.jvp(x, np.zeros_like(h0), h0_dot=along["h0_dot"])[1],
                    strict=True):  # fmt: skip
        close(a, b)


@pytest.mark.parametrize("shape", [(0, 3, 2), (5, 0, 2), (4, 2)])
def test_no_steps_no_rows_no_batch(shape):
    gru = GRU(2, 4, dtype="float64", seed=0)
    x, x_dot = numbers(*shape), numbers(*shape, seed=1)
    h0_dot = numbers(1, *shape[1:-1], 4)
    (y, h), (y_dot, h_dot), pullback = gru.forward_over_reverse(x, x_dot=x_dot, h0_dot=h0_dot)
    assert (y.shape, h.shape) == (y_dot.shape, h_dot.shape)
    for value, dot in zip(*pullback(y, h, y_dot, h_dot), strict=True):
        assert type(value) is type(dot)
    if not shape[0]:
        close(h_dot, h0_dot)


def test_nan_in_padding_reaches_nothing():
    gru, (x, h0, dy, dh), _ = case("two layers", "all")
    lengths, along = [7, 2, 0], directions(*case("two layers", "all")[:1], x, h0)
    _, expected, back = gru.forward_over_reverse(x, h0, lengths, **along)
    dots = back(dy, dh, dy, dh)[1]
    for v in (x, along["x_dot"], dy):
        for b, n in enumerate(lengths):
            v[b, n:] = np.nan
    _, found, again = gru.forward_over_reverse(x, h0, lengths, **along)
    for a, b in zip((*found, *again(dy, dh, dy, dh)[1][1:]), (*expected, *dots[1:]), strict=True):
        close(a, b)


@pytest.mark.parametrize("path", ["plain", "traced"])
def test_nan_in_an_episode_stays_in_it(path):
    gru, (x, h0, dy, dh), _ = case("after", "all")
    resets, along = np.zeros((7, 3), bool), directions(gru, x, h0)
    resets[3, 1] = True
    mask = np.ones((7, 3), bool)
    mask[2:4, 1] = [True, False]
    resets[4, 1] = True
    options = {"resets": resets, "mask": mask}
    with running(path):
        _, expected, back = gru.forward_over_reverse(x, h0, **along, **options)
        dots = back(dy, dh, dy)[1]
        x[1, 1] = np.nan
        _, found, again = gru.forward_over_reverse(x, h0, **along, **options)
        changed = again(dy, dh, dy)[1]
    assert np.isnan(found[0][1, 1]).all()
    for a, b in zip((found[0], changed[1]), (expected[0], dots[1]), strict=True):
        close(a[4:], b[4:])
        close(a[:, [0, 2]], b[:, [0, 2]])
    close(found[1], expected[1])


def test_refusals():
    gru, (x, h0, dy, dh), _ = case("plain", "all")
    with pytest.raises(ValueError, match="no direction to differentiate along: give one of x_dot"):
        gru.jvp(x)
    with pytest.raises(ValueError, match=r"x_dot is \(7, 3\), expected \(7, 3, 2\), the shape of"):
        gru.jvp(x, x_dot=x[..., 0])
    with pytest.raises(ValueError, match=r"h0_dot is \(1, 2, 4\), expected \(1, 3, 4\)"):
        gru.jvp(x, h0_dot=h0[:, :2])
    with pytest.raises(TypeError, match="x_dot has dtype float32, expected float64"):
        gru.jvp(x, x_dot=x.astype("float32"))
    with pytest.raises(KeyError, match="params_dot holds"):
        gru.jvp(x, params_dot={"weight": h0})
    with pytest.raises(ValueError, match=r"params_dot\['bias_ih_l0'\] is \(3,\), expected \(12,\)"):
        gru.jvp(x, params_dot={"bias_ih_l0": np.zeros(3)})
    with pytest.raises(TypeError, match="params_dot is a list, expected a mapping"):
        gru.jvp(x, params_dot=[h0])
    pullback = gru.forward_over_reverse(x, h0, x_dot=x)[2]
    with pytest.raises(ValueError, match="dh_n_dot was given without dh_n"):
        pullback(dy, dh_n_dot=dh)
    with pytest.raises(ValueError, match=r"dy_dot is \(1, 3, 4\), expected \(7, 3, 4\)"):
        pullback(dy, dy_dot=dh)
    gru.params["bias_ih_l0"] = np.zeros(12)
    with pytest.raises(RuntimeError, match="parameters were replaced"):
        pullback(dy)
    with pytest.raises(TypeError, match="complex128 serves"):
        gru.to(dtype="complex128").forward_over_reverse(x + 0j, x_dot=x + 0j)
    model = Chain(Embedding(5, 2, **O), gru)
    with pytest.raises(TypeError, match="x holds integers, which have no derivative"):
        model.jvp(np.zeros((3, 2), int), x_dot=np.zeros((3, 2)))
    with pytest.raises(ValueError, match="state_dot was given without state"):
        model.jvp(np.zeros((3, 2), int), state_dot=[h0])
    with pytest.raises(ValueError, match="state_dot holds 2, expected 1"):
        model.jvp(np.zeros((3, 3), int), [h0], state_dot=[h0, h0])


def test_what_has_no_second_derivative_is_refused():
    x, v = numbers(5, 3), {"bias": np.ones(2)}
    with pytest.raises(TypeError, match="the model is a Linear, expected a GRU or a Chain"):
        hvp(Linear(3, 2, **O), lambda y: squared_error(y, y), v, x)
    with pytest.raises(TypeError, match="frozen"):
        deploy.freeze(GRU(3, 2, **O)).jvp(x, x_dot=x)
    with pytest.raises(TypeError, match="frozen"):
        deploy.freeze(Chain(GRU(3, 2, **O))).jvp(x, x_dot=x)
    with pytest.raises(ValueError, match=r"x is \(3,\), expected \(T, B, I\)"):
        GRU(3, 2, **O).jvp(x[0], h0_dot=numbers(1, 2))


def test_a_function_without_a_derivative_is_refused():
    gru, (x, *_), _ = case("plain", "all")
    v = {"bias_ih_l0": np.ones(12)}
    for f in (lambda y: (0, y.__array_namespace__().cumulative_sum(y)), lambda y: (0, np.cos(y))):
        with pytest.raises((NotImplementedError, TypeError), match=r"no derivative|ufunc"):
            hvp(gru, f, v, x)
