"""Mixed precision: as good as float32, and a step that overflows changes nothing."""

import math

import numpy as np
import pytest
from conftest import require

from gru_any import (
    GRU,
    SGD,
    Adam,
    AdamW,
    Chain,
    Embedding,
    Linear,
    RMSprop,
    clip_by_global_norm,
    softmax_cross_entropy,
    to_numpy,
)
from gru_any.backend import Mode, modes
from gru_any.train.data import streams
from gru_any.train.loop import evaluate, fit
from gru_any.train.mixed import GROWTH, Mixed

HOMES = pytest.mark.parametrize(
    ("library", "half"), [("numpy", "float16"), ("torch", "bfloat16"), ("torch", "float16")]
)
TEXT = np.array([ord(c) % 32 for c in "to be or not to be that is the question " * 30])


def writer(library):
    if library != "numpy":
        require(library)
    home = {"backend": library}
    return Chain(
        Embedding(32, 8, seed=0, **home), GRU(8, 24, seed=1, **home), Linear(24, 32, seed=2, **home)
    )


def train(model, half, loss=softmax_cross_entropy, steps=60, **options):
    optimiser = Adam(model.params, lr=0.02)
    fit(model, loss, lambda epoch: [streams(TEXT, 8)], optimiser, steps=steps, tbptt=(12, 12),
        clip=1.0, mixed=half, bar=False, **options)  # fmt: skip
    return optimiser


def host(arrays):
    return {name: to_numpy(v).copy() for name, v in arrays.items() if name != "count"}


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in b)


@HOMES
def test_the_loss_ends_within_two_percent_of_float32s(library, half):
    losses = {}
    for precision in (None, half):
        model = writer(library)
        train(model, precision)
        losses[precision] = evaluate(model, softmax_cross_entropy, [streams(TEXT, 8)])
        assert str(model.params["1.weight_hh_l0"].dtype).endswith("float32")
    assert losses[None] < 0.5 * math.log(32)
    assert losses[half] != losses[None]
    assert losses[half] == pytest.approx(losses[None], rel=0.02)


def small(y, target, mask=None):
    """A loss whose gradients float16 cannot hold."""
    value, dy = softmax_cross_entropy(y, target, mask=mask)
    return 1e-5 * value, 1e-5 * dy


@pytest.mark.parametrize(("scale", "good"), [(2.0**16, True), (1.0, False)])
def test_the_scale_saves_small_gradients(scale, good):
    model = writer("numpy")
    mixed = Mixed(model, "float16")
    mixed.put(scale, 0.0)
    x, target, *_ = streams(TEXT[:400], 8)
    (y, _), pullback = mixed.twin.vjp(x)
    _, found = mixed.gradient(small, y, target, None, pullback)
    (y, _), pullback = model.vjp(x)
    exact, _, _ = pullback(small(y, target)[1])
    errors = [np.linalg.norm(found[k] - g) / np.linalg.norm(g) for k, g in exact.items()]
    assert max(errors) < 0.01 if good else max(errors) > 0.3


@HOMES
def test_a_step_that_overflows_changes_the_scale_alone(library, half):
    model = writer(library)
    optimiser, mixed = AdamW(model.params), Mixed(model, half)
    grads = {k: model.backend.xp.ones_like(v) for k, v in model.params.items()}
    good, bad = (model.backend.put(np.float32(v)) for v in (1.0, math.inf))
    mixed.update(optimiser, grads, good)
    weights, state = host(model.params), host(optimiser.state)
    twin = host(mixed.twin.params)
    with np.errstate(all="ignore"):
        assert float(mixed.update(optimiser, {k: g * bad for k, g in grads.items()}, bad)) == 0
    assert same(host(model.params), weights)
    assert same(host(optimiser.state), state)
    assert same(host(mixed.twin.params), twin)
    assert optimiser.state["count"] == 1
    assert (float(mixed.scale), float(mixed.good)) == (2.0**15, 0)
    mixed.update(optimiser, grads, good)
    assert optimiser.state["count"] == 2
    assert not same(host(model.params), weights)
    mixed.put(4.0, GROWTH - 1)
    mixed.update(optimiser, grads, good)
    assert (float(mixed.scale), float(mixed.good)) == (8.0, 0)


def test_a_scale_that_overflows_comes_down_and_the_run_goes_on():
    """From a scale that no gradient survives, the weights stand still until it fits."""
    model, seen = writer("numpy"), []
    before = host(model.params)

    def loud(y, target, mask=None):
        value, dy = softmax_cross_entropy(y, target, mask=mask)
        seen.append(host(model.params))
        return 1e5 * value, 1e5 * dy

    train(model, "float16", loud, steps=30)
    assert same(seen[1], before)
    assert not same(host(model.params), before)
    assert all(np.isfinite(v).all() for v in host(model.params).values())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SGD, {"momentum": 0.9, "dampening": 0.3}),
        (RMSprop, {"momentum": 0.9, "centered": True}),
        (Adam, {"betas": (0.0, 0.9), "amsgrad": True}),
        (AdamW, {}),
    ],
)
def test_the_optimisers_undo_a_step(backend, kind, options):
    rng = np.random.default_rng(0)
    start = {"w": rng.standard_normal((3, 4)), "b": rng.standard_normal(4)}
    plain, undone = ({k: backend.backend.put(v) for k, v in start.items()} for _ in range(2))
    one, other = kind(plain, **options), kind(undone, **options)
    yes, no = (backend.backend.put(np.array(v)) for v in (True, False))
    for step in range(4):
        grads = {k: backend.put(rng.standard_normal(v.shape)) for k, v in start.items()}
        one.step(plain, grads)
        other.step(undone, grads, yes)
        spoiled = {k: g * math.nan for k, g in grads.items()}
        before = host(undone) | host(other.state)
        other.step(undone, spoiled, no)
        assert same(host(undone) | host(other.state), before)
        assert other.state["count"] == step + 1
    for k in start:
        assert np.allclose(backend.host(undone[k]), backend.host(plain[k]), rtol=1e-6, atol=1e-8)


def test_nothing_is_read_back(monkeypatch):
    """PyTorch stands for a device here, so it runs by itself."""
    torch = require("torch")
    monkeypatch.setattr(modes, "chosen", Mode.PLAIN)
    model = writer("torch")
    optimiser, mixed = AdamW(model.params), Mixed(model, "bfloat16")
    x, target, *_ = streams(TEXT[:100], 4)
    x, target = model.backend.put(x), model.backend.put(target)

    def refuse(*_):
        raise AssertionError("the device was waited for")

    for name in ("__bool__", "__float__", "__int__", "__index__", "item", "numpy", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    (y, _), pullback = mixed.twin.vjp(x)
    _, grads = mixed.gradient(softmax_cross_entropy, y, target, None, pullback)
    mixed.update(optimiser, grads, clip_by_global_norm(grads, 1.0))


def test_an_overflow_that_no_scale_mends_is_told():
    def hopeless(y, target, mask=None):
        value, dy = softmax_cross_entropy(y, target, mask=mask)
        return value, dy * np.float32(math.inf)

    with pytest.raises(FloatingPointError, match="overflows float16 in step 20, whatever the"):
        train(writer("numpy"), "float16", hopeless)


def test_what_does_not_fit_is_refused():
    for model, half in (
        (writer("numpy").to(dtype="float64"), "float16"),
        (writer("numpy"), "float8"),
    ):
        with pytest.raises(ValueError, match=r"mixed is 'float.*expected float16 or bfloat16"):
            train(model, half)
    with pytest.raises(ValueError, match="bfloat16"):
        train(writer("numpy"), "bfloat16")


@HOMES
def test_it_goes_on_bit_for_bit(library, half, tmp_path):
    """Stopped where the scale has just changed, and the carried state is in half precision."""
    models = []
    for name, stop in (("whole", None), ("cut", 7), ("cut", None)):
        model, wait = writer(library), iter(range(10**6))

        def valid(stop=stop, wait=wait):
            if next(wait) == stop:
                raise RuntimeError("the plug is pulled")
            return 1.0

        options = {"steps": 12, "valid": valid, "validate_every": 1, "save_every": 3}
        options |= {"out": tmp_path / name, "log_every": 4}
        if stop is not None:
            with pytest.raises(RuntimeError, match="plug"):
                train(model, half, **options)
        else:
            optimiser = train(model, half, **options)
            models.append(host(model.params) | host(optimiser.state))
    assert same(*models)
