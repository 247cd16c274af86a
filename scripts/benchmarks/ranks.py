"""How much faster do two ranks train than one? The recipe of train_text.py, beside PyTorch's DDP.

    python scripts/benchmarks/ranks.py --rounds 5

Each contender runs in fresh processes of one thread, in turns: this library on one rank and on
`--ranks` ranks of mpiexec, and PyTorch with DistributedDataParallel (gloo) on as many processes. On
a busy machine, the fastest tenth of the steps says more than their mean. Arguments that the script
does not know go to train_text.py, such as --shard.
"""

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SCRIPTS = Path(__file__).resolve().parent.parent
sys.path.append(str(SCRIPTS))  # the training scripts
WARM = 5  # steps that are not timed

Figures = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    args, rest = parse(arguments)
    if args.work:
        work(args, rest)
        return
    found: dict[str, list[Figures]] = {name: [] for name in ("one", "several", "torch one", "DDP")}
    for number in range(args.rounds):
        for name, figures in found.items():
            figures.append(run(name, args, rest))
        rates = ", ".join(f"{name} {f[-1]['rate']:.2f}" for name, f in found.items())
        print(f"round {number + 1}, steps per second: {rates}", flush=True)
    report(found, args.ranks)


def report(found: dict[str, list[Figures]], ranks: int) -> None:
    """Print the medians of the ratios within the rounds, and how far the results agree."""

    def ratio(a: str, b: str) -> str:
        pairs = list(zip(found[a], found[b], strict=True))
        ratios = [x["rate"] / y["rate"] for x, y in pairs]
        best = statistics.median(y["fast"] / x["fast"] for x, y in pairs)
        return (
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); "
            f"{best:.2f} by the fastest tenth of the steps"
        )

    print(f"{ranks} ranks over one: {ratio('several', 'one')}")
    print(f"DDP on {ranks} processes over PyTorch on one: {ratio('DDP', 'torch one')}")
    print(f"{ranks} ranks over DDP on {ranks} processes: {ratio('several', 'DDP')}")
    one, several = (np.array(found[name][0]["losses"]) for name in ("one", "several"))
    print(f"the losses of all {len(one)} steps differ by {np.abs(one - several).max():.1e} at most")


def run(name: str, args: argparse.Namespace, rest: list[str]) -> Figures:
    """Run a contender to its end, in processes of its own."""
    size = 1 if "one" in name else args.ranks
    command = [sys.executable, __file__, "--steps", str(args.steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command += ["--result", str(result)]
        if name in ("one", "several"):
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
            launcher = shutil.which("mpiexec", path=path) or sys.exit("there is no mpiexec")
            commands = [[launcher, "-n", str(size), *command, "--work", "ours", *rest]]
        else:
            commands = [
                [*command, "--work", "torch", "--store", f"{folder}/store", "--ranks", str(size),
                 "--rank", str(rank), *rest]
                for rank in range(size)
            ]  # fmt: skip
        started = [
            subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True)
            for c in commands
        ]
        for process in started:
            _, err = process.communicate()
            if process.returncode:
                sys.exit(f"{name} failed: {err}")
        return dict(json.loads(result.read_text()))


# in the processes --------------------------------------------------------------------------------


def work(args: argparse.Namespace, rest: list[str]) -> None:
    """Train, and write the rate and the losses."""
    text = importlib.import_module("train_text")
    told = text.parse([*rest, "--steps", str(args.steps), "--backend", "numpy"])
    part = text.split("".join(Path(f).read_text("utf-8") for f in told.data) or topics())
    made = text.recipe(told, part)
    times, schedule = [], made["schedule"]

    def timed(step: int, losses: Any = ()) -> float:
        times.append(time.perf_counter())
        return float(schedule(step, losses))

    made["schedule"] = timed
    if args.work == "ours":
        made |= {"shard": told.shard, "compress": told.compress}
    losses = train_ours(made, args) if args.work == "ours" else train_torch(made, args)
    times.append(time.perf_counter())
    if losses:
        rate = (args.steps - WARM) / (times[-1] - times[WARM])
        fast = float(np.quantile(np.diff(times[WARM:]), 0.1))
        Path(args.result).write_text(json.dumps({"rate": rate, "fast": fast, "losses": losses}))


def topics() -> str:
    """Return CPython's help topics, as train_text.py reads them."""
    from pydoc_data.topics import topics as found

    return "".join(found[name] for name in sorted(found))


def train_ours(made: Figures, args: argparse.Namespace) -> list[float]:
    """Return the losses on the first rank."""
    from gru_any.train import distributed, fit

    comm = distributed.world()
    history = fit(**made, steps=args.steps, log_every=args.every, bar=False, comm=comm)
    return history.column("loss")[1] if comm.rank == 0 else []


def train_torch(made: Figures, args: argparse.Namespace) -> list[float]:
    """Run the same loop on PyTorch, each process on its rows of each batch."""
    import torch
    from on_torch import optimiser_of, pieces, run, tensor, twin
    from torch.nn.functional import cross_entropy
    from torch.nn.parallel import DistributedDataParallel

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = twin(made["model"])

        def forward(self, x: Any, state: Any) -> Any:
            return run(self.layers, x, state, None)

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{args.store}", rank=args.rank, world_size=args.ranks
    )
    model = Model()
    shared = DistributedDataParallel(model) if args.ranks > 1 else model
    optimiser, state, losses = optimiser_of(made, model), None, []
    for step, (_, piece) in zip(range(args.steps), pieces(made), strict=False):
        optimiser.param_groups[0]["lr"] = made["schedule"](step)
        x, target = map(tensor, piece.batch[:2])
        B = x.shape[1]
        rows = slice(args.rank * B // args.ranks, (args.rank + 1) * B // args.ranks)
        y, state = shared(x[:, rows], None if piece.first else state)
        optimiser.zero_grad()
        loss = cross_entropy(y.flatten(0, 1), target[:, rows].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), made["clip"])
        optimiser.step()
        losses.append(float(loss))
    return losses if args.rank == 0 else []


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="how often each contender runs")
    add("--steps", type=int, default=60, help="steps of a run")
    add("--ranks", type=int, default=2, help="processes that share the work")
    add("--every", type=int, default=20, help="steps between two records and checks of the ranks")
    add("--work", choices=["ours", "torch"], help=argparse.SUPPRESS)
    for name in ("--result", "--store"):
        add(name, help=argparse.SUPPRESS)
    add("--rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_known_args(arguments)


if __name__ == "__main__":
    main()
