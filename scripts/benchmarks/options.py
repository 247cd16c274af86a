"""Measure what each option costs: training with it, over training a plain GRU.

    OMP_NUM_THREADS=1 python scripts/benchmarks/options.py

For each row of ROWS, a forward and a backward pass of the plain GRU and of one with the option take
turns, in one process; the figure is the median of the ratios of neighbours. The first row is the
plain GRU itself, made a second time: the noise.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from gru_any import GRU

CELL = (100, 32, 128, 256)  # T, B, I, H


class Row(NamedTuple):
    """An option.

    settings: of the GRU; bar: the ratio that it may cost; call: what `vjp` takes beside x, made of
    a generator and T, B, H; plain: settings that the GRU has which it is compared with; after: it
    needs the reset gate after the product.
    """

    settings: Mapping[str, Any]
    bar: float
    call: Callable[[Any, int, int, int], dict[str, Any]] = lambda rng, T, B, H: {}
    plain: Mapping[str, Any] = {}
    after: bool = False


BOTH = {"bidirectional": True}
ROWS = {
    "nothing": Row({}, 1.0),
    "relu": Row({"activation": "relu"}, 1.2),
    "leaky_relu": Row({"activation": ("leaky_relu", 0.1)}, 1.2),
    "softsign": Row({"activation": "softsign"}, 1.2),
    "elu": Row({"activation": ("elu", 1.0)}, 1.2),
    "softplus": Row({"activation": "softplus"}, 1.2),
    "hard_sigmoid gates": Row({"gate_activation": ("hard_sigmoid", 0.2, 0.5)}, 1.2),
    "softsign gates": Row({"gate_activation": "softsign"}, 1.2),
    "clip": Row({"clip": 3.0}, 1.2),
    "merge sum": Row({**BOTH, "merge": "sum"}, 1.2, plain=BOTH),
    "merge mul": Row({**BOTH, "merge": "mul"}, 1.2, plain=BOTH),
    "weight_dropout": Row({"weight_dropout": 0.3}, 1.15),
    "recurrent_dropout": Row({"recurrent_dropout": 0.3}, 1.15),
    "zoneout": Row({"zoneout": 0.1}, 1.15),
    "resets": Row({}, 1.05, lambda rng, T, B, H: {"resets": rng.random((T, B)) < 0.02}),
    "resets to a start": Row(
        {},
        1.05,
        lambda rng, T, B, H: {
            "resets": rng.random((T, B)) < 0.05,
            "start": np.ones((1, H), "float32"),
        },
    ),
    "layer_norm": Row({"layer_norm": True}, 1.35, after=True),
    "mask": Row({}, 1.05, lambda rng, T, B, H: {"mask": rng.random((T, B)) < 0.9}),
}


def training(
    row: Row, plain: bool, cell: tuple[int, int, int, int], after: bool
) -> Callable[[], float]:
    """Return a function that trains one step, with the option or without, and its seconds."""
    T, B, I, H = cell
    rng = np.random.default_rng(0)
    settings, options = (row.plain, {}) if plain else (row.settings, row.call(rng, T, B, H))
    gru: Any = GRU(I, H, reset_after=after, seed=0, **settings)
    x = rng.standard_normal((T, B, I)).astype("float32")
    dy = rng.standard_normal((T, B, gru.output_size)).astype("float32")

    def call() -> float:
        start = time.perf_counter()
        _, pullback = gru.vjp(x, rng=np.random.default_rng(0), **options)
        pullback(dy)
        return time.perf_counter() - start

    return call


def ratio(row: Row, cell: tuple[int, int, int, int], after: bool, rounds: int) -> float:
    """Return the median of how many times as long the option takes."""
    without, with_it = (training(row, plain, cell, after) for plain in (True, False))
    without(), with_it()
    return statistics.median(with_it() / without() for _ in range(rounds))


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cell", default=",".join(map(str, CELL)), help="T,B,I,H")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each row")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    given = parser.parse_args(arguments)
    T, B, I, H = map(int, given.cell.split(","))
    print(f"training, {T=} {B=} {I=} {H=}: times the plain GRU, reset before and after the product")
    for name in given.rows:
        row = ROWS[name]
        found = [
            ratio(row, (T, B, I, H), after, given.rounds) if after >= row.after else math.nan
            for after in (False, True)
        ]
        over = " over the bar" if any(v > max(row.bar, 1.03) for v in found) else ""
        print(f"{name:20} {found[0]:6.2f} {found[1]:6.2f}   bar {row.bar:.2f}{over}", flush=True)


if __name__ == "__main__":
    main()
