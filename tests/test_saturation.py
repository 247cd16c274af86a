"""tanh and the gates where they saturate and where they are tiny, on every path, in float32."""

import numpy as np
import pytest
from conftest import PATHS, running

from gru_any import GRU

EACH = pytest.mark.parametrize("path", PATHS)


def tanh_of(v, path):
    """tanh, as the candidate of a model that forgets its state: h' = n = tanh(x)."""
    gru = GRU(1, 1)
    gru.params["weight_ih_l0"][...] = [[0], [0], [1]]
    gru.params["weight_hh_l0"][...] = 0
    gru.params["bias_ih_l0"][...] = [0, -1e4, 0]  # z = 0
    with running(path):
        return gru(v[None, :, None])[0][0, :, 0]


def between(low, high, most=400_000):
    """Numbers of float32 from low to high, evenly among those there are, or all of them."""
    first, last = np.array([low, high], "f4").view("i4")
    return np.arange(first, last, max(1, (last - first) // most), dtype="i4").view("f4")


@EACH
def test_near_one_it_is_what_float32_has(path):
    x = between(8, 9.3, 2_000_000)  # all of them
    found, exact = tanh_of(x, path), np.tanh(x.astype("f8"))
    assert found.max() <= 1
    assert np.abs(found - exact).max() < 2e-7
    if path in ("compiled", "packed"):  # NumPy's own reaches 1 later
        assert (found[x >= 9.02] == 1).all()
        assert np.array_equal(tanh_of(-x, path), -found)
    assert np.abs(tanh_of(-x, path) + found).max() < 2e-7


@EACH
def test_ends(path):
    x = np.array([3e38, -3e38, np.nan, 1e30, -1e30, 20, -20, 0], "f4")
    found = tanh_of(x, path)
    np.testing.assert_array_equal(found, np.array([1, -1, np.nan, 1, -1, 1, -1, 0], "f4"))


@EACH
@pytest.mark.parametrize(("low", "high"), [(1.1754944e-38, 1e-30), (1e-30, 1e-4), (1e-4, 8)])
def test_relative_errors_are_small_however_small_the_number(path, low, high):
    # at most 700 at once: NumPy's way for many is exact to 2e-7 of one, as documented there
    x = between(low, high, 600)
    exact = np.tanh(x.astype("f8"))
    assert (np.abs(tanh_of(x, path) - exact) / exact).max() < 7e-7


@EACH
@pytest.mark.parametrize("reset_after", [False, True])
def test_nothing_flows_through_a_saturated_gate(path, reset_after):
    """Where all gates and candidates are at their ends, the input has no effect, however large."""
    rng = np.random.default_rng(0)
    gru = GRU(3, 8, reset_after=reset_after, seed=0)
    x = np.sign(rng.standard_normal((6, 5, 3))).astype("f4") * np.float32(1e4)
    gru.params["weight_ih_l0"][...] = np.sign(gru.params["weight_ih_l0"])  # sums are odd, not 0
    with running(path):
        (y, _), pullback = gru.vjp(x)
        grads, dx, _ = pullback(np.ones_like(y))
    assert set(np.unique(y)) <= {-1, 0, 1}
    assert not grads["weight_ih_l0"].any()
    assert not dx.any()
