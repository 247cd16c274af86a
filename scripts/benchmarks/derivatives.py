"""What derivatives cost, as a ratio to a forward and backward pass, measured in turns.

    python scripts/benchmarks/derivatives.py [T B I H]

Prints medians of the ratios for both variants, of one layer in float32 on the fastest path.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from gru_any import GRU

SIZES = (100, 32, 128, 256), (100, 8, 64, 64), (1000, 4, 64, 128)
SECONDS = 4.0  # for each size and variant


def calls(T: int, B: int, I: int, H: int, reset_after: bool) -> dict[str, Callable[[], object]]:
    """Return the contenders; the first is what the others are compared with."""
    rng = np.random.default_rng(0)
    gru = GRU(I, H, reset_after=reset_after, seed=0)

    def numbers(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype="float32")

    x, x_dot, dy, dy_dot = numbers(T, B, I), numbers(T, B, I), numbers(T, B, H), numbers(T, B, H)
    params_dot = {name: numbers(*p.shape) for name, p in gru.params.items()}

    def row_by_row() -> None:
        for b in range(B):
            rows = slice(b, b + 1)
            gru.vjp(x[:, rows])[1](dy[:, rows])

    def product() -> object:
        *_, pullback = gru.forward_over_reverse(x, params_dot=params_dot)
        return pullback(dy, dy_dot=dy_dot)

    return {
        "forward and backward": lambda: gru.vjp(x)[1](dy),
        "forward alone": lambda: gru(x),
        "gradients of each example": lambda: gru.vjp(x)[1].per_example(dy),
        "the same, row by row": row_by_row,
        "jvp along x": lambda: gru.jvp(x, x_dot=x_dot),
        "jvp along the parameters": lambda: gru.jvp(x, params_dot=params_dot),
        "forward over reverse": product,
    }


def measured(contenders: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median of the ratios to the first contender, called in turns."""
    for call in contenders.values():
        call()
    ratios: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(ratios["forward alone"]) < 3:
        seconds = {}
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            seconds[name] = time.perf_counter() - start
        base = next(iter(seconds.values()))
        for name, value in seconds.items():
            ratios[name].append(value / base)
    return {name: statistics.median(values) for name, values in ratios.items()}


def main() -> None:
    """Print a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", type=int, nargs="*", help="T B I H; three sizes if none is given")
    size = parser.parse_args().size
    for T, B, I, H in [tuple(size)] if size else SIZES:
        found = [measured(calls(T, B, I, H, after)) for after in (False, True)]
        print(f"T, B, I, H = {T}, {B}, {I}, {H}: ratio with the reset gate before and after")
        for name in found[0]:
            print(f"  {name:28} {found[0][name]:6.2f} {found[1][name]:6.2f}")


if __name__ == "__main__":
    main()
