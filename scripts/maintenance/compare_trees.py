"""Is one state of the source slower than another? For use before each release.

    python scripts/maintenance/compare_trees.py a00dd00 HEAD --json results/0.3.0.json
    python scripts/maintenance/compare_trees.py HEAD . --cases 100,1,64,64     before a commit

Each tree is a commit, checked out into a folder of its own, or a folder. A process of each is asked
in turn for the cells of `benchmark.py`, so that what else runs on the machine meets both. Every
round has new processes: where one happens to lie in memory can cost a tenth in all that it does.
Printed is the time of the second over that of the first: the median of the rounds, and the
quartiles. The exit code is 1 where a cell is slower: its lower quartile is above `SLOWER`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from tqdm import trange

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))  # benchmark.py; the package comes from the tree
SLOWER = 1.1
Result: TypeAlias = dict[str, Any]


def work() -> None:
    """Answer lines of JSON: a cell and how many calls; with the mean seconds of one."""
    key, call = None, None
    for line in sys.stdin:
        cell, calls = json.loads(line)
        if cell != key:
            key, call = cell, prepared(*cell)
            call()
        assert call
        call()  # the other process has emptied the caches
        start = time.perf_counter()
        for _ in range(calls):
            call()
        print((time.perf_counter() - start) / calls, flush=True)


def prepared(case: list[int], mode: str, reset_after: bool) -> Callable[[], object]:
    """Return the call to time in a cell, by names that all versions have."""
    from gru_any import GRU

    (T, B, I, H), rng = case, np.random.default_rng(0)
    gru = GRU(I, H, reset_after=reset_after, seed=0)
    x, dy = (rng.standard_normal((T, B, n)).astype("float32") for n in (I, H))
    return (lambda: gru(x)) if mode == "forward" else (lambda: gru.vjp(x)[1](dy))


class Tree:
    """A process with the package of one folder."""

    def __init__(self, folder: Path, threads: int) -> None:
        count = str(threads)
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": count,
                       "OPENBLAS_NUM_THREADS": count}  # fmt: skip
        self.process = subprocess.Popen([sys.executable, __file__, "--worker"], env=environment,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)  # fmt: skip

    def ask(self, cell: Any, calls: int) -> float:
        """The mean seconds of a call."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([cell, calls]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process died on {cell}")
        return float(line)

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait()


@contextmanager
def checked_out(name: str) -> Iterator[tuple[Path, str]]:
    """The folder of a tree, and what to call it; a commit is checked out until the end."""
    if Path(name).is_dir():
        yield Path(name).resolve(), name
        return
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", f"{name}^{{commit}}"], check=True,
                            capture_output=True, text=True).stdout.strip()  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tree"
        subprocess.run([*git, "worktree", "add", "-q", "--detach", str(path), commit], check=True)
        try:
            yield path, commit
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(path)], check=True)


def ratios_of(number: int, folders: list[Path], cells: list[Any],
              args: argparse.Namespace) -> list[float]:  # fmt: skip
    """The time of the second folder over that of the first in each cell, from new processes."""
    trees = [Tree(folder, args.threads) for folder in folders]
    try:
        ratios = []
        for i, cell in enumerate(cells, number):
            once = max(tree.ask(cell, 1) for tree in trees)
            calls, times = max(1, round(args.seconds / once)), [0.0, 0.0]
            for n in (0, 1) if i % 2 else (1, 0):
                times[n] = trees[n].ask(cell, calls)
            ratios.append(times[1] / times[0])
        return ratios
    finally:
        for tree in trees:
            tree.close()


def compare(folders: list[Path], cells: list[Any], args: argparse.Namespace) -> list[Result]:
    """Measure and print each cell."""
    rounds = [ratios_of(i, folders, cells, args) for i in trange(args.rounds, disable=None)]
    found = []
    for cell, *ratios in zip(cells, *rounds, strict=True):
        low, median, high = (float(q) for q in np.quantile(ratios, (0.25, 0.5, 0.75)))
        (T, B, I, H), mode, after = cell
        size, variant = f"T={T} B={B} I={I} H={H}", "after" if after else "before"
        print(f"{size:24} {mode:8} {variant:6} {median:.2f} ({low:.2f} {high:.2f})"
              f"{'  SLOWER' if low > SLOWER else ''}", flush=True)  # fmt: skip
        found.append({"cell": cell, "ratio": [low, median, high]})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "trees", nargs="*", metavar="TREE", help="a commit or a folder; two of them"
    )
    parser.add_argument("--cases", nargs="+", help='such as "100,32,64,128" for T, B, I, H')
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.1, help="of each, in each round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where the results are kept")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work()
        return 0
    from benchmark import CASES, machine  # which needs the newest version

    if len(args.trees) != 2:
        parser.error(f"two trees are compared, {len(args.trees)} given")
    cases = [[int(n) for n in case.split(",")] for case in args.cases or []] or CASES
    cells = [(list(case), mode, after) for case in cases for mode in ("forward", "training")
             for after in (True, False)]  # fmt: skip
    with checked_out(args.trees[0]) as old, checked_out(args.trees[1]) as new:
        print(f"{machine()}\ntime of {new[1]} over that of {old[1]}, {args.threads} threads")
        found = compare([old[0], new[0]], cells, args)
    slower = sum(result["ratio"][0] > SLOWER for result in found)
    middle = statistics.median(result["ratio"][1] for result in found)
    print(f"median of {len(found)} cells: {middle:.2f}; {slower} are slower")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        kept = {"trees": [old[1], new[1]], "machine": machine(), "threads": args.threads,
                "cells": found}  # fmt: skip
        args.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
