"""Proof by numbers: the gradient of a layer against differences of its forward call."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .. import arguments
from ..backend import to_numpy

TOLERANCE = {"central": 1e-7, "complex": 1e-12}
CENTRAL, COMPLEX = 1e-3, 1e-30  # the length of a step, for inputs of about 1


class GradientError(AssertionError):
    """A gradient differs from the slope it should be."""


def gradcheck(
    layer: Any,
    *inputs: Any,
    method: str = "central",
    directions: int = 2,
    seed: int = 0,
    vanishing: Iterable[str] = (),
    **options: Any,
) -> dict[str, float]:
    """Compare each gradient of `layer` with the slope of its forward call along random directions.

    A random cotangent c makes one number of the outputs, f = sum(c * y). For each parameter and
    each input, g = df/d(it) is what the pullback returns. Along a random direction v the slope of f
    is sum(g * v); it is measured by differences of the plain call, in float64 whatever the
    layer's dtype. The error is |sum(g * v) - slope| / (|g| |v|).

    Parameters
    ----------
    layer
        Whatever has the `vjp` of this library: GRU, GRUCell, Linear, Embedding, Chain.
    *inputs : arrays, lists of arrays or None
        What `vjp` is called with, in order. Integer inputs are passed on and not checked.
    method : "central" or "complex"
        Central differences of fourth order; or the complex step (Squire and Trapp 1998), which is
        exact to rounding and needs a backend with complex numbers.
    directions, seed : int
        How many directions for each array, and where they come from.
    vanishing : names
        Gradients that are expected to be exactly 0; of any other that is an error.
    **options
        Passed on by name to `vjp` and to the call, such as `lengths`.

    Returns
    -------
    dict
        The largest error of each parameter and input; inputs are named `input0`, `input1`...

    Raises
    ------
    GradientError
        An error is above 1e-7 (central) or 1e-12 (complex), or a gradient vanishes.

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any import GRU, gradcheck
    >>> x = np.random.default_rng(0).standard_normal((5, 2, 3))
    >>> errors = gradcheck(GRU(3, 4, seed=0), x, method="complex")
    >>> list(errors), max(errors.values()) < 1e-12
    (['weight_ih_l0', 'weight_hh_l0', 'bias_ih_l0', 'input0'], True)
    """
    if method not in TOLERANCE:
        raise ValueError(f"method is {method!r}, expected 'central' or 'complex'")
    rng = arguments.seed(seed)
    twin = layer.to(dtype="float64")
    points = {f"{k}": to_numpy(v) for k, v in twin.params.items()} | _flat("input", inputs)
    points = {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in points.items()}
    outputs, pullback = twin.vjp(*_filled(twin, inputs, points, "float64"), **options)
    cotangents = {k: rng.standard_normal(v.shape) for k, v in _flat("output", (outputs,)).items()}
    filled = _filled(twin, (outputs,), cotangents, "float64", "output")[0]
    grads, *dinputs = pullback(*filled) if isinstance(filled, tuple) else pullback(filled)
    found = {k: to_numpy(v) for k, v in grads.items()} | _flat("input", tuple(dinputs))
    slope = _slope(layer, inputs, points, cotangents, options, method)
    errors = {
        name: max(_error(found[name], slope, name, rng) for _ in range(directions))
        for name in points
        if points[name].dtype.kind == "f" and (name in found or name in grads)
    }
    _judge(errors, found, TOLERANCE[method], set(vanishing))
    return errors


def _error(grad: Any, slope: Callable[[str, Any], float], name: str, rng: Any) -> float:
    """How far sum(g * v) is from the slope along one random v."""
    v = rng.standard_normal(grad.shape)
    scale = np.linalg.norm(grad) * np.linalg.norm(v)
    difference = abs(float(np.sum(grad * v)) - slope(name, v))
    return float(difference / scale if scale else difference)


def _slope(
    layer: Any, inputs: Any, points: Any, cotangents: Any, options: Any, method: str
) -> Callable[[str, Any], float]:
    """Return slope(name, v): the derivative of f along v in the array of this name."""
    twin = layer.to(dtype="complex128" if method == "complex" else "float64")

    def f(name: str, moved: Any) -> Any:
        values = points | {name: moved}
        for k in twin.params:
            twin.params[k] = twin.backend.put(values[k], twin.dtype)
        outputs = _flat("output", (twin(*_filled(twin, inputs, values, twin.dtype), **options),))
        return sum(np.sum(cotangents[k] * outputs[k]) for k in outputs)

    def slope(name: str, v: Any) -> float:
        if method == "complex":
            return float(np.imag(f(name, points[name] + 1j * COMPLEX * v)) / COMPLEX)
        near, far = (
            f(name, points[name] + e * v) - f(name, points[name] - e * v)
            for e in (CENTRAL, 2 * CENTRAL)
        )
        return float((8 * near - far) / (12 * CENTRAL))

    return slope


def _judge(errors: dict[str, float], found: Any, tolerance: float, vanishing: set[str]) -> None:
    for name, error in errors.items():
        zero = not np.any(found[name])
        if zero != (name in vanishing):
            raise GradientError(f"the gradient to {name} is {'' if zero else 'not '}exactly 0")
        if not error <= tolerance:
            raise GradientError(
                f"the gradient to {name} is off by {error:.1e}, {tolerance:.0e} allowed"
            )


def _flat(name: str, values: Any) -> dict[str, Any]:
    """Nested tuples and lists of arrays -> name -> host array, such as output0.1."""
    flat: dict[str, Any] = {}
    for i, value in enumerate(values):
        if isinstance(value, (tuple, list)):
            flat |= {f"{name}{i}.{k}": v for k, v in _flat("", value).items()}
        elif value is not None:
            flat[f"{name}{i}"] = to_numpy(value)
    return flat


def _filled(layer: Any, values: Any, arrays: Any, dtype: str, name: str = "input") -> Any:
    """The structure of `values`, with arrays of the layer's backend taken from `arrays`."""

    def fill(value: Any, key: str) -> Any:
        if isinstance(value, (tuple, list)):
            start = key + "."
            return type(value)(fill(v, f"{start}{i}") for i, v in enumerate(value))
        if value is None or arrays[key].dtype.kind not in "fc":
            return value
        return layer.backend.put(arrays[key], dtype)

    return tuple(fill(value, f"{name}{i}") for i, value in enumerate(values))
