"""The backward pass through the layers of a GRU."""

from functools import partial
from typing import Any, NamedTuple

from ..errors import check_shape
from .params import refuse_stale
from .stack import BackwardInputs, Stack
from .sweep import Padding


class Call(NamedTuple):
    """What came in: x (T, B, I), h0 (L*D, B, H), the padding, and whether there was no batch."""

    x: Any
    h0: Any
    padding: Padding | None
    single: bool


class Pullback:
    """From dL/dy and dL/dh_n to dL/d of the parameters, x and h0. See `GRU.vjp`."""

    def __init__(self, gru: Any, entry: Call, tapes: Any, version: int) -> None:
        self._gru, self._entry, self._tapes, self._version = gru, entry, tapes, version

    def __call__(self, dy: Any, dh_n: Any = None) -> tuple[dict[str, Any], Any, Any]:
        """Return grads (a dict named like the parameters), dx, dh0."""
        return self._back(dy, dh_n, None)

    def taps(self, dy: Any, dh_n: Any = None) -> Any:
        """Return dL/dh (L*D, T, B, H) of every step, all that reaches it counted; 0 at padding."""
        gru, (states, B, H) = self._gru, self._entry.h0.shape
        shape, stack = (self._entry.x.shape[0], B, H), gru._stack_for(self._entry)
        taps = [stack.run.output(shape, stack.dtype) for _ in range(states)]
        self._back(dy, dh_n, taps)
        return gru._stored(gru.backend.xp.stack([tap.array() for tap in taps]))

    def _back(self, dy: Any, dh_n: Any, taps: list[Any] | None) -> Any:
        gru, entry = self._gru, self._entry
        refuse_stale(gru.params, self._version)
        given, stack = self._enter(dy, dh_n), gru._stack_for(entry)
        if taps is None:
            steps = gru._steps_of(entry)
            found, _ = stack.run.run_graph(Stack.backward, stack, (), given, steps, self._tapes)
        else:
            back = partial(Stack.backward, taps=taps)
            found, _ = stack.run.run_graph(back, stack, (), given, None, self._tapes)
        grads, dx, dh0 = found
        dx, dh0 = gru._leave(entry, dx, dh0)
        return {name: grads[name] for name in gru.params}, dx, dh0

    def _enter(self, dy: Any, dh_n: Any) -> BackwardInputs:
        """Check the cotangents; lay them out time-major, dh_n as (L*D, B, H)."""
        gru, entry = self._gru, self._entry
        if dy is None and dh_n is None:
            raise ValueError("pullback got neither dy nor dh_n; one of them must be given")
        T, B, H, D = entry.x.shape[0], entry.x.shape[1], gru.hidden_size, len(gru.suffixes)
        sizes = {"T": T, "B": B, "D*H": D * H, "L*D": gru.num_layers * D, "H": H}
        if dy is not None:
            gru.backend.check("dy", dy, gru.dtype)
            letters = "T, B" if not gru.batch_first else "B, T"
            check_shape("dy", dy, "(T, D*H)" if entry.single else f"({letters}, D*H)", sizes)
            dy = gru._time_major(dy, entry.single)
        if dh_n is None:
            return BackwardInputs(dy, gru.backend.zeros((gru.num_layers * D, B, H), gru.arithmetic))
        gru.backend.check("dh_n", dh_n, gru.dtype)
        check_shape("dh_n", dh_n, "(L*D, H)" if entry.single else "(L*D, B, H)", sizes)
        dh_n = gru.backend.xp.reshape(dh_n, (-1, B, H)) if entry.single else dh_n
        return BackwardInputs(dy, gru._compute(dh_n))
