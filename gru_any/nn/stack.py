"""Layers on top of one another, in one or two directions, as functions of arrays and nothing else.

So a device can record a whole call and replay it over other arrays.
"""

from functools import partial
from typing import Any, NamedTuple

from ..backend.contract import Runner
from ..equations import Variant
from .sweep import Padding, Sweep, Weights
from .weights import weights


class ForwardInputs(NamedTuple):
    """The arrays of a call: x (T, B, I), h0 (L*D, B, H), the parameters by name.

    alive: (T, B, 1) of bool, None where nothing is padded; masks: of the input of each layer, None
    where no dropout acts.
    """

    x: Any
    h0: Any
    params: dict[str, Any]
    alive: Any
    masks: tuple[Any, ...]


class BackwardInputs(NamedTuple):
    """The inputs of the backward pass: dy (T, B, D*H) or None, dh_n (L*D, B, H)."""

    dy: Any
    dh_n: Any


class LayerTape(NamedTuple):
    """The residuals of one layer: its input, its dropout mask, its directions."""

    x: Any
    mask: Any
    sweeps: list[tuple[Sweep, Any]]


class Stack(NamedTuple):
    """What all calls have in common: how blocks run, the equations, the layers, the dtypes.

    suffixes: of the parameters of each direction; dtype: of the arithmetic; stored: of results.
    """

    run: Any
    variant: Variant
    bias: bool
    reset_after: bool
    layers: int
    suffixes: tuple[str, ...]
    dtype: Any
    stored: Any

    def on(self, run: Runner) -> "Stack":
        """Return the stack on another runner."""
        return self if run is self.run else self._replace(run=run)

    def forward(
        self, full: int, keep: bool, segment: int | None, outputs: bool, given: ForwardInputs
    ) -> tuple[Any, list[LayerTape]]:
        """Run all layers -> (y (T, B, D*H) or None, h_n (L*D, B, H)), and their tapes.

        full: before this step all rows are alive; the rest is that of `Sweep.forward`. There are no
        tapes without `keep`: they would hold the outputs of all layers at once.
        """
        padding = None if given.alive is None else Padding(given.alive, full)
        states: list[Any] = []
        tapes: list[LayerTape] = []

        def through(layer: int, run: Runner, x: Any) -> Any:
            wanted = outputs or layer + 1 < self.layers
            y, hs, tape = self._layer(run, layer, given, padding, x, keep, segment, wanted)
            states.extend(hs)
            if keep:
                tapes.append(tape)
            return y

        calls = [partial(through, layer) for layer in range(self.layers)]
        y = self.run.pipeline(calls, given.x, self._overlap(given.masks, given.h0))
        return (y, self._together(states)), tapes

    def backward(
        self, given: BackwardInputs, tapes: list[LayerTape], taps: list[Any] | None = None
    ) -> tuple[Any, None]:
        """Walk all layers back -> (the gradients by name, dx, dh0 (L*D, B, H)), and no tape.

        taps: an output for each state, as `Sweep.backward` fills it.
        """
        grads: dict[str, Any] = {}
        dh0: list[Any] = []

        def back(layer: int, run: Runner, dy: Any) -> Any:
            dx, of_states = self._layer_back(run, layer, tapes[layer], dy, given.dh_n, grads, taps)
            dh0[:0] = of_states
            return dx

        calls = [partial(back, layer) for layer in range(self.layers - 1, -1, -1)]
        masks = tuple(tape.mask for tape in tapes)
        dx = self.run.pipeline(calls, given.dy, self._overlap(masks, given.dh_n))
        return (grads, dx, self._together(dh0)), None

    def weights(self, params: Any, layer: int, suffix: str) -> Weights:
        """Of one layer in one direction, in the dtype of the arithmetic."""

        def get(name: str) -> Any:
            return self.run.upcast(params[f"{name}_l{layer}{suffix}"], self.dtype)

        return weights(self.run.xp, get, self.bias, self.reset_after)

    def sweep(self, params: Any, layer: int, suffix: str, padding: Padding | None) -> Sweep:
        """One layer in one direction."""
        taken = self.weights(params, layer, suffix)
        reverse = suffix == "_reverse"
        return Sweep(self.run, self.variant, taken, padding, reverse, self.dtype)

    def _layer(
        self,
        run: Runner,
        layer: int,
        given: ForwardInputs,
        padding: Any,
        x: Any,
        keep: bool,
        segment: Any,
        wanted: bool,
    ) -> tuple[Any, Any, LayerTape]:
        """Through one layer -> its outputs (T, B, D*H), the last states, its tape."""
        mask, D = given.masks[layer], len(self.suffixes)
        x = x if mask is None else x * mask
        sweeps = [self.sweep(given.params, layer, suffix, padding) for suffix in self.suffixes]

        def forward(sweep: Sweep, h0: Any, run: Runner) -> Any:
            return sweep.on(run).forward(x, h0, keep, segment, wanted)

        h0 = [given.h0[layer * D + d, :, :] for d in range(D)]
        found = run.concurrent([partial(forward, *pair) for pair in zip(sweeps, h0, strict=True)])
        y = found[0][0]
        if D == 2 and wanted:
            y = self.run.xp.concat([y, found[1][0]], axis=-1)
        pairs = [(sweep, kept) for sweep, (_, _, kept) in zip(sweeps, found, strict=True)]
        return y, [h for _, h, _ in found], LayerTape(x, mask, pairs)

    def _layer_back(
        self, run: Runner, layer: int, tape: LayerTape, dy: Any, dh_n: Any, grads: Any, taps: Any
    ) -> Any:
        """Through one layer: dL/d of its outputs -> of its inputs, and of its first states."""
        D, H, total, dh0, calls = len(tape.sweeps), dh_n.shape[-1], None, [], []

        def backward(sweep: Sweep, kept: Any, dy: Any, dh: Any, taps: Any, run: Runner) -> Any:
            return sweep.on(run).backward(tape.x, kept, dy, dh, taps)

        for d, (sweep, kept) in enumerate(tape.sweeps):
            part = dy if D == 1 or dy is None else dy[..., d * H : (d + 1) * H]
            tap = None if taps is None else taps[layer * D + d]
            dh = dh_n[layer * D + d, :, :]
            calls.append(partial(backward, sweep, kept, part, dh, tap))
        for d, (dx, dh, of_weights) in enumerate(run.concurrent(calls)):
            names = ("weight_ih", "bias_ih", "weight_hh", "bias_hh")
            for name, grad in zip(names, of_weights, strict=False):
                grads[f"{name}_l{layer}{self.suffixes[d]}"] = self._stored(grad)
            total = dx if total is None else total + dx
            dh0.append(dh)
        return (total if tape.mask is None else total * tape.mask), dh0

    def _overlap(self, masks: tuple[Any, ...], states: Any) -> int | None:
        """How many numbers a state has; None where a layer needs all of another at once."""
        alone = len(self.suffixes) == 2 or any(mask is not None for mask in masks)
        return None if alone else states.shape[1] * states.shape[2]

    def _together(self, states: list[Any]) -> Any:
        """One (B, H) for each state -> (L*D, B, H), in the dtype of results."""
        out = self.run.output((len(states), *states[0].shape), self.stored)
        for n, state in enumerate(states):
            out.put(slice(n, n + 1), self._stored(state)[None, :, :])
        return out.array()

    def _stored(self, v: Any) -> Any:
        return v if v.dtype == self.stored else self.run.xp.astype(v, self.stored)
