"""Optimisers and clipping, by PyTorch's definitions.

    opt = Adam(params, lr=1e-3)
    opt.step(params, grads)

params and grads are dicts name -> array. Everything stays on the device; `opt.lr` may be written
between steps. The arithmetic runs in the dtype of each parameter, as in PyTorch.
"""

import math
from collections.abc import Mapping, MutableMapping
from typing import Any

from .backend import of
from .errors import ShapeError


class Optimizer:
    """What the optimisers share: a learning rate, a step, and a state that can be stored."""

    def __init__(self, params: Mapping[str, Any], lr: float, weight_decay: float) -> None:
        _not_negative(lr=lr, weight_decay=weight_decay)
        self.lr, self.weight_decay = lr, weight_decay
        self.count: Any = 0  # steps; an array without axes once a step was told what is finite
        self._slots: dict[str, Any] = {}
        for name, p in params.items():
            xp = of(p).xp
            self._slots |= {f"{slot}.{name}": xp.zeros_like(p) for slot in self._names()}

    def _refuse_lost(self, eps: float, params: Mapping[str, Any]) -> None:
        """Raise where eps is 0 in the dtype of a parameter: a gradient of 0 would become NaN."""
        for name, p in params.items():
            if 0 < eps <= 2.0**-25 and of(p).xp.finfo(p.dtype).smallest_normal > 1e-6:
                raise ValueError(
                    f"eps is {eps}, which is 0 in {name}'s dtype {p.dtype}: take 1e-4, or keep "
                    "the weights in float32 with fit(..., mixed=...)"
                )

    def _names(self) -> tuple[str, ...]:
        """The arrays kept for each parameter."""
        raise NotImplementedError

    def _update(self, xp: Any, name: str, p: Any, g: Any) -> Any:
        """What is taken off the parameter."""
        raise NotImplementedError

    def step(
        self, params: MutableMapping[str, Any], grads: Mapping[str, Any], finite: Any = None
    ) -> None:
        """Change the parameters by their gradients, in place where the library can.

        finite : array of bool without axes, or None
            Where it is False, neither parameters nor state change; it stays on the device. The
            entries of params are replaced then.

        Raises
        ------
        KeyError
            A gradient is missing, or has no parameter.
        ValueError
            A gradient has another shape than its parameter.
        """
        if set(params) != set(grads):
            missing, unused = set(params) - set(grads), set(grads) - set(params)
            raise KeyError(f"grads: missing {sorted(missing)}, unused {sorted(unused)}")
        for name, g in grads.items():
            if tuple(g.shape) != tuple(params[name].shape):
                raise ShapeError(f"grads[{name!r}] is {g.shape}, expected {params[name].shape}")
        if finite is not None:
            xp = of(*grads.values()).xp
            self.count = self.count + xp.astype(finite, xp.float32)
            self._step_where(xp, finite, params, grads)
            return
        self.count += 1
        for name in params:
            xp = of(params[name], grads[name]).xp
            params[name] -= self._update(xp, name, params[name], grads[name])

    def _step_where(self, xp: Any, finite: Any, params: Any, grads: Any) -> None:
        for name, g in grads.items():
            p, slots = params[name], [f"{slot}.{name}" for slot in self._names()]
            before = {k: xp.asarray(self._slots[k], copy=True) for k in slots}
            params[name] = xp.where(finite, p - self._update(xp, name, p, g), p)
            for k in slots:
                self._slots[k] = xp.where(finite, self._slots[k], before[k])

    @property
    def state(self) -> dict[str, Any]:
        """The number of steps under "count", the arrays under names such as "m.weight_ih_l0"."""
        return {"count": int(self.count), **self._slots}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        if set(state) != set(self.state):
            missing, unused = set(self.state) - set(state), set(state) - set(self.state)
            raise KeyError(f"state: missing {sorted(missing)}, unused {sorted(unused)}")
        for name, array in self._slots.items():
            if tuple(array.shape) != tuple(state[name].shape):
                raise ShapeError(f"state[{name!r}] is {state[name].shape}, expected {array.shape}")
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

    def _decayed(self, p: Any, g: Any) -> Any:
        return g + self.weight_decay * p if self.weight_decay else g


class SGD(Optimizer):
    """Gradient descent, with momentum (Polyak) or Nesterov's.

        b <- momentum b + (1 - dampening) g      (b = g in the first step)
        p <- p - lr b                            (Nesterov: p - lr (g + momentum b))

    Parameters
    ----------
    params : mapping name -> array
    lr, momentum, dampening, weight_decay : float
    nesterov : bool
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        _not_negative(momentum=momentum)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("nesterov=True needs momentum above 0 and dampening=0")
        self.momentum, self.dampening, self.nesterov = momentum, dampening, nesterov
        super().__init__(params, lr, weight_decay)

    def _names(self) -> tuple[str, ...]:
        return ("b",) if self.momentum else ()

    def _update(self, xp: Any, name: str, p: Any, g: Any) -> Any:
        g = self._decayed(p, g)
        if self.momentum:
            b = self._slots[f"b.{name}"]
            b *= self.momentum
            b += (1 - self.dampening * self._later(xp)) * g
            self._slots[f"b.{name}"] = b
            g = g + self.momentum * b if self.nesterov else b
        return self.lr * g

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
    params : mapping name -> array
    lr, alpha, eps, weight_decay, momentum : float
    centered : bool
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
    ) -> None:
        _not_negative(alpha=alpha, eps=eps, momentum=momentum)
        self._refuse_lost(eps, params)
        self.alpha, self.eps, self.momentum, self.centered = alpha, eps, momentum, centered
        super().__init__(params, lr, weight_decay)

    def _names(self) -> tuple[str, ...]:
        return ("v", *(["m"] if self.centered else []), *(["b"] if self.momentum else []))

    def _update(self, xp: Any, name: str, p: Any, g: Any) -> Any:
        g = self._decayed(p, g)
        v = self._average("v", name, self.alpha, g * g)
        if self.centered:
            m = self._average("m", name, self.alpha, g)
            v = v - m * m
        u = g / (xp.sqrt(v) + self.eps)
        if self.momentum:
            b = self._slots[f"b.{name}"]
            b *= self.momentum
            b += u
            self._slots[f"b.{name}"] = u = b
        return self.lr * u


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015); with amsgrad, Reddi et al. 2018.

        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
        p <- p - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    amsgrad takes the largest v so far. weight_decay is added to the gradient.

    Parameters
    ----------
    params : mapping name -> array
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
        params: Mapping[str, Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas is {betas}, expected two numbers from 0 up to below 1")
        _not_negative(eps=eps)
        self._refuse_lost(eps, params)
        self.betas, self.eps, self.amsgrad = betas, eps, amsgrad
        super().__init__(params, lr, weight_decay)

    def _names(self) -> tuple[str, ...]:
        return ("m", "v", "vmax") if self.amsgrad else ("m", "v")

    def _update(self, xp: Any, name: str, p: Any, g: Any) -> Any:
        g = self._decayed(p, g)
        b1, b2 = self.betas
        m = self._average("m", name, b1, g)
        v = self._average("v", name, b2, g * g)
        if self.amsgrad:
            v = xp.maximum(self._slots[f"vmax.{name}"], v)
            self._slots[f"vmax.{name}"] = v
        root = xp.sqrt(v)
        root /= self._reached(xp, b2) ** 0.5
        root += self.eps
        update = m / root
        update *= self.lr / self._reached(xp, b1)
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
        params: Mapping[str, Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad)

    def _decayed(self, p: Any, g: Any) -> Any:
        return g

    def _update(self, xp: Any, name: str, p: Any, g: Any) -> Any:
        return super()._update(xp, name, p, g) + (self.lr * self.weight_decay) * p


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
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm!r}, expected a number above 0")
    if not grads:
        raise ValueError("grads is empty")
    xp = of(*grads.values()).xp
    squares = [_wide(xp, g) for g in grads.values()]
    norm = xp.sqrt(xp.sum(xp.stack([xp.sum(g * g) for g in squares])))
    factor = xp.where(norm + 1e-6 > max_norm, max_norm / (norm + 1e-6), xp.ones_like(norm))
    for name, g in grads.items():
        grads[name] *= xp.astype(factor, g.dtype, copy=False)
    return norm


def clip_by_value(grads: MutableMapping[str, Any], limit: float) -> None:
    """Cut every number of the gradients to -limit..limit, in place where the library can."""
    if not limit > 0:
        raise ValueError(f"limit is {limit!r}, expected a number above 0")
    for name, g in grads.items():
        cut = of(g).xp.clip(g, -limit, limit)
        try:
            g[...] = cut
        except TypeError:  # an array that cannot be written to
            grads[name] = cut


def _wide(xp: Any, g: Any) -> Any:
    """Half precision as float32: a sum of squares would overflow."""
    return xp.astype(g, xp.float32) if xp.finfo(g.dtype).bits == 16 else g


def _not_negative(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number >= 0:
            raise ValueError(f"{name} is {number!r}, expected at least 0")
