"""Forward mode, and forward mode over a backward pass: the same calls on dual numbers.

See `backend/dual.py`. What ends in _dot is the derivative of what it is named after, along one
direction.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from ..backend import Backend
from ..backend.bridge import views_of
from ..backend.dual import Dual, dot_of, value_of
from ..backend.dual_backend import DualBackend, dual
from ..errors import ShapeError
from ..typing import Array, Arrays, Derivatives, Gradients, Loss, Pytree
from .params import Layer, Parametrised

States: TypeAlias = Sequence[Array | None]  # of the GRUs of a Chain


class Differentiable(Parametrised, Protocol):
    """A GRU or a Chain."""

    @property
    def forward_over_reverse(self) -> Callable[..., tuple[Any, Any, Any]]:
        """Outputs, their derivatives, and the pullback of both."""


def dual_layer(layer: Layer, params_dot: Mapping[str, Array | None]) -> Any:
    """Return the layer over dual numbers; parameters that are not in params_dot are constants."""
    home = dual(layer.backend)
    twin = layer.over(home, layer.dtype, ())
    arrays = {name: home.lift(v, params_dot.get(name)) for name, v in layer.params.items()}
    twin.params = views_of(layer, arrays)  # type: ignore[assignment]
    return twin


def lift(backend: Backend, dtype: str, name: str, value: Array, dot: Array | None) -> Array:
    """Return an argument as a dual number; its derivative `dot` must have its shape and dtype."""
    if dot is None:
        return None if value is None else dual(backend).lift(value, None)
    if value is None:
        raise ValueError(f"{name}_dot was given without {name}, of which it is the derivative")
    if backend.xp.isdtype(value.dtype, "integral"):
        raise TypeError(f"{name} holds integers, which have no derivative: leave {name}_dot out")
    backend.check(name, value, dtype)
    _check_dot(backend, dtype, name, value, f"{name}_dot", dot)
    return dual(backend).lift(value, dot)


def check_params_dot(model: Parametrised, params_dot: Arrays | None) -> Arrays:
    """Return the derivatives of parameters by name; not all need be there.

    Raises
    ------
    TypeError, KeyError, ValueError
        It is no mapping, has a name that is no parameter, or an array that does not fit.
    """
    if params_dot is None:
        return {}
    if not isinstance(params_dot, Mapping):
        kind = type(params_dot).__name__
        raise TypeError(f"params_dot is a {kind}, expected a mapping from names to arrays")
    unknown = sorted(set(params_dot) - set(model.params))
    if unknown:
        raise KeyError(f"params_dot holds {unknown}; the parameters are {list(model.params)}")
    for name, dot in params_dot.items():
        value = model.params[name]
        _check_dot(model.backend, model.dtype, name, value, f"params_dot[{name!r}]", dot)
    return params_dot


def _check_dot(
    backend: Backend, dtype: str, name: str, value: Array, told: str, dot: Array
) -> None:
    backend.check(told, dot, dtype)
    if tuple(dot.shape) != tuple(value.shape):
        shapes = tuple(dot.shape), tuple(value.shape)
        raise ShapeError(f"{told} is {shapes[0]}, expected {shapes[1]}, the shape of {name}")


def refuse_no_direction(names: str, *dots: object) -> None:
    """Raise ValueError where no direction is given."""
    if all(dot is None for dot in dots):
        raise ValueError(f"there is no direction to differentiate along: give one of {names}")


def split_duals(backend: DualBackend, tree: Pytree) -> tuple[Pytree, Pytree]:
    """Split a tree of dual numbers into the tree of values and that of derivatives."""
    xp = backend.constants.xp
    return _tree_map(value_of, tree), _tree_map(lambda v: dot_of(xp, v), tree)


def _tree_map(function: Callable[[Array], Array], tree: Pytree) -> Pytree:
    if isinstance(tree, dict):
        return {name: _tree_map(function, v) for name, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)([_tree_map(function, v) for v in tree])
    return None if tree is None else function(tree)


class DualPullback:
    """The backward pass of a GRU and its derivative. See `GRU.forward_over_reverse`."""

    def __init__(self, backend: DualBackend, dtype: str, pullback: Callable[..., Any]) -> None:
        self._backend, self._dtype, self._pullback = backend, dtype, pullback

    def __call__(
        self,
        dy: Array | None,
        dh_n: Array | None = None,
        dy_dot: Array | None = None,
        dh_n_dot: Array | None = None,
    ) -> tuple[Derivatives, Derivatives]:
        """Return (grads, dx, dh0[, dstart]) and (grads_dot, dx_dot, dh0_dot[, dstart_dot])."""
        dy, dh_n = self._lift("dy", dy, dy_dot), self._lift("dh_n", dh_n, dh_n_dot)
        return split_duals(self._backend, self._pullback(dy, dh_n))

    def _lift(self, name: str, value: Array | None, dot: Array | None) -> Array | None:
        return lift(self._backend.constants, self._dtype, name, value, dot)


class DualChainPullback(DualPullback):
    """The backward pass of a Chain and its derivative. See `Chain.forward_over_reverse`."""

    def __call__(
        self,
        dy: Array | None,
        dstate: States | None = None,
        dy_dot: Array | None = None,
        dstate_dot: States | None = None,
    ) -> tuple[Pytree, Pytree]:
        """Return (grads, dx, dstate) and (grads_dot, dx_dot, dstate_dot)."""
        dy = self._lift("dy", dy, dy_dot)
        dstate = lift_states(self._lift, "dstate", dstate, dstate_dot)
        return split_duals(self._backend, self._pullback(dy, dstate))


def lift_states(
    lift: Callable[..., Array], name: str, states: States | None, dots: States | None
) -> States | None:
    """Return states of a Chain with their derivatives, both lists of one for each GRU."""
    if dots is None:
        return states
    if states is None:
        raise ValueError(f"{name}_dot was given without {name}, of which it is the derivative")
    if len(states) != len(dots):
        raise ValueError(f"{name}_dot holds {len(dots)}, expected {len(states)}, as {name} does")
    return [lift(name, v, dot) for v, dot in zip(states, dots, strict=True)]


def hvp(
    model: Differentiable,
    loss: Loss,
    params_dot: Arrays,
    x: Array,
    *args: object,
    **options: object,
) -> tuple[Array, Gradients, Gradients]:
    """Return a loss, its gradient, and the product of its Hessian with a vector.

    The gradient is differentiated along the vector, forward mode over a backward pass (Pearlmutter
    1994), so the product is exact and costs a few backward passes; there is no Hessian in memory.

    Parameters
    ----------
    model : GRU or Chain
    loss : function of y that returns the value and dL/dy
        Such as `lambda y: softmax_cross_entropy(y, target)`. It is called on dual numbers: of
        Python's operators and the functions of `y.__array_namespace__()`.
    params_dot : mapping of names to arrays
        The vector, in the form of `model.params`; where a name is missing it is 0.
    x, *args, **options
        What `model.forward_over_reverse` takes beside: h0 or state, lengths, ...

    Returns
    -------
    value : the loss
    grads : dict, its gradient to the parameters
    product : dict, the Hessian times the vector

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any import GRU, hvp, squared_error
    >>> gru = GRU(3, 4, dtype="float64", seed=0)
    >>> x, target = np.ones((5, 2, 3)), np.zeros((5, 2, 4))
    >>> v = {name: np.ones_like(p) for name, p in gru.params.items()}
    >>> value, grads, product = hvp(gru, lambda y: squared_error(y, target), v, x)
    >>> product["weight_hh_l0"].shape
    (12, 4)
    """
    if not hasattr(model, "forward_over_reverse"):
        kind = type(model).__name__
        raise TypeError(f"the model is a {kind}, expected a GRU or a Chain: try Chain(model)")
    (y, _), (y_dot, _), pullback = model.forward_over_reverse(
        x, *args, params_dot=params_dot, **options
    )
    value, dy = loss(dual(model.backend).lift(y, y_dot))
    dy_dot = dy.dot if isinstance(dy, Dual) else None
    (grads, *_), (product, *_) = pullback(value_of(dy), dy_dot=dy_dot)
    return value_of(value), grads, product
