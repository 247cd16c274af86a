"""The random masks of a call that trains, drawn on the host by the generator that the user gives.

They are drawn kind by kind, in the order of the fields of `Masks`; of each kind layer by layer, and
in each layer forward before reverse. So they are the same on every backend and on every path.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from ..typing import Array, Rng, Shape


class Regularised(Protocol):
    """A GRU, as far as its masks are concerned."""

    hidden_size: int
    num_layers: int
    suffixes: list[str]
    weight_dropout: float
    dropout: float

    def _mask(self, rng: Rng | None, shape: Shape, p: float) -> Array | None: ...


class Masks(NamedTuple):
    """The masks of one call. An element is 0 where something is dropped, else 1 / (1 - p)."""

    weights: dict[str, Array]  # of each weight_hh (3H, H), by its name
    between: tuple[Array | None, ...] | None  # of the input of each layer, (T, B, D*H)


NO_MASKS = Masks({}, None)


def draw(gru: Regularised, rng: Rng, T: int, B: int) -> Masks:
    """Draw the masks of a call over T steps of B rows."""
    H, D = gru.hidden_size, len(gru.suffixes)
    weights: dict[str, Array] = {}
    if gru.weight_dropout:
        # a model that was loaded may have its parameters in another order
        ends = [f"{n}{suffix}" for n in range(gru.num_layers) for suffix in gru.suffixes]
        p, shape = gru.weight_dropout, (3 * H, H)
        weights = {f"weight_hh_l{end}": gru._mask(rng, shape, p) for end in ends}
    between = None
    if gru.dropout:
        whole = T, B, D * H
        drawn = [gru._mask(rng, whole, gru.dropout) for _ in range(gru.num_layers - 1)]
        between = (None, *drawn)
    return Masks(weights, between)


def axes_of_rows(gru: Regularised) -> Iterator[int | None]:
    """Yield the axis of the batch in each array that `draw` draws, in order; None: it has none."""
    if gru.weight_dropout:
        yield from [None] * (gru.num_layers * len(gru.suffixes))
    if gru.dropout:
        yield from [1] * (gru.num_layers - 1)  # time-major, whatever the layout
