"""The random masks of a call that trains, drawn on the host by the generator that the user gives.

They are drawn kind by kind, in the order of the fields of `Masks`; of each kind layer by layer, and
in each layer forward before reverse. So they are the same on every backend and on every path.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from ..typing import Array, Rng, Shape


class Regularised(Protocol):
    """The attributes of a GRU that decide its masks."""

    hidden_size: int
    num_layers: int
    suffixes: list[str]
    weight_dropout: float
    recurrent_dropout: float
    zoneout: float
    dropout: float

    @property
    def output_size(self) -> int:
        """The width of a layer's output."""

    @property
    def arithmetic(self) -> str:
        """The dtype of the arithmetic."""

    def _mask(
        self, rng: Rng | None, shape: Shape, p: float, dtype: str | None = None
    ) -> Array | None: ...

    def _kept(self, rng: Rng, shape: Shape, p: float, dtype: str) -> Array: ...


class Masks(NamedTuple):
    """The masks of one call. An element is 0 where something is dropped, else 1 / (1 - p)."""

    weights: dict[str, Array]  # of each weight_hh (3H, H), by its name
    # for each layer and direction: recurrent dropout's (B, H), and zoneout's (T, B, H), which is 1
    # where a unit keeps its state, else 0
    steps: tuple[tuple[Array | None, Array | None], ...] | None
    between: tuple[Array | None, ...] | None  # of the input of each layer, (T, B, output_size)


NO_MASKS = Masks({}, None, None)


def draw(gru: Regularised, rng: Rng, T: int, B: int) -> Masks:
    """Draw the masks of a call over T steps of B rows."""
    H = gru.hidden_size
    ends = [f"{n}{suffix}" for n in range(gru.num_layers) for suffix in gru.suffixes]
    weights: dict[str, Array] = {}
    if gru.weight_dropout:
        p, shape = gru.weight_dropout, (3 * H, H)
        weights = {f"weight_hh_l{end}": gru._mask(rng, shape, p) for end in ends}
    steps, between = None, None
    if gru.recurrent_dropout or gru.zoneout:
        q, dtype = gru.recurrent_dropout, gru.arithmetic
        dropped = [gru._mask(rng, (B, H), q, dtype) for _ in ends]
        zoned = [_zoneout(gru, rng, (T, B, H)) for _ in ends]
        steps = tuple(zip(dropped, zoned, strict=True))
    if gru.dropout:
        whole = T, B, gru.output_size
        drawn = [gru._mask(rng, whole, gru.dropout) for _ in range(gru.num_layers - 1)]
        between = (None, *drawn)
    return Masks(weights, steps, between)


def _zoneout(gru: Regularised, rng: Rng, shape: Shape) -> Array | None:
    return 1.0 - gru._kept(rng, shape, gru.zoneout, gru.arithmetic) if gru.zoneout else None


def axes_of_rows(gru: Regularised) -> Iterator[int | None]:
    """Yield the axis of the batch in each array that `draw` draws, in order; None: it has none."""
    ways = gru.num_layers * len(gru.suffixes)
    yield from [None] * (ways if gru.weight_dropout else 0)
    yield from [0] * (ways if gru.recurrent_dropout else 0)
    yield from [1] * (ways if gru.zoneout else 0)  # time-major, whatever the layout
    if gru.dropout:
        yield from [1] * (gru.num_layers - 1)
