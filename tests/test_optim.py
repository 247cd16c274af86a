"""Optimisers against PyTorch over 20 steps; clipping."""

import numpy as np
import pytest
from conftest import require
from hypothesis import given
from hypothesis import strategies as st

from gru_any import GRU, SGD, Adam, AdamW, RMSprop, clip_by_global_norm, clip_by_value

CASES = [
    (SGD, {}),
    (SGD, {"lr": 0.1, "momentum": 0.9}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (RMSprop, {}),
    (RMSprop, {"lr": 0.05, "alpha": 0.8, "eps": 1e-3, "weight_decay": 0.1}),
    (RMSprop, {"momentum": 0.9}),
    (RMSprop, {"momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    (Adam, {}),
    (Adam, {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    (Adam, {"lr": 0.1, "amsgrad": True}),
    (AdamW, {}),
    (AdamW, {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.3, "amsgrad": True}),
]
IDS = [f"{c.__name__}-{'-'.join(o) or 'defaults'}" for c, o in CASES]


def start(seed=0):
    rng = np.random.default_rng(seed)
    return {"w": rng.standard_normal((3, 4)), "b": rng.standard_normal(4)}


def gradients(step):
    rng = np.random.default_rng(100 + step)
    return {"w": rng.standard_normal((3, 4)) / (1 + step), "b": rng.standard_normal(4)}


@pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)
def test_torch_over_20_steps(kind, options):
    torch = require("torch")
    ours = start()
    theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in ours.items()}
    optimiser = kind(ours, **options)
    other = getattr(torch.optim, kind.__name__)(theirs.values(), **options)
    for step in range(20):
        grads = gradients(step)
        for k, p in theirs.items():
            p.grad = torch.tensor(grads[k])
        optimiser.step(ours, grads)
        other.step()
    for k, p in theirs.items():
        change = np.linalg.norm(p.detach().numpy() - start()[k])
        assert change > 1e-3
        assert np.linalg.norm(ours[k] - p.detach().numpy()) <= 1e-10 * change


@pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)
def test_every_backend_gives_the_numbers_of_numpy(backend, kind, options):
    here = start()
    there = {k: backend.backend.put(v) for k, v in here.items()}
    one, other = kind(here, **options), kind(there, **options)
    for step in range(5):
        grads = gradients(step)
        one.step(here, grads)
        other.step(there, {k: backend.put(v) for k, v in grads.items()})
    for k in here:
        assert np.allclose(backend.host(there[k]), here[k], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)
def test_state_can_be_taken_and_given_back(kind, options):
    params = start()
    optimiser = kind(params, **options)
    for step in range(3):
        optimiser.step(params, gradients(step))
    kept = {k: np.array(v) for k, v in optimiser.state.items()}
    middle = {k: v.copy() for k, v in params.items()}
    for step in range(3, 6):
        optimiser.step(params, gradients(step))
    again = kind(middle, **options)
    again.state = kept
    before = {k: v.copy() for k, v in kept.items()}
    for step in range(3, 6):
        again.step(middle, gradients(step))
    for k in params:
        assert np.array_equal(params[k], middle[k])
    assert all(np.array_equal(before[k], kept[k]) for k in kept)
    with pytest.raises(KeyError, match="unused"):
        again.state = {**kept, "other": 1}


def test_the_first_step_of_adam_by_hand():
    params = {"w": np.array([1.0, 2.0])}
    Adam(params, lr=0.5, eps=0.0).step(params, {"w": np.array([3.0, -0.01])})
    assert np.allclose(params["w"], [0.5, 2.5])


def test_numpy_parameters_change_in_place():
    gru = GRU(3, 4, seed=0)
    weight, before = gru.params["weight_hh_l0"], gru.params["weight_hh_l0"].copy()
    (y, _), pullback = gru.vjp(np.ones((5, 2, 3), "float32"))
    Adam(gru.params).step(gru.params, pullback(y)[0])
    assert gru.params["weight_hh_l0"] is weight
    assert weight.dtype == np.float32
    assert np.abs(weight - before).max() > 1e-4


def test_the_learning_rate_may_be_written():
    params = start()
    optimiser = SGD(params, lr=0.1)
    optimiser.lr = 0.0
    optimiser.step(params, gradients(0))
    assert all(np.array_equal(params[k], start()[k]) for k in params)


def test_an_eps_that_half_precision_loses_is_refused():
    half = {"w": np.zeros(3, np.float16)}
    for kind in (Adam, AdamW, RMSprop):
        with pytest.raises(ValueError, match=r"eps is 1e-08, which is 0 in w's dtype float16"):
            kind(half)
        kind(half, eps=1e-4).step(half, {"w": np.zeros(3, np.float16)})
        assert not half["w"].any()


def test_bad_arguments():
    params = start()
    with pytest.raises(ValueError, match="lr is -1"):
        SGD(params, lr=-1)
    with pytest.raises(ValueError, match="betas"):
        Adam(params, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="nesterov"):
        SGD(params, nesterov=True)
    optimiser = SGD(params)
    with pytest.raises(KeyError, match=r"missing \['b'\]"):
        optimiser.step(params, {"w": params["w"]})
    with pytest.raises(ValueError, match=r"grads\['b'\]"):
        optimiser.step(params, {"w": params["w"], "b": np.zeros(5)})
    for limit in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="expected a number above 0"):
            clip_by_global_norm(start(), limit)
        with pytest.raises(ValueError, match="expected a number above 0"):
            clip_by_value(start(), limit)


@given(seed=st.integers(0, 999), limit=st.floats(1e-3, 1e3))
def test_clipping(seed, limit):
    grads = start(seed)
    length = np.sqrt(sum((g * g).sum() for g in grads.values()))
    first = grads["w"]
    assert clip_by_global_norm(grads, limit) == pytest.approx(length)
    assert grads["w"] is first
    clipped = np.sqrt(sum((g * g).sum() for g in grads.values()))
    assert clipped == pytest.approx(min(length, limit), rel=2e-6 / min(length, 1) + 1e-9)
    once = {k: g.copy() for k, g in grads.items()}
    clip_by_global_norm(grads, limit)
    assert all(np.allclose(grads[k], once[k], rtol=2e-6 / limit + 1e-9) for k in grads)
    clip_by_value(grads, limit / 10)
    assert max(np.abs(g).max() for g in grads.values()) <= limit / 10


def test_clipping_is_torchs(backend):
    torch = require("torch")
    host = start()
    tensors = [torch.nn.Parameter(torch.tensor(v)) for v in host.values()]
    for tensor, value in zip(tensors, host.values(), strict=True):
        tensor.grad = torch.tensor(value)
    theirs = torch.nn.utils.clip_grad_norm_(tensors, 0.7)
    grads = {k: backend.backend.put(v) for k, v in host.items()}
    ours = clip_by_global_norm(grads, 0.7)
    assert float(backend.host(ours)) == pytest.approx(theirs.item(), rel=1e-13)
    for tensor, k in zip(tensors, grads, strict=True):
        assert np.allclose(backend.host(grads[k]), tensor.grad.numpy(), rtol=1e-13)
    before = dict(grads)
    clip_by_value(grads, 0.01)
    torch.nn.utils.clip_grad_value_(tensors, 0.01)
    for tensor, k in zip(tensors, grads, strict=True):
        assert np.array_equal(backend.host(grads[k]), tensor.grad.numpy())
        assert grads[k] is before[k] or backend.name == "jax.numpy"


def test_the_norm_of_half_precision_does_not_overflow():
    grads = {"w": np.full((100, 100), 300, np.float16)}
    assert clip_by_global_norm(grads, 1.0) == pytest.approx(30_000)
    assert np.abs(grads["w"].astype(float) - 0.01).max() < 1e-4
