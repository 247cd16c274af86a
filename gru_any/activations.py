"""The functions that gates and candidate are made of, each with its gradient.

    y = f(v)        dv = dy * f'(v), with f'(v) written from y, so that a step need not keep v

dv stands for dL/dv. Names, alpha and beta are those of ONNX's operator GRU, which defines these
functions. Everything is element by element, in the namespace `xp`.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple, TypeAlias

from .typing import Array, Namespace

Function: TypeAlias = Callable[..., Array]


def positive(xp: Namespace, v: Array) -> Array:
    """max(v, 0)"""
    return xp.where(v < 0.0, xp.zeros_like(v), v)


def negative(xp: Namespace, v: Array) -> Array:
    """min(v, 0)"""
    return xp.where(v > 0.0, xp.zeros_like(v), v)


def magnitude(xp: Namespace, v: Array) -> Array:
    """|v|"""
    return xp.where(v < 0.0, 0.0 - v, v)


def where_positive(xp: Namespace, dy: Array, y: Array) -> Array:
    """dy where y > 0, else 0"""
    return xp.where(y > 0.0, dy, xp.zeros_like(dy))


def sigmoid(xp: Namespace, v: Array) -> Array:
    """1 / (1 + exp(-v)), written so that nothing overflows."""
    return 0.5 + 0.5 * xp.tanh(0.5 * v)


def sigmoid_gradient(xp: Namespace, dy: Array, y: Array) -> Array:
    """f' = y (1 - y)"""
    return dy * y * (1.0 - y)


def tanh(xp: Namespace, v: Array) -> Array:
    """(exp(v) - exp(-v)) / (exp(v) + exp(-v))"""
    return xp.tanh(v)


def tanh_gradient(xp: Namespace, dy: Array, y: Array) -> Array:
    """f' = 1 - y^2"""
    return dy * (1.0 - y * y)


def relu(xp: Namespace, v: Array) -> Array:
    """max(v, 0)"""
    return positive(xp, v)


def relu_gradient(xp: Namespace, dy: Array, y: Array) -> Array:
    """f' = 1 where y > 0, else 0"""
    return where_positive(xp, dy, y)


def affine(xp: Namespace, v: Array, alpha: float, beta: float) -> Array:
    """alpha * v + beta"""
    return alpha * v + beta


def affine_gradient(xp: Namespace, dy: Array, y: Array, alpha: float, beta: float) -> Array:
    """f' = alpha"""
    return alpha * dy


def leaky_relu(xp: Namespace, v: Array, alpha: float) -> Array:
    """v where v > 0, else alpha * v"""
    return positive(xp, v) + alpha * negative(xp, v)


def leaky_relu_gradient(xp: Namespace, dy: Array, y: Array, alpha: float) -> Array:
    """f' = 1 where y > 0, else alpha"""
    return xp.where(y > 0.0, dy, alpha * dy)


def thresholded_relu(xp: Namespace, v: Array, alpha: float) -> Array:
    """v where v > alpha, else 0"""
    return xp.where(v > alpha, v, xp.zeros_like(v))


def thresholded_relu_gradient(xp: Namespace, dy: Array, y: Array, alpha: float) -> Array:
    """f' = 1 where y > 0, else 0"""
    return where_positive(xp, dy, y)


def scaled_tanh(xp: Namespace, v: Array, alpha: float, beta: float) -> Array:
    """alpha * tanh(beta * v)"""
    return alpha * xp.tanh(beta * v)


def scaled_tanh_gradient(xp: Namespace, dy: Array, y: Array, alpha: float, beta: float) -> Array:
    """f' = alpha * beta * (1 - (y / alpha)^2)"""
    return dy * (alpha * beta - (beta / alpha) * y * y)


def hard_sigmoid(xp: Namespace, v: Array, alpha: float, beta: float) -> Array:
    """alpha * v + beta, at least 0 and at most 1"""
    y = positive(xp, alpha * v + beta)
    return xp.where(y > 1.0, xp.full_like(y, 1.0), y)


def hard_sigmoid_gradient(xp: Namespace, dy: Array, y: Array, alpha: float, beta: float) -> Array:
    """f' = alpha where 0 < y < 1, else 0"""
    return alpha * where_positive(xp, where_positive(xp, dy, y), 1.0 - y)


def elu(xp: Namespace, v: Array, alpha: float) -> Array:
    """v where v > 0, else alpha * (exp(v) - 1)"""
    return positive(xp, v) + alpha * xp.expm1(negative(xp, v))


def elu_gradient(xp: Namespace, dy: Array, y: Array, alpha: float) -> Array:
    """f' = 1 where y > 0, else y + alpha"""
    return xp.where(y > 0.0, dy, dy * (y + alpha))


def softsign(xp: Namespace, v: Array) -> Array:
    """v / (1 + |v|)"""
    return v / (1.0 + magnitude(xp, v))


def softsign_gradient(xp: Namespace, dy: Array, y: Array) -> Array:
    """f' = (1 - |y|)^2"""
    return dy * (1.0 - magnitude(xp, y)) * (1.0 - magnitude(xp, y))


def softplus(xp: Namespace, v: Array) -> Array:
    """log(1 + exp(v)), written so that nothing overflows."""
    return positive(xp, v) + xp.log1p(xp.exp(0.0 - magnitude(xp, v)))


def softplus_gradient(xp: Namespace, dy: Array, y: Array) -> Array:
    """f' = 1 - exp(-y)"""
    return (0.0 - dy) * xp.expm1(0.0 - y)


class Definition(NamedTuple):
    """A function (xp, v, *numbers) -> y and its gradient (xp, dy, y, *numbers) -> dv."""

    function: Function
    gradient: Function
    numbers: tuple[str, ...] = ()


DEFINITIONS = {
    "sigmoid": Definition(sigmoid, sigmoid_gradient),
    "tanh": Definition(tanh, tanh_gradient),
    "relu": Definition(relu, relu_gradient),
    "affine": Definition(affine, affine_gradient, ("alpha", "beta")),
    "leaky_relu": Definition(leaky_relu, leaky_relu_gradient, ("alpha",)),
    "thresholded_relu": Definition(thresholded_relu, thresholded_relu_gradient, ("alpha",)),
    "scaled_tanh": Definition(scaled_tanh, scaled_tanh_gradient, ("alpha", "beta")),
    "hard_sigmoid": Definition(hard_sigmoid, hard_sigmoid_gradient, ("alpha", "beta")),
    "elu": Definition(elu, elu_gradient, ("alpha",)),
    "softsign": Definition(softsign, softsign_gradient),
    "softplus": Definition(softplus, softplus_gradient),
}


class Activation(NamedTuple):
    """A function of `DEFINITIONS` with its numbers, such as Activation("elu", (1.0,)).

    clip: v is first bounded by -clip and clip, and its gradient is 0 where that changed it. Since f
    is monotone, y shows where: it equals f(clip) or f(-clip), the same floats in both passes.
    """

    name: str
    numbers: tuple[float, ...] = ()  # alpha, beta
    clip: float | None = None

    def __call__(self, xp: Namespace, v: Array) -> Array:
        """Return y."""
        y = DEFINITIONS[self.name].function(xp, v, *self.numbers)
        if self.clip is None:
            return y
        first, last = self.ends
        y = xp.where(v > self.clip, xp.full_like(y, last), y)
        return xp.where(v < -self.clip, xp.full_like(y, first), y)

    def backward(self, xp: Namespace, dy: Array, y: Array) -> Array:
        """Return dv."""
        dv = DEFINITIONS[self.name].gradient(xp, dy, y, *self.numbers)
        if self.clip is None:
            return dv
        lowest, highest = sorted(self.ends)
        dv = where_positive(xp, dv, highest - y)
        return where_positive(xp, dv, y - lowest)

    @property
    def ends(self) -> tuple[float, float]:
        """f(-clip) and f(clip)."""
        f, clip = DEFINITIONS[self.name].function, self.clip or 0.0
        return f(NUMBERS, -clip, *self.numbers), f(NUMBERS, clip, *self.numbers)


# the namespace of Python's floats
NUMBERS = SimpleNamespace(
    tanh=math.tanh,
    exp=math.exp,
    expm1=math.expm1,
    log1p=math.log1p,
    where=lambda condition, x, y: x if condition else y,
    zeros_like=lambda v: 0.0,
    full_like=lambda v, number: number,
)


class Activations(NamedTuple):
    """The activations of a GRU."""

    gate: Activation  # of r and z
    candidate: Activation  # of n


USUAL = Activations(Activation("sigmoid"), Activation("tanh"))
