"""From the user's arrays to time-major ones, and back."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from .. import arguments
from ..backend import Backend, is_traced
from ..equations import halves
from ..errors import ShapeError, check_shape
from ..typing import Array, HostArray, Lengths, Namespace, Shape
from .steps import Restarts, flags, gathered, repeated, restarts, running
from .sweep import SequenceMask

SKIPPED = "zero", "repeat"
NO_RESTARTS = Restarts(None, None)
LONE_START = "start was given without resets, of which it is the state: give resets too; the state"
ONE_FLAG = "one boolean, since there is no batch: shape"
Repetition: TypeAlias = Callable[..., Array]  # xp, v, alive, reverse -> v


class Call(NamedTuple):
    """The inputs of a call."""

    x: Array  # (T, B, I)
    h0: Array  # (L*D, B, H), in the dtype of the arithmetic
    mask: SequenceMask | None  # None: no step is skipped
    restarts: Restarts
    repeat: bool  # skipped steps repeat the output before them; else they are 0
    unbatched: bool  # the user's x was (T, I)


class SequenceLayout(NamedTuple):
    """The shapes and dtypes of a GRU's arrays as its user sees them, and conversions."""

    backend: Backend
    dtype: str
    arithmetic: str  # the dtype of the arithmetic
    batch_first: bool
    input_size: int
    hidden_size: int
    layers: int
    reverses: tuple[bool, ...]  # of each direction, whether it reads from the end
    merge: str | None = "concat"  # how y has the directions; None: as a pair
    every: bool = False  # whether y is a tuple, the outputs of each layer

    def enter(
        self,
        x: Array,
        h0: Array | None,
        lengths: Lengths | None,
        mask: Array | None = None,
        resets: Array | None = None,
        start: Array | None = None,
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
        if start is not None and resets is None:
            raise ValueError(f"{LONE_START} before the first step is h0")
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
            found = self._attach_start(found, start, B, unbatched)
        h0 = self._with_start(found, h0)
        return Call(x, h0, self._mask(alive), found, repeat, unbatched)

    def restart(
        self,
        state: Array,
        resets: Array | None,
        start: Array | None,
        unbatched: bool,
        name: str = "resets",
    ) -> Array:
        """Return the state (L, B, H) before a single step, set anew where `resets` says so.

        name: of resets in errors.
        """
        if resets is None:
            raise ValueError(f"{LONE_START} before the step is `state`")
        home, xp, B = self.backend, self.backend.xp, state.shape[1]
        shape, letters = ((), ONE_FLAG) if unbatched else ((B,), "(B,)")
        if is_traced(resets):
            _check_traced_flags(xp, name, resets, shape, letters)
        else:
            resets = home.put(flags(name, resets, shape, letters), "bool")
        fresh = xp.reshape(resets, (1, B, 1))
        found = self._attach_start(Restarts(None, fresh), start, B, unbatched)
        return xp.astype(self._with_start(found, state), state.dtype, copy=False)

    def _attach_start(
        self, found: Restarts, start: Array | None, B: int, unbatched: bool
    ) -> Restarts:
        """Return restarts with the state given for them."""
        if start is None:
            return found
        self.backend.check("start", start, self.dtype)
        xp, shared = self.backend.xp, start.ndim == 2 and not unbatched
        self._check_states("start", start, B, unbatched or shared)
        start = xp.astype(start, self.backend.dtype(self.arithmetic), copy=True)
        if start.ndim == 2:
            shape = start.shape[0], B, start.shape[1]
            start = xp.broadcast_to(xp.expand_dims(start, axis=1), shape)
        return found._replace(start=start, shared=shared)

    def _with_start(self, found: Restarts, states: Array) -> Array:
        """Return h0 (L*D, B, H), or the start for rows that are reset before their first step."""
        _, fresh, start, _ = found
        if fresh is None:
            return states
        xp = self.backend.xp
        return xp.where(fresh, xp.zeros_like(states) if start is None else start, states)

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

    def leave_states(
        self, call: Call, dh0: Array, dstart: Array | None, by_row: bool
    ) -> tuple[Array, ...]:
        """Return dh0 in the user's layout, and dstart if a start was given.

        dh0: the gradient to the state before the first step; dstart: to the start, from resets at
        later steps. by_row: a start that all rows share gets a gradient for each, (B, L*D, H).
        """
        xp, (_, fresh, start, shared) = self.backend.xp, call.restarts
        zero = xp.zeros_like(dh0)
        first = zero if fresh is None else xp.where(fresh, dh0, zero)
        dh0 = dh0 if fresh is None else xp.where(fresh, zero, dh0)
        if start is None:
            return (self._leave_batch(call, dh0),)
        dstart = first if dstart is None else first + dstart
        if shared:
            dstart = xp.permute_dims(dstart, (1, 0, 2)) if by_row else self._summed(dstart)
            return self._leave_batch(call, dh0), dstart
        return self._leave_batch(call, dh0), self._leave_batch(call, dstart)

    def _summed(self, v: Array) -> Array:
        """Return the sum of v (L*D, B, H) over the rows; half precision is summed in float32."""
        xp, home = self.backend.xp, self.backend
        v = xp.astype(v, home.dtype(self.arithmetic), copy=False)
        return xp.astype(xp.sum(v, axis=1), home.dtype(self.dtype), copy=False)

    def _leave_batch(self, call: Call, states: Array) -> Array:
        return states[:, 0, :] if call.unbatched else states

    def enter_cotangents(
        self, call: Call, dy: Array | None, dh_n: Array | None
    ) -> tuple[Any, Array]:
        """Check the inputs of a backward pass; return dy time-major, dh_n (L*D, B, H)."""
        backend, H, states = self.backend, self.hidden_size, self.layers * len(self.reverses)
        B = call.x.shape[1]
        if self.every and dy is not None:
            dy = self._enter_dys(call, dy)
        elif dy is not None:
            dy = self._enter_dy(call, dy)
        if dy is None and dh_n is None:
            raise ValueError("pullback got neither dy nor dh_n; one of them must be given")
        if dh_n is None:
            return dy, backend.zeros((states, B, H), self.arithmetic)
        self._check_states("dh_n", dh_n, B, call.unbatched)
        dh_n = backend.xp.reshape(dh_n, (states, B, H)) if call.unbatched else dh_n
        return dy, backend.xp.astype(dh_n, backend.dtype(self.arithmetic), copy=False)

    def outputs(self, call: Call, y: Array | None, h_n: Array) -> tuple[Any, Array]:
        """Return y (T, B, D*H) and h_n (L*D, B, H) in the user's layout."""
        h_n = self._leave_batch(call, h_n)
        if y is None:
            return y, h_n
        if self.every:
            return tuple(self._leave_y(call, v) for v in y), h_n
        return self._leave_y(call, y), h_n

    def _leave_y(self, call: Call, y: Array) -> Any:
        """Return the outputs of a layer in the user's layout."""
        y = self.leave(call, self._repeat(repeated, call, y) if call.repeat else y)
        if self.merge is None:
            astype = self.backend.xp.astype  # copies, so that neither keeps the other in memory
            return tuple(astype(v, v.dtype, copy=True) for v in halves(y))
        return y

    def _enter_dys(self, call: Call, dy: Sequence[Array | None]) -> tuple[Array | None, ...] | None:
        """Return the gradients of the outputs of all layers, time-major; None where all are."""
        if not isinstance(dy, (tuple, list)) or len(dy) != self.layers:
            count = f" of {len(dy)}" if isinstance(dy, (tuple, list)) else ""
            raise TypeError(
                f"dy is a {type(dy).__name__}{count}, expected a tuple of {self.layers}, one for "
                'each layer, as y is one with outputs="all"'
            )
        found = tuple(None if v is None else self._enter_dy(call, v) for v in dy)
        return None if all(v is None for v in found) else found

    def _enter_dy(self, call: Call, dy: Any) -> Array:
        """Check the gradient of the outputs of a layer, and make it time-major."""
        dy = self._join_pair(dy) if self.merge is None else dy
        self.backend.check("dy", dy, self.dtype)
        width = self.hidden_size * (len(self.reverses) if self.merge in ("concat", None) else 1)
        (T, B, _), letters = call.x.shape, "(B, T, D*H)" if self.batch_first else "(T, B, D*H)"
        rows = (T,) if call.unbatched else (B, T) if self.batch_first else (T, B)
        if dy.shape != (*rows, width):
            sizes = {"T": T, "B": B, "D*H": width}
            check_shape("dy", dy, "(T, D*H)" if call.unbatched else letters, sizes)
        if call.unbatched or self.batch_first:
            dy = self._time_major(dy, call.unbatched)
        return self._repeat(gathered, call, dy) if call.repeat else dy

    def _join_pair(self, dy: Sequence[Array]) -> Array:
        """Concatenate the gradients of both directions' outputs."""
        if not isinstance(dy, (tuple, list)) or len(dy) != 2:
            raise TypeError(
                f"dy is a {type(dy).__name__}, expected a pair, as y is one with merge=None"
            )
        for v in dy:
            self.backend.check("dy", v, self.dtype)
            if v.shape != dy[0].shape:
                shapes = f"{tuple(dy[0].shape)} and {tuple(v.shape)}"
                raise ShapeError(f"dy holds {shapes}, expected one shape for both directions")
        return self.backend.xp.concat(list(dy), axis=-1)

    def leave(self, call: Call, v: Array) -> Array:
        """Return v (T, B, .) in the user's layout."""
        if call.unbatched:
            return v[:, 0, :]
        return self.backend.xp.permute_dims(v, (1, 0, 2)) if self.batch_first else v

    def _time_major(self, v: Array, unbatched: bool) -> Array:
        if unbatched:
            return self.backend.xp.expand_dims(v, axis=1)
        return self.backend.xp.permute_dims(v, (1, 0, 2)) if self.batch_first else v

    def _check_states(self, name: str, states: Array, B: int, unbatched: bool) -> None:
        self.backend.check(name, states, self.dtype)
        sizes = {"L*D": self.layers * len(self.reverses), "B": B, "H": self.hidden_size}
        check_shape(name, states, "(L*D, H)" if unbatched else "(L*D, B, H)", sizes)

    def _flags(self, name: str, v: Array, T: int, B: int, unbatched: bool) -> HostArray:
        """Check the flags of all steps, and return them time-major, (T, B)."""
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
        """Apply `repeated` or its gradient to v (T, B, D*H), each direction in its own order."""
        if call.mask is None or not v.shape[0]:
            return v
        xp, H, alive = self.backend.xp, self.hidden_size, call.mask.alive
        parts = [v[:, :, d * H : (d + 1) * H] for d in range(len(self.reverses))]
        pairs = zip(parts, self.reverses, strict=True)
        return xp.concat([function(xp, part, alive, way) for part, way in pairs], axis=-1)

    def _traced_mask(self, lengths: Array, T: int, B: int) -> SequenceMask:
        """Return the mask of traced lengths, whose shape and dtype alone can be checked."""
        xp = self.backend.xp
        if tuple(lengths.shape) != (B,):
            raise ShapeError(f"lengths is {tuple(lengths.shape)}, expected (B,) = ({B},)")
        if not xp.isdtype(lengths.dtype, "integral"):
            raise TypeError(f"lengths has dtype {lengths.dtype}, expected integers")
        steps = xp.arange(T, dtype=lengths.dtype)[:, None, None]
        return SequenceMask(steps < lengths[None, :, None], 0)


def _check_traced_flags(xp: Namespace, name: str, v: Array, shape: Shape, letters: str) -> None:
    """Check the shape and dtype of traced flags, which have no values."""
    if tuple(v.shape) != shape:
        raise ShapeError(f"{name} is {tuple(v.shape)}, expected {letters} = {shape}")
    if not xp.isdtype(v.dtype, "bool"):
        raise TypeError(f"{name} has dtype {v.dtype}, expected booleans, such as {name} != 0")
