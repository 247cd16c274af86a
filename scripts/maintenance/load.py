"""Long and crowded use: memory that does not grow, and right answers from many threads.

    python scripts/maintenance/load.py

Four parts, each with its figures: a million steps of a stream; ten thousand calls of changing
shapes; 8 threads on one model for a minute; and a sequence of a million steps in training with
recompute. The exit code is 1 where memory grows or an answer is wrong. Memory is what the system
counts for this process (VmRSS, and VmHWM for its peak), so this runs on Linux.
"""

import argparse
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gru_any import GRU
from gru_any.stream import Stream

GROWTH = 8.0  # MB that memory may grow by: what an allocator keeps varies


def megabytes(name: str = "VmRSS") -> float:
    """The memory of this process now, or its peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) / 1024


def reset_peak() -> None:
    """Begin to count the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


def repeated(calls: int, call: Callable[[int], object]) -> float:
    """Make the calls; return by how many MB memory grew in their second half.

    In the first, buffers are kept for later calls, up to a limit.
    """
    early = 0.0
    for i in tqdm(range(calls), leave=False, disable=None, mininterval=1):
        if i == calls // 2:
            early = megabytes()
        call(i)
    return megabytes() - early


def streaming(steps: int) -> bool:
    """A stream that goes on and on; its state is finite and its memory constant."""
    gru, rng = GRU(16, 64, 2, seed=0), np.random.default_rng(0)
    stream, x = Stream(gru), rng.standard_normal((64, 1, 16)).astype("float32")
    start = time.perf_counter()
    grown = repeated(steps, lambda i: stream.step(x[i % 64]))
    seconds = time.perf_counter() - start
    fine = bool(np.isfinite(stream.state).all()) and grown < GROWTH
    print(f"{steps} steps of a stream: memory grew by {grown:.1f} MB; {seconds:.0f} s")
    return fine


def shapes(calls: int) -> bool:
    """Forward and training of other sizes each time, as a server with ragged requests sees."""
    rng = np.random.default_rng(0)
    models = [GRU(8, H, reset_after=after, seed=0) for H in (16, 48) for after in (False, True)]

    def call(i: int) -> None:
        T, B = rng.integers(0, 200), rng.integers(0, 40)
        gru = models[i % 4]
        x = rng.standard_normal((T, B, 8), dtype="float32")
        lengths = rng.integers(0, T + 1, B) if i % 3 == 0 else None
        (y, _), pullback = gru.vjp(x, lengths=lengths)
        pullback(y)
        gru(x, lengths=lengths)

    start = time.perf_counter()
    grown = repeated(calls, call)
    print(f"{calls} changing shapes: memory grew by {grown:.1f} MB; "
          f"{time.perf_counter() - start:.0f} s")  # fmt: skip
    return grown < GROWTH


def crowd(count: int, seconds: float) -> bool:
    """Threads that call one model at once, each with its own inputs and known answers."""
    gru, rng = GRU(8, 128, reset_after=True, seed=0), np.random.default_rng(0)
    inputs = [rng.standard_normal((50, B, 8), dtype="float32") for B in (1, 3, 9, 33)]

    def answer(x: Any) -> list[Any]:
        (y, h_n), pullback = gru.vjp(x)
        grads, dx, dh0 = pullback(y)
        return [y, h_n, dx, dh0, *grads.values()]

    expected, wrong, calls = [answer(x) for x in inputs], [0] * count, [0] * count
    end = time.perf_counter() + seconds

    def work(me: int) -> None:
        while time.perf_counter() < end:
            n = (me + calls[me]) % len(inputs)
            found = answer(inputs[n])
            wrong[me] += not all(map(np.array_equal, found, expected[n]))
            calls[me] += 1

    workers = [threading.Thread(target=work, args=(me,)) for me in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(f"{count} threads for {seconds:.0f} s: {sum(calls)} trainings, {sum(wrong)} with other "
          f"bits; the slowest thread made {min(calls)}")  # fmt: skip
    return sum(wrong) == 0 < min(calls)


def training(steps: int) -> bool:
    """One sequence in training; beyond its arrays memory is a small multiple of sqrt(T)."""
    gru = GRU(4, 32, seed=0, recompute="sqrt")
    x = np.random.default_rng(0).standard_normal((steps, 1, 4), dtype="float32")
    dy = np.ones((steps, 1, 32), "float32")
    gru.vjp(x[:200])[1](dy[:200])  # compiled
    before, start = megabytes(), time.perf_counter()
    reset_peak()
    (y, _), pullback = gru.vjp(x)
    grads, dx, _ = pullback(dy)
    beyond = megabytes("VmHWM") - before - (y.nbytes + dx.nbytes) / 2**20
    kept = 6 * y.nbytes / 2**20  # without recompute: a state, four residuals, the gradients' parts
    finite = all(np.isfinite(g).all() for g in (dx, *grads.values()))
    print(f"a sequence of {steps} steps in training: {beyond:.0f} MB beyond x, y, dy and dx, where "
          f"keeping all takes {kept:.0f} or more; {time.perf_counter() - start:.0f} s")  # fmt: skip
    return finite and beyond < 0.1 * kept + 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of all numbers (1)")
    args = parser.parse_args()
    million, thousands = round(1e6 * args.scale), round(1e4 * args.scale)
    fine = [streaming(million), shapes(thousands), crowd(8, 60 * args.scale), training(million)]
    print("all is well" if all(fine) else "NOT all is well")
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
