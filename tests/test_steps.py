"""Masks with holes and resets, against a loop over the episodes of each row."""

import numpy as np
import pytest
from conftest import HOST, PATHS, running
from hypothesis import given, settings
from hypothesis import strategies as st
from vjp_calls import assert_same, drawn, results, short_blocks  # noqa: F401

from gru_any import GRU, Chain, Linear, gradcheck
from gru_any.backend import modes
from gru_any.nn.layers import Last
from gru_any.stream import Stream

VARIANTS = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
WAYS = [*PATHS, *(["packed"] if "compiled" in PATHS else [])]
EVERY = pytest.mark.parametrize("path", WAYS)
DIRECTIONS = {"forward": {}, "reverse": {"reverse": True}, "both": {"bidirectional": True}}


def make(after=False, layers=2, direction="both", dtype="float64", **options):
    ways = DIRECTIONS[direction]
    return GRU(3, 4, layers, reset_after=after, dtype=dtype, seed=1, **ways, **options)


def flags(rng, T, B, share):
    return rng.random((T, B)) < share


def by_episode(gru, x, h0, dy, dh, alive, resets, start=None):
    """The same from a loop over rows and episodes, which knows neither masks nor resets.

    start: None, or of each row (L*D, B, H), with its gradient likewise.
    """
    forward = np.array([s == "" for _ in range(gru.num_layers) for s in gru.suffixes])
    forward = forward[:, None, None]
    found = {"y": np.zeros_like(dy), "h_n": h0.copy(), "dx": np.zeros_like(x), "dh0": dh.copy()}
    found |= {name: np.zeros_like(v) for name, v in gru.params.items()}
    found |= {"dstart": np.zeros_like(h0)}
    begin = np.zeros_like(h0) if start is None else start
    for b in range(x.shape[1]):
        steps = np.flatnonzero(alive[:, b])
        if not steps.size:
            continue
        starts = [i for i, t in enumerate(steps) if i and resets[t, b]]
        episodes, row = np.split(steps, starts), slice(b, b + 1)
        found["dh0"][:, row] = 0
        for n, episode in enumerate(episodes):
            at = np.ix_(episode, [b])
            begins = n == 0 and not resets[episode[0], b]
            ends = n == len(episodes) - 1
            enters = np.where(forward, begins, ends)
            leaves = np.where(forward, ends, n == 0)
            (y, h_n), pullback = gru.vjp(x[at], np.where(enters, h0[:, row], begin[:, row]))
            grads, dx, dh0 = pullback(dy[at], np.where(leaves, dh[:, row], 0.0))
            found["y"][at], found["dx"][at] = y, dx
            found["h_n"][:, row] = np.where(leaves, h_n, found["h_n"][:, row])
            found["dh0"][:, row] += np.where(enters, dh0, 0.0)
            found["dstart"][:, row] += np.where(enters, 0.0, dh0)
            for name, grad in grads.items():
                found[name] += grad
    if start is None:
        del found["dstart"]
    return found


@EVERY
@VARIANTS
@given(
    direction=st.sampled_from(sorted(DIRECTIONS)),
    layers=st.integers(1, 2),
    T=st.integers(0, 11),
    B=st.sampled_from([1, 3, 20]),
    holes=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    share=st.sampled_from([0.0, 0.2, 1.0]),
    ragged=st.booleans(),
    recompute=st.sampled_from([None, 3]),
    start=st.sampled_from(["zero", "shared", "own"]),
    seed=st.integers(0, 9999),
)
@settings(max_examples=10)
def test_rows_are_their_episodes(
    path, after, direction, layers, T, B, holes, share, ragged, recompute, start, seed
):
    """Whatever stands where a step is skipped, NaN included, changes nothing."""
    rng = np.random.default_rng(seed)
    gru = make(after, layers, direction, recompute=recompute)
    x, h0, dy, dh = drawn(gru, T, B, seed)
    mask, resets = ~flags(rng, T, B, holes), flags(rng, T, B, share)
    lengths = rng.integers(0, T + 1, B) if ragged else None
    alive = mask & (np.arange(T)[:, None] < (T if lengths is None else lengths))
    given = rng.standard_normal(h0.shape)
    given = {"zero": None, "own": given, "shared": np.repeat(given[:, :1], B, 1)}[start]
    with running("plain"):
        expected = by_episode(gru, x, h0, dy, dh, alive, resets, given)
    x[~alive], dy[~alive] = np.nan, np.inf
    options = {"lengths": lengths, "mask": mask, "resets": resets, "start": given}
    if start == "shared":
        options["start"], expected["dstart"] = given[:, 0], expected["dstart"].sum(1)
    with running(path):
        assert_same(results(gru, x, h0, dy, dh, **options), expected, 1e-12)
        y, h_n = gru(x, h0, **options)
        assert_same({"y": y, "h_n": h_n}, {k: expected[k] for k in ("y", "h_n")}, 1e-12)
        assert np.allclose(gru.last(x, h0, **options), expected["h_n"], rtol=0, atol=1e-12)


@EVERY
@VARIANTS
def test_gradients_are_slopes(path, after):
    gru, rng = make(after), np.random.default_rng(0)
    x, h0, *_ = drawn(gru, 6, 3, 0)
    mask, resets = ~flags(rng, 6, 3, 0.3), flags(rng, 6, 3, 0.3)
    resets[0] = [True, False, False]
    with running(path):
        for skipped in ("zero", "repeat"):
            options = {"mask": mask, "resets": resets, "skipped": skipped}
            gradcheck(gru, x, h0, directions=1, **options)
        if path == "plain":  # as complex numbers always run
            gradcheck(gru, x, h0, method="complex", directions=1, **options)


@EVERY
@VARIANTS
def test_nothing_passes_a_cut(path, after):
    """A NaN in an episode reaches neither the next one nor, back in time, the one before."""
    gru = make(after, direction="both")
    x, h0, dy, dh = drawn(gru, 9, 3, 0)
    resets = np.zeros((9, 3), bool)
    resets[[3, 6], 1] = True
    inside = np.zeros((9, 3), bool)
    inside[3:6, 1] = True
    with running(path):
        clean = results(gru, x, h0, dy, dh, resets=resets)
        x[4, 1, 0] = np.nan
        found = results(gru, x, h0, dy, dh, resets=resets)
    for name in ("y", "dx"):
        assert np.isnan(found[name][inside]).any()
        assert np.array_equal(found[name][~inside], clean[name][~inside])
    for name in ("h_n", "dh0"):
        assert np.array_equal(found[name], clean[name])


def test_nan_before_the_first_reset_is_not_read():
    gru = make(direction="forward")
    x, h0, dy, dh = drawn(gru, 4, 2, 0)
    h0[:, 1] = np.nan
    resets = np.zeros((4, 2), bool)
    resets[0, 1] = True
    found = results(gru, x, h0, dy, dh, resets=resets)
    assert all(np.isfinite(v).all() for v in found.values())
    assert not found["dh0"][:, 1].any()
    assert found["dh0"][:, 0].any()


@VARIANTS
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_outputs_repeat(after, direction):
    """Skipped steps hold the output read before; its gradient gathers theirs."""
    gru, rng = make(after, direction=direction), np.random.default_rng(3)
    x, h0, dy, dh = drawn(gru, 7, 4, 0)
    mask = flags(rng, 7, 4, 0.5)
    mask[:, 3] = False
    zero = results(gru, x, h0, dy, dh, mask=mask)["y"]
    folded, expected = np.zeros_like(dy), np.zeros_like(dy)
    for d, suffix in enumerate(gru.suffixes):
        part = slice(4 * d, 4 * d + 4)
        for t, b in np.ndindex(mask.shape):
            reads = range(t, 7) if suffix else range(t, -1, -1)
            source = next((s for s in reads if mask[s, b]), None)
            if source is not None:
                expected[t, b, part] = zero[source, b, part]
                folded[source, b, part] += dy[t, b, part]
    found = results(gru, x, h0, dy, dh, mask=mask, skipped="repeat")
    assert np.array_equal(found.pop("y"), expected)
    theirs = results(gru, x, h0, folded, dh, mask=mask)
    del theirs["y"]
    assert_same(found, theirs, 1e-14)


@VARIANTS
def test_lengths_are_a_mask(after):
    gru = make(after)
    x, h0, dy, dh = drawn(gru, 6, 4, 0)
    lengths = np.array([6, 0, 3, 5])
    mask = np.arange(6)[:, None] < lengths
    for skipped in ("zero", "repeat"):
        ours = results(gru, x, h0, dy, dh, mask=mask, skipped=skipped)
        theirs = results(gru, x, h0, dy, dh, lengths=lengths, skipped=skipped)
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_nothing_reset_and_nothing_masked_is_the_plain_call():
    gru = make(dtype="float32")
    arrays = drawn(gru, 6, 4, 0)
    plain = results(gru, *arrays)
    no, yes = np.zeros((6, 4), bool), np.ones((6, 4), bool)
    found = results(gru, *arrays, mask=yes, resets=no, skipped="repeat")
    assert all(np.array_equal(plain[name], found[name]) for name in plain)


def test_layouts():
    first, plain = make(batch_first=True), make()
    x, h0, *_ = drawn(plain, 5, 2, 0)
    mask, resets = np.ones((5, 2), bool), np.zeros((5, 2), bool)
    mask[1, 0] = resets[3, 1] = resets[2, 0] = False
    resets[3, 1] = True
    y, h_n = plain(x, h0, mask=mask, resets=resets)
    other, h = first(x.transpose(1, 0, 2), h0, mask=mask.T, resets=resets.T.tolist())
    assert np.array_equal(other, y.transpose(1, 0, 2))
    assert np.array_equal(h, h_n)
    one, h = plain(x[:, 1], h0[:, 1], mask=mask[:, 1], resets=resets[:, 1])
    assert np.allclose(one, y[:, 1], rtol=0, atol=1e-15)
    assert np.allclose(h, h_n[:, 1], rtol=0, atol=1e-15)


@EVERY
@VARIANTS
def test_taps(path, after):
    """Gates and gradients of every step, those of each episode alone."""
    gru = make(after, layers=1, direction="both")
    x, h0, dy, dh = drawn(gru, 7, 1, 0)
    resets = np.zeros((7, 1), bool)
    resets[4] = True
    with running(path):
        (_, _), pullback = gru.vjp(x, h0, resets=resets)
        found = {**gru.taps(x, h0, resets=resets), "g": pullback.taps(dy, dh)}
    forward = np.array([True, False])[:, None, None]
    for n, at in enumerate((slice(0, 4), slice(4, 7))):
        enters = np.where(forward, n == 0, n == 1)
        leaves = np.where(forward, n == 1, n == 0)
        own = x[at], np.where(enters, h0, 0.0)
        expected = {**gru.taps(*own), "g": gru.vjp(*own)[1].taps(dy[at], np.where(leaves, dh, 0.0))}
        for name, v in expected.items():
            assert np.allclose(found[name][:, at], v, rtol=0, atol=1e-13)


ON_CUDA = pytest.mark.parametrize(
    ("way", "dtype"),
    [
        *((way, "float64") for way in ("eager", "blocks", "graph", "persistent", "whole")),
        *((way, dtype) for way in ("graph", "persistent") for dtype in ("float32", "float16")),
    ],
)


def check_on_cuda(gru, way, monkeypatch, cases):
    """Compare the emulated device with the plain path in float64. cases: arrays and options."""
    monkeypatch.setattr(modes, "chosen_on_cuda", way)
    modes._runner.cache_clear()
    modes._on_cuda.cache_clear()
    there, exact = gru.to(HOST), gru.to(dtype="float64")
    limit = {"float64": 1e-13, "float32": 2e-6, "float16": 6e-3}[gru.dtype]
    for arrays, options in cases:
        given = dict(options)
        if "start" in options:
            given["start"] = there.backend.put(options["start"])
            options = {**options, "start": options["start"].astype("float64")}
        with running("plain"):
            expected = results(exact, *(v.astype("float64") for v in arrays), **options)
        assert_same(results(there, *arrays, **given), expected, limit)
    modes._runner.cache_clear()
    modes._on_cuda.cache_clear()


@pytest.mark.usefixtures("compiler")
@VARIANTS
@ON_CUDA
def test_cuda(after, way, dtype, monkeypatch):
    """Thrice, so that the call is compiled, recorded and replayed, on other flags each time."""
    gru, cases = make(after, direction="both", dtype=dtype), []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        options = {"mask": ~flags(rng, 6, 3, 0.3), "resets": flags(rng, 6, 3, 0.4)}
        cases.append((drawn(gru, 6, 3, seed), options))
    check_on_cuda(gru, way, monkeypatch, cases)


def test_every_library(backend):
    gru = make(layers=1)
    there = gru.to(backend.name, backend.device)
    rng = np.random.default_rng(0)
    arrays = drawn(gru, 3, 3, 0)
    options = {"mask": ~flags(rng, 3, 3, 0.3), "resets": flags(rng, 3, 3, 0.4)}
    assert options["resets"][1:].any()
    expected = results(gru, *arrays, **options, skipped="repeat")
    given = {name: backend.put(v) for name, v in options.items()}
    assert_same(results(there, *arrays, **given, skipped="repeat"), expected, 1e-12)


def test_a_chain_hands_them_to_its_grus():
    options = {"dtype": "float64", "seed": 0}
    for last in ([], [Last(dtype="float64")]):
        chain = Chain(GRU(3, 4, **options), Linear(4, 5, **options), GRU(5, 4, **options), *last)
        x, rng = drawn(make(), 6, 3, 0)[0], np.random.default_rng(0)
        given = {"mask": ~flags(rng, 6, 3, 0.3), "resets": flags(rng, 6, 3, 0.3)}
        given["skipped"] = "repeat"
        y, state = chain(x, **given)
        first, middle, second = chain.layers[:3]
        z, h1 = first(x, **given)
        z, h2 = second(middle(z), **given)
        assert np.array_equal(y, h2[0] if last else z)
        assert all(np.array_equal(a, b) for a, b in zip(state, (h1, h2), strict=True))
        gradcheck(chain, x, directions=1, **given)


@VARIANTS
def test_a_stream_in_chunks(after):
    """Whatever the cut, and by steps with `reset`, as the whole at once."""
    gru, rng = make(after, direction="forward"), np.random.default_rng(0)
    x, resets, mask = drawn(gru, 7, 3, 0)[0], flags(rng, 7, 3, 0.3), ~flags(rng, 7, 3, 0.3)
    whole, _ = gru(x, resets=resets, mask=mask)
    stream, found = Stream(gru), []
    for part in (slice(0, 0), slice(0, 3), slice(3, 4), slice(4, 7)):
        found.append(stream(x[part], resets=resets[part], mask=mask[part]))
    assert np.allclose(np.concatenate(found), whole, rtol=0, atol=1e-14)
    whole, _ = gru(x, resets=resets)
    stream.reset()
    for t in range(7):
        stream.reset(resets[t])
        assert np.allclose(stream.step(x[t]), whole[t], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mask": np.ones((5, 2))}, "mask has dtype float64, expected booleans"),
        ({"resets": np.ones((5, 3), bool)}, r"resets is \(5, 3\), expected \(T, B\) = \(5, 2\)"),
        ({"skipped": "nan"}, 'skipped is .nan., expected "zero" or "repeat"'),
    ],
)
def test_refusals(options, told):
    with pytest.raises((TypeError, ValueError), match=told):
        make()(np.zeros((5, 2, 3)), **options)


@EVERY
@pytest.mark.parametrize(("T", "B"), [(0, 2), (3, 0), (0, 0)])
def test_without_a_step_or_a_row(path, T, B):
    gru = make(layers=1)
    x, h0, dy, dh = drawn(gru, T, B, 0)
    every = np.ones((T, B), bool)
    with running(path):
        for options in ({"resets": every}, {"mask": every}, {"mask": ~every, "resets": every}):
            found = results(gru, x, h0, dy, dh, **options)
            assert found["y"].shape == dy.shape
            assert np.array_equal(found["h_n"], h0)
            assert np.array_equal(found["dh0"], dh)
            assert not any(v.any() for name, v in found.items() if name in gru.params)
