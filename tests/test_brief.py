"""A few steps of a batch on several threads: the same numbers as the reference."""

import numpy as np
import pytest
from conftest import is_rounding, require, running
from replaced import replaced

from gru_any import GRU, equations, gradcheck
from gru_any.backend import runner, select
from gru_any.backend.cpu import numba_runner as module
from gru_any.backend.cpu import tuning
from gru_any.deploy import freeze


@pytest.fixture(autouse=True)
def several_threads(monkeypatch):
    """As where there are two; and sizes that a test can afford."""
    require("numba")
    monkeypatch.setattr(module, "count", lambda: 2)
    monkeypatch.setattr(tuning, "current", tuning.current._replace(brief_work=1))


def taken(T, B, H):
    with running("compiled"):
        return type(runner(select("numpy")).for_call(T, B, H)).__name__


def test_which_calls_are_brief(monkeypatch):
    assert taken(1, 32, 256) == taken(2, 128, 64) == "Brief"
    assert taken(3, 32, 256) == taken(1, 4, 256) == taken(1, 256, 256) == "Numba"
    monkeypatch.setattr(module, "count", lambda: 1)
    assert taken(1, 32, 256) == "Brief"
    assert taken(1, 64, 256) == "Numba"


def results(gru, x, h0, lengths, dy, dh_n):
    (y, h_n), pullback = gru.vjp(x, h0, lengths)
    grads, dx, dh0 = pullback(dy, dh_n)
    (_, _), again = gru.vjp(x, None, lengths)
    taps = gru.taps(x, h0, lengths)
    plain = gru(x, h0, lengths)
    last = again(None, dh_n)[1]
    return [y, h_n, dx, dh0, *grads.values(), *taps.values(), pullback.taps(dy), *plain, last]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reset_after": True},
        {"bias": False, "reverse": True},
        {"bias": False, "reset_after": True},
        {"bidirectional": True, "num_layers": 2, "batch_first": True},
    ],
)
def test_brief_calls_are_the_reference(dtype, T, settings):
    B, I, H = 16, 5, 8
    rng = np.random.default_rng(0)
    gru = GRU(I, H, dtype=dtype, seed=0, **settings)
    rows = gru.num_layers * len(gru.suffixes)
    shape = (B, T) if gru.batch_first else (T, B)
    x = rng.standard_normal((*shape, I)).astype(dtype)
    h0, dh_n = rng.standard_normal((2, rows, B, H)).astype(dtype)
    dy = rng.standard_normal((*shape, H * len(gru.suffixes))).astype(dtype)
    assert taken(T, B, H) == "Brief"
    wide = gru.to(dtype="float64")
    for lengths in (None, rng.integers(0, T + 1, B)):
        with running("plain"):
            plain = results(gru, x, h0, lengths, dy, dh_n)
            exact = results(wide, *(v.astype("float64") for v in (x, h0)), lengths,
                            *(v.astype("float64") for v in (dy, dh_n)))  # fmt: skip
        with running("compiled"):
            found = results(gru, x, h0, lengths, dy, dh_n)
            frozen = freeze(gru)(x, h0, lengths)
        assert all(map(is_rounding, found, plain, exact))
        assert all(map(is_rounding, frozen, plain[:2], exact[:2]))
        assert {v.dtype for v in (*found, *frozen)} == {np.dtype(dtype)}


@pytest.mark.parametrize("reset_after", [False, True])
def test_replace_an_equation_and_brief_calls_follow(reset_after, monkeypatch):
    gru = GRU(3, 4, reset_after=reset_after, dtype="float64", seed=0)
    x = np.random.default_rng(0).standard_normal((2, 16, 3))
    for name, function in replaced(reset_after):
        monkeypatch.setattr(equations, name, function)
    with running("plain"):
        expected = gru(x)[0]
    with running("compiled"):
        assert np.allclose(gru(x)[0], expected, rtol=1e-13)
        gradcheck(gru, x, directions=1, vanishing=[])


def test_a_step_whose_product_reads_columns_that_stand_apart(monkeypatch):
    """What is not side by side in memory is gathered for the product."""

    def step(xp, a, h, U):
        H = h.shape[-1]
        pair = xp.concat((xp.tanh(h), h * a[..., :H]), axis=-1)
        return pair @ U[: 2 * H, :] + xp.tanh(a[..., 2 * H :]), ()

    gru = GRU(3, 4, dtype="float64", seed=0)
    x = np.random.default_rng(0).standard_normal((2, 16, 3))
    monkeypatch.setattr(equations, "reset_before", step)
    with running("plain"):
        expected = gru(x)[0]
    with running("compiled"):
        assert np.allclose(gru(x)[0], expected, rtol=1e-13)


def test_strides_are_no_matter():
    gru = GRU(3, 4, seed=0)
    x = np.random.default_rng(0).standard_normal((1, 16, 3)).astype("float32")
    with running("compiled"):
        (y, _), pullback = gru.vjp(x)
        dx = pullback(np.ones_like(y))[1]
        (other, _), pullback = gru.vjp(np.asfortranarray(x[:, ::-1])[:, ::-1])
        spread = pullback(np.broadcast_to(np.float32(1), y.shape))[1]
    assert np.array_equal(y, other)
    assert np.abs(dx - spread).max() <= 8 * np.finfo(dx.dtype).eps * np.abs(dx).max()
