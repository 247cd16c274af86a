"""What it takes to run a trained GRU: size, import, first answer, memory, steps and sequences.

    python scripts/deployment.py
    python scripts/deployment.py --only C Numba onnxruntime --sizes 64 256

This library with its run-time dependencies alone ("NumPy"), with Numba, with frozen weights, and as
C runs the same weights (reset after, I = H, one row, one thread) as PyTorch, onnxruntime and
OpenVINO, each in a process of its own. Steps and sequences are measured in turns. PyTorch, onnx and
packaging are needed beside the contenders; what a contender lacks is printed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.deployed import (
    COMPILED,
    IMPORTS,
    LIBRARIES,
    MAKERS,
    NEEDS,
    STEPS,
    MissingError,
    write,
)

SIZES = [64, 256, 512, 1024]
FIRST = 256  # H of the first answer
HOME = Path(__file__).parent.parent
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"},
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"),
    "PYTHONPATH": str(HOME),
}
Times = dict[tuple[str, str, int], list[Any]]  # contender, "step" or "sequence", H


# in the process of a contender --------------------------------------------------------------------


def work(name: str, folder: str) -> None:
    """First the seconds of import and first answer and the memory; then calls on demand."""
    start = time.perf_counter()
    try:
        __import__(IMPORTS.get(name, "gru_any.stream"))
        imported = time.perf_counter()
        step = MAKERS[name](folder, FIRST).step
        first = step()
    except (MissingError, ImportError) as e:
        print(json.dumps({"missing": str(e)}), flush=True)
        return
    report = {
        "import": imported - start,
        "first": time.perf_counter() - start,
        "computing": time.process_time(),
        "memory": memory(),
    }
    print(json.dumps(report | {"y": [float(v) for v in first.ravel()[:5]]}), flush=True)
    for line in sys.stdin:
        what, H, count = json.loads(line)
        call, before = getattr(MAKERS[name](folder, H), what), 3 + count // 20
        print(json.dumps([seconds(call) for _ in range(count + before)][before:]), flush=True)


def seconds(call: Callable[[], Any]) -> tuple[float, float]:
    """How long a call takes, and how long of it this thread computes and does not wait."""
    start, computing = time.perf_counter(), time.thread_time()
    call()
    return time.perf_counter() - start, time.thread_time() - computing


def memory() -> int:
    """Bytes of this process in memory now."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition("VmRSS:")[2].split()[0])


# what is installed --------------------------------------------------------------------------------


def installed(names: Iterable[str]) -> int:
    """Bytes of these distributions, and of all they require that is here."""
    from packaging.requirements import Requirement

    todo, seen, total = list(names), set(), 0
    for name in todo:
        metadata.distribution(name)  # raises where it is not here
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        paths = {Path(str(file.locate())) for file in distribution.files or []}
        total += sum(p.stat().st_size for p in paths if p.is_file() and p.suffix != ".pyc")
        for text in distribution.requires or []:
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                todo.append(need.name)
    return total


def size(name: str) -> int:
    """Bytes that are installed for a contender; ours with its source."""
    if name in LIBRARIES:
        return installed([LIBRARIES[name]])
    source = sum(p.stat().st_size for p in (HOME / "gru_any").rglob("*.py"))
    return source + installed([*NEEDS, *(["numba"] if name in COMPILED else [])])


# the report ---------------------------------------------------------------------------------------


def start(name: str, folder: str) -> tuple[subprocess.Popen, Any]:
    """A new process of this contender, and its first report."""
    environment = ENVIRONMENT | ({"GRU_ANY_NO_NUMBA": "1"} if name == "NumPy" else {})
    process = subprocess.Popen(
        [sys.executable, __file__, "--work", name, "--folder", folder],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    return process, json.loads(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1000, help="of each size in a round")
    parser.add_argument("--only", nargs="+", default=[*MAKERS], choices=[*MAKERS], metavar="NAME")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="H")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        write(folder, sorted({FIRST, *args.sizes}))
        starts = begun(folder, args.only, args.rounds)
        show_starts(starts)
        times = measured(folder, [*starts], args.sizes, args.rounds, args.steps)
    for what, clock, title in (
        ("step", 0, "step, us: median (99th percentile)"),
        ("step", 1, "a step, the thread's own time, us"),
        ("sequence", 1, f"{STEPS} steps in a call, the thread's own time, us"),
    ):
        show_times(times, [*starts], args.sizes, what, clock, title)


def begun(folder: str, names: list[str], rounds: int) -> dict[str, list[Any]]:
    """The first reports of each contender that runs here; what the others lack is printed."""
    starts: dict[str, list[Any]] = {}
    for i in range(rounds + 1):
        for name in names if not i else [*starts]:
            process, report = start(name, folder)
            process.stdin.close()
            process.wait()
            if missing := report.get("missing"):
                print(f"{name} is missing: {missing}")
            else:  # the first one fills caches
                starts.setdefault(name, []).extend([report] if i else [])
    agree(starts)
    return starts


def agree(starts: dict[str, list[Any]]) -> None:
    """Raise where a contender computes something else."""
    answers = {name: reports[0]["y"] for name, reports in starts.items()}
    expected = next(iter(answers.values()))
    for name, y in answers.items():
        limit = 1e-6 if not name.endswith(("int8", "bfloat16")) else 0.02
        worst = max(abs(a - b) for a, b in zip(y, expected, strict=True))
        assert worst < limit, f"{name} is off by {worst}"


def measured(folder: str, names: list[str], sizes: list[int], rounds: int, count: int) -> Times:
    """The seconds of each call, contenders in turn."""
    processes = {name: start(name, folder)[0] for name in names}
    found: Times = {}
    for H in sizes * rounds:
        for what, calls in (("step", count), ("sequence", max(3, count // STEPS))):
            for name, process in processes.items():
                process.stdin.write(json.dumps([what, H, calls]) + "\n")
                process.stdin.flush()
                answer = json.loads(process.stdout.readline())
                found.setdefault((name, what, H), []).extend(answer)
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return found


def show_starts(starts: dict[str, list[Any]]) -> None:
    columns = [
        "installed, MB",
        "import, s",
        "first answer, s",
        "processor time of it",
        "memory, MB",
    ]
    row("", columns)
    print("|---" * 6 + "|")
    for name, reports in starts.items():
        keys = ("import", "first", "computing")
        taken = [f"{statistics.median(r[key] for r in reports):.2f}" for key in keys]
        held = statistics.median(r["memory"] for r in reports)
        row(name, [f"{size(name) / 1e6:.0f}", *taken, f"{held / 1e6:.0f}"])


def show_times(
    times: Times, names: list[str], sizes: list[int], what: str, clock: int, title: str
) -> None:
    print()
    row(title, (f"H = {H}" for H in sizes))
    print("|---" * (len(sizes) + 1) + "|")
    for name in names:
        cells = []
        for H in sizes:
            found = sorted(1e6 * call[clock] for call in times[name, what, H])
            end = f" ({found[-len(found) // 100]:.0f})" if what == "step" and not clock else ""
            cells.append(f"{found[len(found) // 2]:.0f}{end}")
        row(name, cells)


def row(title: str, cells: Iterable[str]) -> None:
    print(f"| {title} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
