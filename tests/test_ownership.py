"""Who may write what, and when it takes effect: on every path of NumPy."""

import copy
import pickle

import numpy as np
import pytest
from conftest import PATHS, at_once, running

from gru_any import GRU, SGD, Chain, Embedding, GRUCell, Linear


@pytest.fixture(params=PATHS, autouse=True)
def path(request):
    """Each test of this file runs in every way there is on NumPy."""
    with running(request.param):
        yield request.param


VARIANTS = pytest.mark.parametrize("reset_after", [False, True], ids=["before", "after"])


def setup(reset_after, T=70, **options):
    gru = GRU(3, 4, 2, reset_after=reset_after, seed=1, **options)
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((T, 2, n)).astype("float32") for n in (3, 4))
    return gru, x, dy


def flat(results):
    grads, dx, dh0 = results
    return [*grads.values(), dx, dh0]


def same(a, b):
    return all(np.array_equal(v, w) for v, w in zip(a, b, strict=True))


@VARIANTS
def test_writing_a_weight_takes_effect_at_the_next_call(reset_after):
    gru, x, _ = setup(reset_after)
    before, _ = gru(x)
    kept = before.copy()
    gru.params["weight_hh_l0"][...] *= 2
    after, _ = gru(x)
    assert not np.array_equal(before, after)
    assert np.array_equal(before, kept)
    fresh = GRU(3, 4, 2, reset_after=reset_after)
    fresh.load_params(gru.params)
    assert np.array_equal(after, fresh(x)[0])


@VARIANTS
def test_replacing_a_weight_takes_effect_at_the_next_call(reset_after):
    gru, x, _ = setup(reset_after)
    before, _ = gru(x)
    gru.params["weight_ih_l1"] = gru.params["weight_ih_l1"] * np.float32(2)
    assert not np.array_equal(before, gru(x)[0])


@VARIANTS
def test_outputs_belong_to_the_caller(reset_after):
    gru, x, dy = setup(reset_after)
    (y, h_n), pullback = gru.vjp(x)
    first = [v.copy() for v in flat(pullback(dy))]
    y[...], h_n[...] = np.nan, np.nan
    results = pullback(dy)
    assert same(flat(results), first)
    for array in flat(results):
        array[...] = np.nan
    assert same(flat(pullback(dy)), first)
    y1, h1 = gru(x)
    kept = y1.copy(), h1.copy()
    gru(x[::-1])
    assert same((y1, h1), kept)


@VARIANTS
def test_inputs_are_never_written(reset_after):
    gru, x, dy = setup(reset_after)
    h0 = np.ones((2, 2, 4), "float32")
    for array in (x, dy, h0, *gru.params.values()):
        array.flags.writeable = False
    (_, h_n), pullback = gru.vjp(x, h0, [70, 5])
    h_n.flags.writeable = False
    pullback(dy, h_n)
    gru(x, h0)


@VARIANTS
def test_two_forwards_before_the_first_pullback(reset_after):
    gru, x, dy = setup(reset_after)
    _, one = gru.vjp(x)
    expected = flat(one(dy))
    _, first = gru.vjp(x)
    _, second = gru.vjp(x * 2)
    different = flat(second(dy))
    assert same(flat(first(dy)), expected)
    assert not same(different, expected)


@VARIANTS
def test_a_pullback_dropped_unused(reset_after):
    gru, x, dy = setup(reset_after)
    expected = flat(gru.vjp(x)[1](dy))
    for _ in range(3):
        gru.vjp(x * 3)
    assert same(flat(gru.vjp(x)[1](dy)), expected)


@VARIANTS
def test_changing_weights_under_a_pullback_is_an_error(reset_after):
    gru, x, dy = setup(reset_after)
    _, pullback = gru.vjp(x)
    grads, _, _ = pullback(dy)
    SGD(gru.params, lr=0.1).step(gru.params, grads)
    with pytest.raises(RuntimeError, match="between vjp and its pullback"):
        pullback(dy)


def test_changing_weights_under_the_pullback_of_other_layers_is_an_error():
    linear, cell = Linear(3, 4), GRUCell(3, 4)
    x = np.ones((2, 3), "float32")
    for layer, name in ((linear, "weight"), (cell, "weight_ih")):
        y, pullback = layer.vjp(x)
        layer.params[name] *= np.float32(2)
        with pytest.raises(RuntimeError, match="between vjp and its pullback"):
            pullback(y)


@VARIANTS
def test_threads(reset_after):
    gru, x, dy = setup(reset_after)
    inputs = [x * (i + 1) for i in range(8)]
    expected = [flat(gru.vjp(v)[1](dy)) for v in inputs]

    def work(i):
        for _ in range(5):
            assert same(flat(gru.vjp(inputs[i])[1](dy)), expected[i])

    at_once(work, 8)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(how):
    chain = Chain(Embedding(5, 3, seed=0), GRU(3, 4, seed=0), Linear(4, 2, seed=0))
    x = np.arange(5)[:, None]
    twin = how(chain)
    assert np.array_equal(twin(x)[0], chain(x)[0])
    twin.params["2.bias"][...] = 9
    assert not np.array_equal(twin(x)[0], chain(x)[0])


def test_what_fits_no_parameter_is_refused():
    gru = GRU(3, 4)
    with pytest.raises(KeyError, match="is no parameter"):
        gru.params["weight_ih_l9"] = np.zeros((12, 3), "float32")
    with pytest.raises(ValueError, match="expected \\(12, 3\\)"):
        gru.params["weight_ih_l0"] = np.zeros((3, 12), "float32")
    with pytest.raises(TypeError, match="float64"):
        gru.params["weight_ih_l0"] = np.zeros((12, 3))
    with pytest.raises(TypeError, match="cannot be deleted"):
        del gru.params["weight_ih_l0"]
