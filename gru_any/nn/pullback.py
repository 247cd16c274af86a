"""The backward pass through the layers of a GRU."""

from ..backend.contract import Output
from ..typing import Array, Derivatives
from .layout import Call, SequenceLayout
from .masks import Masks
from .params import Params, refuse_stale
from .stack import BackwardInputs, LayerResiduals, Stack


class Pullback:
    """From dL/dy and dL/dh_n to dL/d of the parameters, x, h0 and start. See `GRU.vjp`."""

    def __init__(
        self,
        params: Params,
        layout: SequenceLayout,
        stack: Stack,
        call: Call,
        residuals: list[LayerResiduals],
        masks: Masks,
    ) -> None:
        self._params, self._version = params, params.version
        self._layout, self._stack, self._call = layout, stack, call
        self._residuals = residuals  # or what the runner returned in their place
        self._masks = masks

    def __call__(self, dy: Array | None, dh_n: Array | None = None) -> Derivatives:
        """Return grads (a dict named like the parameters), dx, dh0; dstart if there is a start."""
        return self._back(dy, dh_n, None)

    def taps(self, dy: Array | None, dh_n: Array | None = None) -> Array:
        """Return the total gradient dL/dh (L*D, T, B, H) of every step; 0 at padding."""
        stack, (states, B, H) = self._stack, self._call.h0.shape
        shape = (self._call.x.shape[0], B, H)
        taps = [stack.run.output(shape, stack.dtype) for _ in range(states)]
        self._back(dy, dh_n, taps)
        return stack.to_storage(stack.run.xp.stack([tap.array() for tap in taps]))

    def per_example(self, dy: Array | None, dh_n: Array | None = None) -> Derivatives:
        """Return grads, dx and dh0 as a call does, but grads of each row of the batch, (B, ...).

        So is dstart, (B, L*D, H), where one start serves all rows.
        Row b is the gradient from b's own part of dy and dh_n; their sum is the gradient.

        Raises
        ------
        ValueError
            x was (T, I), without a batch.
        """
        if self._call.unbatched:
            raise ValueError("x (T, I) has no batch: the pullback itself gives its one gradient")
        return self._back(dy, dh_n, None, True)

    def _back(
        self,
        dy: Array | None,
        dh_n: Array | None,
        taps: list[Output] | None,
        by_row: bool = False,
    ) -> Derivatives:
        refuse_stale(self._params, self._version)
        stack, call, layout = self._stack, self._call, self._layout
        given = BackwardInputs(*layout.enter_cotangents(call, dy, dh_n))
        steps = None if by_row or taps is not None else stack.steps(call.x)
        found, _ = stack.run.run_graph(
            Stack.backward, stack, (taps, by_row), given, steps, self._residuals
        )
        grads, dx, dh0, dstart = found
        if dropped := self._masks.weights:
            grads = {**grads, **{name: grads[name] * kept for name, kept in dropped.items()}}
        states = layout.leave_states(call, dh0, dstart, by_row)
        return {name: grads[name] for name in self._params}, layout.leave(call, dx), *states


class BlockPullback(Pullback):
    """The pullback of one block through one layer in one direction, without masks."""

    def __call__(self, dy: Array | None, dh_n: Array | None = None) -> Derivatives:
        """Return grads, dx and dh0, by one call of the sweep."""
        refuse_stale(self._params, self._version)
        dy, dh_n = self._layout.enter_cotangents(self._call, dy, dh_n)
        ((sweep, (segment,)),) = self._residuals[0].sweeps
        assert segment.residuals  # a block is not recomputed
        (kept,) = segment.residuals
        dx, dh, grads = sweep.one_block_back(self._call.x, kept, dy, dh_n[0])
        dx = dx.swapaxes(0, 1) if self._layout.batch_first else dx
        return dict(zip(self._params, grads, strict=False)), dx, dh[None]
