"""Optimisers and clipping, by PyTorch's definitions.

    opt = Adam(params, lr=1e-3)
    opt.step(params, grads)

params and grads are dicts name -> array. Everything stays on the device; `opt.lr` may be written
between steps. The arithmetic runs in the dtype of each parameter, as in PyTorch.

An optimiser changes the parameters it was made with and no others, so those left out are frozen.
Several groups of parameters may each have their own settings:

    opt = AdamW([{"params": matrices}, {"params": biases, "lr": 1e-4, "weight_decay": 0.0}])
"""

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

from .. import arguments
from ..backend import of, plain_name
from ..errors import ShapeError
from ..nn.params import refuse_shared


def _betas(name: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} is {value!r}, expected two numbers from 0 up to below 1")
    b1, b2 = (arguments.number(f"{name}[{i}]", beta, below=1) for i, beta in enumerate(value))
    return b1, b2


# the settings of the optimisers, and how each is checked whenever it is written
SETTINGS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("lr", "weight_decay", "momentum", "dampening", "eps"), arguments.number),
    **dict.fromkeys(("nesterov", "centered", "amsgrad"), arguments.flag),
    "alpha": partial(arguments.number, below=1),
    "betas": _betas,
}

# of these, whether they are 0 decides which arrays the optimiser keeps
FIXED = ("momentum", "nesterov", "centered", "amsgrad")


class Group(NamedTuple):
    """The names of some parameters, and the settings in which they differ from the others."""

    names: tuple[str, ...]
    own: dict[str, Any]


class Optimizer:
    """What the optimisers share: a learning rate, a step, and a state that can be stored.

    Attributes
    ----------
    lr : float
        The learning rate of all groups without one of their own. Those with one keep their
        proportion to it: where lr is halved, so are they.
    first_rate : float
        The lr it was made with.
    names : tuple of str
        The parameters that a step changes.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
        self.lr, self.weight_decay = lr, weight_decay
        self.first_rate = self.lr
        arrays, self._groups = _grouped(params, self._own())
        self.names = tuple(arrays)
        refuse_shared(arrays)
        self.count: Any = 0  # steps; an array without axes once a step was told what is finite
        self._like = {k: (type(p), of(p), p.dtype, tuple(p.shape)) for k, p in arrays.items()}
        self._slots: dict[str, Any] = {}
        for names, o in self._settled():
            for name in names:
                p = arrays[name]
                self._accept(o, name, p)
                self._slots |= {f"{s}.{name}": of(p).xp.zeros_like(p) for s in self._kept(o)}

    def __setattr__(self, name: str, value: Any) -> None:
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
        """What it was made with, fit for JSON: its arguments, and names and own ones of groups."""
        groups = [[list(group.names), group.own] for group in self._groups]
        return {**self._own(), "groups": groups}

    def _settled(self) -> Iterator[tuple[tuple[str, ...], Any]]:
        """The names of each group, and all its settings as attributes."""
        for names, own in self._groups:
            o = SimpleNamespace(**{**self._own(), **own})
            if "lr" in own and self.lr != self.first_rate:
                if not self.first_rate:
                    raise ValueError(
                        "lr was 0 and was changed, so a group's own lr has no proportion to it: "
                        "make the optimiser with an lr above 0"
                    )
                o.lr = own["lr"] * (self.lr / self.first_rate)
            yield names, o

    def _accept(self, o: Any, name: str, p: Any) -> None:
        """Raise where the settings of a group do not fit together, or not this parameter."""

    def _kept(self, o: Any) -> tuple[str, ...]:
        """The arrays kept for each parameter."""
        raise NotImplementedError

    def _update(self, xp: Any, name: str, p: Any, g: Any, o: Any) -> Any:
        """What is taken off the parameter."""
        raise NotImplementedError

    def step(
        self, params: MutableMapping[str, Any], grads: Mapping[str, Any], finite: Any = None
    ) -> None:
        """Change the parameters by their gradients, in place where the library can.

        Parameters and gradients that this optimiser was not made with stay as they are.

        finite : array of bool without axes, or None
            Where it is False, neither parameters nor state change; it stays on the device. The
            entries of params are replaced then.

        Raises
        ------
        KeyError
            A parameter or a gradient is missing, or a gradient has no parameter.
        ValueError
            A parameter or a gradient has another shape than the optimiser was made with; or one
            array stands under two names.
        TypeError
            One is no array, or has another dtype.
        """
        self._check(params, grads)
        self.count = self.count + (1 if finite is None else _float(finite))
        for names, o in self._settled():
            for name in names:
                p, g = params[name], grads[name]
                xp = of(p, g).xp
                if finite is None:
                    p -= self._update(xp, name, p, g, o)
                    params[name] = p
                    continue
                slots = [f"{slot}.{name}" for slot in self._kept(o)]
                before = {k: xp.asarray(self._slots[k], copy=True) for k in slots}
                params[name] = xp.where(finite, p - self._update(xp, name, p, g, o), p)
                for k in slots:
                    self._slots[k] = xp.where(finite, self._slots[k], before[k])

    def _check(self, params: Mapping[str, Any], grads: Mapping[str, Any]) -> None:
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
                    raise ShapeError(f"{what}, expected {shape}")

    @property
    def state(self) -> dict[str, Any]:
        """A copy: the number of steps, "count", and arrays by names such as "m.weight_ih_l0"."""
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

    def _average(self, slot: str, name: str, rate: float, v: Any) -> Any:
        """Move the running average of v a little: avg <- rate * avg + (1 - rate) * v."""
        avg = self._slots[f"{slot}.{name}"]
        avg *= rate
        avg += (1 - rate) * v
        self._slots[f"{slot}.{name}"] = avg
        return avg

    def _decayed(self, p: Any, g: Any, o: Any) -> Any:
        return g + o.weight_decay * p if o.weight_decay else g


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

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        self.momentum, self.dampening, self.nesterov = momentum, dampening, nesterov
        super().__init__(params, lr, weight_decay)

    def _accept(self, o: Any, name: str, p: Any) -> None:
        if o.nesterov and (o.momentum <= 0 or o.dampening != 0):
            raise ValueError("nesterov=True needs momentum above 0 and dampening=0")

    def _kept(self, o: Any) -> tuple[str, ...]:
        return ("b",) if o.momentum else ()

    def _update(self, xp: Any, name: str, p: Any, g: Any, o: Any) -> Any:
        g = self._decayed(p, g, o)
        if o.momentum:
            b = self._slots[f"b.{name}"]
            b *= o.momentum
            b += (1 - o.dampening * self._later(xp)) * g
            self._slots[f"b.{name}"] = b
            g = g + o.momentum * b if o.nesterov else b
        return o.lr * g

    def _later(self, xp: Any) -> Any:
        """0 in the first step, then 1."""
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

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
    ) -> None:
        self.alpha, self.eps, self.momentum, self.centered = alpha, eps, momentum, centered
        super().__init__(params, lr, weight_decay)

    def _accept(self, o: Any, name: str, p: Any) -> None:
        _refuse_lost(o.eps, name, p)

    def _kept(self, o: Any) -> tuple[str, ...]:
        return ("v", *(["m"] if o.centered else []), *(["b"] if o.momentum else []))

    def _update(self, xp: Any, name: str, p: Any, g: Any, o: Any) -> Any:
        g = self._decayed(p, g, o)
        v = self._average("v", name, o.alpha, g * g)
        if o.centered:
            m = self._average("m", name, o.alpha, g)
            v = xp.maximum(v - m * m, xp.zeros_like(v))  # rounding can bring it below 0
        u = g / (xp.sqrt(v) + o.eps)
        if o.momentum:
            b = self._slots[f"b.{name}"]
            b *= o.momentum
            b += u
            self._slots[f"b.{name}"] = u = b
        return o.lr * u


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

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
    ) -> None:
        self.betas, self.eps, self.amsgrad = betas, eps, amsgrad
        super().__init__(params, lr, weight_decay)

    def _accept(self, o: Any, name: str, p: Any) -> None:
        _refuse_lost(o.eps, name, p)

    def _kept(self, o: Any) -> tuple[str, ...]:
        return ("m", "v", "vmax") if o.amsgrad else ("m", "v")

    def _update(self, xp: Any, name: str, p: Any, g: Any, o: Any) -> Any:
        g = self._decayed(p, g, o)
        b1, b2 = o.betas
        m = self._average("m", name, b1, g)
        v = self._average("v", name, b2, g * g)
        if o.amsgrad:
            v = xp.maximum(self._slots[f"vmax.{name}"], v)
            self._slots[f"vmax.{name}"] = v
        root = xp.sqrt(v)
        root /= self._reached(xp, b2) ** 0.5
        root += o.eps
        update = m / root
        update *= o.lr / self._reached(xp, b1)
        return update

    def _reached(self, xp: Any, beta: float) -> Any:
        """1 - beta^t: how far a running average of t terms has come from 0."""
        if beta == 0:
            return 1.0
        if isinstance(self.count, int):
            return 1 - beta**self.count
        return -xp.expm1(math.log(beta) * self.count)  # precise in float32


class AdamW(Adam):
    """Adam with the decay taken off the weights themselves (Loshchilov and Hutter 2019).

    p <- p - lr weight_decay p, then as Adam
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad)

    def _decayed(self, p: Any, g: Any, o: Any) -> Any:
        return g

    def _update(self, xp: Any, name: str, p: Any, g: Any, o: Any) -> Any:
        return super()._update(xp, name, p, g, o) + (o.lr * o.weight_decay) * p


def clip_by_global_norm(grads: MutableMapping[str, Any], max_norm: float) -> Any:
    """Scale all gradients by one factor, so that their common norm is at most `max_norm`.

    Returns the norm before, a number without axes on the device. In place where the library can;
    by PyTorch's definition, with the factor max_norm / (norm + 1e-6).

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any import clip_by_global_norm
    >>> grads = {"a": np.array([3.0]), "b": np.array([4.0])}
    >>> float(clip_by_global_norm(grads, 1.0)), round(float(grads["a"][0]), 4)
    (5.0, 0.6)
    """
    if max_norm != math.inf:
        max_norm = arguments.number("max_norm", max_norm, above=True)
    if not grads:
        raise ValueError("grads is empty")
    _check_gradients(grads)
    xp = of(*grads.values()).xp
    squares = [_wide(xp, g) for g in grads.values()]
    norm = xp.sqrt(xp.sum(xp.stack([xp.sum(g * g) for g in squares])))
    factor = xp.where(norm + 1e-6 > max_norm, max_norm / (norm + 1e-6), xp.ones_like(norm))
    for name, g in grads.items():
        grads[name] *= xp.astype(factor, g.dtype, copy=False)
    return norm


def clip_by_value(grads: MutableMapping[str, Any], limit: float) -> None:
    """Cut every number of the gradients to -limit..limit, in place where the library can."""
    limit = arguments.number("limit", limit, above=True)
    _check_gradients(grads)
    for name, g in grads.items():
        cut = of(g).xp.clip(g, -limit, limit)
        try:
            g[...] = cut
        except TypeError:  # an array that cannot be written to
            grads[name] = cut


def _grouped(params: Any, settings: dict[str, Any]) -> tuple[dict[str, Any], list[Group]]:
    """All arrays by name, and the groups they are given in."""
    given = [{"params": params}] if isinstance(params, Mapping) else params
    if not isinstance(given, (list, tuple)) or not all(
        isinstance(g, Mapping) and isinstance(g.get("params"), Mapping) for g in given
    ):
        raise TypeError(
            f"params is a {type(params).__name__}, expected a mapping name -> array such as "
            'model.params, or a list of groups such as {"params": a mapping, "lr": 1e-4}'
        )
    arrays: dict[str, Any] = {}
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


def _check_array(what: str, array: Any) -> None:
    """Raise TypeError where it is no floating array."""
    try:
        home = of(array)
    except TypeError:
        raise TypeError(f"{what} is a {type(array).__name__}, expected an array") from None
    if not home.xp.isdtype(array.dtype, "real floating"):
        raise TypeError(f"{what} has dtype {array.dtype}, expected a real floating dtype")
    home.dtype(plain_name(array.dtype))
    home.check(what, array, plain_name(array.dtype))


def _check_gradients(grads: Mapping[str, Any]) -> None:
    if not isinstance(grads, Mapping):
        raise TypeError(f"grads is a {type(grads).__name__}, expected a mapping name -> array")
    seen = set()
    for name, g in grads.items():
        kind = type(g), getattr(g, "dtype", None)
        if kind not in seen:
            _check_array(f"grads[{name!r}]", g)
        seen.add(kind)
    refuse_shared(grads, "grads")


def _float(finite: Any) -> Any:
    xp = of(finite).xp
    return xp.astype(finite, xp.float32)


def _refuse_lost(eps: float, name: str, p: Any) -> None:
    """Raise where eps is 0 in the dtype of a parameter: a gradient of 0 would become NaN."""
    if 0 < eps <= 2.0**-25 and of(p).xp.finfo(p.dtype).smallest_normal > 1e-6:
        raise ValueError(
            f"eps is {eps}, which is 0 in {name}'s dtype {p.dtype}: take 1e-4, or keep "
            "the weights in float32 with fit(..., mixed=...)"
        )


def _wide(xp: Any, g: Any) -> Any:
    """Half precision as float32: a sum of squares would overflow."""
    return xp.astype(g, xp.float32) if xp.finfo(g.dtype).bits == 16 else g
