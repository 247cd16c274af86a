"""Layers on top of one another, in one or two directions, as functions of arrays and nothing else.

So a device can capture a whole call and replay it on other arrays.
"""

from __future__ import annotations  # those of nested functions cost time in each call

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from ..backend.contract import Output, Result, Runner
from ..equations import Variant
from ..typing import Array, DType, Gradients
from .merge import merge, merge_backward
from .sweep import Segment, SequenceMask, StepMasks, Sweep, Weights
from .weights import normalised_weights, parameter_names, weights


class ForwardInputs(NamedTuple):
    """The arrays of a forward pass."""

    x: Array  # (T, B, I)
    h0: Array  # (L*D, B, H), in the dtype of the arithmetic
    params: Mapping[Any, Any]  # what `Stack.weights` reads: the parameters by name
    alive: Array | None  # as of `SequenceMask`; None: no step is skipped
    cuts: tuple[Array, ...] | None  # of each direction, as of `Sweep`; None: no state is cut
    dropout: tuple[Array | None, ...] | None  # of the input of each layer; None: there is none
    # of each layer and direction, the first two of `StepMasks`; None: there are none
    steps: tuple[tuple[Array | None, Array | None], ...] | None = None
    start: Array | None = None  # (L*D, B, H), from which states start anew; None: from 0


class BackwardInputs(NamedTuple):
    """The arrays of a backward pass."""

    dy: Any  # (T, B, D*H) or None; of all layers a tuple of such, or None
    dh_n: Array  # (L*D, B, H), in the dtype of the arithmetic


class LayerResiduals(NamedTuple):
    """What the backward pass needs of a layer."""

    x: Array  # (T, B, .), its input after dropout
    dropout: Array | None  # the mask that its input was multiplied by
    sweeps: list[tuple[Sweep, list[Segment]]]  # of each direction
    outputs: Sequence[Array] | None = None  # of each direction, with merge="mul" alone


class Stack(NamedTuple):
    """The layers of a GRU without their parameters."""

    run: Runner  # how a block of steps runs
    variant: Variant  # the equations
    bias: bool
    reset_after: bool
    layers: int  # L
    suffixes: tuple[str, ...]  # the ends of the parameters' names, one for each direction
    dtype: DType  # of the arithmetic
    storage: DType  # of inputs, outputs and gradients
    merge: str = "concat"  # how the outputs of two directions become one; see merge.py
    layer_norm: bool = False  # whether there are gains; see normalisation.py
    every: bool = False  # whether y has the outputs of all layers

    def on(self, run: Runner) -> Stack:
        """Return the layers on another runner."""
        return self if run is self.run else self._replace(run=run)

    def forward(
        self,
        unmasked: int,
        keep: bool,
        segment: int | None,
        outputs: bool,
        given: ForwardInputs,
    ) -> tuple[tuple[Any, Array], list[LayerResiduals]]:
        """Run all layers; return y (T, B, D*H) and h_n (L*D, B, H), and the residuals.

        y is a tuple, one array a layer, with `every`, and None without `outputs`. unmasked: as of
        `SequenceMask`; keep, segment and outputs: as of `Sweep.forward`. There are no residuals
        without `keep`: they would hold the outputs of all layers at once.
        """
        x, h0, params, alive, cuts, dropout, of_steps, start = given
        mask = None if alive is None else SequenceMask(alive, unmasked)
        D = len(self.suffixes)
        states: list[Array] = []
        residuals: list[LayerResiduals] = []
        every: list[Array] = []

        def run_layer(layer: int, run: Runner, x: Array) -> Array:
            wanted = outputs or layer + 1 < self.layers
            dropped = None if dropout is None else dropout[layer]
            x = x if dropped is None else x * dropped
            masks: Sequence[StepMasks | None] = (None,) * D
            if cuts or of_steps:
                masks = _step_masks(cuts, start, of_steps, layer, D)
            if D == 1:  # the same at less cost, for small calls
                sweep = self.sweep(params, layer, self.suffixes[0], mask, masks[0])
                h = h0[layer, :, :]
                y, h, blocks = sweep.on(run).forward(x, h, keep, segment, wanted)
                states.append(h)
                if keep:
                    residuals.append(LayerResiduals(x, dropped, [(sweep, blocks)]))
                return y
            pairs = zip(self.suffixes, masks, strict=True)
            sweeps = [self.sweep(params, layer, suffix, mask, own) for suffix, own in pairs]

            def run_sweep(d: int, run: Runner) -> tuple[Array | None, Array, list[Segment]]:
                h = h0[layer * D + d, :, :]
                return sweeps[d].on(run).forward(x, h, keep, segment, wanted)

            ys, hs, segments = zip(*_concurrent(run_sweep, D, run), strict=True)
            states.extend(hs)
            if keep:
                kept = list(zip(sweeps, segments, strict=True))
                parts = ys if self.merge == "mul" and wanted else None
                residuals.append(LayerResiduals(x, dropped, kept, parts))
            return merge(run.xp, self.merge, ys) if wanted else None

        def run_and_keep(layer: int, run: Runner, x: Array) -> Array:
            every.append(run_layer(layer, run, x))
            return every[-1]

        if self.layers == 1:
            y = run_layer(0, self.run, x)
        else:
            run = run_and_keep if self.every and outputs else run_layer
            y = self._pipeline(run, range(self.layers), x, h0, dropout)
        if self.every and outputs:
            y = tuple(every) or (y,)
        return (y, self.run.stacked(states, self.storage)), residuals

    def backward(
        self,
        taps: list[Output] | None,
        by_row: bool,
        given: BackwardInputs,
        residuals: list[LayerResiduals],
    ) -> tuple[tuple[Gradients, Array, Array, Array | None], None]:
        """Run the backward pass of all layers; return (grads, dx, dh0, dstart), and no residuals.

        dstart is None where no step starts from a given state. taps: None, or an output for each
        layer and direction, which `Sweep.backward` fills. by_row: as there.
        """
        D = len(self.suffixes)
        grads: Gradients = {}
        states: list[Array] = []
        starts: list[Array] = []

        def run_layer(layer: int, run: Runner, dy: Array | None) -> Array:
            x, dropped, sweeps, outputs = residuals[layer]
            if self.every and given.dy is not None:
                dy = _added(dy, given.dy[layer])
            dys = [dy] * D if D == 1 or dy is None else merge_backward(self.merge, dy, outputs)

            def run_sweep(d: int, run: Runner) -> tuple[Array, Array, list[Array]]:
                sweep, segments = sweeps[d]
                tap = None if taps is None else taps[layer * D + d]
                dh = given.dh_n[layer * D + d, :, :]
                return sweep.on(run).backward(x, segments, dys[d], dh, tap, by_row)

            total, found = None, _concurrent(run_sweep, D, run)
            masks, of_start = sweeps[0][0].masks, list[Array]()
            started = masks is not None and masks.start is not None and x.shape[0] > 0
            for suffix, (dx, _, of_weights) in zip(self.suffixes, found, strict=True):
                names = self._names(layer, suffix)
                if self.dtype != self.storage:
                    of_weights = list(map(self.to_storage, of_weights))
                grads.update(zip(names, of_weights, strict=False))
                if started:
                    of_start.append(of_weights[-1])
                total = dx if total is None else total + dx
            states[:0], starts[:0] = [dh for _, dh, _ in found], of_start
            return total if dropped is None else total * dropped

        layers = range(self.layers - 1, -1, -1)
        dropout = residuals[-1].dropout  # which acts on all layers but the first
        top = None if self.every else given.dy
        dx = self._pipeline(run_layer, layers, top, given.dh_n, dropout)
        dstart = self.run.stacked(starts, self.storage) if starts else None
        return (grads, dx, self.run.stacked(states, self.storage), dstart), None

    def gradients(
        self,
        unmasked: int,
        keep: bool,
        segment: int | None,
        outputs: bool,
        given: ForwardInputs,
        cotangents: tuple[Any, Array | None],
    ) -> ForwardInputs:
        """Return the gradients to the arrays of `forward`, of those to its results, y and h_n.

        Of cotangents None is 0. The residuals are not kept: the forward pass is run once more.
        """
        dy, dh_n = cotangents
        if dh_n is None:
            h0 = given.h0
            dh_n = self.run.xp.zeros(h0.shape, dtype=h0.dtype, device=self.run.device)
        wanted = outputs and self.merge == "mul"
        _, residuals = self.forward(unmasked, True, segment, wanted, given)
        back = BackwardInputs(dy, dh_n)
        (grads, dx, dh0, dstart), _ = self.backward(None, False, back, residuals)
        return ForwardInputs(dx, dh0, grads, None, None, None, None, dstart)

    def steps(self, x: Array) -> int:
        """Return how many steps a call on x (T, B, I) runs, all layers and directions counted."""
        return int(x.shape[0]) * self.layers * len(self.suffixes)

    def weights(self, params: Mapping[Any, Any], layer: int, suffix: str) -> Weights:
        """Return the weights of one layer in one direction, in the dtype of the arithmetic."""
        own = list(map(params.__getitem__, self._names(layer, suffix)))
        if self.dtype != self.storage:
            own = [self.run.upcast(v, self.dtype) for v in own]
        if self.layer_norm:
            return normalised_weights(self.run.xp, *own)
        return weights(self.run.xp, self.reset_after, *own)

    def sweep(
        self,
        params: Mapping[Any, Any],
        layer: int,
        suffix: str,
        mask: SequenceMask | None = None,
        masks: StepMasks | None = None,
    ) -> Sweep:
        """Return the sweep of one layer in one direction."""
        own, reverse = self.weights(params, layer, suffix), suffix == "_reverse"
        return Sweep(self.run, self.variant, own, mask, reverse, self.dtype, masks)

    def _names(self, layer: int, suffix: str) -> tuple[str, ...]:
        """Return the names of the parameters of one layer in one direction."""
        return parameter_names(self.bias, self.reset_after, layer, suffix, self.layer_norm)

    def _pipeline(
        self,
        run_layer: Callable[[int, Runner, Array], Array],
        layers: Sequence[int],
        x: Array,
        states: Array,
        dropout: object,
    ) -> Array:
        """Run layers one after the other, each on the result of the one before."""
        # a second direction, dropout and the user (`every`) need all steps of a layer at once
        alone = len(self.suffixes) == 2 or dropout is not None or self.every
        overlap = None if alone else states.shape[1] * states.shape[2]
        return self.run.pipeline([partial(run_layer, layer) for layer in layers], x, overlap)

    def to_storage(self, v: Array) -> Array:
        """Cast to the dtype of outputs and gradients."""
        return v if v.dtype == self.storage else self.run.xp.astype(v, self.storage)


def _added(a: Array | None, b: Array | None) -> Array | None:
    """Return the sum of two gradients, of which None is 0."""
    return a if b is None else b if a is None else a + b


def _concurrent(
    run_sweep: Callable[[int, Runner], Result], directions: int, run: Runner
) -> Sequence[Result]:
    """Run the sweeps of a layer, which do not depend on one another."""
    if directions == 1:
        return (run_sweep(0, run),)
    return run.concurrent([partial(run_sweep, d) for d in range(directions)])


def _step_masks(
    cuts: tuple[Array, ...] | None,
    start: Array | None,
    steps: tuple[tuple[Array | None, Array | None], ...] | None,
    layer: int,
    D: int,
) -> list[StepMasks]:
    """Return the masks of a layer's steps, one for each direction."""
    of_layer = ((None, None),) * D if steps is None else steps[layer * D : (layer + 1) * D]
    starts: Sequence[Array | None] = (None,) * D
    if cuts and start is not None:
        starts = [start[layer * D + d, :, :] for d in range(D)]
    found = zip(of_layer, cuts or (None,) * D, starts, strict=True)
    return [StepMasks(*own, cut, begin) for own, cut, begin in found]
