"""A few steps of a batch, by weights as they are stored: the same numbers as the reference."""

import numpy as np
import pytest
from conftest import THOROUGH, is_rounding, require, running, tuned
from replaced import replaced

from gru_any import GRU, equations, gradcheck
from gru_any.backend.cpu import cores, threads, tuning, unpacked
from gru_any.backend.cpu import numba_runner as module
from gru_any.deploy import freeze

TEAM = {"team_step_work": 1, "team_units": 1, "thread_work": 1}
H = 40  # more than one vector's share, and not a whole number of them


@pytest.fixture(autouse=True)
def several_threads(monkeypatch):
    """As where there are two that nobody else holds; and work that a test can afford."""
    require("numba")
    for place in (module, threads):
        monkeypatch.setattr(place, "count", lambda: 2)
    monkeypatch.setattr(threads, "crowd", cores.Crowd())
    monkeypatch.setattr(threads.crowd, "present", lambda: False)
    with tuned(**TEAM, wake_polls=10**6):
        yield


@pytest.fixture
def members(monkeypatch):
    """How many threads were asked for, call by call."""
    found, run_team = [], threads.run_team

    def noted(call, rows, most):
        found.append(most)
        run_team(call, rows, most)

    monkeypatch.setattr(module, "run_team", noted)
    return found


def test_which_calls_are_shared():
    v = tuning.Tuning()
    with tuned(**v._asdict()):
        assert tuning.team_in_place(1, 8, 256, 768 * 384, lambda: 2) == 2
        assert tuning.team_in_place(1, 8, 100, 768 * 384, lambda: 2) == 1  # units of a thread
        assert tuning.team_in_place(1, 1, 64, 192 * 128, lambda: pytest.fail("counted")) == 1
        assert not tuning.packed(v.packed_rows)
        assert tuning.packed(v.packed_rows + 1)


def results(gru, x, h0, lengths, dy, dh_n):
    (y, h_n), pullback = gru.vjp(x, h0, lengths)
    grads, dx, dh0 = pullback(dy, dh_n)
    (_, _), again = gru.vjp(x, None, lengths)
    taps = gru.taps(x, h0, lengths)
    plain = gru(x, h0, lengths)
    last = again(None, dh_n)[1]
    return [y, h_n, dx, dh0, *grads.values(), *taps.values(), pullback.taps(dy), *plain, last]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("T", "B"), [(1, 16), (2, 7), (3, 1)])
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
def test_few_steps_are_the_reference(dtype, T, B, settings, members):
    if not THOROUGH and (dtype == "float64") != bool(settings.get("reset_after")):
        pytest.skip("compiles for a minute: GRU_ANY_THOROUGH=1 does")
    I, rng = 5, np.random.default_rng(0)
    gru = GRU(I, H, dtype=dtype, seed=0, **settings)
    rows = gru.num_layers * len(gru.suffixes)
    shape = (B, T) if gru.batch_first else (T, B)
    x = rng.standard_normal((*shape, I)).astype(dtype)
    h0, dh_n = rng.standard_normal((2, rows, B, H)).astype(dtype)
    dy = rng.standard_normal((*shape, H * len(gru.suffixes))).astype(dtype)
    wide = gru.to(dtype="float64")
    for lengths in (None, rng.integers(0, T + 1, B)):
        with running("plain"):
            plain = results(gru, x, h0, lengths, dy, dh_n)
            exact = results(wide, *(v.astype("float64") for v in (x, h0)), lengths,
                            *(v.astype("float64") for v in (dy, dh_n)))  # fmt: skip
        with running("compiled"):
            found = results(gru, x, h0, lengths, dy, dh_n)
            frozen = freeze(gru)(x, h0, lengths)
            with tuned(thread_work=10**9):
                alone = results(gru, x, h0, lengths, dy, dh_n)
        assert all(map(is_rounding, found, plain, exact))
        assert all(map(is_rounding, frozen, plain[:2], exact[:2]))
        assert all(map(np.array_equal, found, alone)), "threads change bits"
        assert {v.dtype for v in (*found, *frozen)} == {np.dtype(dtype)}
    assert set(members) == {2}


@pytest.mark.parametrize("reset_after", [False, True] if THOROUGH else [True])
def test_masks_and_resets_and_dropped_units(reset_after, members):
    T, B, I = 3, 6, 5
    gru = GRU(I, H, reset_after=reset_after, dtype="float64", seed=0,
              recurrent_dropout=0.3, zoneout=0.2)  # fmt: skip
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((T, B, I)), rng.standard_normal((T, B, H))
    flags = {"mask": rng.random((T, B)) < 0.7, "resets": rng.random((T, B)) < 0.5}

    def everything():
        (y, h_n), pullback = gru.vjp(x, rng=np.random.default_rng(1), **flags)
        grads, dx, dh0 = pullback(dy)
        return [y, h_n, dx, dh0, *grads.values(), *gru(x, **flags)]

    with running("plain"):
        expected = everything()
    with running("compiled"):
        found = everything()
    for a, b in zip(found, expected, strict=True):
        assert np.allclose(a, b, rtol=0, atol=1e-13)
    assert set(members) == {2}


@pytest.mark.parametrize("reset_after", [False, True] if THOROUGH else [False])
def test_replace_an_equation_and_few_steps_follow(reset_after, monkeypatch):
    gru = GRU(3, 4, reset_after=reset_after, dtype="float64", seed=0)
    x = np.random.default_rng(0).standard_normal((2, 16, 3))
    for name, function in replaced(reset_after):
        monkeypatch.setattr(equations, name, function)
    with running("plain"):
        expected = gru(x)[0]
    with running("compiled"):
        assert np.allclose(gru(x)[0], expected, rtol=1e-13)
        gradcheck(gru, x, directions=1, vanishing=[])


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


# the product -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_product_is_exact_at_every_edge_of_a_tile(dtype):
    """Of small integers, so that no sum is rounded; beside y nothing is written."""
    rng = np.random.default_rng(0)
    for R in (*range(1, 10), 21):
        for N in (1, 2, 5, 15, 16, 17, 33, 64, 65, 140, 300):
            for K in (0, 1, 2, 15, 16, 17, 40):
                x = rng.integers(-4, 5, (R, K)).astype(dtype)
                M = rng.integers(-4, 5, (K, N)).astype(dtype)
                room = np.full((R + 2, N), np.nan, dtype)
                for left in (x, np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2]):
                    for right in (M, np.asfortranarray(M)):
                        room[1:-1] = np.nan
                        unpacked.gemm(left, right, room[1:-1])
                        assert np.array_equal(room[1:-1], x @ M), (R, K, N)
                        assert np.isnan(room[[0, -1]]).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_the_bits_of_a_row_depend_on_no_other(transposed):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, 50)).astype("float32")
    M = rng.standard_normal((50, 70)).astype("float32")
    M = np.asfortranarray(M) if transposed else M
    whole = np.empty((7, 70), "float32")
    unpacked.gemm(x, M, whole)
    for r in range(7):
        row = np.empty((1, 70), "float32")
        unpacked.gemm(x[r : r + 1], M, row)
        assert np.array_equal(row[0], whole[r])
