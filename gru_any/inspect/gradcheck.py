"""Numerical gradient checks: the gradients of a layer against differences of its forward call."""

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, Protocol, TypeAlias

import numpy as np

from .. import arguments
from ..backend import Backend, to_numpy
from ..typing import Array, HostArray, Rng

TOLERANCE = {"central": 1e-7, "complex": 1e-12}
CENTRAL, COMPLEX = 1e-3, 1e-30  # step lengths, for inputs of about 1
Tree: TypeAlias = Any  # an array, None, or tuples and lists of them
HostArrays: TypeAlias = Mapping[str, HostArray]
Slope: TypeAlias = Callable[[str, HostArray], float]


class Differentiable(Protocol):
    """What can be checked: a layer, a Chain, or anything else with these methods."""

    @property
    def params(self) -> MutableMapping[str, Array]:
        """The parameters by name."""

    @property
    def backend(self) -> Backend:
        """The backend of the parameters."""

    @property
    def dtype(self) -> str:
        """The name of their dtype."""

    @property
    def vjp(self) -> Callable[..., tuple[Tree, Callable[..., tuple[Any, ...]]]]:
        """`outputs, pullback = vjp(*inputs)`, where `grads, *dinputs = pullback(*doutputs)`."""

    def __call__(self, *inputs: Any, **options: Any) -> Tree:
        """Return the outputs."""

    def to(self, *, dtype: str) -> "Differentiable":
        """Return a copy of this dtype."""


class GradientError(AssertionError):
    """A gradient differs from the measured slope."""


def gradcheck(
    layer: Differentiable,
    *inputs: Tree,
    method: str = "central",
    directions: int = 2,
    seed: int = 0,
    vanishing: Iterable[str] = (),
    start: Tree = None,
    **options: object,
) -> dict[str, float]:
    """Compare each gradient of `layer` with the slope of its forward call along random directions.

    A random cotangent c reduces the outputs to a scalar, f = sum(c * y). The pullback returns g,
    the gradient of f to each parameter and each input. Along a random direction v the slope of f is
    sum(g * v); it is measured by differences of the plain call, in float64 whatever the layer's
    dtype. The error is |sum(g * v) - slope| / (|g| |v|).

    Parameters
    ----------
    layer
        Anything with the `vjp` of this library: GRU, GRUCell, Linear, Embedding, Chain.
    *inputs : arrays, lists of arrays or None
        The arguments of `vjp`, in order. Integer inputs are passed on and not checked.
    method : "central" or "complex"
        Central differences of fourth order; or the complex step (Squire and Trapp 1998), which is
        exact to rounding and needs a backend with complex numbers.
    directions, seed : int
        The number of directions for each array, and the seed they are drawn with.
    vanishing : names, as the result has them
        Gradients that must be exactly 0; no other may be.
    start : array, list of arrays or None
        The argument of this name of a GRU or Chain, whose gradient is checked too.
    **options
        Other keyword arguments for `vjp` and the plain call, such as `lengths` and `resets`.

    Returns
    -------
    dict
        The largest error of each parameter and input; inputs are named `input0`, `input1`... and
        `start`; what a list holds has a number more, as in `start.0`.

    Raises
    ------
    GradientError
        An error is above 1e-7 (central) or 1e-12 (complex), or a gradient vanishes that is not
        among `vanishing`, or does not that is.
    ValueError, TypeError
        An argument is none of the above, such as an unknown name in `vanishing`.

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
    if not hasattr(layer, "vjp"):
        kind = type(layer).__name__
        raise TypeError(f"layer is a {kind}, expected a layer or Chain: gradcheck(model, x)")
    if isinstance(vanishing, str):
        raise TypeError(f"vanishing is {vanishing!r}, expected a list of names: [{vanishing!r}]")
    directions, rng = arguments.size("directions", directions), arguments.seed(seed)
    twin = layer.to(dtype="float64")
    given = {**_numbered(inputs), **({} if start is None else {"start": start})}
    points = {f"{k}": to_numpy(v) for k, v in twin.params.items()} | _flat(given)
    points = {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in points.items()}
    outputs, pullback = _call(twin.vjp, _filled(twin, given, points, "float64"), options)
    cotangents = {
        k: rng.standard_normal(tuple(v.shape)) for k, v in _flat({"output": outputs}).items()
    }
    filled = _filled(twin, {"output": outputs}, cotangents, "float64")["output"]
    grads, *dinputs = pullback(*filled) if isinstance(filled, tuple) else pullback(filled)
    found = {k: to_numpy(v) for k, v in grads.items()}
    if start is not None:
        found |= _flat({"start": dinputs.pop()})
    found |= _flat(_numbered(dinputs))
    slope = _slope(layer, given, points, cotangents, options, method)
    errors = {
        name: max(_error(found[name], slope, name, rng) for _ in range(directions))
        for name in points
        if points[name].dtype.kind == "f" and (name in found or name in grads)
    }
    expected = set(vanishing)
    if unknown := expected - set(errors):
        raise ValueError(f"vanishing holds {sorted(unknown)}, expected some of {list(errors)}")
    _judge(errors, found, TOLERANCE[method], expected)
    return errors


def _error(grad: HostArray, slope: Slope, name: str, rng: Rng) -> float:
    """Return the relative error of sum(g * v) against the slope along one random v."""
    v = rng.standard_normal(tuple(grad.shape))
    scale = np.linalg.norm(grad) * np.linalg.norm(v)
    difference = abs(float(np.sum(grad * v)) - slope(name, v))
    return float(difference / scale if scale else difference)


def _slope(
    layer: Differentiable,
    given: Mapping[str, Tree],
    points: HostArrays,
    cotangents: HostArrays,
    options: Mapping[str, object],
    method: str,
) -> Slope:
    """Return slope(name, v): the derivative of f along v in the array of this name."""
    twin = layer.to(dtype="complex128" if method == "complex" else "float64")

    def f(name: str, moved: HostArray) -> Any:
        values = {**points, name: moved}
        for k in twin.params:
            twin.params[k] = twin.backend.put(values[k], twin.dtype)
        found = _call(twin, _filled(twin, given, values, twin.dtype), options)
        outputs = _flat({"output": found})
        return sum(np.sum(cotangents[k] * outputs[k]) for k in outputs)

    def slope(name: str, v: HostArray) -> float:
        if method == "complex":
            return float(np.imag(f(name, points[name] + 1j * COMPLEX * v)) / COMPLEX)
        near, far = (
            f(name, points[name] + e * v) - f(name, points[name] - e * v)
            for e in (CENTRAL, 2 * CENTRAL)
        )
        return float((8 * near - far) / (12 * CENTRAL))

    return slope


def _judge(
    errors: dict[str, float], found: HostArrays, tolerance: float, vanishing: set[str]
) -> None:
    for name, error in errors.items():
        zero = not np.any(found[name])
        if zero != (name in vanishing):
            raise GradientError(f"the gradient to {name} is {'' if zero else 'not '}exactly 0")
        if not error <= tolerance:
            raise GradientError(
                f"the gradient to {name} is off by {error:.1e}, {tolerance:.0e} allowed"
            )


def _numbered(inputs: Iterable[Tree]) -> dict[str, Tree]:
    """Name the positional arguments."""
    return {f"input{i}": value for i, value in enumerate(inputs)}


def _call(
    function: Callable[..., Any], given: Mapping[str, Tree], options: Mapping[str, object]
) -> Any:
    """Call a function with its inputs by position, and a start by keyword."""
    start = {name: v for name, v in given.items() if name == "start"}
    return function(*(v for name, v in given.items() if name not in start), **start, **options)


def _flat(values: Mapping[str, Tree]) -> dict[str, HostArray]:
    """Flatten nested tuples and lists of arrays to host arrays by names such as output.1."""
    flat: dict[str, HostArray] = {}
    for name, value in values.items():
        if isinstance(value, (tuple, list)):
            flat |= _flat({f"{name}.{i}": v for i, v in enumerate(value)})
        elif value is not None:
            flat[name] = to_numpy(value)
    return flat


def _filled(
    layer: Differentiable, values: Mapping[str, Tree], arrays: HostArrays, dtype: str
) -> dict[str, Tree]:
    """Rebuild the structure of `values` from `arrays`, on the layer's backend."""

    def fill(value: Tree, key: str) -> Tree:
        if isinstance(value, (tuple, list)):
            return type(value)(fill(v, f"{key}.{i}") for i, v in enumerate(value))
        if value is None or arrays[key].dtype.kind not in "fc":
            return value
        return layer.backend.put(arrays[key], dtype)

    return {name: fill(value, name) for name, value in values.items()}
