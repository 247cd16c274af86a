"""Regularisation of the recurrence: functions around the steps of a variant.

Each takes a variant and returns one whose steps take one more argument at the end, a mask.

    recurrent dropout                        zoneout
    Gal and Ghahramani 2016, the masks       Krueger et al. 2016
    of all gates tied

    h' = step(a, h, U diag(d))               h' = k * h + (1 - k) * step(a, h, U)
    d = 0 with probability p,                k = 1 with probability p, else 0;
    else 1 / (1 - p); of a sequence          of a step; p itself at inference

    dh = backward(g, h, U diag(d))           dh = k * g + backward((1 - k) * g, h, U)

U diag(d) leaves out columns of U: the operands of the products with U are multiplied by d, while
z * h, which carries the state over, is not. d and k are (B, H), so that each row has its own.
"""

from functools import lru_cache
from typing import Any

from .equations import Variant
from .typing import Array, Namespace, Saved


class MaskedColumns:
    """U diag(d) for each row of a batch: products with it apply d (B, H) to the other operand."""

    __array_ufunc__ = None  # so that NumPy leaves `h @ U` to this class

    def __init__(self, U: Any, d: Array, transposed: bool = False) -> None:
        self.U, self.d, self.transposed = U, d, transposed

    def __getitem__(self, rows: Any) -> "MaskedColumns":
        return MaskedColumns(self.U[rows], self.d)

    @property
    def T(self) -> "MaskedColumns":  # noqa: N802, the name of the standard
        """diag(d) U^T."""
        return MaskedColumns(self.U, self.d, not self.transposed)

    def __rmatmul__(self, left: Array) -> Array:
        return (left * self.d) @ self.U.T if self.transposed else (left @ self.U) * self.d


@lru_cache(maxsize=64)
def recurrent_dropout(variant: Variant) -> Variant:
    """Return the variant whose steps take d (B, H): they read U diag(d) in place of U."""

    def step(xp: Namespace, a: Array, h: Array, U: Any, *others: Array) -> tuple[Array, Any]:
        *vectors, d = others
        try:
            return variant.step(xp, a, h, MaskedColumns(U, d), *vectors)
        except TypeError as e:
            raise TypeError(
                f"recurrent_dropout multiplies states by an object that stands for weights, which "
                f"arrays of {type(h).__module__} refuse ({e}): train on another backend"
            ) from e

    def backward(
        xp: Namespace, g: Array, h: Array, saved: Saved, U: Any, *others: Array
    ) -> tuple[Array, Any]:
        *given, d = others
        return variant.backward(xp, g, h, saved, MaskedColumns(U, d), *given)

    return variant._replace(step=step, backward=backward)


@lru_cache(maxsize=64)
def zoneout(variant: Variant) -> Variant:
    """Return the variant whose steps take k (B, H), the share of the old state that is kept."""

    def step(xp: Namespace, a: Array, h: Array, U: Any, *others: Any) -> tuple[Array, Any]:
        *given, k = others
        new, saved = variant.step(xp, a, h, U, *given)
        return k * h + (1.0 - k) * new, saved

    def backward(
        xp: Namespace, g: Array, h: Array, saved: Saved, U: Any, *others: Any
    ) -> tuple[Array, Any]:
        *given, k = others
        dh, parts = variant.backward(xp, (1.0 - k) * g, h, saved, U, *given)
        return k * g + dh, parts

    return variant._replace(step=step, backward=backward)


@lru_cache(maxsize=64)
def expected_zoneout(variant: Variant, p: float) -> Variant:
    """Return the variant as inference runs it: each unit keeps the share p of its old state."""
    zoned = zoneout(variant)

    def step(xp: Namespace, *arguments: Array) -> tuple[Array, Any]:
        return zoned.step(xp, *arguments, p)

    def backward(xp: Namespace, *arguments: Any) -> tuple[Array, Any]:
        return zoned.backward(xp, *arguments, p)

    return variant._replace(step=step, backward=backward)
