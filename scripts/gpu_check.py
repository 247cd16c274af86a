"""Test and time everything on a machine with a CUDA device, in one command and under 8 minutes.

    python scripts/gpu_check.py                  versions, tests, every path against NumPy, speed
    python scripts/gpu_check.py --part bench     one part alone: tests (all of them), paths,
                                                 libraries or bench
    python scripts/gpu_check.py --dry-run        on the emulated device: its figures mean nothing

It needs CuPy. Where PyTorch is installed, its GRU is timed too, in the same precision. After each
cell the results so far are written to OUT: results.json, results.md and speed.png. A part that
fails is recorded, and the others still run. Figures are milliseconds, medians over several rounds;
T is 100.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
WIDTHS, BATCHES = (64, 128, 256, 512, 1024), (1, 32, 128, 256)
WEAKEST = {512: 0, 1024: 1, 256: 2, 64: 3, 128: 4}  # widths, in the order they are measured


class Cell(NamedTuple):
    """What to measure. other: "gru" or "cell" of PyTorch; a cell runs in a loop over the steps."""

    H: int
    B: int
    layers: int = 1
    directions: int = 1
    reset_after: bool = True
    precision: str = "full"
    other: str = "gru"
    T: int = 100


def cells(full: bool) -> list[Cell]:
    """Return all cells, beginning with those where we expect to be weakest."""
    found = [Cell(H, B, reset_after=after) for H in WIDTHS for B in BATCHES for after in (1, 0)]
    few = [(2, 1), (6, 1), (1, 2)]
    found += [Cell(H, 32, *shape) for H in (128, 256, 1024) for shape in few]
    halves = itertools.product((256, 1024), (32, 256), ("tf32", "float16"))
    found += [Cell(H, B, precision=precision) for H, B, precision in halves]
    found += [Cell(H, 32, reset_after=False, other="cell") for H in (64, 256, 1024)]
    if full:
        every = itertools.product(WIDTHS, BATCHES, (1, 2, 6), (1, 2), (True, False),
                                  ("full", "tf32", "float16"))  # fmt: skip
        found += [Cell(*settings) for settings in every]
    return sorted(dict.fromkeys(found), key=lambda c: (c.layers * c.directions > 1, WEAKEST[c.H]))


DRY = [Cell(5, 2, T=4), Cell(4, 3, 2, 2, False, T=4), Cell(4, 2, 2, precision="float16", T=4)]


# the parts ---------------------------------------------------------------------------------------


def versions(backend: Any) -> dict[str, str]:
    """Return the hardware and the versions of the software."""
    found = {"Python": platform.python_version(), "system": platform.platform()}
    for name in ("gru-any", "numpy", "cupy-cuda12x", "cupy-cuda13x", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if backend.name != "cupy":
        return found | {"device": "played by the host"}
    runtime = backend.xp.cuda.runtime
    properties = runtime.getDeviceProperties(backend.device.id)
    capability = f"{properties['major']}.{properties['minor']}"
    driver = str(runtime.driverGetVersion())
    return found | {"device": properties["name"].decode(), "driver": driver, "sm": capability}


def tests(check: "Check") -> str:
    """Run all tests if this part runs alone, else those of CuPy; these must not be skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
    command += ["--numprocesses=4"] if importlib.util.find_spec("xdist") else []
    if check.dry:
        command.append("tests/test_trace.py")
    elif not check.alone:
        command += ["-k", "cupy or cuda"]
    environment = {**os.environ, "GRU_ANY_REQUIRE": "" if check.dry else "cupy"}
    seconds = check.left(600 if check.alone else 150)
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, timeout=seconds
        )
        text, good = done.stdout.decode(), done.returncode == 0
    except subprocess.TimeoutExpired as e:
        text, good = f"{(e.stdout or b'').decode()}\nthe time was up after {seconds:.0f} s", False
    last = (text.strip().splitlines() or ["nothing was printed"])[-1]
    return last if good else f"FAILED: {last}\n{text[-2000:]}"


def paths(check: "Check") -> list[dict[str, Any]]:
    """Compare all paths, variants and dtypes with NumPy: largest difference over largest value.

    On a device this stops after 100 seconds if other parts follow, since it compiles many kernels.
    """
    rows: list[dict[str, Any]] = []
    until = time.monotonic() + check.left(600 if check.alone or check.dry else 100)
    for way, after, dtype in itertools.product(
        ("plain", "eager", "blocks", "graph", "persistent", "whole"), (True, False), LIMITS
    ):
        row = {"path": way, "reset_after": after, "dtype": dtype}
        if time.monotonic() > until:
            rows.append({**row, "error": "the time was up", "good": False})
            continue
        try:
            worst, limit = compare(check.name, way, after, dtype)
            row |= {"worst": worst, "limit": limit, "good": worst <= limit}
        except Exception as e:
            row |= {"error": repr(e), "good": False}
        rows.append(row)
        print("  ", row, flush=True)
    return rows


def libraries(check: "Check") -> list[dict[str, Any]]:
    """Arrays of other libraries on the device, on CuPy's paths, against NumPy."""
    from gru_any import GRU
    from gru_any.backend import BackendError, bridged, select

    rows: list[dict[str, Any]] = []
    others = ["gru_any.testing.fake_cuda.other"] if check.dry else ["torch", "jax.numpy"]
    for name in others:
        row: dict[str, Any] = {"library": name}
        try:
            home = select(name, None if check.dry else "cuda")
            model = GRU(3, 5, 2, reset_after=True, seed=0)
            way, worst = bridged(home, "float32"), gap(home, model, 8 if check.dry else 130)
            row |= {"way": way, "worst": worst, "good": bool(way) and worst <= LIMITS["float32"]}
        except BackendError as e:  # it is not installed, or has no device
            row |= {"left out": str(e), "good": True}
        except Exception as e:
            row |= {"error": repr(e), "good": False}
        rows.append(row)
        print("  ", row, flush=True)
    return rows


# of the differences; float16 is held against float64 on the same rounded numbers
LIMITS = {"float32": 2e-6, "float64": 1e-13, "float16": 8 * 2.0**-10}


def compare(name: str, way: str, after: bool, dtype: str) -> tuple[float, float]:
    """Compare one path with NumPy, launched and replayed; return the worst error and its limit."""
    from gru_any import GRU
    from gru_any.backend import modes as run

    before, run.chosen_on_cuda = run.chosen_on_cuda, way
    long = 130 if name == "cupy" else 8  # three blocks, of which the layers make a wavefront
    try:
        worst = 0.0
        for layers, two, T in ((2, True, 20), (3, False, long)):
            model = GRU(3, 5, layers, bidirectional=two, reset_after=after, dtype=dtype, seed=0)
            worst = max(worst, gap(name, model, T))
    finally:
        run.chosen_on_cuda = before
    return worst, LIMITS[dtype]


def gap(name: Any, model: Any, T: int) -> float:
    """Return the largest difference over four calls, the last of which are replayed."""
    from gru_any import to_numpy

    dtype, worst = model.dtype, 0.0
    exact = "float64" if dtype == "float16" else dtype
    host, model = model.to(dtype=exact), model.to(name)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        shapes = (T, 7, 3), (T, 7, 5 * len(host.suffixes))
        x, dy = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
        for lengths in (None, [T, 3, 0, T // 2, T, 1, T - 1]):
            expected, found = (
                outcome(gru, gru.backend.put(x, kind), gru.backend.put(dy, kind), lengths)
                for gru, kind in ((host, exact), (model, dtype))
            )
            for ours_, theirs_ in zip(found, expected, strict=True):
                difference = np.abs(to_numpy(ours_) - theirs_).max() / np.abs(theirs_).max()
                known = difference == difference
                worst = max(worst, float(difference)) if known else float("inf")
    return worst


def outcome(gru: Any, x: Any, dy: Any, lengths: Any) -> list[Any]:
    (y, h_n), pullback = gru.vjp(x, lengths=lengths)
    grads, dx, dh0 = pullback(dy)
    return [y, h_n, dx, dh0, *(grads[name] for name in sorted(grads))]


def bench(check: "Check") -> list[dict[str, Any]]:
    """Time ours and PyTorch's, cell after cell, until the time is up."""
    chosen, rows = DRY if check.dry else cells(check.full), []
    for n, cell in enumerate(chosen):
        left = check.left(600) / (len(chosen) - n)
        if check.left(600) < 2:
            print(f"   time is up: {len(chosen) - n} cells are left out")
            break
        rows.append({**cell._asdict(), **measure(check, cell, min(left, 12.0))})
        print("  ", rows[-1], flush=True)
        check.results |= {"bench": rows, "rule": rule(rows)}
        check.write()
    return rows


def measure(check: "Check", cell: Cell, seconds: float) -> dict[str, Any]:
    """Return the milliseconds of each contender, forward and training, or its error."""
    row: dict[str, Any] = {}
    for name, maker in (("ours", ours), ("whole", whole), ("apart", apart), ("torch", theirs)):
        try:
            made = maker(check, cell)
            if made is None:
                continue
            wait, calls = made
            for mode, call in calls.items():
                row[f"{name} {mode}"] = timed(call, wait, seconds / 6)
        except Exception as e:
            row[f"{name} error"] = repr(e)[:300]
    for mode in ("forward", "training"):
        if f"ours {mode}" in row and f"torch {mode}" in row:
            row[f"times {mode}"] = row[f"torch {mode}"] / row[f"ours {mode}"]
    return row


def timed(call: Any, wait: Any, seconds: float) -> float:
    """Return the milliseconds of one call: the median of rounds of some hundredths of a second."""
    for _ in range(3):  # launched, recorded, replayed
        call()
    wait()
    start, n, found = time.perf_counter(), 1, []
    while time.perf_counter() - start < seconds or len(found) < 3:
        begin = time.perf_counter()
        for _ in range(n):
            call()
        wait()
        took = time.perf_counter() - begin
        if took < 0.02 and n < 1000:
            n *= 2
        else:
            found.append(1e3 * took / n)
        if time.perf_counter() - start > 3 * seconds:
            break
    return statistics.median(found or [1e3 * took / n])


# the contenders ----------------------------------------------------------------------------------


def inputs(cell: Cell) -> Any:
    rng = np.random.default_rng(0)
    dtype = "float16" if cell.precision == "float16" else "float32"
    shapes = ((cell.T, cell.B, cell.H), (cell.T, cell.B, cell.directions * cell.H))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes], dtype


def ours(check: "Check", cell: Cell) -> Any:
    from gru_any import GRU
    from gru_any.backend.modes import forget

    (x, dy), dtype = inputs(cell)
    gru = GRU(cell.H, cell.H, cell.layers, bidirectional=cell.directions == 2, dtype=dtype, seed=0,
              reset_after=bool(cell.reset_after), backend=check.name,
              precision="full" if cell.precision == "full" else "tf32")  # fmt: skip
    forget(gru.backend)
    x, dy = gru.backend.put(x), gru.backend.put(dy)
    calls = {"forward": lambda: gru(x), "training": lambda: gru.vjp(x)[1](dy)}
    return gru.backend.synchronize, calls


def whole(check: "Check", cell: Cell) -> Any:
    """Return our calls with the cooperative kernel; None where it does not fit the cell."""
    from gru_any import equations
    from gru_any.backend import modes as run
    from gru_any.backend import select
    from gru_any.codegen.cuda_cooperative import holds
    from gru_any.codegen.cuda_source import backward_scan, forward_scan

    if cell.layers * cell.directions > 1:
        return None
    variant, ops = equations.variant(bool(cell.reset_after)), run.runner(select(check.name)).ops
    scans = (forward_scan(variant.step, int(cell.reset_after), True, "float32"),
             backward_scan(variant.backward, 4, True, False, "float32"))  # fmt: skip
    if not all(holds(w, cell.B, cell.H, ops.multiprocessors, ops.shared) for w in scans):
        return None
    wait, calls = ours(check, cell)

    def taking(call: Any) -> None:
        before, run.chosen_on_cuda = run.chosen_on_cuda, "whole"
        try:
            call()
        finally:
            run.chosen_on_cuda = before

    return wait, {mode: partial(taking, call) for mode, call in calls.items()}


def apart(check: "Check", cell: Cell) -> Any:
    """Return our calls with one layer after the other; None where layers do not overlap anyway."""
    from gru_any.backend.cuda import tuning

    if cell.layers == 1 or cell.directions == 2 or not tuning.overlaps(cell.B * cell.H):
        return None
    wait, made = ours(check, cell)

    def taking(call: Any) -> None:
        before, tuning.current = tuning.current, tuning.current._replace(idle=0)
        try:
            call()
        finally:
            tuning.current = before

    return wait, {mode: partial(taking, call) for mode, call in made.items()}


def rule(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Derive thresholds from the measurements, with the sizes that each comes from.

    whole: for each hidden size, the batch up to which the cooperative kernel was always faster, 0
    for none. overlap: B H up to which layers are faster side by side (`idle` in cuda/tuning.py).
    """
    found: dict[str, Any] = {}
    for mode in ("forward", "training"):
        of_whole = _faster(rows, f"whole {mode}", f"ours {mode}")
        widths = sorted({row["H"] for row, _ in of_whole})
        found[f"whole {mode}"] = {
            H: _up_to((row["B"], good) for row, good in of_whole if row["H"] == H) for H in widths
        }
        overlaps = _faster(rows, f"ours {mode}", f"apart {mode}")
        found[f"overlap {mode}"] = _up_to((row["B"] * row["H"], good) for row, good in overlaps)
        for name, pairs in (("whole", of_whole), ("overlap", overlaps)):
            for word, wanted in (("faster", True), ("not faster", False)):
                sizes = [_size(row) for row, good in pairs if good == wanted]
                if sizes:
                    found[f"{name} {mode} {word} (HxB)"] = ", ".join(sizes)
    return found


def _faster(rows: list[dict[str, Any]], one: str, other: str) -> list[tuple[dict[str, Any], bool]]:
    """Return the rows that have both times, each with whether the first is less."""
    return [(row, row[one] < row[other]) for row in rows if one in row and other in row]


def _up_to(pairs: Any) -> int:
    """Return the largest size up to which all were good; 0 if none was."""
    pairs = sorted(pairs)
    bad = min((size for size, good in pairs if not good), default=float("inf"))
    return max((size for size, _ in pairs if size < bad), default=0)


def _size(row: dict[str, Any]) -> str:
    shape = f"{row['H']}x{row['B']} L{row['layers']} D{row['directions']}"
    return f"{shape} {row['precision']} {'after' if row['reset_after'] else 'before'}"


def theirs(check: "Check", cell: Cell) -> Any:
    try:
        import torch
    except ImportError:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not check.dry:
        return None
    torch.backends.cudnn.allow_tf32 = cell.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = cell.precision == "tf32"
    (x, dy), dtype = inputs(cell)
    kind = getattr(torch, dtype)
    x, dy = (torch.as_tensor(v, device=device) for v in (x, dy))
    if cell.other == "cell":
        model = torch.nn.GRUCell(cell.H, cell.H).to(device, kind)
    else:
        model = torch.nn.GRU(cell.H, cell.H, cell.layers, bidirectional=cell.directions == 2)
        model = model.to(device, kind)
    x.requires_grad_()

    def forward() -> Any:
        if cell.other == "gru":
            return model(x)[0]
        h, hs = torch.zeros_like(x[0]), []
        for step in x:
            h = model(step, h)
            hs.append(h)
        return torch.stack(hs)

    def silent() -> None:
        with torch.no_grad():
            forward()

    def training() -> None:
        torch.autograd.grad(forward(), [x, *model.parameters()], dy)

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return wait, {"forward": silent, "training": training}


# results -----------------------------------------------------------------------------------------


class Check:
    """A run: its clock, and its results so far."""

    def __init__(self, dry: bool, full: bool, out: Path, minutes: float) -> None:
        self.dry, self.full, self.out, self.alone = dry, full, out, False
        self.end = time.monotonic() + 60 * minutes
        self.name = "gru_any.testing.fake_cuda.array" if dry else "cupy"
        self.results: dict[str, Any] = {"dry run": dry, "date": time.strftime("%Y-%m-%d")}
        out.mkdir(parents=True, exist_ok=True)

    def left(self, most: float) -> float:
        """Return how many seconds are left, at most this many."""
        return max(min(most, self.end - time.monotonic()), 0.1)

    def part(self, name: str, function: Any) -> None:
        """Run one part; an error that it raises becomes its result."""
        print(name, flush=True)
        start = time.monotonic()
        try:
            self.results[name] = function(self)
        except Exception as e:
            traceback.print_exc()
            self.results[f"{name} error"] = repr(e)[:2000]
        self.results[f"{name} seconds"] = round(time.monotonic() - start, 1)
        self.write()

    def write(self) -> None:
        """Write the JSON, the table and the picture."""
        text = json.dumps(self.results, indent=1)
        (self.out / "results.json").write_text(text, "utf-8")
        (self.out / "results.md").write_text(self.table(), "utf-8")
        self.draw()

    def table(self) -> str:
        """Return the results as a table in Markdown."""
        rows = self.results.get("bench", [])
        names = list(dict.fromkeys(name for row in rows for name in row))
        lines = [f"# Results of {self.results['date']}{', a dry run' if self.dry else ''}", ""]
        later = ("bench", "libraries", "paths", "rule")
        lines += [f"- {k}: {v}" for k, v in self.results.items() if k not in later]
        both = [self.results.get(name, []) for name in ("paths", "libraries")]
        lines += [f"- {row}" for rows_ in both for row in rows_]
        lines += ["", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        for row in rows:
            lines.append("| " + " | ".join(_short(row.get(name, "")) for name in names) + " |")
        ratios = [v for row in rows for k, v in row.items() if k.startswith("times ")]
        if ratios:
            low, middle = min(ratios), statistics.median(ratios)
            lines += ["", f"Times as fast as PyTorch: least {low:.2f}, median {middle:.2f}."]
        lines += ["", *(f"- {name}: {v}" for name, v in self.results.get("rule", {}).items())]
        return "\n".join(lines) + "\n"

    def draw(self) -> None:
        """Draw a bar for each cell that PyTorch ran too."""
        rows = [row for row in self.results.get("bench", []) if "times training" in row]
        try:
            import matplotlib
        except ImportError:
            return
        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axis = pyplot.subplots(figsize=(8, 1 + 0.2 * len(rows)), layout="constrained")
        names = [_size(row) for row in rows]
        places = np.arange(len(rows))
        for shift, mode in ((-0.2, "forward"), (0.2, "training")):
            axis.barh(places + shift, [r.get(f"times {mode}", 0) for r in rows], 0.4, label=mode)
        axis.set_yticks(places, names, fontsize=6)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlabel("times as fast as PyTorch" + (", a dry run" if self.dry else ""))
        axis.legend()
        figure.savefig(self.out / "speed.png", dpi=120)
        pyplot.close(figure)


def _short(v: Any) -> str:
    return f"{v:.3g}" if isinstance(v, float) else str(v)


PARTS = {"tests": tests, "paths": paths, "libraries": libraries, "bench": bench}


def main() -> int:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--part", choices=PARTS, help="this part alone")
    parser.add_argument("--full", action="store_true", help="every combination of sizes")
    parser.add_argument("--dry-run", action="store_true", help="without a device")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--minutes", type=float, default=7.5, help="after which cells are left out")
    given = parser.parse_args()
    from gru_any.backend import BackendError, select

    check = Check(given.dry_run, given.full, given.out, given.minutes)
    check.alone = given.part is not None
    try:
        backend = select(check.name)
    except BackendError as e:
        print(e, file=sys.stderr)
        return 1
    check.results |= versions(backend)
    for name, function in PARTS.items():
        if given.part in (None, name):
            check.part(name, function)
    print((given.out / "results.md").read_text("utf-8"))
    rows = [row for name in ("paths", "libraries") for row in check.results.get(name, [])]
    bad = [row for row in rows if not row["good"]]
    bad += [text for text in (check.results.get("tests", ""),) if text.startswith("FAILED")]
    return 1 if bad or any(" error" in k for k in check.results) else 0


if __name__ == "__main__":
    sys.exit(main())
