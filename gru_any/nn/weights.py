"""The parameters of one layer in one direction: names, shapes, and what a sweep makes of them."""

from collections.abc import Callable
from typing import Any

from .sweep import Weights


def parameter_shapes(I: int, H: int, bias: bool, reset_after: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of the parameters of one layer in one direction."""
    shapes: dict[str, tuple[int, ...]] = {"weight_ih": (3 * H, I), "weight_hh": (3 * H, H)}
    if bias:
        shapes["bias_ih"] = (3 * H,)
    if bias and reset_after:
        shapes["bias_hh"] = (3 * H,)
    return shapes


def weights(xp: Any, get: Callable[[str], Any], bias: bool, reset_after: bool) -> Weights:
    """What a sweep needs, from the named parameters.

    The bias of h U^T is added outside the loop, but for the candidate's third, which r multiplies.
    """
    W, U = get("weight_ih"), get("weight_hh")
    b = get("bias_ih") if bias else None
    if not reset_after:
        return Weights(W, b, (U,))
    H = U.shape[-1]
    if b is None:
        return Weights(W, None, (U, xp.zeros_like(U[:H, 0])))
    c = get("bias_hh")
    b = xp.concat((b[: 2 * H] + c[: 2 * H], b[2 * H :]))
    return Weights(W, b, (U, c[2 * H :]))


def variant_advice(missing: set[str], unused: set[str]) -> str:
    """What to say when weights are of the other variant."""
    if any("bias_hh" in name for name in unused):
        return (
            "; bias_hh belongs to reset_after=True, which PyTorch's and most of Keras' weights need"
        )
    if any("bias_hh" in name for name in missing):
        return "; weights without bias_hh belong to reset_after=False"
    return ""
