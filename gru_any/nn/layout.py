"""From the user's arrays to time-major ones, and back."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from .. import arguments
from ..backend import Backend, is_traced
from ..errors import ShapeError, check_shape
from ..typing import Array, HostArray, Lengths
from .merge import part
from .steps import Restarts, flags, gathered, repeated, restarts, running
from .sweep import SequenceMask

SKIPPED = "zero", "repeat"
NO_RESTARTS = Restarts(None, None)
Repetition: TypeAlias = Callable[..., Array]  # xp, v, alive, reverse -> v


class Call(NamedTuple):
    """The inputs of a call."""

    x: Array  # (T, B, I)
    h0: Array  # (L*D, B, H), in the dtype of the arithmetic
    mask: SequenceMask | None  # None: no step is skipped
    restarts: Restarts
    repeat: bool  # skipped steps have the output before them, not 0
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
    reverses: tuple[bool, ...]  # of each direction, whether it reads from the end
    merge: str | None = "concat"  # how y has the directions; None: as a pair

    @property
    def directions(self) -> int:
        """D."""
        return len(self.reverses)

    def enter(
        self,
        x: Array,
        h0: Array | None,
        lengths: Lengths | None,
        mask: Array | None = None,
        resets: Array | None = None,
        skipped: str = "zero",
    ) -> Call:
        """Check the inputs of a forward pass, and make them time-major."""
        backend, H, states = self.backend, self.hidden_size, self.layers * len(self.reverses)
        backend.check("x", x, self.dtype)
        unbatched = x.ndim == 2
        if x.ndim not in (2, 3) or x.shape[-1] != self.input_size:
            letters = "(B, T, I)" if self.batch_first else "(T, B, I)"
            if x.ndim not in (2, 3):
                raise ShapeError(
                    f"x is {tuple(x.shape)}, expected {letters}, I = {self.input_size}; or (T, I) "
                    "without a batch"
                )
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
        repeat = skipped != "zero" and arguments.choice("skipped", skipped, SKIPPED) == "repeat"
        if repeat and self.merge not in ("concat", None):
            raise ValueError(
                f'skipped="repeat" repeats each direction, and merge={self.merge!r} leaves one '
                "output of both: use merge=None, and merge the two yourself"
            )
        if lengths is None and mask is None and resets is None:
            return Call(x, h0, None, NO_RESTARTS, repeat, unbatched)
        if any(map(is_traced, (lengths, mask, resets))):
            return self._traced(x, h0, lengths, mask, resets, repeat)
        given = None if mask is None else self._flags("mask", mask, T, B, unbatched)
        alive, found = running(lengths, given, T, B), NO_RESTARTS
        if resets is not None:
            at = self._flags("resets", resets, T, B, unbatched)
            found = restarts(at, alive, backend, self.reverses, self.layers)
        call = Call(x, h0, self._mask(alive), found, repeat, unbatched)
        return call._replace(h0=self.without_fresh(call, h0))

    def _traced(
        self,
        x: Array,
        h0: Array,
        lengths: Lengths | None,
        mask: Array | None,
        resets: Array | None,
        repeat: bool,
    ) -> Call:
        """Enter a call inside of jax.jit, whose lengths have no values yet."""
        if mask is not None or resets is not None:
            raise TypeError(
                "lengths, mask or resets are traced by JAX; with mask or resets, all of them must "
                "be known before the call: close over NumPy arrays in the traced function"
            )
        T, B, _ = x.shape
        return Call(x, h0, self._traced_mask(lengths, T, B), NO_RESTARTS, repeat, False)

    def without_fresh(self, call: Call, states: Array) -> Array:
        """Return states (L*D, B, H) with zeros where a reset came before the first step."""
        fresh, xp = call.restarts.fresh, self.backend.xp
        return states if fresh is None else xp.where(fresh, xp.zeros_like(states), states)

    def enter_cotangents(
        self, call: Call, dy: Array | None, dh_n: Array | None
    ) -> tuple[Array | None, Array]:
        """Check the inputs of a backward pass; return dy time-major, dh_n (L*D, B, H)."""
        backend, H, states = self.backend, self.hidden_size, self.layers * len(self.reverses)
        T, B, _ = call.x.shape
        if dy is None and dh_n is None:
            raise ValueError("pullback got neither dy nor dh_n; one of them must be given")
        if dy is not None and self.merge is None:
            dy = self._of_pair(dy)
        if dy is not None:
            backend.check("dy", dy, self.dtype)
            width = len(self.reverses) * H if self.merge in ("concat", None) else H
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
            if call.unbatched or self.batch_first:
                dy = self._time_major(dy, call.unbatched)
            dy = self._repeat(gathered, call, dy) if call.repeat else dy
        if dh_n is None:
            return dy, backend.zeros((states, B, H), self.arithmetic)
        self._check_states("dh_n", dh_n, B, call.unbatched)
        dh_n = backend.xp.reshape(dh_n, (states, B, H)) if call.unbatched else dh_n
        return dy, backend.xp.astype(dh_n, backend.dtype(self.arithmetic), copy=False)

    def outputs(self, call: Call, y: Array | None, h_n: Array) -> tuple[Any, Array]:
        """Return y (T, B, D*H) and h_n (L*D, B, H) as the user has x and h0."""
        if call.repeat and y is not None:
            y = self._repeat(repeated, call, y)
        y, h_n = self.leave(call, y, h_n)
        if self.merge is None and y is not None:
            own = self.backend.xp.astype  # a copy: neither is to keep the other in memory
            return tuple(own(v, v.dtype, copy=True) for v in part("concat", y)), h_n
        return y, h_n

    def _of_pair(self, dy: Sequence[Array]) -> Array:
        """Return the gradients of both outputs side by side."""
        if not isinstance(dy, (tuple, list)) or len(dy) != 2:
            raise TypeError(
                f"dy is a {type(dy).__name__}, expected a pair, as y is one with merge=None"
            )
        for v in dy:
            self.backend.check("dy", v, self.dtype)
            if v.shape != dy[0].shape:
                raise ShapeError(f"dy holds {tuple(dy[0].shape)} and {tuple(v.shape)}")
        return self.backend.xp.concat(list(dy), axis=-1)

    def leave(self, call: Call, y: Array | None, states: Array) -> tuple[Array | None, Array]:
        """Return v (T, B, .) and the states (L*D, B, H) as the user has x and h0."""
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

    def _flags(self, name: str, v: Array, T: int, B: int, unbatched: bool) -> HostArray:
        """Return one flag a step, (T, B)."""
        if unbatched:
            return flags(name, v, (T,), "(T,)")[:, None]
        if self.batch_first:
            return flags(name, v, (B, T), "(B, T)").T
        return flags(name, v, (T, B), "(T, B)")

    def _mask(self, alive: HostArray | None) -> SequenceMask | None:
        if alive is None:
            return None
        unmasked = int(alive.all(axis=1).argmin())
        return SequenceMask(self.backend.put(alive[:, :, None], "bool"), unmasked)

    def _repeat(self, function: Repetition, call: Call, v: Array) -> Array:
        """Apply a function of skipped steps to v (T, B, D*H), each direction in its own order."""
        if call.mask is None or not v.shape[0]:
            return v
        xp, H, alive = self.backend.xp, self.hidden_size, call.mask.alive
        parts = [v[:, :, d * H : (d + 1) * H] for d in range(self.directions)]
        pairs = zip(parts, self.reverses, strict=True)
        return xp.concat([function(xp, part, alive, way) for part, way in pairs], axis=-1)

    def _traced_mask(self, lengths: Array, T: int, B: int) -> SequenceMask:
        """Return the mask of lengths without values, of which only shape and dtype are checked."""
        xp = self.backend.xp
        if tuple(lengths.shape) != (B,):
            raise ShapeError(f"lengths is {tuple(lengths.shape)}, expected (B,) = ({B},)")
        if not xp.isdtype(lengths.dtype, "integral"):
            raise TypeError(f"lengths has dtype {lengths.dtype}, expected integers")
        steps = xp.arange(T, dtype=lengths.dtype)[:, None, None]
        return SequenceMask(steps < lengths[None, :, None], 0)
