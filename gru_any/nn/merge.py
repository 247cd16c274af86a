"""How the outputs of two directions become one, and the gradient of that.

a is the output of the forward direction and b that of the reverse one, both for the same steps.

    concat   y = (a, b), side by side        da, db = the halves of dy
    sum      y = a + b                       da = dy          db = dy
    mean     y = (a + b) / 2                 da = dy / 2      db = dy / 2
    mul      y = a * b                       da = dy * b      db = dy * a
"""

from collections.abc import Sequence

from ..typing import Array, Namespace

MODES = "concat", "sum", "mean", "mul"


def merge(xp: Namespace, mode: str, parts: Sequence[Array]) -> Array:
    """Return y of a and b, each (..., H)."""
    if mode == "concat":
        return xp.concat(parts, axis=-1)
    a, b = parts
    if mode == "mul":
        return a * b
    return a + b if mode == "sum" else 0.5 * (a + b)


def merge_backward(mode: str, dy: Array, parts: Sequence[Array] | None = None) -> list[Array]:
    """Return da and db of dy; parts: a and b, which only "mul" needs."""
    if mode == "concat":
        H = dy.shape[-1] // 2
        return [dy[..., :H], dy[..., H:]]
    if mode == "mul" and parts is not None:
        a, b = parts
        return [dy * b, dy * a]
    return [dy, dy] if mode == "sum" else [0.5 * dy] * 2
