"""Frozen models with weights of bfloat16 and int8: rounded as they should be, and nothing else."""

import copy
import os
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PATHS, THOROUGH, at_once, finished, require, running

from gru_any import GRU, Chain, Embedding, Linear
from gru_any.backend.rounding import restore, round_weights
from gru_any.deploy import freeze
from gru_any.stream import Stream

SMALL = pytest.mark.parametrize("small", ["bfloat16", "int8"])
VARIANTS = pytest.mark.parametrize("reset_after", [False, True], ids=["before", "after"])
COMPILED = pytest.mark.skipif("compiled" not in PATHS, reason="numba: only it keeps small weights")
STEPS = 1_000_000 if THOROUGH else 3_000
RNG = np.random.default_rng(0)


def close(a, b):
    return a.dtype == b.dtype == np.float32 and np.allclose(a, b, rtol=0, atol=3e-6)


def twin(frozen, model):
    """The model with the weights that the frozen one has, as an ordinary one."""
    found = model.to()
    found.load_params(dict(frozen.params))
    return found


def chain():
    return Chain(Embedding(50, 24, seed=0), GRU(24, 37, seed=1), Linear(37, 50, seed=2))


# rounding ----------------------------------------------------------------------------------------


def test_int8_by_hand():
    values, scale = round_weights("U", np.float32([[1, -0.6, 0.25, 0], [0, 0, -254, 100]]), "int8")
    assert values.tolist() == [[127, -76, 32, 0], [0, 0, -127, 50]]
    assert np.allclose(scale, [1 / 127, 2], rtol=2e-5, atol=0)


def test_bfloat16_is_that_of_pytorch():
    torch = require("torch")
    M = (RNG.standard_normal((300, 200)) * 10.0 ** RNG.integers(-30, 30, (300, 1))).astype(
        "float32"
    )
    M[0, :5] = [np.inf, -np.inf, np.nan, 0, -0.0]
    expected = torch.tensor(M).to(torch.bfloat16).to(torch.float32).numpy()
    found = restore(*round_weights("U", M, "bfloat16"))
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.signbit(found[0, 4])


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-3, 1.0, 3e38])
def test_an_int8_is_half_a_step_off_at_most_and_rounding_again_changes_nothing(size):
    M = (size * RNG.uniform(-1, 1, (20, 30))).astype("float32")
    values, scale = round_weights("U", M, "int8")
    found = restore(values, scale)
    assert np.all(np.abs(found - M.astype("float64")) <= 0.501 * scale[:, None] + 2e-38)
    again = round_weights("U", found, "int8")
    assert np.array_equal(again[0], values)
    assert np.array_equal(again[1], scale)


@SMALL
def test_rows_of_zeros_stay_zero(small):
    M = np.float32([[0, 0, 0], [1, 2, 3], [0, -0.0, 0]])
    found = restore(*round_weights("U", M, small))
    assert np.array_equal(found[[0, 2]], np.zeros((2, 3)))
    assert np.allclose(found[1], M[1], rtol=0.01)


# calls -------------------------------------------------------------------------------------------


@SMALL
@VARIANTS
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("B", [1, 3, 40])
def test_it_computes_what_a_model_with_these_weights_does(path, small, reset_after, B):
    if path == "compiled" and reset_after != (small == "int8") and not THOROUGH:
        pytest.skip("compiles for a minute: GRU_ANY_THOROUGH=1 does")
    x = RNG.standard_normal((6, B, 5)).astype("float32")
    h0 = RNG.standard_normal((4, B, 37)).astype("float32")
    lengths = RNG.integers(0, 7, B)
    gru = GRU(5, 37, 2, bidirectional=True, reset_after=reset_after, seed=0)
    with running(path):
        frozen = freeze(gru, small)
        expected = twin(frozen, gru)
        for a, b in zip(frozen(x, h0, lengths), expected(x, h0, lengths), strict=True):
            assert close(a, b)
        assert close(frozen.last(x), expected.last(x))
        for name, tap in expected.taps(x, h0, lengths).items():
            assert close(frozen.taps(x, h0, lengths)[name], tap)
    for name, array in gru.params.items():
        rounded = restore(*round_weights(name, array, small)) if array.ndim == 2 else array
        assert np.array_equal(frozen.params[name], rounded)


@SMALL
@VARIANTS
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("B", [1, 9])
def test_steps_streams_and_sequences_agree(path, small, reset_after, B):
    x = RNG.standard_normal((6, B, 20)).astype("float32")
    gru = GRU(20, 37, 2, bias=False, reset_after=reset_after, seed=0)
    with running(path):
        frozen, state = freeze(gru, small), None
        y, _ = twin(frozen, gru)(x)
        stream = Stream(frozen)
        for w in gru.params.values():
            w[...] = 9
        for t in range(3):
            y_t, state = frozen.step(x[t], state)
            assert close(y_t, y[t])
            assert close(stream.step(x[t]), y[t])
        assert close(stream(x[3:]), y[3:])


@SMALL
@pytest.mark.parametrize("path", PATHS)
def test_a_chain(path, small):
    x, model = RNG.integers(0, 50, (4, 3)), chain()
    with running(path):
        frozen = freeze(model, small)
        y, (h,) = twin(frozen, model)(x)
        stream = Stream(frozen)
        for other in (
            frozen,
            copy.deepcopy(frozen),
            pickle.loads(pickle.dumps(frozen)),
            frozen.to(),
        ):
            assert other.weights == small
            found, (h_n,) = other(x)
            assert close(found, y)
            assert close(h_n, h)
        assert close(stream.step(x[0]), y[0])
    for name, array in model.params.items():
        rounded = restore(*round_weights(name, array, small)) if array.ndim == 2 else array
        assert np.array_equal(frozen.params[name], rounded)
    again = freeze(freeze(model), small)
    assert all(np.array_equal(again.params[k], v) for k, v in frozen.params.items())


@SMALL
def test_on_every_backend_it_is_the_same_rounding(backend, small):
    x = RNG.standard_normal((4, 2, 3)).astype("float32")
    gru, linear = GRU(3, 4, seed=0), Linear(4, 5, seed=1)
    expected = freeze(Chain(gru, linear), small)(x)[0]
    home = {"backend": backend.backend}
    frozen = freeze(Chain(gru.to(**home), linear.to(**home)), small)
    assert close(backend.host(frozen(backend.put(x))[0]), expected)


@SMALL
@COMPILED
def test_many_threads(small):
    frozen = freeze(chain(), small)
    x = [RNG.integers(0, 50, (5, 1 + i)) for i in range(6)]
    expected = [frozen(v)[0] for v in x]

    def work(i):
        stream = Stream(frozen)
        for _ in range(5):
            assert np.array_equal(frozen(x[i])[0], expected[i])
            stream.reset()
            for t in range(5):
                assert close(stream.step(x[i][t]), expected[i][t])

    at_once(work, 6)


# size --------------------------------------------------------------------------------------------


@COMPILED
def test_its_size_is_told():
    gru = GRU(256, 256, reset_after=True)
    whole = sum(v.nbytes for v in gru.params.values())
    for small, part in (("bfloat16", 0.5), ("int8", 0.25)):
        frozen = freeze(Chain(gru, Linear(256, 100), Embedding(1, 1)), small)
        weights = whole + 4 * 256 * 100
        assert part * weights < frozen.nbytes < (part + 0.02) * weights
        assert f"{small}, {frozen.layers[0].nbytes / 1e6:.1f} MB" in repr(frozen)
    assert whole < freeze(gru).nbytes < 2.2 * whole


def resident():
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s*(\d+)", text).group(1))


@COMPILED
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_steps_without_end_need_no_more_memory(weights):
    stream = Stream(freeze(chain(), weights))
    x = np.array([7])
    for _ in range(500):
        stream.step(x)
    grown = []  # what something else in this process needs, it needs once
    for _ in range(3):
        before = resident()
        for _ in range(STEPS):
            y = stream.step(x)
        grown.append(resident() - before)
    assert min(grown) < 500_000
    assert np.isfinite(y).all()


# what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, np.finfo(np.float32).max])
def test_int8_of_what_has_no_scale_is_refused(bad):
    model = chain()
    model.params["1.weight_hh_l0"][3, 5] = bad
    with pytest.raises(ValueError, match=r"1\.weight_hh_l0 holds NaN.*repair.*bfloat16"):
        freeze(model, "int8")


@pytest.mark.parametrize("path", PATHS)
def test_a_nan_in_bfloat16_stays_one(path):
    gru = GRU(5, 37, seed=0)
    gru.params["weight_hh_l0"][:] = np.nan
    with running(path):
        assert np.isnan(freeze(gru, "bfloat16")(np.ones((2, 1, 5), "float32"))[0]).all()


def test_other_dtypes_and_names_are_refused():
    with pytest.raises(ValueError, match=r"float32, this one is float64: freeze model\.to\(dtype="):
        freeze(GRU(3, 4, dtype="float64"), "int8")
    with pytest.raises(
        ValueError, match="weights is 'int4', expected one of 'float32', 'bfloat16'"
    ):
        freeze(GRU(3, 4), "int4")


# products of integers -----------------------------------------------------------------------------


def in_integers(x, M, base):
    """base + x M^T as the integers of a row and of weights give it, by hand."""
    values, c = round_weights("M", M, "int8")
    s = np.abs(x).max() / np.float32(32767)
    q = np.floor(x.astype("float64") / s + 0.5)
    return base + (values.astype("float64") @ q) * c * s


def of_integers(monkeypatch, least=0):
    from gru_any.backend.cpu import tuning

    monkeypatch.setattr(tuning, "current", tuning.current._replace(integer_elements=least))


@COMPILED
@pytest.mark.parametrize(("K", "N"), [(1, 1), (37, 50), (513, 24), (1026, 17)])
def test_a_single_row_is_multiplied_in_integers(K, N, monkeypatch):
    of_integers(monkeypatch)
    x = RNG.standard_normal((3, K)).astype("float32")
    linear = Linear(K, N, seed=0)
    b, M = (linear.params[name] for name in ("bias", "weight"))
    with running("compiled"):
        frozen = freeze(Chain(linear), "int8")
        exact = x.astype("float64") @ restore(*round_weights("M", M, "int8")).T + b
        for row, right in zip(x, exact, strict=True):
            found = frozen(row[None, None])[0][0, 0]
            size = np.abs(row).max() * np.abs(M).sum(axis=1)
            assert np.allclose(found, in_integers(row, M, b), rtol=0, atol=3e-6 * K**0.5)
            assert np.all(np.abs(found - right) <= size / 65534 + 3e-6 * K**0.5)
        assert np.allclose(
            frozen(x[None])[0][0], exact, rtol=0, atol=3e-6 * K**0.5
        )  # of several, in float32


@COMPILED
@VARIANTS
def test_a_step_of_a_single_row_in_integers(reset_after, monkeypatch):
    gru = GRU(33, 53, reset_after=reset_after, seed=0)
    x = RNG.standard_normal((4, 1, 33)).astype("float32")
    h0 = RNG.standard_normal((1, 1, 53)).astype("float32")
    with running("compiled"):
        frozen = freeze(gru, "int8")
        in_floats = frozen(x, h0)[0]
        of_integers(monkeypatch)
        y, _ = frozen(x, h0)
        assert 1e-7 < np.abs(y - in_floats).max() < 3e-4
        lengths, _ = frozen(x, h0, [4])
        state = h0
        for t in range(4):
            y_t, state = frozen.step(x[t], state)
            assert np.allclose(y_t, y[t], rtol=0, atol=3e-4)  # here x is rounded too
        assert np.array_equal(lengths, y)
        assert np.array_equal(frozen(x, h0, mask=np.ones((4, 1), bool))[0], y)


@COMPILED
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30, 1e-35, 0.0])
def test_a_row_without_integers_is_multiplied_in_floats(bad, monkeypatch):
    of_integers(monkeypatch)
    frozen = freeze(Chain(Linear(40, 30, seed=0)), "int8")
    x = RNG.standard_normal((1, 2, 40)).astype("float32")
    x[0, 0] = 0 if abs(bad) < 1 else x[0, 0]
    x[0, 0, 7] = bad
    with running("compiled"):
        assert np.array_equal(frozen(x[:, :1])[0], frozen(x)[0][:, :1], equal_nan=True)


FREED = """
import numpy as np
from gru_any import Chain, Linear
from gru_any.deploy import freeze
frozen, x = freeze(Chain(Linear(2001, 70, seed=0)), "int8"), np.ones((1, 2, 2001), "float32")
assert np.allclose(frozen(x[:, :1])[0], frozen(x)[0][:, :1], rtol=0, atol=1e-5)
"""


@COMPILED
@pytest.mark.skipif(sys.platform != "linux", reason="the C library: only glibc fills freed memory")
def test_a_row_of_integers_is_freed_after_its_product():
    """In a process where what is freed is filled at once."""
    environment = {**os.environ, "MALLOC_PERTURB_": "165", "OMP_NUM_THREADS": "1"}
    finished([sys.executable, "-c", FREED], code=0, env=environment)


@COMPILED
def test_integers_are_for_large_matrices(monkeypatch):
    from gru_any.backend.cpu import tuning

    size = tuning.current.integer_elements
    assert [tuning.integers(*v) for v in ((1, size), (1, size - 1), (2, size))] == [
        True,
        False,
        False,
    ]
