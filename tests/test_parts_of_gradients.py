"""A pullback of the outputs alone, of the last states alone, and of sequences without steps."""

import numpy as np
import pytest
from conftest import PATHS, running

from gru_any import GRU

EACH = pytest.mark.parametrize("path", ["plain", *PATHS])
SHAPES = pytest.mark.parametrize(("layers", "both"), [(1, False), (1, True), (2, True)])


def model(layers, both, reset_after, I=3, H=4):
    settings = {"bidirectional": both, "reset_after": reset_after, "dtype": "float64"}
    return GRU(I, H, layers, seed=0, **settings)


@EACH
@SHAPES
@pytest.mark.parametrize("reset_after", [False, True])
@pytest.mark.parametrize("lengths", [None, [5, 0, 2]])
def test_the_parts_add_up(path, layers, both, reset_after, lengths):
    """The backward pass is linear in (dy, dh_n), and zeros are as good as nothing."""
    gru, rng = model(layers, both, reset_after), np.random.default_rng(1)
    x, h0 = rng.standard_normal((5, 3, 3)), rng.standard_normal((layers * (1 + both), 3, 4))
    with running(path):
        (y, h_n), pullback = gru.vjp(x, h0, lengths)
        dy, dh_n = rng.standard_normal(y.shape), rng.standard_normal(h_n.shape)
        found = [pullback(dy, dh_n), pullback(dy), pullback(None, dh_n)]
        zeros = [pullback(dy, np.zeros_like(h_n)), pullback(np.zeros_like(y), dh_n)]
    flat = [np.concatenate([v.ravel() for v in (*g.values(), dx, dh)]) for g, dx, dh in found]
    np.testing.assert_allclose(flat[0], flat[1] + flat[2], rtol=1e-12, atol=1e-12)
    for (grads, dx, dh0), (expected, *others) in zip(found[1:], zeros, strict=True):
        for name, grad in grads.items():
            np.testing.assert_allclose(grad, expected[name], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(dx, others[0], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(dh0, others[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("both", [False, True])
def test_the_last_states_alone_by_numbers(both):
    """dL/dx of L = sum(dh_n * h_n), by central differences, with each direction weighed anew."""
    gru, rng = model(2, both, True), np.random.default_rng(2)
    x = rng.standard_normal((4, 2, 3))
    dh_n = rng.standard_normal((2 * (1 + both), 2, 4))
    _, dx, _ = gru.vjp(x)[1](None, dh_n)

    def loss(v):
        return float(np.sum(gru(v)[1] * dh_n))

    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += 1e-6
        down[i] -= 1e-6
        assert dx[i] == pytest.approx((loss(up) - loss(down)) / 2e-6, abs=1e-8)


@EACH
@SHAPES
@pytest.mark.parametrize("reset_after", [False, True])
@pytest.mark.parametrize(("I", "H"), [(3, 4), (1, 4), (3, 1), (1, 1)])
def test_without_steps(path, layers, both, reset_after, I, H):
    """The last states are the first, so their gradient passes, and nothing reaches the weights."""
    gru, rng = model(layers, both, reset_after, I, H), np.random.default_rng(3)
    h0, dh_n = rng.standard_normal((2, layers * (1 + both), 2, H))
    with running(path):
        (y, h_n), pullback = gru.vjp(np.zeros((0, 2, I)), h0)
        grads, dx, dh0 = pullback(y, dh_n)
    assert y.shape == (0, 2, H * (1 + both))
    assert dx.shape == (0, 2, I)
    np.testing.assert_array_equal(h_n, h0)
    np.testing.assert_array_equal(dh0, dh_n)
    for name, grad in grads.items():
        np.testing.assert_array_equal(grad, np.zeros_like(gru.params[name]))
