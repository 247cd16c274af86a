"""How much memory does each rank take, with the optimiser's state whole and in shares?

    python scripts/benchmarks/ranks_memory.py --hidden 1024

Trains one GRU and a Linear layer with Adam for a few steps, in fresh processes of mpiexec for each
row. Printed are megabytes of a rank, the largest over the ranks: what the state of the optimiser
takes, what the system counts for the process while it trains, and at most. Needs Linux.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    args = parse()
    if args.work:
        work(args)
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    launcher = shutil.which("mpiexec", path=path) or sys.exit("there is no mpiexec")
    print("ranks  optimiser  state MB  training MB  at most MB")
    for ranks in args.ranks:
        for shard in ("whole", "sharded"):
            command = [launcher, "-n", str(ranks), sys.executable, __file__, "--work", shard]
            done = subprocess.run(
                [*command, "--hidden", str(args.hidden)],
                capture_output=True, text=True, check=False,
                env={**os.environ, "OMP_NUM_THREADS": "1", "GRU_ANY_NO_NUMBA": "1"},
            )  # fmt: skip
            if done.returncode:
                sys.exit(done.stderr)
            state, now, most = json.loads(done.stdout)
            print(f"{ranks:5}  {shard:9}  {state:8.1f}  {now:11.1f}  {most:10.1f}", flush=True)


def work(args: argparse.Namespace) -> None:
    """Train on all ranks; the first prints the figures."""
    from gru_any import GRU, Adam, Chain, Linear, squared_error
    from gru_any.train import distributed, fit

    comm, H = distributed.world(), args.hidden
    model = Chain(GRU(H, H, seed=0), Linear(H, 1, seed=1))
    optimiser, found = Adam(model.params), [0.0, 0.0]
    data = np.zeros((1, 2 * comm.size, H), "float32"), np.zeros((1, 2 * comm.size, 1), "float32")

    def rate(step: int, losses: Any) -> float:
        state = sum(slot.nbytes for slot in optimiser.slots.values()) / 1e6
        found[:] = state, megabytes("VmRSS")
        return 1e-3

    fit(model, squared_error, lambda epoch: [data], optimiser, steps=5, schedule=rate, bar=False,
        comm=comm, shard=args.work == "sharded")  # fmt: skip
    all_found = comm.gather([*found, megabytes("VmHWM")])
    if comm.rank == 0:
        print(json.dumps(np.max(all_found, axis=0).tolist()))


def megabytes(name: str) -> float:
    """Return a figure of this process from the system."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) * 1024 / 1e6


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="sizes of the runs")
    parser.add_argument("--hidden", type=int, default=1024, help="inputs and units of the GRU")
    parser.add_argument("--work", choices=["whole", "sharded"], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
