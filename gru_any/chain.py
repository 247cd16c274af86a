"""Layers one after the other, with the states of the GRUs among them."""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from .cell import GRUCell
from .gru import GRU
from .params import Layer, load


class Chain:
    """Layers applied in order: a sequence model in one object.

    Parameters
    ----------
    *layers
        GRU, Linear, Embedding or Dropout layers on one backend; the GRUs with one `batch_first`.

    Attributes
    ----------
    params : mapping
        The parameters of all layers, live, under names such as `0.weight_ih_l0`.
    batch_first : bool
        Whether x and y are (B, T, .) in place of (T, B, .), as all GRUs of the chain have it.

    Notes
    -----
    `state` is a list of one h (L*D, B, H) for each GRU, in order.

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any import GRU, Chain, Embedding, Linear
    >>> model = Chain(Embedding(10, 3, seed=0), GRU(3, 4, seed=1), Linear(4, 10, seed=2))
    >>> y, state = model(np.array([[7], [1]]))  # (T, B) of integers
    >>> y.shape, [h.shape for h in state]
    ((2, 1, 10), [(1, 1, 4)])
    >>> list(model.params)[:3]
    ['0.weight', '1.weight_ih_l0', '1.weight_hh_l0']
    """

    def __init__(self, *layers: Any) -> None:
        for layer in layers:
            if not isinstance(layer, Layer) or isinstance(layer, GRUCell):
                raise TypeError(
                    f"a Chain is made of GRU, Linear, Embedding and Dropout, not {type(layer)}"
                )
        if not layers:
            raise ValueError("a Chain needs at least one layer")
        homes = {(layer.backend.name, str(layer.backend.device), layer.dtype) for layer in layers}
        if len(homes) != 1:
            raise ValueError(f"layers of a Chain must share backend and dtype, these are {homes}")
        layouts = {layer.batch_first for layer in layers if isinstance(layer, GRU)}
        if len(layouts) == 2:
            raise ValueError(
                "the GRUs of a Chain must share batch_first: one reads (T, B, .), another (B, T, .)"
            )
        self.batch_first = True in layouts
        self.layers = layers
        self.params = _AllParams(layers)
        self.backend, self.dtype = layers[0].backend, layers[0].dtype

    def __call__(self, x: Any, state: Any = None, lengths: Any = None) -> tuple[Any, list[Any]]:
        """Run all layers, keeping nothing for a way back -> y, the new state."""
        states, new = self._states(state), []
        for layer in self.layers:
            if isinstance(layer, GRU):
                x, h = layer(x, next(states), lengths)
                new.append(h)
            else:
                x = layer(x)
        return x, new

    def vjp(self, x: Any, state: Any = None, lengths: Any = None, rng: Any = None) -> Any:
        """Run all layers; with `rng` dropout acts.

        Returns
        -------
        (y, state) : as in a plain call.
        pullback : callable
            `grads, dx, dstate = pullback(dy, dstate=None)`: grads named like `params`; dstate a
            list like state. It may be called again.
        """
        states, new, pullbacks = self._states(state), [], []
        for layer in self.layers:
            if isinstance(layer, GRU):
                (x, h), back = layer.vjp(x, next(states), lengths, rng)
                new.append(h)
            else:
                x, back = layer.vjp(x, rng=rng)
            pullbacks.append(back)

        def pullback(dy: Any, dstate: Any = None) -> Any:
            if dy is None and dstate is None:
                raise ValueError("pullback got neither dy nor dstate; one of them must be given")
            return self._back(
                pullbacks, self.backend.xp.zeros_like(x) if dy is None else dy, dstate
            )

        return (x, new), pullback

    def _back(self, pullbacks: list[Any], dy: Any, dstate: Any) -> Any:
        given, found, grads = list(self._states(dstate)), [], {}
        for i in range(len(self.layers) - 1, -1, -1):
            if isinstance(self.layers[i], GRU):
                of_layer, dy, dh0 = pullbacks[i](dy, given.pop())
                found.append(dh0)
            else:
                of_layer, dy = pullbacks[i](dy)
            grads[i] = of_layer
        named = {f"{i}.{k}": v for i in sorted(grads) for k, v in grads[i].items()}
        return named, dy, found[::-1]

    def _states(self, state: Any) -> Iterator[Any]:
        count = sum(isinstance(layer, GRU) for layer in self.layers)
        state = [None] * count if state is None else list(state)
        if len(state) != count:
            raise ValueError(f"state holds {len(state)}, expected {count}, one for each GRU")
        return iter(state)

    def load_params(self, mapping: Mapping[str, Any]) -> None:
        """Load all layers; strict, like `GRU.load_params`. Nothing is loaded unless all fits."""
        load(self, mapping, lambda missing, unused: "")

    def to(self, backend: Any = None, device: Any = None, dtype: str | None = None) -> "Chain":
        """Return a new chain with these weights on another backend, device or dtype."""
        return Chain(*(layer.to(backend, device, dtype) for layer in self.layers))

    def __repr__(self) -> str:
        return "Chain(\n  " + "\n  ".join(repr(layer) for layer in self.layers) + "\n)"

    def __reduce__(self) -> Any:
        return Chain, self.layers


class _AllParams(MutableMapping[str, Any]):
    """The params of several layers as one mapping; writing to it writes to them."""

    def __init__(self, layers: tuple[Any, ...]) -> None:
        self._layers = layers

    def _at(self, name: str) -> tuple[Any, str]:
        number, _, rest = name.partition(".")
        if number.isdecimal() and int(number) < len(self._layers):
            return self._layers[int(number)].params, rest
        raise KeyError(name)

    def __getitem__(self, name: str) -> Any:
        params, rest = self._at(name)
        return params[rest]

    def __setitem__(self, name: str, array: Any) -> None:
        params, rest = self._at(name)
        params[rest] = array

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{name!r} cannot be deleted; the layer needs it")

    def __iter__(self) -> Iterator[str]:
        return (f"{i}.{name}" for i, layer in enumerate(self._layers) for name in layer.params)

    def __len__(self) -> int:
        return sum(len(layer.params) for layer in self._layers)
