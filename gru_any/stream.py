"""A model that reads a sequence piece by piece and keeps the state between the pieces."""

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

import numpy as np

from .backend import to_numpy
from .errors import check_shape
from .nn.chain import Chain
from .nn.gru import GRU
from .nn.layers import Last
from .typing import Array, HostArray, Lengths


class Stream:
    """A GRU or Chain that keeps its state, so that each call continues where the last one ended.

    Letters: T time, B batch (streams that advance together), I input, H hidden, L layers.

    Parameters
    ----------
    model : GRU or Chain
        Its GRUs read forward: one that reads from the end would have to wait for it.

    Raises
    ------
    ValueError
        A GRU is bidirectional or reverse, or the Chain has a Last.
    TypeError
        It is neither a GRU nor a Chain.

    Notes
    -----
    However a sequence is cut into steps and chunks, the outputs are those of one call, up to
    rounding; the same cuts give the same bits. A Stream may keep a copy of the weights for single
    steps, so call `refresh` after you change the model's parameters.

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any import GRU
    >>> from gru_any.stream import Stream
    >>> gru = GRU(3, 4, seed=0)
    >>> x = np.ones((5, 2, 3), dtype="float32")  # (T, B, I)
    >>> stream = Stream(gru)
    >>> chunk, step = stream(x[:4]), stream.step(x[4])
    >>> chunk.shape, step.shape, bool(np.allclose(step, gru(x)[0][4], atol=1e-6))
    ((4, 2, 4), (2, 4), True)
    """

    def __init__(self, model: GRU | Chain) -> None:
        if not isinstance(model, GRU | Chain):
            raise TypeError(f"the model is a {type(model).__name__}, expected a GRU or a Chain")
        self.model = model
        self._layers = model.layers if isinstance(model, Chain) else (model,)
        self._grus = [layer for layer in self._layers if isinstance(layer, GRU)]
        for gru in self._grus:
            if "_reverse" in gru.suffixes:
                raise ValueError(
                    f"{gru!r} cannot stream: its reverse direction reads from the end, which has "
                    "not come yet"
                )
        if any(isinstance(layer, Last) for layer in self._layers):
            raise ValueError("a Chain with a Last cannot stream: it waits for the sequence's end")
        self._states: list[Array | None] = [None] * len(self._grus)
        self.refresh()

    def __call__(
        self,
        x: Array,
        lengths: Lengths | None = None,
        *,
        mask: Array | None = None,
        resets: Array | None = None,
        start: Array | Sequence[Array | None] | None = None,
    ) -> Array:
        """Read a chunk x, shaped as the model takes it, of any T, 0 too; return y.

        With `batch_first` in the model x and y are (B, T, .).

        lengths : B integers in 0..T
            How many steps of each row there are. A row with none keeps its state.
        mask, resets : booleans, one for each step of each row
            As in a call of a GRU: the steps that are not skipped, and those at which an episode
            begins.
        start : what a reset sets the state to, as the model takes it; None for 0
        """
        options: dict[str, Any] = {"mask": mask, "resets": resets, "start": start}
        if isinstance(self.model, Chain):
            y, states = self.model(x, self._states, lengths, **options)
        else:
            y, h = self.model(x, self._states[0], lengths, **options)
            states = [h]
        self._states = [*states]
        return y

    def step(
        self,
        x_t: Array,
        *,
        resets: Array | Sequence[bool] | bool | None = None,
        start: Array | Sequence[Array | None] | None = None,
    ) -> Array:
        """Read one step x_t (B, I) or (I,), or integers (B,) for an Embedding; return y_t.

        resets: B booleans, or one without a batch: where an episode begins at this step. start: as
        in a call.
        """
        starts = repeat(None) if start is None else self._starts(start)
        y, states, new = x_t, iter(self._states), []
        for step, recurrent in self._steps:
            if recurrent:
                y, h = step(y, next(states), resets, next(starts))
                new.append(h)
            else:
                y = step(y)
        self._states = new
        return y

    def refresh(self) -> None:
        """Take the model's parameters as they are now; the state stays."""
        if isinstance(self.model, Chain):
            self.model.params.refuse_untied()
        # the function of each layer, and whether it takes a state
        self._steps: list[tuple[Callable[..., Any], bool]] = [
            (layer._prepared_step(), True) if isinstance(layer, GRU) else (layer, False)
            for layer in self._layers
        ]

    @property
    def state(self) -> Any:
        """The state as the model returns it, a copy; None at the start.

        h (L, B, H) of a GRU, (L, H) without a batch; of a Chain a list, one h for each GRU. Assign
        a state to continue from it.
        """
        if any(h is None for h in self._states):
            return None
        copies = [self._copy(h) for h in self._states]
        return copies if isinstance(self.model, Chain) else copies[0]

    @state.setter
    def state(self, state: Array | Sequence[Array] | None) -> None:
        if state is None:
            self.reset()
            return
        states: list[Array] = list(state) if isinstance(self.model, Chain) else [state]
        if len(states) != len(self._grus):
            raise ValueError(
                f"state holds {len(states)}, expected {len(self._grus)}, one for each GRU"
            )
        for gru, h in zip(self._grus, states, strict=True):
            gru.backend.check("state", h, gru.dtype)
            sizes = {"L": gru.num_layers, "H": gru.hidden_size}
            check_shape("state", h, "(L, H)" if h.ndim == 2 else "(L, B, H)", sizes)
        self._states = [self._copy(h) for h in states]

    def reset(
        self,
        rows: Sequence[bool] | Array | None = None,
        start: Array | Sequence[Array | None] | None = None,
    ) -> None:
        """Set the state to zeros: of all rows, or of those where `rows`, B booleans, is true.

        start: what it is set to in place of zeros, as in a call; it needs rows.
        """
        if rows is None:
            if start is not None:
                raise ValueError("start was given without rows, expected B booleans: which to set")
            self._states = [None] * len(self._grus)
            return
        chosen = np.asarray(rows) if isinstance(rows, list) else to_numpy(rows, "rows")
        if chosen.dtype != bool:
            raise ValueError(
                f"rows is {chosen.dtype} {chosen.shape}, expected B booleans, True to reset"
            )
        if all(h is not None for h in self._states):
            triples = zip(self._grus, self._states, self._starts(start), strict=True)
            self._states = [self._restarted(gru, h, chosen, own) for gru, h, own in triples]
        elif start is not None:
            raise ValueError(
                "start was given before anything was read, when the batch is not known: assign "
                "`state`, or give the first call resets and start"
            )

    def _starts(self, start: Array | Sequence[Array | None] | None) -> Iterator[Array | None]:
        """Return the start of each GRU."""
        if start is not None and isinstance(self.model, Chain):
            return self.model._states(start, "start")
        return iter([start] * len(self._grus))

    def _restarted(self, gru: GRU, h: Array, chosen: HostArray, start: Array | None) -> Array:
        """Return h (L, B, H) with zeros, or the start, in these rows of the batch."""
        if h.ndim != 3 or chosen.shape != h.shape[1:2]:
            wanted = "none, since there is no batch: reset(), or resets=True in the next step"
            wanted = f"booleans (B,) = {tuple(h.shape[1:2])}" if h.ndim == 3 else wanted
            raise ValueError(f"rows is {chosen.dtype} {chosen.shape}, expected {wanted}")
        return gru._layout.restart(h, chosen, start, False, "rows")

    def __reduce__(self) -> tuple[Callable[..., "Stream"], tuple[GRU | Chain, Any]]:
        """Copy the model and the present state."""
        return _again, (self.model, self.state)

    def _copy(self, h: Array) -> Array:
        return self.model.backend.xp.astype(h, h.dtype, copy=True)


def _again(model: GRU | Chain, state: Array | Sequence[Array] | None) -> Stream:
    stream = Stream(model)
    stream.state = state
    return stream
