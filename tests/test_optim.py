"""Optimisers against PyTorch over 20 steps; clipping."""

import json
import math

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


# parts and groups --------------------------------------------------------------------------------

GROUPS = [
    (SGD, {"lr": 0.1, "momentum": 0.9}, {"lr": 0.02, "momentum": 0.5, "weight_decay": 0.1}),
    (SGD, {"lr": 0.1}, {"momentum": 0.9, "nesterov": True}),
    (RMSprop, {"lr": 0.05}, {"lr": 0.2, "alpha": 0.8, "momentum": 0.5, "centered": True}),
    (Adam, {"lr": 0.1}, {"lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-3, "amsgrad": True}),
    (AdamW, {"lr": 0.1, "weight_decay": 0.3}, {"weight_decay": 0.0}),
]


@pytest.mark.parametrize("part", [False, True], ids=["all", "frozen"])
@pytest.mark.parametrize(("kind", "options", "own"), GROUPS)
def test_groups_are_torchs(kind, options, own, part):
    """Their rates change as PyTorch's LambdaLR changes them; what is in no group stays."""
    torch = require("torch")
    ours = start()
    theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in ours.items()}
    given = [{"params": {"w": ours["w"]}, **own}, {"params": {} if part else {"b": ours["b"]}}]
    optimiser = kind(given, **options)
    given = [{"params": [theirs["w"]], **own}, *([] if part else [{"params": [theirs["b"]]}])]
    other = getattr(torch.optim, kind.__name__)(given, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(other, lambda step: 1 / (1 + step))
    for step in range(20):
        optimiser.lr = options["lr"] / (1 + step)
        grads = gradients(step)
        for k, p in theirs.items():
            p.grad = torch.tensor(grads[k])
        optimiser.step(ours, grads)
        other.step()
        schedule.step()
    for k, p in theirs.items():
        change = np.linalg.norm(p.detach().numpy() - start()[k])
        assert (change == 0) == (part and k == "b")
        assert np.linalg.norm(ours[k] - p.detach().numpy()) <= 1e-10 * change
    assert optimiser.names == (("w",) if part else ("w", "b"))
    assert all(k == "count" or k.endswith(optimiser.names) for k in optimiser.state)


def test_a_part_is_stepped_and_the_rest_is_left_alone(backend):
    params = {k: backend.backend.put(v) for k, v in start().items()}
    before = dict(params)
    optimiser = Adam({"b": params["b"]})
    grads = {k: backend.put(v) for k, v in gradients(0).items()}
    optimiser.step(params, grads)
    optimiser.step(params, {"b": grads["b"]})
    assert params["w"] is before["w"]
    assert np.array_equal(backend.host(params["w"]), start()["w"])
    assert np.abs(backend.host(params["b"]) - start()["b"]).min() > 1e-4
    with pytest.raises(KeyError, match=r"grads: missing \['b'\], unused \[\]"):
        optimiser.step(params, {"w": grads["w"]})
    with pytest.raises(KeyError, match=r"params: missing \['b'\]"):
        optimiser.step({"w": params["w"]}, grads)
    with pytest.raises(KeyError, match=r"grads: missing \[\], unused \['other'\]"):
        optimiser.step(params, {**grads, "other": grads["w"]})


def test_groups_that_cannot_be():
    p = start()
    w, b = {"w": p["w"]}, {"b": p["b"]}
    for groups, error, message in (
        ([{"params": w}, {"params": p}], ValueError, r"\['w'\] in two groups"),
        ([{"params": w, "rate": 1.0}], TypeError, r"group 0 has \['rate'\], expected some of \['"),
        ([{"params": w, "dampening": 0.1}], TypeError, r"group 0 has \['dampening'\]"),
        ([{"params": w}, {"params": b, "lr": "0.1"}], TypeError, "lr of group 1 is '0.1'"),
        ([{"params": w}, {"params": b, "lr": -1}], ValueError, "lr of group 1 is -1"),
        ([{"params": list(w.values())}], TypeError, "params is a list, expected a mapping name"),
        ([{"lr": 0.1}], TypeError, "params is a list, expected a mapping name"),
        (list(p.values()), TypeError, "params is a list, expected a mapping name"),
        (p.items(), TypeError, "params is a dict_items, expected a mapping name"),
        ({}, ValueError, "params is empty"),
        ([], ValueError, "params is empty"),
        ([{"params": {}}], ValueError, "params is empty"),
    ):
        with pytest.raises(error, match=message):
            Adam(groups)
    with pytest.raises(ValueError, match="nesterov=True needs"):
        SGD([{"params": w, "momentum": 0.9}, {"params": b, "momentum": 0.0}], nesterov=True,
            momentum=0.9)  # fmt: skip
    optimiser = SGD([{"params": w, "lr": 0.1}, {"params": b}], lr=0.0)
    optimiser.step(p, gradients(0))
    assert np.array_equal(p["b"], start()["b"])
    assert np.allclose(p["w"], start()["w"] - 0.1 * gradients(0)["w"])
    optimiser.lr = 0.5
    with pytest.raises(ValueError, match="lr was 0 and was changed"):
        optimiser.step(p, gradients(0))


# at the door -------------------------------------------------------------------------------------

WRONG = [
    (SGD, "lr", "0.1", TypeError), (SGD, "lr", True, TypeError), (SGD, "lr", math.inf, ValueError),
    (SGD, "lr", math.nan, ValueError), (SGD, "lr", None, TypeError), (SGD, "lr", 1j, TypeError),
    (SGD, "lr", np.array([0.1, 0.2]), TypeError), (SGD, "momentum", "0.9", TypeError),
    (SGD, "momentum", -0.1, ValueError), (SGD, "dampening", math.nan, ValueError),
    (SGD, "weight_decay", math.inf, ValueError), (SGD, "nesterov", "False", TypeError),
    (RMSprop, "alpha", 1.5, ValueError), (RMSprop, "centered", 1, TypeError),
    (RMSprop, "eps", "1e-8", TypeError), (Adam, "betas", (0.9,), ValueError),
    (Adam, "betas", 0.9, ValueError), (Adam, "betas", ("0.9", 0.99), TypeError),
    (Adam, "betas", (0.9, math.nan), ValueError), (Adam, "betas", "ab", ValueError),
    (Adam, "eps", math.inf, ValueError), (Adam, "amsgrad", 0, TypeError),
    (AdamW, "weight_decay", True, TypeError),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "value", "error"), WRONG)
def test_settings_are_refused_by_name_when_given_and_when_written(kind, name, value, error):
    with pytest.raises(error, match=name):
        kind(start(), **{name: value})
    optimiser = kind(start())
    kept = getattr(optimiser, name)
    with pytest.raises(error, match=name):
        setattr(optimiser, name, value)
    assert getattr(optimiser, name) == kept


def test_what_decides_the_state_stays():
    params = start()
    optimiser = SGD(params, momentum=0.9)
    optimiser.momentum = 0.95
    with pytest.raises(ValueError, match=r"momentum was 0\.95 and decides"):
        optimiser.momentum = 0.0
    with pytest.raises(ValueError, match="amsgrad was False and decides"):
        Adam(params).amsgrad = True
    narrow = {k: np.asarray(v, np.float32) for k, v in optimiser.state.items()}
    with pytest.raises(TypeError, match=r"state\['b\.w'\] has dtype float32, expected float64"):
        optimiser.state = narrow


def test_numpys_scalars_become_pythons():
    optimiser = Adam(start(), lr=np.float32(0.5), betas=[np.float64(0.5), 0], amsgrad=np.True_)
    optimiser.lr = np.float64(0.25)
    assert type(optimiser.lr) is float
    assert optimiser.betas == (0.5, 0.0)
    assert type(optimiser.betas[0]) is float
    assert optimiser.amsgrad is True
    json.dumps(optimiser.settings)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (None, TypeError, r"grads\['b'\] is a NoneType"),
        ([0.0] * 4, TypeError, r"grads\['b'\] is a list"),
        (np.zeros(4, np.float32), TypeError, r"grads\['b'\] has dtype float32, expected float64"),
        (np.zeros(4, int), TypeError, r"grads\['b'\] has dtype int64"),
        (np.ma.zeros(4), TypeError, r"grads\['b'\] is a MaskedArray"),
        (np.zeros((1, 4)), ValueError, r"grads\['b'\] is \(1, 4\), expected \(4,\)"),
    ],
)
def test_gradients_are_refused_by_name_before_anything_changes(wrong, error, message):
    params = start()
    optimiser = Adam(params)
    with pytest.raises(error, match=message):
        optimiser.step(params, {"w": gradients(0)["w"], "b": wrong})
    assert all(np.array_equal(params[k], v) for k, v in start().items())
    assert optimiser.state["count"] == 0
    if error is TypeError and getattr(wrong, "dtype", 0) != np.float32 and wrong is not None:
        with pytest.raises(TypeError, match=message):
            clip_by_global_norm({"w": gradients(0)["w"], "b": wrong}, 1.0)
    with pytest.raises(error, match=message.replace("grads", "params")):
        optimiser.step({"w": params["w"], "b": wrong}, gradients(0))


def test_parameters_of_another_model_are_refused():
    params = start()
    optimiser = Adam(params)
    other = {"w": np.zeros((3, 1)), "b": np.zeros(4)}
    with pytest.raises(ValueError, match=r"params\['w'\] is \(3, 1\), expected \(3, 4\)"):
        optimiser.step(other, {k: np.zeros_like(v) for k, v in other.items()})
    other = {k: v.astype(np.float32) for k, v in params.items()}
    with pytest.raises(TypeError, match=r"params\['w'\] has dtype float32, expected float64"):
        optimiser.step(other, other)
    for wrong in (None, [1.0], np.zeros(3, int), np.ma.zeros(3)):
        with pytest.raises(TypeError, match=r"params\['w'\]"):
            Adam({"w": wrong})


def test_clipping_is_refused_by_name():
    for value in ("1.0", True, None):
        with pytest.raises(TypeError, match="max_norm is"):
            clip_by_global_norm(start(), value)
        with pytest.raises(TypeError, match="limit is"):
            clip_by_value(start(), value)
    with pytest.raises(ValueError, match="limit is inf"):
        clip_by_value(start(), math.inf)
    grads = start()
    clip_by_global_norm(grads, math.inf)  # measures alone
    assert all(np.array_equal(grads[k], v) for k, v in start().items())
    with pytest.raises(TypeError, match=r"grads\['w'\] is a NoneType"):
        clip_by_value({"w": None}, 1.0)


@pytest.mark.parametrize("clip", [clip_by_global_norm, clip_by_value])
def test_gradients_without_names(clip):
    with pytest.raises(TypeError, match="grads is a list, expected a mapping name -> array"):
        clip([np.ones(3)], 1.0)
