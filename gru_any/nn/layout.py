"""From the user's arrays to time-major ones, and back."""

from typing import NamedTuple

import numpy as np

from .. import arguments
from ..backend import Backend, is_traced, to_numpy
from ..errors import ShapeError, check_shape
from ..typing import Array, Lengths
from .sweep import SequenceMask


class Call(NamedTuple):
    """The inputs of a call."""

    x: Array  # (T, B, I)
    h0: Array  # (L*D, B, H), in the dtype of the arithmetic
    mask: SequenceMask | None  # None: no sequence is padded
    unbatched: bool  # the user's x was (T, I)


class SequenceLayout(NamedTuple):
    """What the arrays of a GRU's users look like."""

    backend: Backend
    dtype: str
    arithmetic: str  # the dtype of the arithmetic
    batch_first: bool
    input_size: int
    hidden_size: int
    layers: int
    directions: int

    def enter(self, x: Array, h0: Array | None, lengths: Lengths | None) -> Call:
        """Check the inputs of a forward pass, and make them time-major."""
        backend, H, states = self.backend, self.hidden_size, self.layers * self.directions
        backend.check("x", x, self.dtype)
        unbatched = x.ndim == 2
        if x.ndim not in (2, 3) or x.shape[-1] != self.input_size:
            letters = "(B, T, I)" if self.batch_first else "(T, B, I)"
            check_shape("x", x, "(T, I)" if unbatched else letters, {"I": self.input_size})
        x = self._time_major(x, unbatched)
        T, B, _ = x.shape
        if h0 is None:
            h0 = backend.zeros((states, B, H), self.arithmetic)
        else:
            self._check_states("h0", h0, B, unbatched)
            h0 = backend.xp.reshape(h0, (states, B, H))
            h0 = backend.xp.astype(h0, backend.dtype(self.arithmetic), copy=True)
        if lengths is not None and unbatched:
            raise ValueError("lengths were given, but x (T, I) has no batch; cut x instead")
        return Call(x, h0, None if lengths is None else self._mask(lengths, T, B), unbatched)

    def enter_cotangents(
        self, call: Call, dy: Array | None, dh_n: Array | None
    ) -> tuple[Array | None, Array]:
        """Check the inputs of a backward pass; return dy time-major, dh_n (L*D, B, H)."""
        backend, H, states = self.backend, self.hidden_size, self.layers * self.directions
        T, B, _ = call.x.shape
        if dy is None and dh_n is None:
            raise ValueError("pullback got neither dy nor dh_n; one of them must be given")
        if dy is not None:
            backend.check("dy", dy, self.dtype)
            width = self.directions * H
            shape = (
                (T, width)
                if call.unbatched
                else (B, T, width)
                if self.batch_first
                else (T, B, width)
            )
            if dy.shape != shape:
                letters = "(B, T, D*H)" if self.batch_first else "(T, B, D*H)"
                sizes = {"T": T, "B": B, "D*H": width}
                check_shape("dy", dy, "(T, D*H)" if call.unbatched else letters, sizes)
            dy = self._time_major(dy, call.unbatched)
        if dh_n is None:
            return dy, backend.zeros((states, B, H), self.arithmetic)
        self._check_states("dh_n", dh_n, B, call.unbatched)
        dh_n = backend.xp.reshape(dh_n, (states, B, H)) if call.unbatched else dh_n
        return dy, backend.xp.astype(dh_n, backend.dtype(self.arithmetic), copy=False)

    def leave(self, call: Call, y: Array | None, states: Array) -> tuple[Array | None, Array]:
        """Return y (T, B, .) and the states (L*D, B, H) as the user has x and h0."""
        if call.unbatched:
            return (None if y is None else y[:, 0, :]), states[:, 0, :]
        if self.batch_first and y is not None:
            y = self.backend.xp.permute_dims(y, (1, 0, 2))
        return y, states

    def _time_major(self, v: Array, unbatched: bool) -> Array:
        if unbatched:
            return self.backend.xp.expand_dims(v, axis=1)
        return self.backend.xp.permute_dims(v, (1, 0, 2)) if self.batch_first else v

    def _check_states(self, name: str, states: Array, B: int, unbatched: bool) -> None:
        self.backend.check(name, states, self.dtype)
        sizes = {"L*D": self.layers * self.directions, "B": B, "H": self.hidden_size}
        check_shape(name, states, "(L*D, H)" if unbatched else "(L*D, B, H)", sizes)

    def _mask(self, lengths: Lengths, T: int, B: int) -> SequenceMask | None:
        """Return the mask of these lengths; None where there is nothing to mask."""
        if is_traced(lengths):
            return self._traced_mask(lengths, T, B)
        n = arguments.lengths(to_numpy(lengths, "lengths"), T, B)
        if isinstance(lengths, (list, tuple)) and any(isinstance(v, bool) for v in lengths):
            raise TypeError(f"lengths is {lengths!r}, expected integers")
        if (n == T).all():
            return None
        alive = np.arange(T)[:, None, None] < n[None, :, None]
        return SequenceMask(self.backend.put(alive, "bool"), int(n.min()))

    def _traced_mask(self, lengths: Array, T: int, B: int) -> SequenceMask:
        """Return the mask of lengths without values, of which only shape and dtype are checked."""
        xp = self.backend.xp
        if tuple(lengths.shape) != (B,):
            raise ShapeError(f"lengths is {tuple(lengths.shape)}, expected (B,) = ({B},)")
        if not xp.isdtype(lengths.dtype, "integral"):
            raise TypeError(f"lengths has dtype {lengths.dtype}, expected integers")
        steps = xp.arange(T, dtype=lengths.dtype)[:, None, None]
        return SequenceMask(steps < lengths[None, :, None], 0)
