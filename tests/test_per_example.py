"""Gradients of each example: against runs of each row alone, PyTorch and JAX."""

import numpy as np
import pytest
from conftest import HOST, PATHS, require, running

from gru_any import GRU, Chain, Dropout, Embedding, Last, Linear, asarray, to_numpy

T, B = 7, 3
KINDS = {
    "plain": {},
    "after": {"reset_after": True, "recompute": 2},
    "two layers": {"num_layers": 2, "reset_after": True, "batch_first": True},
    "both ways": {"bidirectional": True, "num_layers": 2, "recompute": "sqrt"},
    "no bias": {"bias": False, "reverse": True},
}
GIVEN = {
    "all": {},
    "lengths": {"lengths": [7, 0, 4]},
    "mask": {"mask": True, "resets": True, "skipped": "repeat"},
}


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def case(kind, given, dtype="float64"):
    """A model, its inputs and cotangents, and how a row of a batch is cut out of them."""
    gru = GRU(2, 4, seed=0, dtype=dtype, **KINDS[kind])
    D, lead = len(gru.suffixes), (B, T) if gru.batch_first else (T, B)
    states = gru.num_layers * D, B, 4
    arrays = numbers(*lead, 2), numbers(*states, seed=1), numbers(*lead, 4 * D, seed=2)
    options, rng = dict(GIVEN[given]), np.random.default_rng(3)
    for name in ("mask", "resets"):
        if name in options:
            options[name] = rng.random(lead) < {"mask": 0.7, "resets": 0.3}[name]
    return gru, [v.astype(dtype) for v in (*arrays, numbers(*states, seed=4))], options


def row(v, b, first):
    """Row b of an array of a call, whose batch is the first axis or the second."""
    return v[b : b + 1] if first else v[:, b : b + 1]


def close(found, expected, tolerance=1e-12):
    assert found.shape == expected.shape
    scale = max(float(np.abs(expected).max(initial=0)), 1.0)
    assert float(np.abs(found - expected).max(initial=0)) <= tolerance * scale


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_the_gradient_of_that_row_alone(kind, given):
    gru, (x, h0, dy, dh), options = case(kind, given)
    first = gru.batch_first
    with running("traced"):
        pullback = gru.vjp(x, h0, **options)[1]
        grads, dx, dh0 = pullback.per_example(dy, dh)
        total, *others = pullback(dy, dh)
        for name in total:
            assert grads[name].shape == (B, *gru.params[name].shape)
            close(grads[name].sum(axis=0), total[name])
        close(dx, others[0])
        close(dh0, others[1])
        for b in range(B):
            own = dict(options)
            for name in ("mask", "resets"):
                if name in own:
                    own[name] = row(own[name], b, first)
            if "lengths" in own:
                own["lengths"] = own["lengths"][b : b + 1]
            alone = gru.vjp(row(x, b, first), row(h0, b, False), **own)[1]
            expected = alone(row(dy, b, first), row(dh, b, False))[0]
            for name in expected:
                close(grads[name][b], expected[name])


@pytest.mark.parametrize("path", ["packed", *PATHS])
@pytest.mark.parametrize("kind", ["after", "both ways"])
def test_all_ways_give_the_same(path, kind):
    gru, (x, h0, dy, dh), options = case(kind, "lengths")
    expected, *_ = gru.vjp(x, h0, **options)[1].per_example(dy, dh)
    with running(path):
        found, *_ = gru.vjp(x, h0, **options)[1].per_example(dy, dh)
    for name in expected:
        close(found[name], expected[name])


@pytest.mark.parametrize("way", ["plain", "graph", "persistent"])
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_on_the_emulated_device(way, dtype, monkeypatch, compiler):
    from gru_any.backend import modes

    monkeypatch.setattr(modes, "chosen_on_cuda", modes.Mode(way))
    gru, (x, h0, dy, dh), options = case("both ways", "lengths", dtype)
    there = gru.to(HOST)
    found = there.vjp(*(asarray(v, like=there) for v in (x, h0)), **options)[1].per_example(
        *(asarray(v, like=there) for v in (dy, dh))
    )[0]
    expected = gru.vjp(x, h0, **options)[1].per_example(dy, dh)[0]
    for name in expected:
        assert str(found[name].dtype) == dtype
        close(to_numpy(found[name]).astype(float), expected[name].astype(float),
              1e-12 if dtype == "float64" else 2e-2)  # fmt: skip


def test_on_every_library(backend):
    gru, (x, h0, dy, dh), options = case("after", "mask")
    expected = gru.vjp(x, h0, **options)[1].per_example(dy, dh)
    there = gru.to(backend.name, backend.device)
    x, h0, dy, dh = map(backend.put, (x, h0, dy, dh))
    found = there.vjp(x, h0, **options)[1].per_example(dy, dh)
    for name in expected[0]:
        assert type(found[0][name]) is type(x)
        close(backend.host(found[0][name]), expected[0][name])


def test_as_torch_func():
    """By torch.func.grad of PyTorch's own GRU, row by row."""
    torch = require("torch")
    x = torch.from_numpy(numbers(B, T, 2))
    theirs = torch.nn.GRU(2, 4, 2, batch_first=True, bidirectional=True, dtype=torch.float64)
    params = {k: v.detach() for k, v in theirs.named_parameters()}

    def loss(params, x, dy):
        y, _ = torch.func.functional_call(theirs, params, (x[None],))
        return (y[0] * dy).sum()

    dy = torch.from_numpy(numbers(B, T, 8, seed=1))
    alone = [torch.func.grad(loss)(params, x[b], dy[b]) for b in range(B)]
    gru = GRU(2, 4, 2, bidirectional=True, reset_after=True, batch_first=True, dtype="float64")
    gru.load_params(theirs.state_dict())
    found = gru.vjp(x.numpy())[1].per_example(dy.numpy())[0]
    for name in params:
        close(found[name], np.stack([g[name].numpy() for g in alone]))


def test_as_vmap_of_grad_in_jax():
    jax = require("jax")
    gru, (x, h0, dy, dh), _ = case("no bias", "all")
    there = gru.to("jax.numpy")

    def loss(params, x, h0, dy, dh):
        y, h = there.apply(params, x[:, None], h0[:, None])
        return (y[:, 0] * dy).sum() + (h[:, 0] * dh).sum()

    @jax.jit
    def both(params, *arrays):
        x, h0, dy, dh = arrays
        each = jax.vmap(jax.grad(loss), (None, 1, 1, 1, 1))
        return each(params, *arrays), there.vjp(x, h0)[1].per_example(dy, dh)[0]

    arrays = [jax.numpy.asarray(v) for v in (x, h0, dy, dh)]
    expected, inside = both(dict(there.params), *arrays)
    found = gru.vjp(x, h0)[1].per_example(dy, dh)[0]
    for name in found:
        close(found[name], np.asarray(expected[name]), 1e-10)
        close(np.asarray(inside[name]), found[name], 1e-10)


CHAINS = {
    "tied": lambda o: Chain(
        Embedding(5, 3, seed=0, **o), GRU(3, 3, seed=1, **o), Linear(3, 5, seed=2, **o),
        tied={"2.weight": "0.weight"},
    ),
    "last": lambda o: Chain(
        Embedding(5, 3, seed=0, **o), Linear(3, 2, seed=3, **o), Dropout(0.3, **o),
        GRU(2, 3, bidirectional=True, seed=1, **o), Last(**o), Linear(6, 2, bias=False, **o),
    ),
    "batch first": lambda o: Chain(
        Embedding(5, 3, seed=0, **o), GRU(3, 3, seed=1, batch_first=True, **o),
        Linear(3, 2, seed=2, **o),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHAINS)
def test_chains(kind):
    model = CHAINS[kind]({"dtype": "float64"})
    x = np.random.default_rng(0).integers(0, 5, (B, T) if model.batch_first else (T, B))
    (y, state), pullback = model.vjp(x, lengths=[7, 0, 4], rng=np.random.default_rng(1))
    dy, dstate = numbers(*y.shape), [numbers(*h.shape, seed=1) for h in state]
    grads = pullback.per_example(dy, dstate)[0]
    total = pullback(dy, dstate)[0]
    batch = 0 if model.batch_first or kind == "last" else 1
    assert list(grads) == list(total)
    for b in range(B):
        rows = [n for n in range(B) if n != b]
        own, states = np.moveaxis(dy.copy(), batch, 0), [h.copy() for h in dstate]
        own[rows] = 0
        for h in states:
            h[:, rows] = 0
        expected = pullback(np.moveaxis(own, 0, batch), states)[0]
        for name in expected:
            close(grads[name][b], expected[name])
    for name in total:
        close(grads[name].sum(axis=0), total[name])


def test_layers_alone():
    layers = Linear(4, 2, dtype="float64", seed=0), Embedding(6, 2, dtype="float64", seed=0)
    for layer, x in zip(layers, (numbers(3, 5, 4), np.arange(15).reshape(3, 5) % 6), strict=True):
        y, pullback = layer.vjp(x)
        dy = numbers(*y.shape)
        for axis in (0, 1):
            grads = pullback.per_example(dy, axis)[0]
            for b in range(x.shape[axis]):
                alone = layer.vjp(np.take(x, [b], axis))[1](np.take(dy, [b], axis))[0]
                for name in alone:
                    close(grads[name][b], alone[name])
        with pytest.raises(ValueError, match="has no axis 2 before its last"):
            pullback.per_example(dy, 2)


def test_edges():
    gru = GRU(2, 4, dtype="float64", seed=0)
    for shape in ((0, 3, 2), (5, 0, 2)):
        (y, _), pullback = gru.vjp(np.zeros(shape))
        grads = pullback.per_example(np.zeros_like(y))[0]
        for name, grad in grads.items():
            assert grad.shape == (shape[1], *gru.params[name].shape)
            assert not grad.any()
    y, pullback = Embedding(5, 2).vjp(np.zeros((0, 3), int))
    assert pullback.per_example(y)[0]["weight"].shape == (0, 5, 2)
    (y, _), pullback = gru.vjp(np.zeros((4, 2)))
    with pytest.raises(ValueError, match="has no batch"):
        pullback.per_example(y)


def test_padding_and_nan_stay_in_their_row():
    gru = GRU(2, 4, dtype="float64", seed=0)
    x = numbers(T, B, 2)
    x[3, 1], x[6, 2] = np.nan, np.nan
    (y, _), pullback = gru.vjp(x, lengths=[7, 7, 6])
    grads = pullback.per_example(np.ones_like(y))[0]
    for grad in grads.values():
        assert np.isfinite(grad[[0, 2]]).all()
        assert np.isnan(grad[1]).any()
