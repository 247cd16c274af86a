"""Resets to a given state: its gradient, its forms, and every kind of call that takes it.

`test_rows_are_their_episodes` of test_steps.py compares each path with a loop over the episodes.
"""

import numpy as np
import pytest
from conftest import PATHS, THOROUGH, require, running
from test_steps import DIRECTIONS, EVERY, ON_CUDA, VARIANTS, check_on_cuda, flags, make
from vjp_calls import assert_same, drawn, results, short_blocks  # noqa: F401

from gru_any import GRU, Chain, Last, Linear, gradcheck, hvp, squared_error
from gru_any.deploy import freeze
from gru_any.inspect.gradcheck import GradientError
from gru_any.stream import Stream

OPTIONS = {
    "no biases": {"bias": False},
    "zoneout": {"zoneout": 0.3},
    "recurrent dropout": {"recurrent_dropout": 0.3},
    "all": {"zoneout": 0.2, "recurrent_dropout": 0.3, "weight_dropout": 0.3, "dropout": 0.3},
    "recompute": {"recompute": 3},
}


@pytest.fixture
def traced():
    """Without a compiler, for what does not depend on the path."""
    with running("traced"):
        yield


def case(gru, T=9, B=4, seed=0, shared=True):
    """Arrays of a training call, and flags and a start for it."""
    rng = np.random.default_rng(seed + 100)
    arrays = drawn(gru, T, B, seed)
    options = {"mask": ~flags(rng, T, B, 0.2), "resets": flags(rng, T, B, 0.4)}
    options["resets"][0] = np.arange(B) % 2 == 0
    start = rng.standard_normal(arrays[1].shape).astype(gru.dtype)
    return arrays, {**options, "start": start[:, 0] if shared else start}


class Started:
    """A GRU whose start is an input, as `gradcheck` takes it; seed: of its dropouts, or None."""

    def __init__(self, gru, seed=None):
        self.gru, self.seed = gru, seed
        self.params, self.backend, self.dtype = gru.params, gru.backend, gru.dtype

    def to(self, dtype):
        return Started(self.gru.to(dtype=dtype), self.seed)

    def vjp(self, x, h0, start, **options):
        rng = None if self.seed is None else np.random.default_rng(self.seed)
        return self.gru.vjp(x, h0, rng=rng, start=start, **options)

    def __call__(self, x, h0, start, **options):
        if self.seed is not None:
            return self.vjp(x, h0, start, **options)[0]
        return self.gru(x, h0, start=start, **options)


@EVERY
@VARIANTS
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_gradients_are_slopes(path, after, shared):
    gru = make(after)
    (x, h0, *_), options = case(gru, shared=shared)
    with running(path):
        errors = gradcheck(gru, x, h0, directions=1, **options)
        if path == "plain":  # as complex numbers always run
            gradcheck(gru, x, h0, method="complex", directions=1, **options)
    assert "start" in errors


@pytest.mark.usefixtures("traced")
def test_gradcheck_finds_a_wrong_gradient_to_a_start():
    class Wrong(GRU):
        def vjp(self, *inputs, **options):
            outputs, pullback = super().vjp(*inputs, **options)
            return outputs, lambda *given: (*(found := pullback(*given))[:-1], 2 * found[-1])

    (x, h0, *_), options = case(make())
    wrong = Wrong(3, 4, 2, bidirectional=True, seed=1)  # float32, checked in float64
    options["start"] = options["start"].astype("float32")
    with pytest.raises(GradientError, match="the gradient to start is off by"):
        gradcheck(wrong, x, h0, directions=1, **options)
    chain = Chain(GRU(3, 4, seed=0), Linear(4, 3, seed=0), GRU(3, 4, seed=1))
    options["start"] = [None, options["start"][:1]]
    for method in ("central", "complex"):
        errors = gradcheck(chain, x, directions=1, method=method, **options)
        assert "start.1" in errors
        assert "start.0" not in errors
    options["resets"] = np.zeros((9, 4), bool)
    with pytest.raises(GradientError, match=r"the gradient to start.1 is exactly 0"):
        gradcheck(chain, x, directions=1, **options)
    gradcheck(chain, x, directions=1, vanishing=["start.1"], **options)


@pytest.mark.parametrize("path", PATHS if THOROUGH else ["plain", "traced"])
@pytest.mark.parametrize("name", OPTIONS)
def test_with_other_options(path, name):
    gru = make(**OPTIONS[name])
    (x, h0, *_), options = case(gru)
    start = options.pop("start")
    with running(path):
        gradcheck(Started(gru, 5), x, h0, start, directions=1, **options)


@(EVERY if THOROUGH else pytest.mark.parametrize("path", ["plain", "traced"]))
def test_with_layer_norm(path):
    """Whose slopes are too steep for differences: the plain path by complex step, others by it."""
    gru = make(True, layer_norm=True)
    arrays, options = case(gru)
    with running("plain"):
        expected = results(gru, *arrays, **options)
    with running(path):
        assert_same(results(gru, *arrays, **options), expected, 1e-11)
    start = options.pop("start")
    if path == "plain":
        checked = {"method": "complex", "directions": 1, **options}
        with running(path):
            gradcheck(Started(gru), *arrays[:2], start, **checked)


@EVERY
@VARIANTS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_start_of_zeros_is_a_plain_reset(path, after, dtype):
    if dtype == "float32" and path in ("compiled", "packed") and not THOROUGH:
        pytest.skip("compiles for a minute: GRU_ANY_THOROUGH=1 does")
    gru = make(after, dtype=dtype)
    arrays, options = case(gru)
    zeros = np.zeros_like(options.pop("start"))
    with running(path):
        plain = results(gru, *arrays, **options)
        found = results(gru, *arrays, start=zeros, **options)
    assert found.pop("dstart").any()
    assert all(np.array_equal(v, found[name]) for name, v in plain.items())


@EVERY
@VARIANTS
def test_nothing_passes_a_cut(path, after):
    """NaN in an episode reaches no other one, and a start that no row reads reaches nothing."""
    gru = make(after, direction="both")
    (x, h0, dy, dh), options = case(gru, shared=False)
    resets, mask = np.zeros((9, 4), bool), np.ones((9, 4), bool)
    resets[[3, 6], 1] = True
    options |= {"resets": resets, "mask": mask}
    inside = np.zeros((9, 4), bool)
    inside[3:6, 1] = True
    with running(path):
        clean = results(gru, x, h0, dy, dh, **options)
        x[4, 1, 0] = np.nan
        options["start"][:, [0, 2, 3]] = np.nan
        found = results(gru, x, h0, dy, dh, **options)
    for name in ("y", "dx"):
        assert np.isnan(found[name][inside]).any()
        assert np.array_equal(found[name][~inside], clean[name][~inside])
    for name in ("h_n", "dh0"):
        assert np.array_equal(found[name], clean[name])
    assert not found["dstart"][:, [0, 2, 3]].any()
    assert np.isnan(found["dstart"][0, 1]).any()  # forward, of the second episode


@EVERY
def test_at_the_ends(path):
    """A reset before the first step replaces h0, one at each step the state, one beyond nothing."""
    gru = make(layers=1, direction="forward")
    (x, h0, dy, dh), options = case(gru, T=5, B=3, shared=False)
    start, none = options["start"], np.zeros((5, 3), bool)
    h0[:, 0] = np.nan
    resets = none.copy()
    resets[0, 0] = resets[:, 1] = resets[4, 2] = True
    with running(path):
        given = {"lengths": [5, 5, 3], "resets": resets, "start": start}
        found = results(gru, x, h0, dy, dh, **given)
        (y, _), pullback = gru.vjp(x[:, :1], start[:, :1])
        _, _, dh0 = pullback(dy[:, :1], dh[:, :1])
        assert np.allclose(found["y"][:, :1], y, rtol=0, atol=1e-14)
        assert np.allclose(found["dstart"][:, :1], dh0, rtol=0, atol=1e-14)
        assert not found["dh0"][:, :2].any()
        each = np.repeat(start[:, 1:2], 5, 1)
        (y, _), pullback = gru.vjp(x[None, :, 1], each)
        last = np.where(np.arange(5)[:, None] == 4, dh[:, 1], 0.0)
        _, _, dh0 = pullback(dy[None, :, 1], last[None])
        assert np.allclose(found["y"][:, 1], y[0], rtol=0, atol=1e-14)
        assert np.allclose(found["dstart"][:, 1], dh0.sum(1), rtol=0, atol=1e-14)
        assert not found["dstart"][:, 2].any()
        usual = results(gru, x, h0, dy, dh, resets=none, start=start, lengths=[5, 5, 3])
        assert not usual["dstart"].any()
        one = results(gru, x[:1], h0, dy[:1], dh, resets=np.ones((1, 3), bool), start=start)
        _, pullback = gru.vjp(x[:1], start)
        assert np.allclose(one["dstart"], pullback(dy[:1], dh)[2], rtol=0, atol=1e-14)
        assert one["dstart"].any()


@pytest.mark.usefixtures("compiler")
@VARIANTS
@ON_CUDA
def test_cuda(after, way, dtype, monkeypatch):
    """Thrice, so that the call is compiled, recorded and replayed, on another start each time."""
    gru = make(after, direction="both", dtype=dtype)
    check_on_cuda(gru, way, monkeypatch, [case(gru, 6, seed=seed) for seed in range(3)])


@pytest.mark.usefixtures("traced")
def test_every_library(backend):
    gru = make(layers=1)
    there = gru.to(backend.name, backend.device)
    arrays, options = case(gru, 4)
    expected = results(gru, *arrays, **options)
    given = {name: backend.put(v) for name, v in options.items()}
    assert_same(results(there, *arrays, **given), expected, 1e-12)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_layouts(direction):
    """Batch first, without a batch, and in `last`, `taps`, a frozen model and its pieces."""
    gru, first = make(direction=direction), make(direction=direction, batch_first=True)
    (x, h0, dy, dh), options = case(gru, shared=False)
    found = results(gru, x, h0, dy, dh, **options)
    turned = {name: options[name].T for name in ("mask", "resets")}
    swapped = x.transpose(1, 0, 2), h0, dy.transpose(1, 0, 2), dh
    other = results(first, *swapped, start=options["start"], **turned)
    assert np.array_equal(other["y"].transpose(1, 0, 2), found["y"])
    assert np.array_equal(other["dstart"], found["dstart"])
    of_row = {"mask": options["mask"][:, 1], "resets": options["resets"][:, 1]}
    alone = results(gru, x[:, 1], h0[:, 1], dy[:, 1], dh[:, 1],
                    start=options["start"][:, 1], **of_row)  # fmt: skip
    for name, v in (("y", found["y"][:, 1]), ("dstart", found["dstart"][:, 1])):
        assert np.allclose(alone[name], v, rtol=0, atol=1e-13)
    assert np.allclose(gru.last(x, h0, **options), found["h_n"], rtol=0, atol=1e-14)
    taps = gru.taps(x, h0, **options)["h"]
    ways = len(gru.suffixes)
    assert np.allclose(taps[-ways], found["y"][..., :4], rtol=0, atol=1e-14)
    y, h_n = freeze(gru)(x, h0, **options)
    assert np.allclose(y, found["y"], rtol=0, atol=1e-13)
    assert np.allclose(h_n, found["h_n"], rtol=0, atol=1e-13)


@pytest.mark.usefixtures("traced")
@VARIANTS
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_gradients_of_each_example(after, shared):
    gru = make(after)
    (x, h0, dy, dh), options = case(gru, shared=shared)
    pullback = gru.vjp(x, h0, **options)[1]
    total, *_, whole = pullback(dy, dh)
    grads, *_, each = pullback.per_example(dy, dh)
    for b in range(4):
        only = (np.arange(4) == b)[:, None]
        of_row, *_, dstart = pullback(dy * only, dh * only)
        if shared:
            assert np.allclose(each[b], dstart, rtol=0, atol=1e-13)
        for name in total:
            assert np.allclose(grads[name][b], of_row[name], rtol=0, atol=1e-13)
    assert np.allclose(each.sum(0) if shared else each, whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize("path", ["plain", "traced"])
@VARIANTS
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_along_a_direction(path, after, direction):
    """Forward mode, and over the backward pass, against differences of plain calls."""
    gru = make(after, direction=direction)
    (x, h0, dy, dh), options = case(gru)
    rng = np.random.default_rng(1)
    start = options.pop("start")
    dot, x_dot = rng.standard_normal(start.shape), rng.standard_normal(x.shape)

    def slope(function):
        pairs = zip(function(1e-6), function(-1e-6), strict=True)
        return [(above - below) / 2e-6 for above, below in pairs]

    def gradients(s):
        grads, *inputs = gru.vjp(x + s * x_dot, h0, start=start + s * dot, **options)[1](dy, dh)
        return [*grads.values(), *inputs]

    with running(path):
        for along in ({"start_dot": dot}, {"start_dot": dot, "x_dot": x_dot}):
            moved = x_dot if "x_dot" in along else 0 * x_dot
            _, found = gru.jvp(x, h0, start=start, **along, **options)
            wanted = slope(lambda s, v=moved: gru(x + s * v, h0, start=start + s * dot, **options))
            for v, w in zip(found, wanted, strict=True):
                assert np.allclose(v, w, rtol=0, atol=1e-8)
        *_, pullback = gru.forward_over_reverse(x, h0, start=start, **along, **options)
        (*_, dstart), (grads, *inputs) = pullback(dy, dh)
        assert np.allclose(dstart, gradients(0)[-1], rtol=0, atol=1e-12)
        for v, w in zip([*grads.values(), *inputs], slope(gradients), strict=True):
            assert np.allclose(v, w, rtol=0, atol=1e-7)


@pytest.mark.usefixtures("traced")
def test_second_derivatives_go_through_a_start():
    gru = make(layers=1)
    (x, h0, dy, _), options = case(gru)
    rng = np.random.default_rng(1)
    v = {name: rng.standard_normal(p.shape) for name, p in gru.params.items()}
    _, _, product = hvp(gru, lambda y: squared_error(y, dy), v, x, h0, **options)
    params, found = dict(gru.params), []
    for s in (1e-6, -1e-6):
        gru.load_params({name: p + s * v[name] for name, p in params.items()})
        (y, _), pullback = gru.vjp(x, h0, **options)
        found.append(pullback(squared_error(y, dy)[1])[0])
    for name, p in product.items():
        assert np.allclose(p, (found[0][name] - found[1][name]) / 2e-6, rtol=0, atol=1e-8)


@pytest.mark.usefixtures("traced")
def test_a_chain_hands_each_gru_its_own():
    options = {"dtype": "float64", "seed": 0}
    for last in ([], [Last(dtype="float64")]):
        chain = Chain(GRU(3, 4, **options), Linear(4, 5, **options), GRU(5, 4, **options), *last)
        rng = np.random.default_rng(0)
        x, starts = rng.standard_normal((6, 3, 3)), list(rng.standard_normal((2, 1, 4)))
        given = {"mask": ~flags(rng, 6, 3, 0.2), "resets": flags(rng, 6, 3, 0.4)}
        (y, _), pullback = chain.vjp(x, start=starts, **given)
        first, middle, second = chain.layers[:3]
        z, _ = first(x, start=starts[0], **given)
        z, h = second(middle(z), start=starts[1], **given)
        assert np.array_equal(y, h[0] if last else z)
        dy = rng.standard_normal(y.shape)
        grads, dx, dstate, dstart = pullback(dy)
        assert len(grads) == 8
        assert dx.shape == x.shape
        assert len(dstate) == 2
        *_, each = pullback.per_example(dy)
        for n, (found, rows) in enumerate(zip(dstart, each, strict=True)):
            dot = [rng.standard_normal((1, 4)) if k == n else None for k in range(2)]
            slopes = [
                np.sum(dy * chain(x, start=[v if d is None else v + s * d
                                            for v, d in zip(starts, dot, strict=True)], **given)[0])
                for s in (1e-6, -1e-6)
            ]  # fmt: skip
            slope = (slopes[0] - slopes[1]) / 2e-6
            assert np.isclose(np.sum(found * dot[n]), slope, rtol=0, atol=1e-8)
            (_, _), (y_dot, _) = chain.jvp(x, start=starts, start_dot=dot, **given)
            assert np.isclose(np.sum(dy * y_dot), slope, rtol=0, atol=1e-8)
            assert np.allclose(rows.sum(0), found, rtol=0, atol=1e-13)
        *_, dstart = chain.vjp(x, start=[None, starts[1]], **given)[1](dy)
        assert dstart[0] is None
        assert len(chain.vjp(x, **given)[1](dy)) == 3


@pytest.mark.usefixtures("traced")
def test_a_stream_in_chunks():
    for make_stream in (lambda gru: gru, lambda gru: Chain(gru), freeze):
        gru = make(direction="forward")
        (x, *_), options = case(gru)
        whole, _ = gru(x, **options)
        stream, found = Stream(make_stream(gru)), []
        start = [options["start"]] if isinstance(stream.model, Chain) else options["start"]
        for part in (slice(0, 3), slice(3, 4), slice(4, 9)):
            flagged = {name: options[name][part] for name in ("mask", "resets")}
            found.append(stream(x[part], start=start, **flagged))
        assert np.allclose(np.concatenate(found), whole, rtol=0, atol=1e-13)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("kind", ["float64", "float16", "frozen", "outputs of all layers"])
@pytest.mark.parametrize("shared", [None, True, False], ids=["zeros", "shared", "own"])
def test_steps_one_by_one(kind, shared):
    """As the whole in one call: `step` of a GRU, with a batch and without, and of a Stream."""
    dtype = kind if kind == "float16" else "float64"
    others = {"outputs": "all"} if kind.startswith("outputs") else {}
    gru = make(direction="forward", dtype=dtype, **others)
    gru = freeze(gru) if kind == "frozen" else gru
    (x, h0, *_), options = case(gru, shared=bool(shared))
    del options["mask"]
    if shared is None:
        del options["start"]
    whole, h_n = gru(x, h0, **options)
    stream, state, given = Stream(gru), h0.copy(), h0.copy()
    stream.state = h0
    near = {"rtol": 0, "atol": 2e-3 if dtype == "float16" else 1e-14}
    for t, resets in enumerate(options.pop("resets")):
        y, state = gru.step(x[t], state, resets=resets, **options)
        assert np.array_equal(stream.step(x[t], resets=list(resets), **options)[0], y[0])
        if not others:
            assert y.dtype == state.dtype == dtype
            assert np.allclose(y, whole[t], **near)
            assert np.array_equal(stream.state, state)
    assert np.allclose(state, h_n, **near)
    assert np.array_equal(given, h0)
    own = {"start": options["start"] if shared else options["start"][:, 1]} if options else {}
    row = gru.step(x[0], h0, resets=[False, True, False, True], **options)[1]
    for reset in (True, np.True_, np.array(True)):
        one = gru.step(x[0, 1], h0[:, 1], resets=reset, **own)[1]
        assert np.allclose(one, row[:, 1], **near)


@pytest.mark.usefixtures("traced")
def test_what_a_step_resets_reaches_nothing():
    """NaN in a state that is reset, and in a start that no row reads."""
    gru = make(direction="forward")
    (x, h0, *_), options = case(gru, shared=False)
    resets, start = np.array([True, False, False, True]), options["start"]
    expected = gru.step(x[0], h0, resets=resets, start=start)[1]
    h0[:, resets], start[:, ~resets] = np.nan, np.nan
    assert np.array_equal(gru.step(x[0], h0, resets=resets, start=start)[1], expected)


@pytest.mark.usefixtures("traced")
def test_rows_of_a_stream_are_set():
    starts = np.random.default_rng(0).standard_normal((2, 2, 4))
    gru, other = make(direction="forward"), make(True, direction="forward")
    chain = Chain(gru, Linear(4, 3, dtype="float64", seed=0), other)
    x = case(gru)[0][0]
    for model, start in ((gru, starts[0]), (chain, [None, starts[1]]), (chain, list(starts))):
        stream = Stream(model)
        with pytest.raises(ValueError, match="start was given before anything was read"):
            stream.reset([True, False, True, False], start)
        stream(x)
        before = stream.state if model is chain else [stream.state]
        stream.reset([True, False, True, False], start)
        after = stream.state if model is chain else [stream.state]
        given = start if model is chain else [start]
        for old, new, own in zip(before, after, given, strict=True):
            assert np.array_equal(new[:, 1::2], old[:, 1::2])
            assert np.array_equal(new[:, 0], np.zeros((2, 4)) if own is None else own)
        with pytest.raises(ValueError, match="start was given without rows"):
            stream.reset(start=start)
        with pytest.raises(ValueError, match="start"):
            stream.reset([True] * 4, starts[0, :, :3] if model is gru else [starts[0]])


@pytest.mark.usefixtures("traced")
def test_steps_on_every_library(backend):
    gru = make(direction="forward")
    there = gru.to(backend.name, backend.device)
    (x, h0, *_), options = case(gru)
    step = {"resets": options["resets"][1], "start": options["start"]}
    expected = gru.step(x[0], h0, **step)
    x, h0, start = map(backend.put, (x[0], h0, step["start"]))
    for resets in (backend.put(step["resets"]), step["resets"], step["resets"].tolist()):
        found = there.step(x, h0, resets=resets, start=start)
        assert_same(dict(enumerate(map(backend.host, found))), dict(enumerate(expected)), 1e-12)


@pytest.mark.usefixtures("traced")
def test_a_step_inside_of_jax():
    """In `lax.scan`, where resets and start have no values."""
    jax = require("jax")
    gru = make(direction="forward")
    (x, h0, *_), options = case(gru)
    del options["mask"]
    expected, last = gru(x, h0, **options)
    there = gru.to("jax.numpy")

    def run(x, h0, resets, start):
        def step(h, given):
            return there.step(given[0], h, resets=given[1], start=start)[::-1]

        return jax.lax.scan(step, h0, (x, resets))

    h, y = jax.jit(run)(x, h0, options["resets"], options["start"])
    assert np.allclose(y, expected, rtol=0, atol=1e-13)
    assert np.allclose(h, last, rtol=0, atol=1e-13)
    for wrong, told in (
        (np.ones(3, bool), r"resets is \(3,\), expected \(B,\) = \(4,\)"),
        (np.ones(4), "resets has dtype float64, expected booleans"),
    ):
        with pytest.raises((TypeError, ValueError), match=told):
            jax.jit(lambda r: there.step(jax.numpy.asarray(x[0]), resets=r))(wrong)


@pytest.mark.usefixtures("traced")
def test_inside_of_jax():
    """A start may be traced, and JAX's own gradient to it is ours."""
    jax = require("jax")
    gru = make(True, layers=2)
    (x, h0, dy, dh), options = case(gru)
    start = options.pop("start")
    expected = gru.vjp(x, h0, start=start, **options)[1](dy, dh)[-1]
    there = gru.to("jax.numpy")
    params = dict(there.params)

    def loss(start):
        y, h_n = there.apply(params, jax.numpy.asarray(x), jax.numpy.asarray(h0), start=start,
                             **options)  # fmt: skip
        return (y * dy).sum() + (h_n * dh).sum()

    found = jax.jit(jax.grad(loss))(jax.numpy.asarray(start))
    assert np.allclose(found, expected, rtol=0, atol=1e-11)


@pytest.mark.usefixtures("traced")
def test_as_pytorch_in_a_loop():
    """A learned start, in a loop over PyTorch's cell."""
    torch = require("torch")
    gru = GRU(3, 4, reset_after=True, dtype="float64", seed=0)
    cell = torch.nn.GRUCell(3, 4, dtype=torch.float64)
    cell.load_state_dict({k[:-3]: torch.from_numpy(v.copy()) for k, v in gru.params.items()})
    (x, h0, dy, dh), options = case(gru)
    del options["mask"]
    start = torch.from_numpy(options["start"]).requires_grad_()
    h, ys = torch.from_numpy(h0[0]), []
    for x_t, reset in zip(torch.from_numpy(x), torch.from_numpy(options["resets"]), strict=True):
        h = cell(x_t, torch.where(reset[:, None], start, h))
        ys.append(h)
    loss = (torch.stack(ys) * torch.from_numpy(dy)).sum() + (h * torch.from_numpy(dh[0])).sum()
    loss.backward()
    grads, *_, dstart = gru.vjp(x, h0, **options)[1](dy, dh)
    assert np.allclose(dstart, start.grad, rtol=0, atol=1e-12)
    for name, grad in cell.named_parameters():
        assert np.allclose(grads[f"{name}_l0"], grad.grad, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("start", "resets", "told"),
    [
        ((4, 4), None, "start was given without resets, of which it is the state"),
        ((3, 4), True, r"start is \(3, 4\), expected \(L\*D, H\) with L\*D = 4, H = 4"),
        ((4, 3, 4), True, r"start is \(4, 3, 4\), expected \(L\*D, B, H\) with .* B is 2"),
        ((4,), True, r"start is \(4,\), expected \(L\*D, B, H\)"),
    ],
)
def test_refusals(start, resets, told):
    resets = resets and np.ones((5, 2), bool)
    with pytest.raises(ValueError, match=told):
        make()(np.zeros((5, 2, 3)), resets=resets, start=np.zeros(start))


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("rows", "options", "told"),
    [
        ((2,), {"start": np.zeros((4, 4))}, "start was given without resets"),
        ((2,), {"resets": [True]}, r"resets is \(1,\), expected \(B,\) = \(2,\)"),
        ((2,), {"resets": True}, r"resets is \(\), expected \(B,\) = \(2,\)"),
        ((), {"resets": [True]}, r"resets is \(1,\), expected one boolean, since there is no"),
        ((2,), {"resets": [1, 0]}, "resets has dtype int64, expected booleans"),
        ((2,), {"resets": [True] * 2, "start": np.zeros((2, 3))}, "axis 1 is 3, H is 4"),
        ((2,), {"resets": [True] * 2, "start": np.zeros((2, 3, 4))}, "axis 1 is 3, B is 2"),
        ((2,), {"resets": [True] * 2, "start": [np.zeros((2, 4))]}, "start is a list"),
        ((2,), {"resets": [True] * 2, "start": 0.0}, "start is a float"),
    ],
)
def test_refusals_of_steps(rows, options, told):
    gru = make(direction="forward")
    for step in (gru.step, Stream(gru).step, freeze(gru).step):
        with pytest.raises((TypeError, ValueError), match=told):
            step(np.zeros((*rows, 3)), **options)


@pytest.mark.usefixtures("traced")
def test_refusals_of_directions_and_chains():
    gru, x, every = make(), np.zeros((5, 2, 3)), np.ones((5, 2), bool)
    with pytest.raises(ValueError, match="start_dot was given without start"):
        gru.jvp(x, resets=every, start_dot=np.zeros((4, 4)))
    with pytest.raises(TypeError, match="start has dtype float32"):
        gru(x, resets=every, start=np.zeros((4, 4), "float32"))
    with pytest.raises(ValueError, match="start holds 2, expected 1, one for each GRU"):
        Chain(gru)(x, resets=every, start=[None, None])


@pytest.mark.usefixtures("traced")
def test_a_start_is_copied():
    """Writing into it after a call changes neither the pullback nor what was returned."""
    gru = make()
    (x, h0, dy, dh), options = case(gru, shared=False)
    (y, _), pullback = gru.vjp(x, h0, **options)
    kept, expected = y.copy(), pullback(dy, dh)
    options["start"][...] = 7
    assert np.array_equal(y, kept)
    for a, b in zip(expected[1:], pullback(dy, dh)[1:], strict=True):
        assert np.array_equal(a, b)
