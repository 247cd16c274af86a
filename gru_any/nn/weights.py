"""The parameters of one layer in one direction: names, shapes, and what a sweep makes of them."""

from functools import cache

from ..equations import thirds
from ..typing import Array, Namespace, Shape
from .sweep import Weights


def parameter_shapes(
    I: int, H: int, bias: bool, reset_after: bool, layer_norm: bool = False
) -> dict[str, Shape]:
    """Return the name and shape of each parameter of one layer in one direction."""
    shapes: dict[str, Shape] = {"weight_ih": (3 * H, I), "weight_hh": (3 * H, H)}
    if layer_norm:
        shapes |= {"gain_ih": (3 * H,), "gain_hh": (3 * H,)}
    if bias:
        shapes["bias_ih"] = (3 * H,)
    if bias and reset_after:
        shapes["bias_hh"] = (3 * H,)
    return shapes


@cache
def parameter_names(
    bias: bool, reset_after: bool, layer: int, suffix: str, layer_norm: bool = False
) -> tuple[str, ...]:
    """Return the names in a GRU of the parameters of one layer in one direction."""
    shapes = parameter_shapes(1, 1, bias, reset_after, layer_norm)
    return tuple(f"{name}_l{layer}{suffix}" for name in shapes)


def weights(
    xp: Namespace,
    reset_after: bool,
    W: Array,
    U: Array,
    b: Array | None = None,
    c: Array | None = None,
) -> Weights:
    """Return the weights of a sweep, made of parameters in the order of `parameter_shapes`.

    Gains are not among them. With reset_after two thirds of c, the bias of h U^T, are added outside
    of the loop over the steps; r multiplies the candidate's third.
    """
    if not reset_after:
        return Weights(W, b, (U,))
    H = U.shape[-1]
    if b is None or c is None:
        return Weights(W, None, (U, xp.zeros_like(U[:H, 0])))
    b = xp.concat((b[: 2 * H] + c[: 2 * H], b[2 * H :]))
    return Weights(W, b, (U, c[2 * H :]))


def normalised_weights(xp: Namespace, W: Array, U: Array, *others: Array) -> Weights:
    """Return the weights of a sweep with layer normalisation, whose steps take biases and gains."""
    *gains, b, c = others if len(others) == 4 else (*others, None, None)
    W, b, recurrent = weights(xp, True, W, U, b, c)
    b = xp.zeros_like(gains[0]) if b is None else b
    return Weights(W, None, (*recurrent, *(part for v in (b, *gains) for part in thirds(v))))


def variant_advice(missing: set[str], unused: set[str]) -> str:
    """Return a hint for an error where the weights fit another setting, else ""."""
    if any("bias_hh" in name for name in unused):
        return (
            "; bias_hh belongs to reset_after=True, which PyTorch's and most of Keras' weights need"
        )
    if any(name.startswith("gain_") for name in unused):
        return "; gain_ih and gain_hh belong to layer_norm=True"
    if any("bias_hh" in name for name in missing):
        return "; weights without bias_hh belong to reset_after=False"
    return ""
