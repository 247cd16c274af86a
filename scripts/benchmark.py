"""How fast is it? This library against PyTorch, onnxruntime, OpenVINO, JAX and the bare products.

    python scripts/benchmark.py --quick          a minute's worth
    python scripts/benchmark.py --json all.json  every cell; started again, it goes on

Each contender runs in a process of its own. For every cell (sizes, forward or training, reset after
or before) they are asked in turn, several rounds, and the table shows medians: the time of PyTorch,
and of each other how many times faster it is, round by round, with the quartiles in brackets.
PyTorch has only the variant with the reset gate after the product; both of ours are compared with
it. Then the bars of each cell are listed (`benchmarks/bars.py`), and last the time and memory of
this library for T from 10 to 10,000 (`benchmarks/length.py`).
"""

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.bars import report
from benchmarks.contenders import MAKERS, NUMBA, threads_of
from benchmarks.length import sweep

CASES = [
    (1, 1, 64, 64), (1, 1, 256, 256), (1, 1, 512, 512), (100, 1, 64, 64), (100, 1, 256, 256),
    (30, 20, 88, 46), (100, 32, 64, 128), (100, 32, 128, 256), (784, 64, 1, 128),
    (100, 64, 256, 512), (50, 64, 512, 1024),
    (1, 8, 128, 256), (1, 32, 128, 256), (1, 128, 64, 128), (1, 256, 128, 256), (4, 32, 128, 256),
]  # fmt: skip
MODES = ["forward", "training"]
QUICK = [CASES[0], CASES[3], CASES[6]]
# contenders that are named otherwise than what they need
NEEDS = {"frozen": "numba", "torch-arrays": "torch", "jax-arrays": "jax"}
LIBRARIES = ["numpy", "numba", "torch", "onnxruntime", "openvino", "jax", "flax", "equinox"]


# in the process of a contender --------------------------------------------------------------------


def work(name: str, threads: int) -> None:
    """Answer lines of JSON: a cell and how many calls; with the mean seconds of one."""
    if name == "torch":
        importlib.import_module("torch").set_num_threads(threads)
    key, call = None, None
    for line in sys.stdin:
        cell, calls = json.loads(line)
        if cell is None:
            print(json.dumps(threads_of(name)), flush=True)
            continue
        if cell != key:
            key, call = cell, prepare(name, *cell)
        if call is None:
            answer: Any = None
        elif not calls:
            answer = np.asarray(call(), np.float64).ravel()[:64].tolist()
        else:
            call()  # the others have emptied the caches
            start = time.perf_counter()
            for _ in range(calls):
                call()
            answer = (time.perf_counter() - start) / calls
        print(json.dumps(answer), flush=True)


def prepare(name: str, case: list[int], mode: str, reset_after: bool) -> Any:
    """The call of one contender for one cell, warmed up; None where it has none."""
    from gru_any import GRU

    T, B, I, H = case
    if name == "torch" and not reset_after:
        reset_after = True  # the only variant it has
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((T, B, n)).astype("float32") for n in (I, H))
    gru = GRU(I, H, reset_after=reset_after, seed=0)
    call = MAKERS[name](x, dy, gru, mode)
    if call is not None:
        call()
        call()
        call = MAKERS[name](x, dy, gru, mode)  # a stream begins anew
    return call


class Contender:
    """A process that answers."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        count = str(threads)
        environment = {**os.environ, "OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count,
                       "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=" + str(threads > 1).lower(),
                       "JAX_PLATFORMS": "cpu"}  # fmt: skip
        if name not in NUMBA:
            environment["GRU_ANY_NO_NUMBA"] = "1"
        command = [sys.executable, __file__, "--worker", name, "--threads", count]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.sched_setaffinity(self.process.pid, cores)  # JAX has no switch of its own for it
        found = self.ask(None, 0)
        if found != threads:
            raise SystemExit(f"{name} would use {found} threads, not {threads}")

    def ask(self, cell: Any, calls: int) -> Any:
        """The mean seconds of a call; with calls = 0 the first numbers of its result."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([cell, calls]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} died on {cell}")
        return json.loads(line)

    def close(self) -> None:
        """End the process and those that a library started beside it."""
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()


# one cell -----------------------------------------------------------------------------------------


def measure(contenders: list[Contender], cell: Any, rounds: int, seconds: float) -> dict[str, Any]:
    """Ask all in turn, in every round in another order; the seconds of a call, round by round."""
    numbers = {c.name: c.ask(cell, 0) for c in contenders}
    taking_part = [c for c in contenders if numbers[c.name] is not None]
    agree(numbers, cell)
    calls = {c.name: max(1, round(seconds / max(c.ask(cell, 1), 1e-7))) for c in taking_part}
    times: dict[str, list[float]] = {c.name: [] for c in taking_part}
    for i in range(rounds):
        order = taking_part[i % len(taking_part) :] + taking_part[: i % len(taking_part)]
        for contender in order:
            time.sleep(0.15)  # threads of the one before may spin for a while
            times[contender.name].append(contender.ask(cell, calls[contender.name]))
    return times


def agree(numbers: dict[str, Any], cell: Any) -> None:
    """Stop where a contender computes something else."""
    reset_after = cell[2]
    expected = numbers["numpy"]
    for name, found in numbers.items():
        same_equations = name not in ("floor", "flax") and (reset_after or name != "torch")
        if found is not None and same_equations and not np.allclose(found, expected, atol=1e-3):
            raise SystemExit(f"{name} gives other numbers than numpy on {cell}")


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """Median and quartiles of the seconds, and of the ratio to PyTorch (or else NumPy)."""
    base = "torch" if "torch" in times else "numpy"

    def spread(values: list[float]) -> list[float]:
        return [float(q) for q in np.quantile(values, (0.25, 0.5, 0.75))]

    return {
        name: {
            "seconds": spread(t),
            "faster": spread([b / a for a, b in zip(t, times[base], strict=True)]),
        }
        for name, t in times.items()
    }


# all cells ----------------------------------------------------------------------------------------


def installed(names: list[str]) -> list[str]:
    """Return the contenders that can run here."""
    lacking = {n for n in names if n != "floor" and not _version(NEEDS.get(n, n))}
    lacking |= set() if _version("onnx") else {"onnxruntime", "openvino"}
    return [n for n in names if n not in lacking]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def machine() -> str:
    """Processor, cores and versions, in words."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    versions = ", ".join(f"{n} {_version(n)}" for n in LIBRARIES if _version(n))
    cores = len(os.sched_getaffinity(0))
    return f"{cpu}, {cores} cores, Python {platform.python_version()}, {versions}"


def show(cell: Any, threads: int, found: dict[str, Any]) -> None:
    """One line of the table."""
    base = "torch" if "torch" in found else "numpy"
    (T, B, I, H), mode, after = cell
    ratios = "  ".join(
        "{} {:.2f} ({:.2f} {:.2f})".format(n, *(v["faster"][q] for q in (1, 0, 2)))
        for n, v in found.items()
        if n != base
    )
    size = f"T={T} B={B} I={I} H={H}"
    variant = "after" if after else "before"
    seconds = found[base]["seconds"][1]
    print(
        f"{size:24} {mode:8} {variant:6} {threads}t  {base} {1e3 * seconds:9.3f} ms  {ratios}",
        flush=True,
    )


def draw(results: dict[str, Any], file: Path) -> None:
    """How many times faster than PyTorch, by cell."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    others = [name for name in MAKERS if name != "torch"]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for axis, mode in zip(axes, ["forward", "training"], strict=True):
        cells = [v for v in results.values() if v["cell"][1] == mode and v["cell"][2]]
        cells = [v for v in cells if v["threads"] == max(c["threads"] for c in cells)]
        for name, marker in zip(others, "oPs^Dvx*+12", strict=True):
            ratios = [
                v["found"][name]["faster"][1] if name in v["found"] else np.nan for v in cells
            ]
            axis.plot(range(len(cells)), ratios, marker, label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_yscale("log")
        labels = ["T={} B={}\nI={} H={}".format(*c["cell"][0]) for c in cells]
        axis.set_xticks(range(len(cells)), labels, fontsize=7, rotation=60)
        axis.set_title(f"{mode}: times faster than PyTorch (reset after)")
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend()
    figure.savefig(file, dpi=120)
    print(f"picture: {file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="three sizes, three rounds")
    parser.add_argument("--cases", nargs="+", help='such as "100,32,64,128" for T, B, I, H')
    parser.add_argument("--json", type=Path, help="where results go; cells in it are not repeated")
    parser.add_argument("--picture", type=Path, help="a PNG of the ratios")
    parser.add_argument("--threads", default="2", help='such as "1,2" (2)')
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.05, help="of each, in each round")
    parser.add_argument("--contenders", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, int(args.threads))
        return
    cases = [tuple(map(int, c.split(","))) for c in args.cases or []]
    cases = cases or (QUICK if args.quick else CASES)
    results = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    names = installed(args.contenders)
    if "numpy" not in names:
        names.insert(0, "numpy")
    print(machine())
    for threads in map(int, args.threads.split(",")):
        contenders = [Contender(name, threads) for name in names]
        cells = [
            (case, mode, after) for case in cases for mode in args.modes for after in (True, False)
        ]
        for cell in cells:
            key = f"{cell} {threads}"
            if key not in results:
                times = measure(contenders, cell, 3 if args.quick else args.rounds, args.seconds)
                found = summary(times)
                results[key] = {"cell": cell, "threads": threads, "found": found, "times": times}
                results["machine"] = {"cell": (0, "", False), "threads": 0, "found": machine()}
                if args.json:
                    args.json.write_text(json.dumps(results, indent=1))
            show(cell, threads, results[key]["found"])
        for contender in contenders:
            contender.close()
    cells_only = {k: v for k, v in results.items() if k != "machine"}
    ours = [v["found"][names[0]]["faster"][1] for v in cells_only.values()]
    print(f"{names[0]}: {statistics.median(ours):.2f} times in the median of {len(ours)} cells")
    report(cells_only)
    if args.picture:
        draw(cells_only, args.picture)
    if not (args.quick or args.cases):
        sweep()


if __name__ == "__main__":
    main()
