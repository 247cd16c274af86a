"""What it takes to run a trained GRU: size, import, first answer, memory, latency of a step.

    python scripts/deployment.py

This library with its run-time dependencies alone ("numpy"), with Numba, PyTorch and onnxruntime run
the same weights (reset after, I = H, one row, one thread), each in a process of its own. Steps are
measured in turns. onnx and packaging are needed beside the contenders.
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

NAMES = ["numpy", "numba", "torch", "onnxruntime"]
SIZES = [64, 256, 512]
HOME = Path(__file__).parent.parent
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"},
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"),
    "PYTHONPATH": str(HOME),
}


# in the process of a contender --------------------------------------------------------------------


def work(name: str, folder: str) -> None:
    """First the seconds of import and first answer and the memory; then steps on demand."""
    start = time.perf_counter()
    library = {"numpy": "gru_any", "numba": "gru_any"}.get(name, name)
    __import__(library)
    imported = time.perf_counter()
    make = {"torch": torch, "onnxruntime": onnxruntime}.get(name, ours)
    step = make(folder, SIZES[1])
    first = step()
    answered = time.perf_counter()
    report = {"import": imported - start, "first": answered - start, "memory": memory()}
    print(json.dumps(report | {"y": [float(v) for v in first.ravel()[:5]]}), flush=True)
    for line in sys.stdin:
        H, count = json.loads(line)
        step = make(folder, H)
        print(json.dumps([seconds(step) for _ in range(count + 50)][50:]), flush=True)


def seconds(step: Callable[[], Any]) -> tuple[float, float]:
    """How long a step takes, and how long of it this thread computes and does not wait."""
    start, computing = time.perf_counter(), time.thread_time()
    step()
    return time.perf_counter() - start, time.thread_time() - computing


def memory() -> int:
    """Bytes of this process in memory now."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition("VmRSS:")[2].split()[0])


def ours(folder: str, H: int) -> Callable[[], Any]:
    import numpy as np

    from gru_any import load
    from gru_any.stream import Stream

    stream, x = Stream(load(f"{folder}/{H}.safetensors")), np.ones((1, H), "float32")
    return lambda: stream.step(x)


def torch(folder: str, H: int) -> Callable[[], Any]:
    import torch as library

    library.set_num_threads(1)
    cell, x = library.nn.GRUCell(H, H), library.ones(1, H)
    cell.load_state_dict(library.load(f"{folder}/{H}.pt", weights_only=True))
    h = library.zeros(1, H)

    def step() -> Any:
        nonlocal h
        with library.inference_mode():
            h = cell(x, h)
            return h.numpy()

    return step


def onnxruntime(folder: str, H: int) -> Callable[[], Any]:
    import numpy as np
    import onnxruntime as library

    options = library.SessionOptions()
    options.intra_op_num_threads = 1
    session = library.InferenceSession(f"{folder}/{H}.onnx", options)
    x, h = np.ones((1, 1, H), "float32"), np.zeros((1, 1, H), "float32")

    def step() -> Any:
        nonlocal h
        (h,) = session.run(None, {"x": x, "h": h})
        return h

    return step


# the weights, for each contender ------------------------------------------------------------------


def write(folder: str) -> None:
    import numpy as np
    import torch as library

    from gru_any import GRU, save

    for H in SIZES:
        gru = GRU(H, H, reset_after=True, seed=0)
        save(f"{folder}/{H}.safetensors", gru)
        cell = {k.removesuffix("_l0"): library.tensor(np.array(a)) for k, a in gru.params.items()}
        library.save(cell, f"{folder}/{H}.pt")
        Path(f"{folder}/{H}.onnx").write_bytes(onnx_step(gru))


def onnx_step(gru: Any) -> bytes:
    """A step as one node of ONNX: x (1, 1, I), h (1, 1, H) -> the next h."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    from gru_any.convert import keras

    H = gru.hidden_size
    W, R, b = keras.to_arrays(gru)  # whose gates are those of ONNX, z, r, n
    weights = {"W": W.T[None], "R": R.T[None], "B": b.reshape(1, -1)}
    node = helper.make_node(
        "GRU", ["x", "W", "R", "B", "", "h"], ["", "next"], hidden_size=H, linear_before_reset=1
    )
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 1, H)) for name in names]
        for names in (("x", "h"), ("next",))
    )
    constants = [numpy_helper.from_array(np.ascontiguousarray(a), k) for k, a in weights.items()]
    graph = helper.make_graph([node], "step", inputs, outputs, constants)
    opset = [helper.make_opsetid("", 14)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


# what is installed --------------------------------------------------------------------------------


def installed(names: Iterable[str]) -> int:
    """Bytes of these distributions and of all they require."""
    from packaging.requirements import Requirement

    todo, seen, total = list(names), set(), 0
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


def sizes() -> dict[str, int]:
    source = sum(p.stat().st_size for p in (HOME / "gru_any").rglob("*.py"))
    needs = ["numpy", "array-api-compat", "safetensors"]
    return {
        "numpy": source + installed(needs),
        "numba": source + installed([*needs, "numba"]),
        "torch": installed(["torch"]),
        "onnxruntime": installed(["onnxruntime"]),
    }


# the report ---------------------------------------------------------------------------------------


def start(name: str, folder: str) -> tuple[subprocess.Popen, Any]:
    """A new process of this contender, and its first report."""
    environment = ENVIRONMENT | ({"GRU_ANY_NO_NUMBA": "1"} if name == "numpy" else {})
    process = subprocess.Popen(
        [sys.executable, __file__, "--work", name, "--folder", folder],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    return process, json.loads(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1000, help="of each size in a round")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        starts: dict[str, list[Any]] = {name: [] for name in NAMES}
        for i in range(args.rounds + 1):
            for name in NAMES:
                process, report = start(name, folder)
                process.stdin.close()
                process.wait()
                starts[name] += [report] if i else []  # the first one fills caches
        latencies = steps(folder, args.rounds, args.steps)
    answers = [report["y"] for name in NAMES for report in starts[name]]
    assert all(max(abs(a - b) for a, b in zip(y, answers[0], strict=True)) < 1e-6 for y in answers)
    show(starts, latencies)


def steps(folder: str, rounds: int, count: int) -> dict[tuple[str, int], list[Any]]:
    """The seconds of each step, contenders in turn."""
    processes = {name: start(name, folder)[0] for name in NAMES}
    found: dict[tuple[str, int], list[Any]] = {}
    for H in SIZES * rounds:
        for name, process in processes.items():
            process.stdin.write(json.dumps([H, count]) + "\n")
            process.stdin.flush()
            found.setdefault((name, H), []).extend(json.loads(process.stdout.readline()))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return found


def show(starts: dict[str, list[Any]], latencies: dict[tuple[str, int], list[Any]]) -> None:
    size = sizes()
    row("", NAMES)
    print("|---" * (len(NAMES) + 1) + "|")
    row("installed, MB", (f"{size[name] / 1e6:.0f}" for name in NAMES))
    for key, title, unit in (
        ("import", "import, s", 1),
        ("first", "first answer, s", 1),
        ("memory", "memory at rest, MB", 1e6),
    ):
        medians = [statistics.median(r[key] for r in starts[name]) / unit for name in NAMES]
        row(title, (f"{m:.2f}" if unit == 1 else f"{m:.0f}" for m in medians))
    for clock, title in ((0, "step"), (1, "step, the thread's own time")):
        for H in SIZES:
            cells = []
            for name in NAMES:
                times = sorted(1e6 * step[clock] for step in latencies[name, H])
                cells.append(f"{times[len(times) // 2]:.0f} ({times[-len(times) // 100]:.0f})")
            row(f"{title} at H = {H}, us: median (99th percentile)", cells)


def row(title: str, cells: Iterable[str]) -> None:
    print(f"| {title} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
