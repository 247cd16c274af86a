"""Optimisers and clipping, by PyTorch's definitions.

    opt = Adam(params, lr=1e-3)
    opt.step(params, grads)

params and grads are dicts name -> array. Everything stays on the device; `opt.lr` may be assigned
between steps. The arithmetic runs in the dtype of each parameter, as in PyTorch.

An optimiser changes only the parameters it was made with; those left out are frozen. Groups of
parameters may each have their own settings:

    opt = AdamW([{"params": matrices}, {"params": biases, "lr": 1e-4, "weight_decay": 0.0}])
"""

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple, TypeAlias

from .. import arguments
from ..backend import of, plain_name
from ..errors import ShapeError
from ..nn.params import refuse_shared
from ..typing import Array, Arrays, Namespace

Parameters: TypeAlias = Arrays | Sequence[Mapping[str, Any]]  # or groups of them, with settings
Settings: TypeAlias = SimpleNamespace  # all settings of a group, as attributes


def _betas(name: str, value: object) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} is {value!r}, expected two numbers from 0 up to below 1")
    b1, b2 = (arguments.number(f"{name}[{i}]", beta, below=1) for i, beta in enumerate(value))
    return b1, b2


# the settings of the optimisers, and how each is checked whenever it is assigned
SETTINGS: dict[str, Callable[[str, object], object]] = {
    **dict.fromkeys(("lr", "weight_decay", "momentum", "dampening", "eps"), arguments.number),
    **dict.fromkeys(("nesterov", "centered", "amsgrad"), arguments.flag),
    "alpha": partial(arguments.number, below=1),
    "betas": _betas,
}

# whether these are 0 decides which arrays the optimiser keeps
FIXED = ("momentum", "nesterov", "centered", "amsgrad")


class Group(NamedTuple):
    """The names of some parameters, and the settings that are their own."""

    names: tuple[str, ...]
    own: dict[str, Any]


class Optimizer:
    """The base of the optimisers: a learning rate, a step, and a state that can be stored.

    Attributes
    ----------
    lr : float
        The learning rate of all groups without one of their own. The rates of other groups keep
        their proportion to it: if lr is halved, so are they.
    first_rate : float
        The initial lr.
    names : tuple of str
        The parameters that a step changes.
    elementwise : bool
        Whether the update of an element depends on that element alone, so that it may be computed
        in parts; said by the class that defines the update.
    """

    elementwise = False

    def __init__(self, params: Parameters, lr: float, weight_decay: float) -> None:
        self.lr, self.weight_decay = lr, weight_decay
        self.first_rate = self.lr
        arrays, self._groups = _grouped(params, self._own())
        self.names = tuple(arrays)
        refuse_shared(arrays)
        self.count: Array = 0  # of steps; a 0-d array after a step that was given `finite`
        self.rebase(arrays, {})
        for names, group in self._resolved():
            for name in names:
                p = arrays[name]
                self._accept(group, name, p)
                self._slots |= {f"{s}.{name}": _zeros_like(p) for s in self._slot_names(group)}

    def __setattr__(self, name: str, value: object) -> None:
        if name in SETTINGS:
            value = SETTINGS[name](name, value)
            if "_slots" in vars(self) and name in FIXED and bool(value) != bool(vars(self)[name]):
                raise ValueError(
                    f"{name} was {vars(self)[name]} and decides which averages are kept: make a "
                    "new optimiser"
                )
        super().__setattr__(name, value)

    def _own(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name in SETTINGS}

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments, and the names and own settings of each group, in a form fit for JSON."""
        groups = [[list(group.names), group.own] for group in self._groups]
        return {**self._own(), "groups": groups}

    def _resolved(self) -> Iterator[tuple[tuple[str, ...], Settings]]:
        """Yield the names of each group, and all its settings as attributes."""
        for names, own in self._groups:
            group = SimpleNamespace(**{**self._own(), **own})
            if "lr" in own and self.lr != self.first_rate:
                if not self.first_rate:
                    raise ValueError(
                        "lr was 0 and was changed, so a group's own lr has no proportion to it: "
                        "make the optimiser with an lr above 0"
                    )
                group.lr = own["lr"] * (self.lr / self.first_rate)
            yield names, group

    def _accept(self, group: Settings, name: str, p: Array) -> None:
        """Raise if the settings of a group do not fit together or do not fit this parameter."""

    def _slot_names(self, group: Settings) -> tuple[str, ...]:
        """Return the names of the arrays kept for each parameter."""
        raise NotImplementedError

    def _update(self, xp: Namespace, name: str, p: Array, g: Array, group: Settings) -> Array:
        """Return the step to subtract from the parameter."""
        raise NotImplementedError

    def step(
        self, params: MutableMapping[str, Array], grads: Arrays, finite: Array | None = None
    ) -> None:
        """Update the parameters by their gradients, in place if the library can.

        Parameters that this optimiser was not made with do not change.

        finite : 0-d array of bool, or None
            If it is False, neither parameters nor state change; it stays on the device. If it is
            given, the entries of params are replaced.

        Raises
        ------
        KeyError
            A parameter or a gradient is missing, or a gradient has no parameter.
        ValueError
            A parameter or a gradient has another shape than the optimiser was made with; or two
            names have the same array.
        TypeError
            One is not an array, or has another dtype.
        """
        self._check(params, grads)
        self.count = self.count + (1 if finite is None else _float(finite))
        for names, group in self._resolved():
            for name in names:
                p, g = params[name], grads[name]
                xp = of(p, g).xp
                if finite is None:
                    p -= self._update(xp, name, p, g, group)
                    params[name] = p
                    continue
                slots = [f"{slot}.{name}" for slot in self._slot_names(group)]
                before = {k: xp.asarray(self._slots[k], copy=True) for k in slots}
                params[name] = xp.where(finite, p - self._update(xp, name, p, g, group), p)
                for k in slots:
                    self._slots[k] = xp.where(finite, self._slots[k], before[k])

    def _check(self, params: Arrays, grads: Arrays) -> None:
        ours, known = set(self.names), set(params)
        if lost := ours - known:
            raise KeyError(f"params: missing {sorted(lost)}, which the optimiser was made with")
        if ours - set(grads) or set(grads) - known:
            missing, unused = ours - set(grads), set(grads) - known
            raise KeyError(f"grads: missing {sorted(missing)}, unused {sorted(unused)}")
        if len({id(params[name]) for name in ours}) < len(ours):
            refuse_shared({name: params[name] for name in self.names})
        for name, (kind, home, dtype, shape) in self._like.items():
            for where, array in (("params", params[name]), ("grads", grads[name])):
                if type(array) is not kind or array.dtype != dtype:
                    home.check(f"{where}[{name!r}]", array, plain_name(dtype))
                if tuple(array.shape) != shape:
                    what = f"{where}[{name!r}] is {tuple(array.shape)}"
                    why = ": a run that failed left one rank's share here, so make a new optimiser"
                    raise ShapeError(f"{what}, expected {shape}{why if self._in_parts else ''}")

    def rebase(self, params: Arrays, slots: Mapping[str, Array], in_parts: bool = False) -> None:
        """Go on with other parameters of the same names, and the arrays kept for them.

        in_parts : they are parts of the model's parameters, for which an `elementwise` update works
        """
        self._in_parts = in_parts
        self._like = {k: (type(p), of(p), p.dtype, tuple(p.shape)) for k, p in params.items()}
        self._slots: dict[str, Array] = {**slots}

    @property
    def slots(self) -> Mapping[str, Array]:
        """The arrays such as "m.weight_ih_l0" themselves, of which `state` has copies."""
        return MappingProxyType(self._slots)

    @property
    def state(self) -> dict[str, Any]:
        """A copy of the number of steps, "count", and of arrays such as "m.weight_ih_l0"."""
        copies = {name: of(v).xp.asarray(v, copy=True) for name, v in self._slots.items()}
        return {"count": int(self.count), **copies}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        ours = {"count", *self._slots}
        if set(state) != ours:
            missing, unused = ours - set(state), set(state) - ours
            raise KeyError(f"state: missing {sorted(missing)}, unused {sorted(unused)}")
        for name, array in self._slots.items():
            if tuple(array.shape) != tuple(state[name].shape):
                raise ShapeError(f"state[{name!r}] is {state[name].shape}, expected {array.shape}")
            if plain_name(state[name].dtype) != plain_name(array.dtype):
                found = plain_name(state[name].dtype)
                raise TypeError(f"state[{name!r}] has dtype {found}, expected {array.dtype}")
        self.count = int(state["count"])
        self._slots = {
            name: of(array, state[name]).xp.asarray(state[name], copy=True)
            for name, array in self._slots.items()
        }

    def _average(self, slot: str, name: str, rate: float, v: Array) -> Array:
        """Update the running average of v: avg <- rate * avg + (1 - rate) * v."""
        avg = self._slots[f"{slot}.{name}"]
        avg *= rate
        avg += (1 - rate) * v
        self._slots[f"{slot}.{name}"] = avg
        return avg

    def _decayed(self, p: Array, g: Array, group: Settings) -> Array:
        return g + group.weight_decay * p if group.weight_decay else g


class SGD(Optimizer):
    """Gradient descent, with momentum (Polyak) or Nesterov's.

        b <- momentum b + (1 - dampening) g      (b = g in the first step)
        p <- p - lr b                            (Nesterov: p - lr (g + momentum b))

    Parameters
    ----------
    params : mapping name -> array, or list of groups
        A group is a mapping with "params", and any of the other arguments for these alone.
    lr, momentum, dampening, weight_decay : float
    nesterov : bool
    """

    elementwise = True

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        self.momentum, self.dampening, self.nesterov = momentum, dampening, nesterov
        super().__init__(params, lr, weight_decay)

    def _accept(self, group: Settings, name: str, p: Array) -> None:
        if group.nesterov and (group.momentum <= 0 or group.dampening != 0):
            raise ValueError("nesterov=True needs momentum above 0 and dampening=0")

    def _slot_names(self, group: Settings) -> tuple[str, ...]:
        return ("b",) if group.momentum else ()

    def _update(self, xp: Namespace, name: str, p: Array, g: Array, group: Settings) -> Array:
        g = self._decayed(p, g, group)
        if group.momentum:
            b = self._slots[f"b.{name}"]
            b *= group.momentum
            b += (1 - group.dampening * self._later(xp)) * g
            self._slots[f"b.{name}"] = b
            g = g + group.momentum * b if group.nesterov else b
        return group.lr * g

    def _later(self, xp: Namespace) -> Array:
        """Return 0 in the first step, then 1."""
        later = self.count > 1
        return later if isinstance(later, bool) else xp.astype(xp.asarray(later), xp.float32)


class RMSprop(Optimizer):
    """Gradient over the root of its running mean square (Hinton, lecture 6e; centred: Graves 2013).

        v <- alpha v + (1 - alpha) g^2           centred: m <- alpha m + (1 - alpha) g
        u = g / (sqrt(v) + eps)                           u = g / (sqrt(v - m^2) + eps)
        p <- p - lr u                            momentum: b <- momentum b + u;  p <- p - lr b

    Parameters
    ----------
    params : mapping name -> array, or list of groups
        A group is a mapping with "params", and any of the other arguments for these alone.
    lr, alpha, eps, weight_decay, momentum : float
    centered : bool
    """

    elementwise = True

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
    ) -> None:
        self.alpha, self.eps, self.momentum, self.centered = alpha, eps, momentum, centered
        super().__init__(params, lr, weight_decay)

    def _accept(self, group: Settings, name: str, p: Array) -> None:
        _refuse_lost(group.eps, name, p)

    def _slot_names(self, group: Settings) -> tuple[str, ...]:
        return ("v", *(["m"] if group.centered else []), *(["b"] if group.momentum else []))

    def _update(self, xp: Namespace, name: str, p: Array, g: Array, group: Settings) -> Array:
        g = self._decayed(p, g, group)
        v = self._average("v", name, group.alpha, g * g)
        if group.centered:
            m = self._average("m", name, group.alpha, g)
            v = xp.maximum(v - m * m, xp.zeros_like(v))  # rounding can bring it below 0
        u = g / (xp.sqrt(v) + group.eps)
        if group.momentum:
            b = self._slots[f"b.{name}"]
            b *= group.momentum
            b += u
            self._slots[f"b.{name}"] = u = b
        return group.lr * u


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015); with amsgrad, Reddi et al. 2018.

        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
        p <- p - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    amsgrad takes the largest v so far. weight_decay is added to the gradient.

    Parameters
    ----------
    params : mapping name -> array, or list of groups
        A group is a mapping with "params", and any of the other arguments for these alone.
    lr, eps, weight_decay : float
    betas : (float, float), b1 and b2
    amsgrad : bool

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any import Adam
    >>> params = {"w": np.array([1.0, -1.0])}
    >>> optimiser = Adam(params, lr=0.1)
    >>> optimiser.step(params, {"w": np.array([0.5, -2.0])})
    >>> [round(v, 6) for v in params["w"].tolist()]  # the first step is lr, whatever the gradient
    [0.9, -0.9]
    """

    elementwise = True

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
    ) -> None:
        self.betas, self.eps, self.amsgrad = betas, eps, amsgrad
        super().__init__(params, lr, weight_decay)

    def _accept(self, group: Settings, name: str, p: Array) -> None:
        _refuse_lost(group.eps, name, p)

    def _slot_names(self, group: Settings) -> tuple[str, ...]:
        return ("m", "v", "vmax") if group.amsgrad else ("m", "v")

    def _update(self, xp: Namespace, name: str, p: Array, g: Array, group: Settings) -> Array:
        g = self._decayed(p, g, group)
        b1, b2 = group.betas
        m = self._average("m", name, b1, g)
        v = self._average("v", name, b2, g * g)
        if group.amsgrad:
            v = xp.maximum(self._slots[f"vmax.{name}"], v)
            self._slots[f"vmax.{name}"] = v
        root = xp.sqrt(v)
        root /= self._correction(xp, b2) ** 0.5
        root += group.eps
        update = m / root
        update *= group.lr / self._correction(xp, b1)
        return update

    def _correction(self, xp: Namespace, beta: float) -> Array:
        """Return 1 - beta^t, the bias correction of a running average of t terms."""
        if beta == 0:
            return 1.0
        if isinstance(self.count, int):
            return 1 - beta**self.count
        return -xp.expm1(math.log(beta) * self.count)  # precise in float32


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    p <- p - lr weight_decay p, then as Adam
    """

    elementwise = True

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad)

    def _decayed(self, p: Array, g: Array, group: Settings) -> Array:
        return g

    def _update(self, xp: Namespace, name: str, p: Array, g: Array, group: Settings) -> Array:
        return super()._update(xp, name, p, g, group) + (group.lr * group.weight_decay) * p


def clip_by_global_norm(grads: MutableMapping[str, Array], max_norm: float) -> Array:
    """Scale all gradients by one factor, so that their common norm is at most `max_norm`.

    Returns the norm before scaling, a 0-d array on the device. In place if the library can; by
    PyTorch's definition, with the factor max_norm / (norm + 1e-6).

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any import clip_by_global_norm
    >>> grads = {"a": np.array([3.0]), "b": np.array([4.0])}
    >>> float(clip_by_global_norm(grads, 1.0)), round(float(grads["a"][0]), 4)
    (5.0, 0.6)
    """
    return clip_by_total_norm(grads, max_norm, lambda squares: squares)


def clip_by_total_norm(
    grads: MutableMapping[str, Array], max_norm: float, total: Callable[[Array], Array]
) -> Array:
    """Scale gradients as `clip_by_global_norm`, where these are a part of all.

    total : from the sum of the squares of these gradients to that of all
    """
    if max_norm != math.inf:
        max_norm = arguments.number("max_norm", max_norm, above=True)
    if not grads:
        raise ValueError("grads is empty")
    _check_gradients(grads)
    xp = of(*grads.values()).xp
    squares = [_upcast(xp, g) for g in grads.values()]
    norm = xp.sqrt(total(xp.sum(xp.stack([xp.sum(g * g) for g in squares]))))
    factor = xp.where(norm + 1e-6 > max_norm, max_norm / (norm + 1e-6), xp.ones_like(norm))
    for name, g in grads.items():
        grads[name] *= xp.astype(factor, g.dtype, copy=False)
    return norm


def clip_by_value(grads: MutableMapping[str, Array], limit: float) -> None:
    """Clip every element of the gradients to -limit..limit, in place if the library can."""
    limit = arguments.number("limit", limit, above=True)
    _check_gradients(grads)
    for name, g in grads.items():
        cut = of(g).xp.clip(g, -limit, limit)
        try:
            g[...] = cut
        except TypeError:  # an array that cannot be written to
            grads[name] = cut


def is_elementwise(optimiser: Optimizer) -> bool:
    """Whether the class that defines the optimiser's update says that it is element by element."""
    for kind in type(optimiser).__mro__:
        if "_update" in vars(kind) or "step" in vars(kind):
            return bool(vars(kind).get("elementwise", False))
    return False


def _zeros_like(p: Array) -> Array:
    """Return zeros that take no memory before they are used, where the library can."""
    home = of(p)
    return home.zeros(tuple(p.shape), plain_name(p.dtype))


def _grouped(
    params: Parameters, settings: Mapping[str, object]
) -> tuple[dict[str, Array], list[Group]]:
    """Return all arrays by name, and the groups they are given in."""
    given = [{"params": params}] if isinstance(params, Mapping) else params
    if not isinstance(given, (list, tuple)) or not all(
        isinstance(g, Mapping) and isinstance(g.get("params"), Mapping) for g in given
    ):
        raise TypeError(
            f"params is a {type(params).__name__}, expected a mapping name -> array such as "
            'model.params, or a list of groups such as {"params": a mapping, "lr": 1e-4}'
        )
    arrays: dict[str, Array] = {}
    groups = []
    for i, group in enumerate(given):
        own = {name: value for name, value in group.items() if name != "params"}
        if unknown := set(own) - set(settings):
            raise TypeError(f"group {i} has {sorted(unknown)}, expected some of {list(settings)}")
        own = {name: SETTINGS[name](f"{name} of group {i}", value) for name, value in own.items()}
        if twice := set(arrays) & set(group["params"]):
            raise ValueError(f"{sorted(twice)} in two groups, expected each name in one")
        arrays.update(group["params"])
        groups.append(Group(tuple(group["params"]), own))
    if not arrays:
        raise ValueError("params is empty, so there is nothing to optimise")
    for name, p in arrays.items():
        _check_array(f"params[{name!r}]", p)
    return arrays, groups


def _check_array(what: str, array: Array) -> None:
    """Raise TypeError unless it is an array of real floating numbers."""
    try:
        home = of(array)
    except TypeError:
        raise TypeError(f"{what} is a {type(array).__name__}, expected an array") from None
    if not home.xp.isdtype(array.dtype, "real floating"):
        raise TypeError(f"{what} has dtype {array.dtype}, expected a real floating dtype")
    home.dtype(plain_name(array.dtype))
    home.check(what, array, plain_name(array.dtype))


def _check_gradients(grads: Arrays) -> None:
    if not isinstance(grads, Mapping):
        raise TypeError(f"grads is a {type(grads).__name__}, expected a mapping name -> array")
    seen = set()
    for name, g in grads.items():
        kind = type(g), getattr(g, "dtype", None)
        if kind not in seen:
            _check_array(f"grads[{name!r}]", g)
        seen.add(kind)
    refuse_shared(grads, "grads")


def _float(finite: Array) -> Array:
    xp = of(finite).xp
    return xp.astype(finite, xp.float32)


def _refuse_lost(eps: float, name: str, p: Array) -> None:
    """Raise if eps is 0 in the dtype of a parameter, so that a gradient of 0 would become NaN."""
    if 0 < eps <= 2.0**-25 and of(p).xp.finfo(p.dtype).smallest_normal > 1e-6:
        raise ValueError(
            f"eps is {eps}, which is 0 in {name}'s dtype {p.dtype}: take 1e-4, or keep "
            "the weights in float32 with fit(..., mixed=...)"
        )


def _upcast(xp: Namespace, g: Array) -> Array:
    """Cast half precision to float32, since a sum of squares would overflow."""
    return xp.astype(g, xp.float32) if xp.finfo(g.dtype).bits == 16 else g
