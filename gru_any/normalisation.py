"""Layer normalisation inside the gates, as haste's LayerNormGRU defines it.

Ba et al. 2016 is the source of the normalisation. N gives each row the mean 0 and the variance 1,
over the thirds r, z, n together; the biases are added after it:

    N(v) = (v - mean(v)) * s                          s = 1 / sqrt(mean((v - mean(v))^2) + 1e-5)

    a = gain_ih * N(x W^T) + b                        outside of the step, for many steps at once
    q = gain_hh * N(h U^T)                            in place of h U^T in the step

    dv = s * (dn - mean(dn) - n * mean(dn * n))       n = N(v); dv stands for dL/dv, dn for dL/dn

Both gains are (3H,). The step is the one with the reset gate after the product: the other has no
h U^T whose thirds could be normalised together.
"""

from functools import lru_cache
from typing import Any, NamedTuple

from .equations import Variant
from .typing import Array, Namespace, Saved

EPSILON = 1e-5  # haste's, and the default of PyTorch's layer_norm


def mean(xp: Namespace, v: Array) -> Array:
    """(..., N) -> (..., 1)"""
    return xp.sum(v, axis=-1, keepdims=True) / v.shape[-1]


def normalise(xp: Namespace, v: Array) -> tuple[Array, Array]:
    """v (..., N) -> N(v), and s (..., 1)."""
    centred = v - mean(xp, v)
    s = 1.0 / xp.sqrt(mean(xp, centred * centred) + EPSILON)
    return centred * s, s


def normalise_backward(xp: Namespace, dn: Array, n: Array, s: Array) -> Array:
    """Its gradient: dv."""
    return s * (dn - mean(xp, dn) - n * mean(xp, dn * n))


class Gains(NamedTuple):
    """Those of one layer in one direction."""

    ih: Array  # (3H,)
    hh: Array  # (3H,)

    def entering(self, xp: Namespace, v: Array, b: Array | None) -> Array:
        """Return a (K, B, 3H) of v = x W^T."""
        n, _ = normalise(xp, v)
        return self.ih * n if b is None else self.ih * n + b

    def entering_backward(
        self, xp: Namespace, v: Array, parts: tuple[Array, ...]
    ) -> tuple[Array, ...]:
        """Return what a step's gradient gave, dv in place of da; and the gain's part, and da."""
        da, *others = parts
        n, s = normalise(xp, v)
        return normalise_backward(xp, self.ih * da, n, s), *others, da * n, da


class Known:
    """What stands for U in a step where the product with it is known."""

    __array_ufunc__ = None  # so that NumPy leaves `h @ U` to this class

    def __init__(self, product: Array | float) -> None:
        self.product = product

    @property
    def T(self) -> "Known":  # noqa: N802, the name of the standard
        """The same."""
        return self

    def __rmatmul__(self, left: Array) -> Array:
        return self.product


@lru_cache(maxsize=64)
def with_layer_norm(variant: Variant) -> Variant:
    """Return the variant whose steps take gain_hh (3H,) after their biases.

    Beside da and dq, its gradient gives dv, v = h U^T, and that to the gain, each (B, 3H); and its
    weights take the parts that `Gains.entering_backward` returns.
    """

    def step(xp: Namespace, a: Array, h: Array, U: Any, *others: Array) -> tuple[Array, Any]:
        *c, gain = others
        n, s = normalise(xp, h @ U.T)
        try:
            new, saved = variant.step(xp, a, h, Known(gain * n), *c)
        except TypeError as e:
            raise TypeError(
                f"layer_norm multiplies states by an object that stands for weights, which arrays "
                f"of {type(h).__module__} refuse ({e}): use another backend"
            ) from e
        return new, (*saved, n, s)

    def backward(
        xp: Namespace, g: Array, h: Array, saved: Saved, U: Any, gain: Array
    ) -> tuple[Array, Any]:
        *own, n, s = saved
        dh, (da, dq) = variant.backward(xp, g, h, own, Known(0.0))
        dv = normalise_backward(xp, gain * dq, n, s)
        return dh + dv @ U, (da, dq, dv, dq * n)

    def weights(xp: Namespace, h: Array, saved: Saved, *parts: Array) -> tuple[Array, ...]:
        _, dq, dv, of_hh, of_ih, da = parts
        return dv.T @ h, *(xp.sum(v, axis=0) for v in (of_ih, of_hh, da, dq))

    return variant._replace(step=step, backward=backward, weights=weights)
