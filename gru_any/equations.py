"""The GRU: one step and its gradient, with the reset gate after or before the matrix product.

A step takes the state h of each row of a batch to the next state h'. The part that comes from the
input, a = x W^T + b, is computed outside, for many steps at once. `*` is element by element.

    reset after                              reset before
    Cho et al. 2014, first version;          Cho et al. 2014, third version;
    PyTorch, cuDNN, Keras' default           ONNX's default; the default here

    r  = sigmoid(a_r + h U_r^T)              r  = sigmoid(a_r + h U_r^T)           reset gate
    z  = sigmoid(a_z + h U_z^T)              z  = sigmoid(a_z + h U_z^T)           update gate
    m  = h U_n^T + c                         s  = r * h
    n  = tanh(a_n + r * m)                   n  = tanh(a_n + s U_n^T)              candidate
    h' = z * h + (1 - z) * n                 h' = z * h + (1 - z) * n              z near 1 keeps h

The backward step takes the same lines in reverse. dv stands for dL/dv, and g for dL/dh':

    da_n = g * (1 - z) * (1 - n^2)           da_n = g * (1 - z) * (1 - n^2)        through tanh
    da_z = g * (h - n) * z * (1 - z)         da_z = g * (h - n) * z * (1 - z)      through sigmoid
    dm   = da_n * r                          ds   = da_n U_n
    da_r = da_n * m * r * (1 - r)            da_r = ds * h * r * (1 - r)
    dh   = g * z + (da_r, da_z, dm) U        dh   = g * z + ds * r + (da_r, da_z) U_rz

Shapes, for B rows and H units: h (B, H); a (B, 3H), the thirds r, z, n side by side; U (3H, H), the
thirds r, z, n on top of each other; c (H,). Everything is arithmetic of the Python Array API, and
`xp` is the namespace it runs in. f.gate is sigmoid and f.candidate tanh, or any other functions of
`activations.py`, where y = f(xp, v) has the gradient dv = f.backward(xp, dy, y).
"""

from functools import lru_cache, partial
from typing import NamedTuple

from .activations import USUAL, Activations
from .typing import Array, Namespace, Saved, Step, WeightGradients


def thirds(v: Array) -> tuple[Array, Array, Array]:
    """(..., 3H) -> r, z, n, each (..., H)."""
    H = v.shape[-1] // 3
    return v[..., :H], v[..., H : 2 * H], v[..., 2 * H :]


def halves(v: Array) -> tuple[Array, Array]:
    """(..., 2H) -> r, z, each (..., H)."""
    H = v.shape[-1] // 2
    return v[..., :H], v[..., H:]


def reset_after(
    xp: Namespace, a: Array, h: Array, U: Array, c: Array, f: Activations = USUAL
) -> tuple[Array, tuple[Array, ...]]:
    """Return h' (B, H), and the residuals r, z, n, m."""
    a_r, a_z, a_n = thirds(a)
    q_r, q_z, q_n = thirds(h @ U.T)
    r = f.gate(xp, a_r + q_r)
    z = f.gate(xp, a_z + q_z)
    m = q_n + c
    n = f.candidate(xp, a_n + r * m)
    return z * h + (1.0 - z) * n, (r, z, n, m)


def reset_after_backward(
    xp: Namespace, g: Array, h: Array, saved: Saved, U: Array, f: Activations = USUAL
) -> tuple[Array, tuple[Array, ...]]:
    """Return dh (B, H), and da and dq, each (B, 3H), where q = h U^T."""
    r, z, n, m = saved
    da_n = f.candidate.backward(xp, g * (1.0 - z), n)
    da_z = f.gate.backward(xp, g * (h - n), z)
    dm = da_n * r
    da_r = f.gate.backward(xp, da_n * m, r)
    da = xp.concat((da_r, da_z, da_n), axis=-1)
    dq = xp.concat((da_r, da_z, dm), axis=-1)
    return g * z + dq @ U, (da, dq)


def reset_after_weights(
    xp: Namespace, h: Array, saved: Saved, da: Array, dq: Array
) -> tuple[Array, ...]:
    """Return dL/dU (3H, H) and that of the bias of h U^T (3H,), summed over the rows given."""
    return dq.T @ h, xp.sum(dq, axis=0)


def reset_before(
    xp: Namespace, a: Array, h: Array, U: Array, f: Activations = USUAL
) -> tuple[Array, tuple[Array, ...]]:
    """Return h' (B, H), and the residuals r, z, n, s."""
    H = h.shape[-1]
    a_r, a_z, a_n = thirds(a)
    q_r, q_z = halves(h @ U[: 2 * H, :].T)
    r = f.gate(xp, a_r + q_r)
    z = f.gate(xp, a_z + q_z)
    s = r * h
    n = f.candidate(xp, a_n + s @ U[2 * H :, :].T)
    return z * h + (1.0 - z) * n, (r, z, n, s)


def reset_before_backward(
    xp: Namespace, g: Array, h: Array, saved: Saved, U: Array, f: Activations = USUAL
) -> tuple[Array, tuple[Array, ...]]:
    """Return dh (B, H), and da (B, 3H)."""
    H = h.shape[-1]
    r, z, n, _ = saved
    da_n = f.candidate.backward(xp, g * (1.0 - z), n)
    da_z = f.gate.backward(xp, g * (h - n), z)
    ds = da_n @ U[2 * H :, :]
    da_r = f.gate.backward(xp, ds * h, r)
    da = xp.concat((da_r, da_z, da_n), axis=-1)
    return g * z + ds * r + da[..., : 2 * H] @ U[: 2 * H, :], (da,)


def reset_before_weights(xp: Namespace, h: Array, saved: Saved, da: Array) -> tuple[Array, ...]:
    """Return dL/dU (3H, H), summed over the rows given."""
    H = h.shape[-1]
    s = saved[3]
    return (xp.concat((da[:, : 2 * H].T @ h, da[:, 2 * H :].T @ s), axis=0),)


class Variant(NamedTuple):
    """The functions of a variant."""

    step: Step
    backward: Step  # the gradient of a step
    weights: WeightGradients  # the gradient to U and to the bias of h U^T
    reads: tuple[int, ...] = ()  # indices of the residuals that products with U read, beside h
    gains: int = 0  # how many of a step's last vectors `backward` takes too; see normalisation.py


def variant(after: bool, f: Activations = USUAL) -> Variant:
    """Return the equations with the reset gate after (True) or before (False) the product."""
    if after:
        found = Variant(reset_after, reset_after_backward, reset_after_weights)
    else:
        found = Variant(reset_before, reset_before_backward, reset_before_weights, (3,))
    return found if f is USUAL else with_activations(found, f)


@lru_cache(maxsize=64)
def with_activations(usual: Variant, f: Activations) -> Variant:
    """Return the equations with other activations; cached, so that equal ones share code."""
    return usual._replace(step=partial(usual.step, f=f), backward=partial(usual.backward, f=f))
