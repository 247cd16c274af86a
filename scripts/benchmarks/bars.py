"""The bars of each cell of benchmark.py: how fast we demand to be, and whether we are.

A bar demands a factor over the fastest of some contenders. It is met where the median of the
ratios, taken round by round, is within 3 % of it. On one thread PyTorch alone is a contender.
"""

from typing import Any, NamedTuple

import numpy as np

NEAR = 0.97
LONG = 2e7  # multiply-adds, doubled: a millisecond of one core
PEERS = ("onnxruntime", "openvino", "jax")


class Bar(NamedTuple):
    """A demand: `ours` is at least `times` as fast as the fastest of the others."""

    who: str
    times: float
    whom: tuple[str, ...]


def bars(case: Any, mode: str, after: bool, threads: int) -> list[Bar]:
    """Return the bars of one cell; case: T, B, I, H."""
    return [*_on_numpy(case, mode, after, threads), *_on_others(case, mode)]


def _on_others(case: Any, mode: str) -> list[Bar]:
    """Return the bars on JAX, and in cells of a millisecond or more those on other arrays."""
    T, B, I, H = case
    found = [Bar("jax", 1.0, ("flax", "equinox"))]
    if mode == "forward":
        found.append(Bar("frozen", 1.0, PEERS))  # who keep packed weights too
    if 6 * T * B * H * (H + I) < LONG:
        return found
    return [*found, *(Bar(name, 1 / 1.10, ("numba",)) for name in ("torch-arrays", "jax-arrays"))]


def _on_numpy(case: Any, mode: str, after: bool, threads: int) -> list[Bar]:
    T, B, _, H = case
    torch, forward = ("torch",), mode == "forward"
    if threads < 2:
        return [Bar("numba", 1.0, torch)]
    if T < 8 and B > 1:  # weights are laid out anew in each call, unless they are frozen
        return [Bar("numba", 1.0, torch), *([Bar("frozen", 1.2, torch)] if forward else [])]
    best = (0.9 if H >= 512 and B > 1 else 1.0) if forward else 1.3
    found = [
        Bar("numba", (1.2 if forward else 1.4) if after else 1.0, torch),
        Bar("numba", best, PEERS if forward else ("torch", "jax")),
        Bar("numpy", 1.0, torch),
    ]
    if forward:
        found.append(Bar("numba", 1 / _of_bare_products(T, B, H), ("floor",)))
    return found


def _of_bare_products(T: int, B: int, H: int) -> float:
    """Return how many times as long as its bare products a forward call may take."""
    if B == 1:
        return 1.5 if T == 1 else 1.0
    return 1.1 if H >= 512 else 1.2 if H >= 256 else 1.4


def report(results: dict[str, Any]) -> None:
    """Print which bars each cell meets, and what reset before costs beside reset after."""
    held = total = 0
    for result in results.values():
        case, mode, after = result["cell"]
        words = []
        for bar in bars(case, mode, after, result["threads"]):
            ratio = _ratio(result["times"], bar)
            if ratio is not None:
                total, ok = total + 1, ratio >= NEAR * bar.times
                held += ok
                whom = "the best of " * (len(bar.whom) > 1) + ", ".join(bar.whom)
                words.append(f"{'held' if ok else 'NOT'} {bar.who} {ratio:.2f} of {whom}"
                             f" (bar {bar.times:.2f})")  # fmt: skip
        size = "T={} B={} I={} H={}".format(*case)
        variant = "after" if after else "before"
        print(f"{size:24} {mode:8} {variant:6} {result['threads']}t  {'; '.join(words)}")
    costs = _reset_before(results)
    over = sum(cost > 1.25 / NEAR for cost in costs)
    print(f"{held} of {total} bars held; reset before costs more than 1.25 times reset after in "
          f"{over} of {len(costs)} pairs (at most {max(costs, default=0):.2f} times)")  # fmt: skip


def _ratio(times: dict[str, list[float]], bar: Bar) -> float | None:
    """Return how many times as fast, the median over the rounds; None without a contender."""
    whom = [times[name] for name in bar.whom if name in times]
    if bar.who not in times or not whom:
        return None
    return float(np.median(np.min(whom, axis=0) / np.asarray(times[bar.who])))


def _reset_before(results: dict[str, Any]) -> list[float]:
    """Return the time of reset before over that of reset after, for each pair of cells."""
    seconds: dict[Any, float] = {}
    for result in results.values():
        case, mode, after = result["cell"]
        if "numba" in result["times"]:
            key = (tuple(case), mode, result["threads"], after)
            seconds[key] = float(np.median(result["times"]["numba"]))
    pairs = [(k, s) for k, s in seconds.items() if not k[3] and (*k[:3], True) in seconds]
    return [s / seconds[(*k[:3], True)] for k, s in pairs]
