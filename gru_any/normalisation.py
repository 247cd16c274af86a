"""Layer normalisation inside the gates, as haste's LayerNormGRU defines it.

Ba et al. 2016 is the source of the normalisation. N gives each row the mean 0 and the variance 1,
over the thirds r, z, n together; the biases are added after it:

    N(v) = e * s                     e = v - mean(v)         s = 1 / sqrt(mean(e^2) + 1e-5)

    a = gain_ih * N(x W^T) + b
    q = gain_hh * N(h U^T)           in place of h U^T in the step

    dv = s * (dn - mean(dn) - e * s^2 * mean(dn * e))       dv stands for dL/dv, dn for dL/dN(v)

Both gains are (3H,). The step is the one with the reset gate after the product: the other has no
h U^T whose thirds could be normalised together.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from .equations import Variant, thirds
from .typing import Array, Namespace, Saved

EPSILON = 1e-5  # haste's, and the default of PyTorch's layer_norm


def mean(xp: Namespace, v: Array) -> Array:
    """(..., N) -> (..., 1)"""
    return xp.mean(v, axis=-1, keepdims=True)


def scale(xp: Namespace, e: Array) -> Array:
    """e (..., N) -> s (..., 1)."""
    return 1.0 / xp.sqrt(mean(xp, e * e) + EPSILON)


def normalise(xp: Namespace, v: Array) -> tuple[Array, Array]:
    """v (..., N) -> N(v), and e (..., N)."""
    e = v - mean(xp, v)
    return e * scale(xp, e), e


def normalise_backward(xp: Namespace, dn: Array, e: Array) -> tuple[Array, Array]:
    """Return dv, and N(v) again."""
    s = scale(xp, e)
    return s * (dn - mean(xp, dn) - e * (s * s * mean(xp, dn * e))), e * s


class KnownProduct:
    """A stand-in for U: `h @ U.T` gives a product that was computed before."""

    __array_ufunc__ = None  # so that NumPy leaves `h @ U` to this class

    def __init__(self, product: Array | float) -> None:
        self.product = product

    @property
    def T(self) -> "KnownProduct":  # noqa: N802, the name of the standard
        """The stand-in itself."""
        return self

    def __rmatmul__(self, left: Array) -> Array:
        return self.product


def joined(xp: Namespace, parts: Sequence[Array]) -> list[Array]:
    """Concatenate each group of three arrays along the last axis."""
    return [xp.concat(parts[n : n + 3], axis=-1) for n in range(0, len(parts), 3)]


@lru_cache(maxsize=64)
def with_layer_norm(variant: Variant) -> Variant:
    """Return the variant that normalises x W^T and h U^T inside of a step.

    A step takes x W^T in place of a, and after c the thirds (H,) of b, gain_ih and gain_hh. The
    backward step takes the thirds of both gains. Beside dh it returns the gradients to x W^T, h U^T
    and both gains, each (B, 3H) and not yet summed over the rows, then da (B, 3H) and dm (B, H).
    """

    def step(xp: Namespace, v: Array, h: Array, U: Any, *vectors: Array) -> tuple[Array, Any]:
        b, gain_ih, gain_hh = joined(xp, vectors[-9:])
        of_h, e_h = normalise(xp, h @ U.T)
        of_x, e_x = normalise(xp, v)
        try:
            new, saved = variant.step(
                xp, gain_ih * of_x + b, h, KnownProduct(gain_hh * of_h), *vectors[:-9]
            )
        except TypeError as e:
            raise TypeError(
                f"layer_norm multiplies states by an object that stands for weights, which arrays "
                f"of {type(h).__module__} refuse ({e}): use another backend"
            ) from e
        return new, (*saved, *thirds(e_x), *thirds(e_h))

    def backward(
        xp: Namespace, g: Array, h: Array, saved: Saved, U: Any, *gains: Array
    ) -> tuple[Array, Any]:
        (gain_ih, gain_hh), (e_x, e_h) = joined(xp, gains), joined(xp, saved[-6:])
        dh, (da, dq) = variant.backward(xp, g, h, saved[:-6], KnownProduct(0.0))
        dx, of_x = normalise_backward(xp, gain_ih * da, e_x)
        dv, of_h = normalise_backward(xp, gain_hh * dq, e_h)
        parts = dx, dv, da * of_x, dq * of_h, da, thirds(dq)[2]
        return dh + dv @ U, parts

    def weights(xp: Namespace, h: Array, saved: Saved, *parts: Array) -> tuple[Array, ...]:
        _, dv, of_ih, of_hh, da, dm = parts
        dc = xp.concat((xp.sum(da[:, : 2 * h.shape[-1]], axis=0), xp.sum(dm, axis=0)), axis=0)
        return dv.T @ h, xp.sum(of_ih, axis=0), xp.sum(of_hh, axis=0), xp.sum(da, axis=0), dc

    return variant._replace(step=step, backward=backward, weights=weights, gains=6)
