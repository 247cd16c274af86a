"""Layers one after the other, with the states of the GRUs among them."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, NoReturn, TypeAlias

from ..backend import Backend, by_place, of, plain_name, to_numpy
from ..backend.dual_backend import dual
from ..errors import ShapeError
from ..typing import Array, Arrays, Derivatives, Device, Gradients, Lengths, Rng
from .cell import GRUCell
from .gru import GRU
from .layers import Dropout, Embedding, Last, Linear
from .params import BackendLike, Layer, check_mapping, load, refuse_names, refuse_shared
from .tangents import (
    DualChainPullback,
    check_params_dot,
    dual_layer,
    lift,
    lift_states,
    refuse_no_direction,
    split_duals,
)

States: TypeAlias = Sequence[Array | None]  # h (L*D, B, H) of each GRU
Ready: TypeAlias = Callable[[Gradients], object]


class Chain:
    """Layers applied in order: a sequence model in one object.

    Parameters
    ----------
    *layers
        GRU, Linear, Embedding, Dropout or Last layers on one backend, the GRUs with one
        `batch_first`. A Last follows a GRU.
    tied : mapping of str to str, or None
        `{"2.weight": "0.weight"}` makes the parameter on the left another name of the one on the
        right, whose array it takes: one parameter, with the sum of the gradients.

    Attributes
    ----------
    params : mapping
        The parameters of all layers, live, under names such as `0.weight_ih_l0`; a tied one stands
        there once, under the name on the right.
    tied : mapping
        As given; it cannot be changed.
    batch_first : bool
        Whether x and y are (B, T, .) in place of (T, B, .), as all GRUs of the chain have it.

    Raises
    ------
    TypeError
        A layer is of another kind.
    ValueError
        There is no layer, or they are not on one backend, of one dtype and of one layout; `tied`
        names what is not there, is itself tied, or has another shape; or two parameters share
        memory untied.

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

    def __init__(self, *layers: Layer, tied: Mapping[str, str] | None = None) -> None:
        for layer in layers:
            if not isinstance(layer, Layer) or isinstance(layer, GRUCell):
                way = ": Chain(*layers)" if isinstance(layer, (list, tuple)) else ""
                raise TypeError(
                    "a Chain is made of GRU, Linear, Embedding, Dropout and Last, not "
                    f"{type(layer)}{way}"
                )
        if not layers:
            raise ValueError("a Chain needs at least one layer")
        _check_last(layers)
        if any(isinstance(layer, GRU) and layer.merge is None for layer in layers):
            raise ValueError(
                "a GRU with merge=None puts out a pair, which no layer of a Chain reads: use "
                'another merge, such as "concat"'
            )
        if any(isinstance(layer, GRU) and layer.outputs == "all" for layer in layers):
            raise ValueError(
                'a GRU with outputs="all" puts out a tuple, which no layer of a Chain reads: leave '
                'it at "top", and make a GRU of each layer to read what lies between'
            )
        homes = {(layer.backend.name, str(layer.backend.device), layer.dtype) for layer in layers}
        if len(homes) != 1:
            raise ValueError(f"layers of a Chain must share backend and dtype, these are {homes}")
        if tied is not None and not isinstance(tied, Mapping):
            raise TypeError(f'tied is {tied!r}, expected a dict such as {{"2.weight": "0.weight"}}')
        layouts = {layer.batch_first for layer in layers if isinstance(layer, GRU)}
        if len(layouts) == 2:
            raise ValueError(
                "the GRUs of a Chain must share batch_first: one reads (T, B, .), another (B, T, .)"
            )
        self.batch_first = True in layouts
        self.layers: tuple[Any, ...] = layers  # each with a call and a vjp of its own
        self.tied: Mapping[str, str] = MappingProxyType(dict(tied or {}))
        self.params = _AllParams(layers, self.tied)
        refuse_shared(self.params)
        _check_widths(layers)
        self.backend, self.dtype = layers[0].backend, layers[0].dtype

    @by_place
    def __call__(
        self,
        x: Array,
        state: States | None = None,
        lengths: Lengths | None = None,
        *,
        mask: Array | None = None,
        resets: Array | None = None,
        start: States | None = None,
        skipped: str = "zero",
    ) -> tuple[Array, list[Array]]:
        """Run all layers without keeping residuals; return y and the new state.

        The GRUs take lengths, mask, resets and skipped as `GRU.__call__` does. start: a list like
        state, of what each takes as its start; None is 0.
        """
        self.params.refuse_untied()
        states, starts, new = self._states(state), self._states(start, "start"), []
        options: dict[str, Any] = {"mask": mask, "resets": resets, "skipped": skipped}
        for layer in self.layers:
            if isinstance(layer, GRU):
                x, h = layer(x, next(states), lengths, start=next(starts), **options)
                new.append(h)
            elif isinstance(layer, Last):
                x = layer(new[-1], *self._directions)
            else:
                x = layer(x)
        return x, new

    @by_place
    def vjp(
        self,
        x: Array,
        state: States | None = None,
        lengths: Lengths | None = None,
        rng: Rng | None = None,
        *,
        mask: Array | None = None,
        resets: Array | None = None,
        start: States | None = None,
        skipped: str = "zero",
    ) -> tuple[tuple[Array, list[Array]], "ChainPullback"]:
        """Run all layers; with `rng` dropout acts.

        Returns
        -------
        (y, state) : as in a plain call.
        pullback : callable
            `grads, dx, dstate = pullback(dy, dstate=None, ready=None)`: grads named like `params`;
            dstate a list like state. It may be called again. `ready` is called with the gradients
            of each layer as soon as they are there, the last layer's first, unless some are tied.
            Where `start` is given, `grads, dx, dstate, dstart = ...`, a list like start.
            `pullback.per_example(dy, dstate)` returns grads of each row of the batch, (B, ...).
        """
        self.params.refuse_untied()
        states, starts, new = self._states(state), self._states(start, "start"), []
        options: dict[str, Any] = {"mask": mask, "resets": resets, "skipped": skipped}
        pullbacks: list[Any] = []
        for layer in self.layers:
            back: Any
            if isinstance(layer, GRU):
                (x, h), back = layer.vjp(
                    x, next(states), lengths, rng, start=next(starts), **options
                )
                new.append(h)
            elif isinstance(layer, Last):
                x, back = layer.vjp(new[-1], *self._directions)
            else:
                x, back = layer.vjp(x, rng=rng)
            pullbacks.append(back)
        return (x, new), ChainPullback(self, pullbacks, x, start is not None)

    @by_place
    def jvp(
        self,
        x: Array,
        state: States | None = None,
        lengths: Lengths | None = None,
        *,
        x_dot: Array | None = None,
        state_dot: States | None = None,
        start_dot: States | None = None,
        params_dot: Arrays | None = None,
        mask: Array | None = None,
        resets: Array | None = None,
        start: States | None = None,
        skipped: str = "zero",
    ) -> tuple[tuple[Array, list[Array]], tuple[Array, list[Array]]]:
        """Run all layers, and differentiate the outputs along a direction; see `GRU.jvp`.

        state_dot, start_dot: lists like state and start. Returns (y, state) and (y_dot, state_dot).
        """
        twin, x, state, start = self._along(
            x, state, start, x_dot, state_dot, start_dot, params_dot
        )
        options = {"mask": mask, "resets": resets, "start": start, "skipped": skipped}
        found = twin(x, state, lengths, **options)
        values, dots = split_duals(twin.backend, found)
        return values, dots

    @by_place
    def forward_over_reverse(
        self,
        x: Array,
        state: States | None = None,
        lengths: Lengths | None = None,
        rng: Rng | None = None,
        *,
        x_dot: Array | None = None,
        state_dot: States | None = None,
        start_dot: States | None = None,
        params_dot: Arrays | None = None,
        mask: Array | None = None,
        resets: Array | None = None,
        start: States | None = None,
        skipped: str = "zero",
    ) -> tuple[tuple[Array, list[Array]], tuple[Array, list[Array]], DualChainPullback]:
        """Run all layers for a backward pass and its derivative; see `GRU.forward_over_reverse`.

        Returns
        -------
        (y, state), (y_dot, state_dot) : as of `jvp`.
        pullback : callable
            `(grads, dx, dstate), (grads_dot, dx_dot, dstate_dot) = pullback(dy, dstate=None,
            dy_dot=None, dstate_dot=None)`; dx_dot is None where dx is. With a start each triple has
            dstart as a fourth.
        """
        twin, x, state, start = self._along(
            x, state, start, x_dot, state_dot, start_dot, params_dot
        )
        options = {"mask": mask, "resets": resets, "start": start, "skipped": skipped}
        found, back = twin.vjp(x, state, lengths, rng, **options)
        return *split_duals(twin.backend, found), DualChainPullback(twin.backend, self.dtype, back)

    def _along(
        self,
        x: Array,
        state: States | None,
        start: States | None,
        x_dot: Array | None,
        state_dot: States | None,
        start_dot: States | None,
        params_dot: Arrays | None,
    ) -> tuple[Any, Array, States | None, States | None]:
        """Return this chain over dual numbers, and x, state and start as such."""
        given = x_dot, state_dot, start_dot, params_dot
        refuse_no_direction("x_dot, state_dot, start_dot and params_dot", *given)
        self.params.refuse_untied()
        dots = dict(check_params_dot(self, params_dot))
        dots |= {alias: dots[name] for alias, name in self.tied.items() if name in dots}
        twin: Any = self.twin(dual(self.backend), self.dtype)
        own = [{k: dots.get(f"{i}.{k}") for k in v.params} for i, v in enumerate(self.layers)]
        twin.layers = tuple(dual_layer(*pair) for pair in zip(self.layers, own, strict=True))
        twin.params = self.params
        made = partial(lift, self.backend, self.dtype)
        state = lift_states(made, "state", state, state_dot)
        start = lift_states(made, "start", start, start_dot)
        return twin, made("x", x, x_dot), state, start

    def _back(
        self,
        pullbacks: list[Any],
        dy: Array | None,
        dstate: States | None,
        ready: Ready | None,
        by_row: bool,
    ) -> tuple[Gradients, Array, list[Array], list[Array | None]]:
        given, found, grads = list(self._states(dstate)), [], {}
        starts: list[Array | None] = []
        axis = 0 if self.batch_first or self._last or not given else 1  # of the examples in dy
        for i in range(len(self.layers) - 1, -1, -1):
            if isinstance(self.layers[i], GRU):
                back = pullbacks[i].per_example if by_row else pullbacks[i]
                of_layer, dy, dh0, *dstart = back(dy, given.pop())
                found.append(dh0)
                starts.append(dstart[0] if dstart else None)
            elif isinstance(self.layers[i], Last):
                of_layer, given[-1] = pullbacks[i](dy, given[-1])
                dy, axis = None, 0 if self.batch_first else 1
            elif by_row and self.layers[i].params:
                of_layer, dy = pullbacks[i].per_example(dy, axis)
            else:
                of_layer, dy = pullbacks[i](dy)
            grads[i] = of_layer
            if ready and not self.tied:
                ready({f"{i}.{k}": v for k, v in of_layer.items()})
        named = {f"{i}.{k}": v for i in sorted(grads) for k, v in grads[i].items()}
        for alias, name in self.tied.items():
            named[name] = named[name] + named.pop(alias)
        return named, dy, found[::-1], starts[::-1]

    @property
    def _last(self) -> bool:
        """Whether a Last removes the axis of time."""
        return any(isinstance(layer, Last) for layer in self.layers)

    @property
    def _directions(self) -> tuple[int, str]:
        """How many directions the last GRU has, and how they are merged; what a Last takes."""
        last = [layer for layer in self.layers if isinstance(layer, GRU)][-1]
        return len(last.suffixes), last.merge or "concat"

    def _states(self, state: States | None, name: str = "state") -> Iterator[Array | None]:
        count = sum(isinstance(layer, GRU) for layer in self.layers)
        if isinstance(state, (str, Mapping)) or not (state is None or hasattr(state, "__iter__")):
            kind = type(state).__name__
            raise TypeError(f"{name} is a {kind}, expected a list, one for each GRU")
        state = [None] * count if state is None else list(state)
        if len(state) != count:
            raise ValueError(f"{name} holds {len(state)}, expected {count}, one for each GRU")
        return iter(state)

    def load_params(self, mapping: Arrays) -> None:
        """Load all layers; strict, like `GRU.load_params`. Nothing is loaded unless all fits.

        A tied parameter may come under each of its names, but only with the same bits.
        """
        check_mapping(mapping)
        named: dict[str, Array] = {}
        for given, array in mapping.items():
            name = self.tied.get(given, given)
            if name in named and not _same_bits(named[name], array):
                raise ValueError(
                    f"{given} holds other values than another name of {name}, to which it is "
                    "tied: load them into a Chain without this tie, or leave one name out"
                )
            named[name] = array
        load(self, named, lambda missing, unused: "")

    def to(
        self,
        backend: BackendLike | None = None,
        device: Device = None,
        dtype: str | None = None,
    ) -> "Chain":
        """Return a new chain with these weights on another backend, device or dtype."""
        refuse_shared(self.params)
        return _chain([layer.to(backend, device, dtype) for layer in self.layers], dict(self.tied))

    def apply(self, params: Arrays, *args: object, **options: object) -> Any:
        """Call the chain with these parameters, named like its own; see `Layer.apply`."""
        refuse_names(self, params, lambda missing, unused: "")
        named = {**params, **{alias: params[name] for alias, name in self.tied.items()}}
        own = [{k: named[f"{i}.{k}"] for k in layer.params} for i, layer in enumerate(self.layers)]
        home, dtype = of(*params.values()), plain_name(next(iter(params.values())).dtype)
        twin: Any = self.twin(home, dtype)
        twin.layers = tuple(
            layer._with(of_layer) if of_layer else layer.over(home, dtype, ())
            for layer, of_layer in zip(self.layers, own, strict=True)
        )
        twin.params = self.params
        return twin(*args, **options)

    @cached_property
    def twins(self) -> dict[str, "Chain"]:
        """Twins of this chain over the backends that run its calls; see `backend.bridge`."""
        return {}

    def twin(self, backend: Backend, dtype: str) -> "Chain":
        """Return this chain for another backend, without parameters."""
        twin = object.__new__(type(self))
        twin.__dict__ = {name: v for name, v in vars(self).items() if name != "twins"}
        twin.layers = tuple(layer.twin(backend, dtype) for layer in self.layers)
        twin.backend, twin.dtype = backend, dtype
        return twin

    def follow(self, twin: "Chain", views: Callable[[object, object], Any]) -> None:
        """Give a twin the settings and parameters as they are now; views: as of `Layer.follow`."""
        for own, other in zip(self.layers, twin.layers, strict=True):
            own.follow(other, views)
        twin.params = self.params

    def __repr__(self) -> str:
        lines = [repr(layer) for layer in self.layers]
        lines += [f"tied={dict(self.tied)!r}"] if self.tied else []
        return "Chain(\n  " + "\n  ".join(lines) + "\n)"

    def __reduce__(self) -> tuple[Callable[..., "Chain"], tuple[object, ...]]:
        refuse_shared(self.params)
        return _chain, (self.layers, dict(self.tied))


class ChainPullback:
    """From dL/dy and dL/dstate to dL/d of the parameters, x and state. See `Chain.vjp`."""

    def __init__(self, chain: Chain, pullbacks: list[Any], y: Array, started: bool) -> None:
        self._chain, self._pullbacks, self._y = chain, pullbacks, y
        self._started = started  # whether a start was given

    def __call__(
        self, dy: Array | None, dstate: States | None = None, ready: Ready | None = None
    ) -> Derivatives:
        """Return grads (a dict named like the parameters), dx, dstate; dstart if there is one."""
        return self._back(dy, dstate, ready, False)

    def per_example(self, dy: Array | None, dstate: States | None = None) -> Derivatives:
        """Return what a call returns, but grads of each row of the batch, (B, ...).

        The batch is the second axis of x, the first with `batch_first` or in a Chain without a GRU.
        """
        return self._back(dy, dstate, None, True)

    def _back(
        self, dy: Array | None, dstate: States | None, ready: Ready | None, by_row: bool
    ) -> Derivatives:
        if dy is None and dstate is None:
            raise ValueError("pullback got neither dy nor dstate; one of them must be given")
        dy = self._chain.backend.xp.zeros_like(self._y) if dy is None else dy
        *found, dstart = self._chain._back(self._pullbacks, dy, dstate, ready, by_row)
        grads, *inputs = found
        return (grads, *inputs, dstart) if self._started else (grads, *inputs)


def _chain(layers: Sequence[Layer], tied: dict[str, str]) -> Chain:
    return Chain(*layers, tied=tied)


def _same_bits(x: Array, y: Array) -> bool:
    a, b = to_numpy(x), to_numpy(y)
    return bool(a.dtype == b.dtype) and a.shape == b.shape and a.tobytes() == b.tobytes()


def _check_last(layers: Sequence[Layer]) -> None:
    """Raise where a Last does not follow a GRU, or a GRU follows it, which would have no steps."""
    places = [i for i, layer in enumerate(layers) if isinstance(layer, Last)]
    for i in places:
        if i == 0 or not isinstance(layers[i - 1], GRU):
            raise ValueError(f"layer {i} is a Last, which must follow a GRU directly")
        if any(isinstance(layer, GRU) for layer in layers[i:]):
            raise ValueError(f"a GRU comes after the Last at {i}, which leaves no steps to read")


def _check_widths(layers: Sequence[Layer]) -> None:
    """Raise where a layer's input size is not the output size of the layer before it."""
    width: int | None = None  # None: not known
    for i, layer in enumerate(layers):
        name = "in_features" if isinstance(layer, Linear) else "input_size"
        if width is not None and getattr(layer, name, width) != width:
            raise ValueError(
                f"layer {i} has {name}={getattr(layer, name)}, expected {width}, the width of what "
                f"layer {i - 1} returns"
            )
        if isinstance(layer, GRU):
            width = layer.output_size
        elif isinstance(layer, Linear):
            width = layer.out_features
        elif isinstance(layer, Embedding):
            width = layer.size
        elif not isinstance(layer, (Dropout, Last)):
            width = None


class _AllParams(MutableMapping[str, Array]):
    """The params of several layers as one mapping; writing to it writes to them.

    A tied parameter is one array that stands in the entries of several layers.
    """

    def __init__(self, layers: Sequence[Layer], tied: Mapping[str, str]) -> None:
        self._tied = tied
        # the layers, and their names for it, in which each parameter stands
        self._homes = {
            f"{i}.{k}": [(layer, k)] for i, layer in enumerate(layers) for k in layer.params
        }
        for alias, name in tied.items():
            self._refuse_tie(alias, name)
        for alias, name in tied.items():
            layer, entry = self._homes.pop(alias)[0]
            layer.params[entry] = self[name]
            self._homes[name].append((layer, entry))

    def _refuse_tie(self, alias: str, name: str) -> None:
        told = f"tied is {{{alias!r}: {name!r}}}"
        for given in (alias, name):
            if given not in self._homes:
                raise ValueError(f"{told}, but there is no {given!r}, only {list(self._homes)}")
        if name in self._tied:
            raise ValueError(f"{told}, but {name!r} is tied itself: name the one it is tied to")
        homes = [self._homes[given][0] for given in (alias, name)]
        shapes = [tuple(layer.params[entry].shape) for layer, entry in homes]
        if shapes[0] != shapes[1]:
            raise ShapeError(f"{told}, but they are {shapes[0]} and {shapes[1]}")

    def refuse_untied(self) -> None:
        """Raise where the entry of one layer was replaced, so that tied parameters differ."""
        for alias, name in self._tied.items():
            if any(layer.params[k] is not self[name] for layer, k in self._homes[name]):
                raise RuntimeError(
                    f"{alias!r} is tied to {name!r}, but the entry of one layer was replaced: "
                    f"write chain.params[{name!r}] = array, which sets both"
                )

    def __getitem__(self, name: str) -> Array:
        if name in self._tied:
            raise KeyError(f"{name!r} is tied, and stands here as {self._tied[name]!r}")
        layer, entry = self._homes[name][0]
        return layer.params[entry]

    def __setitem__(self, name: str, array: Array) -> None:
        _ = self[name]  # a name that is not there
        for layer, entry in self._homes[name]:
            layer.params[entry] = array

    def __delitem__(self, name: str) -> NoReturn:
        raise TypeError(f"{name!r} cannot be deleted; the layer needs it")

    def __iter__(self) -> Iterator[str]:
        self.refuse_untied()
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)
