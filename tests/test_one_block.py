"""Calls of one block of steps, which go around the layers between: the bits of any other call."""

import sys

import numpy as np
import pytest
from conftest import PATHS, THOROUGH, at_once, running

from gru_any import GRU
from gru_any.nn import sweep
from gru_any.nn.pullback import BlockPullback

EVERY = pytest.mark.parametrize("path", PATHS)
VARIANTS = pytest.mark.parametrize("reset_after", [False, True], ids=["before", "after"])
I, H = 5, 7


def problem(gru, T, B, seed=0):
    """x, h0, dy and dh_n of a GRU."""
    rng, layers = np.random.default_rng(seed), gru.num_layers * len(gru.suffixes)
    first = (B, T) if gru.batch_first else (T, B)
    shapes = (*first, I), (layers, B, H), (*first, gru.output_size), (layers, B, H)
    return [rng.standard_normal(shape).astype(gru.dtype) for shape in shapes]


def results(gru, x, h0, dy, dh_n, **general):
    """All that a call gives; and the pullback. general: what makes it no call of one block."""
    (y, h_n), pullback = gru.vjp(x, h0, **general)
    grads, dx, dh0 = pullback(dy, dh_n)
    found = [y, h_n, dx, dh0, *grads.values(), *gru(x, h0, **general), gru.last(x, h0, **general)]
    by_row, *others = pullback.per_example(dy, dh_n)
    found += [*by_row.values(), *others, pullback.taps(dy, dh_n), *pullback(dy, None)[1:]]
    assert list(grads) == list(by_row) == list(gru.params)
    return found, pullback


@EVERY
@pytest.mark.parametrize("layers", [1, 3])
def test_the_layout_of_a_state_changes_no_bit(path, layers):
    gru = GRU(1, 16, layers, bias=False, seed=0)
    x, dy = np.ones((1, 1, 1), "float32"), np.ones((1, 1, 16), "float32")
    h0 = np.random.default_rng(0).standard_normal((layers, 1, 16), dtype="float32")
    raw = np.frombuffer(b" " + h0.tobytes(), np.uint8)[1:]
    others = [
        np.ascontiguousarray(h0[:, :, ::-1])[:, :, ::-1],
        raw.view("float32").reshape(h0.shape),
    ]
    with running(path):
        expected, _ = results(gru, x, h0, dy, h0)
        for other in others:
            found, _ = results(gru, x, other, dy, h0)
            assert all(map(np.array_equal, found, expected))


@EVERY
@VARIANTS
@pytest.mark.parametrize(("T", "B"), [(1, 1), (64, 3), (4, 64)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_first": True, "reverse": True},
        {"bias": False},
        {"zoneout": 0.3},
        {"bidirectional": True, "num_layers": 2, "merge": "mul"},
    ],
)
def test_it_has_the_bits_of_the_general_way(path, reset_after, T, B, settings):
    if "zoneout" in settings and path not in ("plain", "traced") and not THOROUGH:
        pytest.skip("compiles for a minute")
    gru = GRU(I, H, reset_after=reset_after, seed=0, **settings)
    given = problem(gru, T, B)
    mask = np.ones(given[0].shape[:2], bool)  # which asks for nothing
    with running(path):
        found, pullback = results(gru, *given)
        expected, general = results(gru, *given, mask=mask)
    assert (type(pullback) is BlockPullback) == (gru.num_layers == 1)
    assert type(general) is not BlockPullback
    assert all(map(np.array_equal, found, expected))
    assert all(v.flags.c_contiguous or gru.batch_first for v in found[:2])


def test_what_is_a_block_is_decided_in_one_place(monkeypatch):
    gru, x = GRU(I, H, seed=0), np.ones((3, 1, I), "float32")
    assert type(gru.vjp(x)[1]) is BlockPullback
    monkeypatch.setattr(sweep, "STEPS", 2)
    monkeypatch.setattr(sweep, "ROWS", 1)
    assert type(gru.vjp(x)[1]) is not BlockPullback
    assert type(gru.vjp(x[:2])[1]) is BlockPullback


@EVERY
@VARIANTS
def test_parameters_that_change_and_settings_take_effect_at_the_next_call(path, reset_after):
    gru = GRU(I, H, reset_after=reset_after, seed=0)
    x, h0, dy, _ = problem(gru, 1, 2)

    def found(model):
        (y, _), pullback = model.vjp(x, h0)
        return [*model(x, h0), y, *pullback(dy)[0].values()]

    def is_new():
        twin = GRU(I, H, reset_after=reset_after, zoneout=gru.zoneout, seed=1)
        twin.load_params(gru.params)
        now = found(gru)
        assert all(map(np.array_equal, now, found(twin)))
        same = np.array_equal(now[0], seen[-1])
        seen.append(now[0])
        return not same

    with running(path):
        seen = [gru(x, h0)[0]]
        for name in gru.params:
            gru.params[name][...] *= 2
            assert is_new()
            gru.params[name] = gru.params[name] + np.float32(0.25)
            assert is_new()
            gru.params[name] = np.asfortranarray(gru.params[name] * np.float32(0.5))
            gru.params[name].flags.writeable = False
            assert is_new()
        gru.zoneout = 0.5
        assert is_new()


@EVERY
@VARIANTS
def test_results_belong_to_the_caller(path, reset_after):
    gru = GRU(I, H, reset_after=reset_after, seed=0)
    x, h0, dy, dh_n = problem(gru, 3, 2)
    with running(path):
        (y, h_n), pullback = gru.vjp(x, h0)
        first = pullback(dy, dh_n)
        kept = [v.copy() for v in (*first[0].values(), *first[1:])]
        for array in (y, h_n, h0, *first[0].values(), *first[1:]):
            array[...] = np.nan
        again = pullback(dy, dh_n)
        assert all(map(np.array_equal, (*again[0].values(), *again[1:]), kept))
        plain = gru(x)
        copies = [v.copy() for v in plain]
        gru(-x)
        assert all(map(np.array_equal, plain, copies))
        plain[1][...] = np.nan
        assert np.array_equal(plain[0], copies[0])


@EVERY
def test_many_threads(path):
    gru = GRU(I, H, seed=0)
    given = [problem(gru, 1, 1, seed) for seed in range(6)]
    with running(path):
        expected = [results(gru, *v)[0] for v in given]

        def work(i):
            for _ in range(10):
                assert all(map(np.array_equal, results(gru, *given[i])[0], expected[i]))

        at_once(work, 6)


@pytest.mark.skipif("compiled" not in PATHS, reason="numba: only it is made for small calls")
@VARIANTS
def test_a_step_is_few_calls_of_python(reset_after):
    gru, counted = GRU(I, H, reset_after=reset_after, seed=0), []
    x, _, dy, _ = problem(gru, 1, 1)

    def calls(function, *given):
        """How many there are; their number varies a little with the version of Python."""
        counted.clear()
        sys.setprofile(lambda frame, event, value: event == "call" and counted.append(frame))
        try:
            found = function(*given)
        finally:
            sys.setprofile(None)
        return len(counted), found

    with running("compiled"):
        for _ in range(3):
            step, _ = calls(gru, x)
            forward, (_, pullback) = calls(gru.vjp, x)
            backward, _ = calls(pullback, dy)
    assert step <= 48
    assert forward + backward <= 120


def test_what_is_wrong_is_refused_in_the_same_words():
    gru = GRU(I, H, seed=0)
    x, h0, dy, _ = problem(gru, 1, 2)
    for wrong in ((x[..., 1:], h0), (x.astype("float64"), h0), (x, h0[:, :1]), (x, h0 > 0)):
        said = []
        for general in ({}, {"mask": np.ones((1, 2), bool)}):
            for call in (gru, gru.vjp):
                with pytest.raises((ValueError, TypeError)) as e:
                    call(*wrong, **general)
                said.append(str(e.value))
        assert len(set(said)) == 1
    _, pullback = gru.vjp(x)
    for bad in (dy[:, :1], dy.astype("float64"), None):
        with pytest.raises((ValueError, TypeError)):
            pullback(bad)
    gru.params["weight_hh_l0"] = gru.params["weight_hh_l0"] * np.float32(2)
    with pytest.raises(RuntimeError, match="between vjp and its pullback"):
        pullback(dy)
    with pytest.raises(TypeError, match="rng is 3"):
        gru.vjp(x, rng=3)


def test_the_first_array_of_a_dtype_may_come_with_the_call(monkeypatch):
    """What a backend knows of dtypes must not depend on the calls before."""
    gru = GRU(3, 4, seed=0)
    monkeypatch.setitem(vars(gru.backend), "_dtypes", {})
    wide = {name: v.astype("float64") for name, v in gru.params.items()}
    x = np.ones((2, 1, 3))
    y, _ = gru.apply(wide, x)
    assert y.dtype == np.float64
    assert np.array_equal(y, gru.to(dtype="float64")(x)[0])
