"""Measure time and memory by length T, for one layer with B = 8, I = 32, H = 64.

    python scripts/benchmarks/length.py

For inference, training, and training with recompute="sqrt", it prints the milliseconds of a call
and the peak of NumPy's memory beyond inputs and outputs (tracemalloc, after a first call).
"""

import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from gru_any import GRU
from gru_any.backend import NUMPY
from gru_any.backend.modes import forget

LENGTHS = [10, 100, 1000, 10_000]
B, I, H = 8, 32, 64


def training(gru: Any) -> Callable[[Any, Any], Any]:
    """Run forward and backward; return the results."""

    def call(x: Any, dy: Any) -> Any:
        (y, h), pullback = gru.vjp(x)
        return y, h, pullback(dy)

    return call


def figures(call: Callable[[Any, Any], Any], T: int) -> tuple[float, float]:
    """Return milliseconds of a call, the best of three, and megabytes beyond its results."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((T, B, n)).astype("float32") for n in (I, H))
    call(x, dy)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        call(x, dy)
        seconds.append(time.perf_counter() - start)
    forget(NUMPY)
    tracemalloc.start()
    results = call(x, dy)
    peak = tracemalloc.get_traced_memory()[1]
    forget(NUMPY)
    left = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del results
    return 1e3 * min(seconds), (peak - left) / 1e6


def sweep() -> None:
    """Print the table."""
    kept, again = GRU(I, H, seed=0), GRU(I, H, recompute="sqrt", seed=0)
    calls = {
        "inference": lambda x, dy: kept(x),
        "training": training(kept),
        'recompute="sqrt"': training(again),
    }
    print(f"{'T':>6}" + "".join(f"{name:>27}" for name in calls))
    for T in LENGTHS:
        cells = [figures(call, T) for call in calls.values()]
        print(f"{T:6}" + "".join(f"{ms:12.2f} ms {mb:9.3f} MB" for ms, mb in cells), flush=True)


if __name__ == "__main__":
    sweep()
