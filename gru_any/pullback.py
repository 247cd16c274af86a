"""The way back through the layers of a GRU."""

from functools import partial
from typing import Any, NamedTuple

from .errors import check_shape
from .params import refuse_stale
from .sweep import Padding, Sweep


class Entry(NamedTuple):
    """What came in: x (T, B, I), h0 (L*D, B, H), the padding, and whether there was no batch."""

    x: Any
    h0: Any
    padding: Padding | None
    single: bool


class LayerTape(NamedTuple):
    """What the way back needs of one layer: its input, its dropout mask, its directions."""

    x: Any
    mask: Any
    sweeps: list[tuple[Sweep, Any]]


class Pullback:
    """From dL/dy and dL/dh_n to dL/d of the parameters, x and h0. See `GRU.vjp`."""

    def __init__(self, gru: Any, entry: Entry, tapes: list[LayerTape], version: int) -> None:
        self._gru, self._entry, self._tapes, self._version = gru, entry, tapes, version

    def __call__(self, dy: Any, dh_n: Any = None) -> tuple[dict[str, Any], Any, Any]:
        """Return grads (a dict named like the parameters), dx, dh0."""
        return self._back(dy, dh_n, None)

    def taps(self, dy: Any, dh_n: Any = None) -> Any:
        """Return dL/dh (L*D, T, B, H) of every step, all that reaches it counted; 0 at padding."""
        taps: dict[int, dict[int, Any]] = {}
        self._back(dy, dh_n, taps)
        xp = self._gru.backend.xp
        rows = [
            xp.concat([blocks[t] for t in sorted(blocks)]) for _, blocks in sorted(taps.items())
        ]
        return self._gru._stored(xp.stack(rows))

    def _back(self, dy: Any, dh_n: Any, taps: dict[int, Any] | None) -> Any:
        gru, entry = self._gru, self._entry
        refuse_stale(gru.params, self._version)
        dy, dh_n = self._enter(dy, dh_n)
        grads: dict[str, Any] = {}
        dh0: list[Any] = []
        for layer in range(gru.num_layers - 1, -1, -1):
            dy, of_states = self._layer_back(layer, dy, dh_n, grads, taps)
            dh0 = of_states + dh0
        dx, dh0 = gru._leave(entry, dy, gru._stored(gru.backend.xp.stack(dh0)))
        return {name: grads[name] for name in gru.params}, dx, dh0

    def _layer_back(self, layer: int, dy: Any, dh_n: Any, grads: Any, taps: Any) -> Any:
        """Through one layer: dL/d of its outputs -> of its inputs, and of its first states."""
        gru, tape, H = self._gru, self._tapes[layer], self._gru.hidden_size
        D, total, dh0, calls = len(tape.sweeps), None, [], []
        for d, (sweep, kept) in enumerate(tape.sweeps):
            part = dy if D == 1 or dy is None else dy[..., d * H : (d + 1) * H]
            tap = None if taps is None else taps.setdefault(layer * D + d, {})
            calls.append(partial(sweep.backward, tape.x, kept, part, dh_n[layer * D + d], tap))
        for d, (dx, dh, of_weights) in enumerate(gru._run.parallel(calls)):
            names = ("weight_ih", "bias_ih", "weight_hh", "bias_hh")
            for name, grad in zip(names, of_weights, strict=False):
                grads[f"{name}_l{layer}{gru.suffixes[d]}"] = gru._stored(grad)
            total = dx if total is None else total + dx
            dh0.append(dh)
        return (total if tape.mask is None else total * tape.mask), dh0

    def _enter(self, dy: Any, dh_n: Any) -> tuple[Any, list[Any]]:
        """Check the cotangents; lay them out time-major, dh_n as one (B, H) for each state."""
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
            return dy, [gru.backend.zeros((B, H), gru.arithmetic)] * (gru.num_layers * D)
        gru.backend.check("dh_n", dh_n, gru.dtype)
        check_shape("dh_n", dh_n, "(L*D, H)" if entry.single else "(L*D, B, H)", sizes)
        dh_n = gru._compute(gru.backend.xp.reshape(dh_n, (-1, B, H)) if entry.single else dh_n)
        return dy, [dh_n[i, :, :] for i in range(gru.num_layers * D)]
