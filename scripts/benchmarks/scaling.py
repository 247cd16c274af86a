"""Where does data-parallel training stop scaling? A model of cost, fitted here and carried further.

    python scripts/benchmarks/scaling.py --measure --picture docs/scaling.png

`--measure` runs one to four ranks on this machine and keeps the figures in a file, of which the
model is fitted: seconds of a step on one rank for several numbers of rows, and of sums of buffers
of several sizes. Printed are the fit, its prediction for the measured steps on two to four
ranks, and the prediction for GPUs with published figures of links, which stand in `PUBLISHED`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from scaling_model import (
    Cluster,
    Link,
    Work,
    efficiency,
    fit_link,
    fit_work,
    gru_on_gpu,
    limit,
    step,
)

SCRIPTS = Path(__file__).resolve().parent.parent
FIGURES = SCRIPTS.parent / "results" / "scaling.json"
ROWS, SIZES = (8, 16, 32, 64), tuple(2**n for n in range(14, 24, 2))
HIDDEN, STEPS, WARM, ROUNDS = 256, 30, 5, 4

# Sources: NVIDIA's data sheet of the H100 SXM (NVLink 900 GB/s in both directions together, 67
# TFLOP/s in float32, PCIe 5.0 128 GB/s in both), of which 380 GB/s in one direction are measured
# (github.com/NVIDIA/nccl/issues/1264); ConnectX-7 NDR, 400 Gb/s, one for each GPU of a DGX H100;
# seconds of a hop of NVLink and of a network from NCCL's own model (src/graph/tuning.cc: 3.4 and
# 9.6 us); 100 Gb/s Ethernet, one for a box of eight. Of TCP, 30 us are assumed.
NVLINK, NDR = Link(3.4e-6, 380e9), Link(9.6e-6, 50e9)
ETHERNET = Link(30e-6, 12.5e9 / 8)
PCIE = 64e9
PUBLISHED = {
    "8 GPUs, NVLink": (8, Cluster(NVLINK, box=8)),
    "1,024 GPUs, NVLink and InfiniBand": (1024, Cluster(NVLINK, NDR, box=8)),
    "1,024 GPUs, NVLink and 100 Gb/s Ethernet": (1024, Cluster(NVLINK, ETHERNET, box=8)),
}
# Assumed: 30 % of the peak, and 5 us for a step of time in one direction, which no rows shorten
GPU = gru_on_gpu(T=256, size=1024, layers=2, flops=0.3 * 67e12, per_step=5e-6)
ONE_LAYER = gru_on_gpu(T=256, size=1448, layers=1, flops=0.3 * 67e12, per_step=5e-6)
BATCH = 8192  # rows of all ranks


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.work:
        work(args)
        return
    if args.measure:
        args.figures.write_text(json.dumps(measured(), indent=1) + "\n", "utf-8")
    found = json.loads(args.figures.read_text("utf-8"))
    host = report_here(found)
    clusters = PUBLISHED | {
        "8 GPUs, sums on the host": (8, Cluster(host, box=8, staging=PCIE)),
        "1,024 GPUs, sums on the host, InfiniBand": (1024, Cluster(host, NDR, 8, PCIE)),
    }
    report_further(clusters)
    report_changes(PUBLISHED["1,024 GPUs, NVLink and InfiniBand"][1])
    if args.picture:
        draw(clusters, args.picture)


# the tables --------------------------------------------------------------------------------------


def report_here(found: dict[str, Any]) -> Link:
    """Print the fit, and measured beside predicted steps; return the link of this machine."""
    fixed, per_row = fit_work(ROWS, found["steps of one rank"])
    sums = [(size, int(n), s) for n, times in found["sums"].items() if int(n) <= found["cores"]
            for size, s in zip(SIZES, times, strict=True)]  # fmt: skip
    link = fit_link(*zip(*sums, strict=True))
    print(f"a step on one rank: {1e3 * fixed:.1f} ms and {1e3 * per_row:.2f} ms for each row")
    print(
        f"the link of this machine: {1e6 * link.latency:.0f} us a round, "
        f"{link.bandwidth / 1e9:.1f} GB/s"
    )
    here = Cluster(link, cores=found["cores"])
    made = Work(fixed, per_row, found["bytes"], layers=1, overlap=0.0)
    print("| ranks here | measured ms | predicted ms |\n|---|---|---|")
    for ranks, seconds in found["steps of 32 rows"].items():
        predicted = step(made, 32, int(ranks), here)
        print(f"| {ranks} | {1e3 * seconds:.1f} | {1e3 * predicted:.1f} |")
    return link


def report_further(clusters: dict[str, tuple[int, Cluster]]) -> None:
    """Print the predictions for a batch of a fixed size, and for one that grows with the ranks."""
    rows = 32
    print(f"\none GPU takes {step(GPU, BATCH, 1, Cluster(NVLINK)):.2f} s for {BATCH} rows")
    print(
        f"| ranks and links | ms, {BATCH} rows | of N times one | above half up to | "
        f"of N times one, {rows} rows a rank |\n|---|---|---|---|---|"
    )
    for name, (ranks, cluster) in clusters.items():
        seconds = step(GPU, BATCH, ranks, cluster)
        grown = step(GPU, rows, 1, cluster) / step(GPU, rows * ranks, ranks, cluster)
        print(
            f"| {name} | {1e3 * seconds:.1f} | {efficiency(GPU, BATCH, ranks, cluster):.0%} | "
            f"{min(limit(GPU, BATCH, cluster), ranks if cluster.between is None else BATCH)} | "
            f"{grown:.0%} |"
        )


def changes(cluster: Cluster) -> dict[str, tuple[float, int]]:
    """Return the efficiency of 1,024 ranks, and the most of one half, with one thing changed."""
    between = cluster.between or cluster.inside

    def other(**given: float) -> Cluster:
        return cluster._replace(between=between._replace(**given))

    def up_to(work: Work = GPU, rows: int = BATCH, where: Cluster = cluster) -> tuple[float, int]:
        return efficiency(work, rows, 1024, where), limit(work, rows, where)

    return {
        "as above": up_to(),
        "four times the rows": up_to(rows=4 * BATCH),
        "a quarter of the rows": up_to(rows=BATCH // 4),
        "one layer of H = 1448 in place of two of 1024": up_to(ONE_LAYER),
        "gradients of 16 bits": up_to(GPU._replace(size=GPU.size / 2)),
        "a tenth of the bandwidth": up_to(where=other(bandwidth=between.bandwidth / 10)),
        "ten times the latency": up_to(where=other(latency=10 * between.latency)),
        "no overlap": up_to(GPU._replace(overlap=0.0)),
        "a time step in 1 us in place of 5": up_to(GPU._replace(fixed=GPU.fixed / 5)),
    }


def report_changes(cluster: Cluster) -> None:
    """Print what moves the point where scaling stops."""
    print(
        "\n| 1,024 GPUs, NVLink and InfiniBand | of N times one | above half up to |\n|---|---|---|"
    )
    for name, (part, ranks) in changes(cluster).items():
        print(f"| {name} | {part:.0%} | {ranks} |")


def draw(clusters: dict[str, tuple[int, Cluster]], path: Path) -> None:
    """Draw the efficiency for a fixed batch over the number of ranks, as a PNG."""
    sys.path.append(str(SCRIPTS))
    import training

    with training.picture(path, (7, 4.5)) as axis:
        ranks = [2**n for n in range(11)]
        for name, (most, cluster) in clusters.items():
            if most < ranks[-1]:  # its line is the beginning of another
                continue
            parts = [100 * efficiency(GPU, BATCH, n, cluster) for n in ranks]
            axis.semilogx(ranks, parts, "o-", base=2, markersize=3, label=name)
        axis.axhline(50, color="gray", linestyle="--")
        title = f"predicted: a GRU of 2 layers, H = 1024, T = 256, {BATCH} rows"
        axis.set(xlabel="ranks", ylabel="% of N times the speed of one", title=title, ylim=(0, 105))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower left")


# measured ----------------------------------------------------------------------------------------


def measured() -> dict[str, Any]:
    """Return the figures of runs on one to four ranks, the least of some rounds in turns."""
    runs = {("step", 1, rows): launched(1, "step", rows) for rows in ROWS}
    runs |= {("step", ranks, 32): launched(ranks, "step", 32) for ranks in (2, 3, 4)}
    runs |= {("sums", ranks, 0): launched(ranks, "sums") for ranks in (2, 3, 4)}
    least = {key: np.array(run["seconds"]) for key, run in runs.items()}
    for _ in range(ROUNDS - 1):
        for what, ranks, rows in runs:
            seconds = launched(ranks, what, rows)["seconds"]
            least[what, ranks, rows] = np.minimum(least[what, ranks, rows], seconds)
    seconds = {key: array.tolist() for key, array in least.items()}
    return {
        "cores": len(os.sched_getaffinity(0)),
        "bytes": runs["step", 1, 32]["bytes"],
        "steps of one rank": [seconds["step", 1, rows] for rows in ROWS],
        "steps of 32 rows": {str(n): seconds["step", n, 32] for n in (1, 2, 3, 4)},
        "sums": {str(n): seconds["sums", n, 0] for n in (2, 3, 4)},
    }


def launched(ranks: int, what: str, rows: int = 32) -> dict[str, Any]:
    """Run this script on so many ranks, and return the JSON that the first one prints."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    launcher = shutil.which("mpiexec", path=path) or sys.exit("there is no mpiexec")
    done = subprocess.run(
        [launcher, "-n", str(ranks), sys.executable, __file__, "--work", what,
         "--rows", str(rows)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout))


def work(args: argparse.Namespace) -> None:
    """Measure on all ranks; the first prints the fastest tenth of the steps, or sums."""
    from gru_any.train import distributed

    comm = distributed.world()
    found = sums(comm) if args.work == "sums" else steps(comm, args.rows)
    if comm.rank == 0:
        print(json.dumps(found))


def sums(comm: Any) -> dict[str, Any]:
    """Return the seconds of a sum of each size, waited for as in training."""
    from gru_any.train.watch import Watch

    watch, found = Watch(comm, str), []
    for size in SIZES:
        buffer, times = np.zeros(size // 4, "float32"), []
        for _ in range(60):
            watch.wait([watch.comm.Ibarrier()])
            began = time.perf_counter()
            watch.wait([watch.comm.Iallreduce(watch.in_place, buffer)])
            times.append(time.perf_counter() - began)
        found.append(float(np.quantile(times, 0.1)))
    return {"seconds": found}


def steps(comm: Any, rows: int) -> dict[str, Any]:
    """Return the seconds of a step of a GRU, and the bytes of its gradients."""
    from gru_any import GRU, Adam, Chain, Linear, squared_error
    from gru_any.train import fit

    model, times = Chain(GRU(64, HIDDEN, seed=0), Linear(HIDDEN, 1, seed=1)), []
    rng = np.random.default_rng(0)
    data = tuple(rng.standard_normal((64, rows, n)).astype("float32") for n in (64, 1))

    def rate(step: int, losses: Any) -> float:
        times.append(time.perf_counter())
        return 1e-3

    fit(model, squared_error, lambda epoch: [data], Adam(model.params), steps=STEPS, schedule=rate,
        log_every=10**6, bar=False, comm=comm)  # fmt: skip
    size = sum(w.nbytes for w in model.params.values())
    return {"seconds": float(np.quantile(np.diff(times[WARM:]), 0.1)), "bytes": size}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--measure", action="store_true", help="measure here anew")
    add("--figures", type=Path, default=FIGURES, help="where the figures of this machine are kept")
    add("--picture", type=Path, help="a PNG of the predictions")
    add("--work", choices=["sums", "step"], help=argparse.SUPPRESS)
    add("--rows", type=int, default=32, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
