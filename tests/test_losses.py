"""Losses against PyTorch, differences and numbers worked out by hand."""

import math

import numpy as np
import pytest
from conftest import require
from hypothesis import given
from hypothesis import strategies as st

from gru_any import sigmoid_cross_entropy, softmax_cross_entropy, squared_error

LOSSES = {
    "softmax": softmax_cross_entropy,
    "probabilities": softmax_cross_entropy,
    "sigmoid": sigmoid_cross_entropy,
    "squared": squared_error,
}


def problem(kind, seed=0, shape=(4, 3, 5)):
    rng = np.random.default_rng(seed)
    y = rng.normal(0, 3, shape)
    if kind == "softmax":
        return y, rng.integers(0, shape[-1], shape[:-1])
    if kind == "probabilities":
        return y, rng.dirichlet(np.ones(shape[-1]), shape[:-1])
    return y, rng.random(shape) if kind == "sigmoid" else rng.standard_normal(shape)


def options(kind, y, which, seed=0):
    """A weight of classes or of numbers, a mask of rows or of numbers."""
    rng = np.random.default_rng(seed)
    by_row = kind in ("softmax", "probabilities")
    weight = rng.random(y.shape[-1:] if by_row else y.shape) + 0.1
    mask = rng.random(y.shape[:-1] if by_row else y.shape) < 0.6
    return {k: v for k, v in (("weight", weight), ("mask", mask)) if k in which}


CASES = pytest.mark.parametrize("which", ["", "weight", "mask", "weight mask"])
KINDS = pytest.mark.parametrize("kind", LOSSES)


@CASES
@KINDS
def test_gradient(kind, which):
    y, target = problem(kind)
    extra, loss, rng = options(kind, y, which), LOSSES[kind], np.random.default_rng(1)
    _, grad = loss(y, target, **extra)
    v, e = rng.standard_normal(y.shape), 1e-5
    slope = (loss(y + e * v, target, **extra)[0] - loss(y - e * v, target, **extra)[0]) / (2 * e)
    scale = np.linalg.norm(grad) * np.linalg.norm(v)
    assert scale > 0
    assert abs(np.sum(grad * v) - slope) <= 1e-9 * scale


@pytest.mark.parametrize("which", ["", "weight"])
@KINDS
def test_torch(kind, which):
    torch = require("torch")
    functional = torch.nn.functional
    y, target = problem(kind)
    extra = options(kind, y, which)
    value, grad = LOSSES[kind](y, target, **extra)
    Y, W = torch.tensor(y, requires_grad=True), extra.get("weight")
    W = None if W is None else torch.tensor(W)
    flat = Y.reshape(-1, 5) if "s" in kind and kind in ("softmax", "probabilities") else Y
    T = torch.tensor(target).reshape(flat.shape if kind != "softmax" else -1)
    if kind in ("softmax", "probabilities"):
        theirs = functional.cross_entropy(flat, T, W)
    elif kind == "sigmoid":
        theirs = functional.binary_cross_entropy_with_logits(Y, T, W)
    else:
        theirs = functional.mse_loss(Y, T) if W is None else (W * (Y - T) ** 2).mean()
    theirs.backward()
    assert value == pytest.approx(theirs.item(), rel=1e-13)
    assert np.allclose(grad, Y.grad.numpy(), rtol=1e-12, atol=1e-16)


def test_by_hand():
    value, grad = softmax_cross_entropy(np.log([[1.0, 3.0]]), np.array([1]))
    assert value == pytest.approx(-math.log(0.75))
    assert np.allclose(grad, [[0.25, -0.25]])
    value, grad = sigmoid_cross_entropy(np.array([0.0, math.log(3)]), np.array([1.0, 0.0]))
    assert value == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert np.allclose(grad, [-0.25, 0.375])
    value, grad = squared_error(np.array([1.0, 4.0]), np.array([0.0, 1.0]))
    assert value == 5.0
    assert np.allclose(grad, [1.0, 3.0])


@KINDS
def test_what_is_masked_counts_for_nothing(kind):
    y, target = problem(kind)
    mask = options(kind, y, "mask")["mask"]
    value, grad = LOSSES[kind](y, target, mask=mask)
    dirty = y.copy()
    dirty[~mask] = np.nan
    other = target.copy()
    other[~mask] = 999 if kind == "softmax" else np.nan
    value2, grad2 = LOSSES[kind](dirty, other, mask=mask)
    assert value == value2
    assert np.array_equal(grad, grad2)
    assert not grad2[~mask].any()
    value, grad = LOSSES[kind](dirty, other, mask=np.zeros_like(mask))
    assert value == 0
    assert not grad.any()


@given(shift=st.floats(-1e4, 1e4), seed=st.integers(0, 999))
def test_a_shift_of_all_scores_changes_nothing(shift, seed):
    y, target = problem("softmax", seed)
    value, grad = softmax_cross_entropy(y, target)
    value2, grad2 = softmax_cross_entropy(y + shift, target)
    assert value2 == pytest.approx(value, rel=1e-9)
    assert np.allclose(grad, grad2, atol=1e-9)


@KINDS
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_scores(kind, size):
    y, target = problem(kind, shape=(3, 4))
    y[:, 0] = size
    value, grad = LOSSES[kind](y, target)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    half, _ = LOSSES[kind](y.astype(np.float32), target)
    assert half == pytest.approx(value, rel=1e-6)


def test_a_score_of_minus_infinity_is_an_impossible_class():
    value, grad = softmax_cross_entropy(np.array([[0.0, 0.0, -np.inf]]), np.array([0]))
    assert value == pytest.approx(math.log(2))
    assert np.allclose(grad, [[-0.5, 0.5, 0.0]])


@KINDS
def test_on_every_backend(backend, kind):
    y, target = problem(kind)
    extra = options(kind, y, "weight mask")
    value, grad = LOSSES[kind](y, target, **extra)
    far = {k: backend.put(v) for k, v in extra.items()}
    value2, grad2 = LOSSES[kind](backend.put(y), backend.put(target), **far)
    assert float(backend.host(value2)) == pytest.approx(float(value), rel=1e-13)
    assert np.allclose(backend.host(grad2), grad, rtol=1e-12, atol=1e-17)


@KINDS
def test_half_precision_is_summed_in_float32(kind):
    y, target = problem(kind, shape=(3000, 2, 5))
    y = y.astype(np.float16)
    value, grad = LOSSES[kind](y, target)
    exact, _ = LOSSES[kind](y.astype(np.float64), target)
    assert value == pytest.approx(exact, rel=1e-5)
    assert grad.dtype == np.float16


def test_a_target_out_of_range(backend):
    y, target = problem("softmax")
    target[1, 1] = 5
    if backend.name == "numpy":
        with pytest.raises(IndexError, match="target holds 5, expected 0 to C - 1 = 4"):
            softmax_cross_entropy(backend.put(y), backend.put(target))
    else:
        value, _ = softmax_cross_entropy(backend.put(y), backend.put(target))
        assert math.isnan(float(backend.host(value)))


def test_bad_arguments():
    y = np.zeros((4, 3))
    with pytest.raises(ValueError, match="target is"):
        squared_error(y, np.zeros((3, 4)))
    with pytest.raises(ValueError, match="target is"):
        softmax_cross_entropy(y, np.zeros((2, 3)))
    with pytest.raises(ValueError, match="weight is"):
        softmax_cross_entropy(y, np.zeros(4, int), weight=np.ones(4))
    with pytest.raises(ValueError, match="mask is"):
        squared_error(y, y, mask=np.ones((9, 9), bool))
    for weight in (np.ones(4), np.ones((2, 4, 3))):
        with pytest.raises(ValueError, match=r"weight is .*, expected \(4, 3\)"):
            squared_error(y, y, weight=weight)
    for scores in (np.array(1.0), np.ones((4, 0))):
        with pytest.raises(ValueError, match=r"y is .*, expected \(..., C\)"):
            softmax_cross_entropy(scores, np.zeros(scores.shape[:-1], int))
    with pytest.raises(TypeError, match="list is no array"):
        squared_error([1.0], [1.0])
    with pytest.raises(TypeError, match="expected a real floating dtype"):
        squared_error(np.zeros(3, int), np.zeros(3, int))
    with pytest.raises(TypeError, match="expected integers"):
        softmax_cross_entropy(y, np.zeros(4))
