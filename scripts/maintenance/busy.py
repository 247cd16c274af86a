"""Threads beside others that want the processors: how much slower is a call than on one thread?

    python scripts/maintenance/busy.py

For every cell (T,B,I,H) and every setting (threads asked for, processes that keep a processor busy,
processors left by an affinity mask), a process of ours is asked in turn with one that uses a single
thread beside the same neighbours. Printed is the ratio of the two times: the median of the rounds,
and the largest.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

CELLS = ["100,1,256,256", "100,1,512,512", "100,32,128,256"]
BUSY = "while True: pass"


def work() -> None:
    """Answer lines of JSON: a cell, the mode, the processors to be left, how many calls."""
    from gru_any import GRU

    call: Any = None
    for line in sys.stdin:
        (T, B, I, H), mode, cores, calls = json.loads(line)
        if call is None:
            call = prepare(GRU(I, H, reset_after=True, seed=0), T, B, mode)
            call()
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
            time.sleep(0.2)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        print((time.perf_counter() - start) / calls, flush=True)


def prepare(gru: Any, T: int, B: int, mode: str) -> Callable[[], object]:
    """Return the call to time in a cell."""
    rng, sizes = np.random.default_rng(0), (gru.input_size, gru.hidden_size)
    x, dy = (rng.standard_normal((T, B, n)).astype("float32") for n in sizes)
    return (lambda: gru(x)) if mode == "forward" else (lambda: gru.vjp(x)[1](dy))


class Worker:
    """A process of ours with so many threads."""

    def __init__(self, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"], env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, cell: list[int], mode: str, cores: int, calls: int) -> float:
        """The mean seconds of a call."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([cell, mode, cores, calls]) + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait()


def measure(
    cell: list[int], mode: str, threads: int, busy: int, cores: int, rounds: int, seconds: float
) -> tuple[list[float], list[float]]:
    """The seconds of a call on one thread and on so many, round by round."""
    alone, many = Worker(1), Worker(threads)
    neighbours = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    try:
        once = alone.ask(cell, mode, cores, 3)
        many.ask(cell, mode, cores, 3)
        calls = max(2, round(seconds / once))
        pairs = [
            (alone.ask(cell, mode, cores, calls), many.ask(cell, mode, cores, calls))
            for _ in range(rounds)
        ]
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
        alone.close()
        many.close()
    first, second = zip(*pairs, strict=True)
    return list(first), list(second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cells", nargs="+", default=CELLS)
    parser.add_argument("--modes", nargs="+", default=["forward", "training"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each, in each round")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work()
        return
    cores = len(os.sched_getaffinity(0))
    settings = [(cores, 0, cores), (cores, 1, cores), (cores, cores, cores), (8, 0, cores)]
    settings += [(8, 1, cores), (cores, 0, 1), (8, 0, 1)]
    print("T,B,I,H          mode     threads busy cores  one thread   times that: median  most")
    for cell in args.cells:
        for mode in args.modes:
            for threads, busy, left in settings:
                given = [int(n) for n in cell.split(",")], mode, threads, busy, left
                one, many = measure(*given, args.rounds, args.seconds)
                ratios = [b / a for a, b in zip(one, many, strict=True)]
                print(
                    f"{cell:16} {mode:8} {threads:7} {busy:4} {left:5} "
                    f"{1e3 * statistics.median(one):8.2f} ms {statistics.median(ratios):18.2f} "
                    f"{max(ratios):5.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
