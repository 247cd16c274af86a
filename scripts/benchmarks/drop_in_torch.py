"""The drop-in for torch.nn.GRU beside torch.nn.GRU: how many times as fast, in turns.

    python scripts/benchmarks/drop_in_torch.py            every cell of benchmark.py
    python scripts/benchmarks/drop_in_torch.py --model    a training step of translate_torch.py
    python scripts/benchmarks/drop_in_torch.py --cases 100,32,128,256 --rounds 15

Two processes take turns with the same modules, weights and data; in one of them `accelerate` has
been called. "forward" is a call without gradients. "training" is a call, its backward pass and a
step of Adam, all PyTorch's. The figure is the median over the rounds of the time of torch.nn.GRU
over the time of the drop-in, with the quartiles in brackets.
"""

import argparse
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # benchmark.py

KINDS = ("torch.nn.GRU", "drop-in")
MODEL = "model"


# in the process of a kind ------------------------------------------------------------------------


def work(kind: str, threads: int) -> None:
    """Answer lines of JSON, a cell and how many calls, with the mean seconds of a call."""
    import torch

    torch.set_num_threads(threads)
    key, call = None, None
    for line in sys.stdin:
        cell, calls = json.loads(line)
        if cell != key or call is None:
            key, call = cell, of_model(kind) if cell == MODEL else of_cell(kind, *cell)
            call(), call()
        call()  # the other one has emptied the caches
        start = time.perf_counter()
        for _ in range(calls):
            call()
        print(json.dumps((time.perf_counter() - start) / calls), flush=True)


def accelerated(kind: str, model: Any) -> Any:
    """Return the model, whose GRUs are ours if this kind is the drop-in."""
    if kind == "drop-in":
        importlib.import_module("gru_any.convert.torch").accelerate(model)
    return model


def of_cell(kind: str, case: list[int], mode: str) -> Callable[[], Any]:
    """Return a call of one layer of these sizes."""
    import torch

    T, B, I, H = case
    torch.manual_seed(0)
    layer = accelerated(kind, torch.nn.GRU(I, H))
    x, dy = torch.randn(T, B, I), torch.randn(T, B, H)
    if mode == "forward":
        return torch.no_grad()(lambda: layer(x))
    x.requires_grad_()
    optimiser = torch.optim.Adam(layer.parameters(), fused=True)

    def train() -> None:
        x.grad = None
        optimiser.zero_grad()
        layer(x)[0].backward(dy)
        optimiser.step()

    return train


def of_model(kind: str) -> Callable[[], Any]:
    """Return a training step of the translator."""
    import torch
    import translate_torch as example

    torch.manual_seed(0)
    model = accelerated(kind, example.Translator())
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3, fused=True)
    return partial(example.update, model, optimiser, example.batch(random.Random(0), 64))


# the turns ---------------------------------------------------------------------------------------


def start(kind: str, threads: int) -> Any:
    """Return a process that answers."""
    count = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--worker", kind, "--threads", str(threads)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, **count}, **pipes)


def ask(worker: Any, cell: Any, calls: int) -> float:
    """Return the seconds of a call."""
    worker.stdin.write(json.dumps([cell, calls]) + "\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        sys.exit(f"a process died on {cell}")
    return float(json.loads(line))


def compare(workers: list[Any], cell: Any, rounds: int, seconds: float) -> str:
    """Return one line of the table."""
    calls = [max(1, round(seconds / max(ask(worker, cell, 1), 1e-7))) for worker in workers]
    times: list[tuple[float, float]] = []
    for i in range(rounds):
        found = {}
        for n in (0, 1) if i % 2 else (1, 0):
            time.sleep(0.15)  # threads of the other may spin for a while
            found[n] = ask(workers[n], cell, calls[n])
        times.append((found[0], found[1]))
    theirs, ours = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    low, middle, high = statistics.quantiles((t / o for t, o in times), n=4)
    return f"{theirs:9.3f} ms {ours:9.3f} ms  {middle:5.2f} times ({low:.2f} {high:.2f})"


def main() -> None:
    from benchmark import CASES

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", action="store_true", help="the translator in place of the cells")
    add("--cases", nargs="+", help='such as "100,32,64,128" for T, B, I, H')
    add("--rounds", type=int, default=9)
    add("--seconds", type=float, default=0.1, help="of each, in each round")
    add("--threads", type=int, default=2)
    add("--worker", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.threads)
        return
    workers = [start(kind, args.threads) for kind in KINDS]
    cases = [list(map(int, case.split(","))) for case in args.cases or []] or CASES
    cells: list[Any] = [(case, mode) for case in cases for mode in ("forward", "training")]
    for cell in [MODEL] if args.model else cells:
        name = "a training step of the translator"
        if cell != MODEL:
            name = "T={} B={} I={} H={}".format(*cell[0]).ljust(24) + f" {cell[1]:8}"
        print(name, compare(workers, cell, args.rounds, args.seconds), flush=True)
    for worker in workers:
        worker.communicate("")


if __name__ == "__main__":
    main()
