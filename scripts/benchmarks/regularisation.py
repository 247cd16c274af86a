"""Measure what each way of regularising the recurrence adds to a training call.

    python scripts/benchmarks/regularisation.py

T = 100, B = 32, I = 128, H = 256, float32. All run in turns; printed are the milliseconds of the
fastest call, and the ratio of that to the fastest call without.
"""

import time

import numpy as np

from gru_any import GRU

T, B, I, H = 100, 32, 128, 256
TURNS = 20
KINDS: dict[str, dict[str, float]] = {
    "none": {},
    "none, again": {},
    "weight_dropout": {"weight_dropout": 0.3},
    "recurrent_dropout": {"recurrent_dropout": 0.3},
    "zoneout": {"zoneout": 0.1},
}


def main() -> None:
    """Measure both variants."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((T, B, n)).astype("float32") for n in (I, H))

    def seconds(gru: GRU) -> float:
        masks, begin = np.random.default_rng(1), time.perf_counter()
        (_, _), pullback = gru.vjp(x, rng=masks)
        pullback(dy)
        return time.perf_counter() - begin

    for after in (False, True):
        grus = [GRU(I, H, seed=0, reset_after=after, **kind) for kind in KINDS.values()]
        for gru in grus:
            seconds(gru)
        least = np.min([[seconds(gru) for gru in grus] for _ in range(TURNS)], axis=0)
        print(f"reset {'after' if after else 'before'}")
        for name, best in zip(KINDS, least, strict=True):
            print(f"  {name:18} {1e3 * best:6.1f} ms  {best / least[0]:.2f}")


if __name__ == "__main__":
    main()
