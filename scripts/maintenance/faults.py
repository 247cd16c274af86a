"""Faults of distributed training: ranks that are killed or stopped, and signals to the launcher.

    python scripts/maintenance/faults.py

A real training on `--ranks` ranks of mpiexec is disturbed at a random moment, and then goes on to
its end. Printed is one line for each kind of fault: how many runs ended within the promised time,
said which rank it was, on which host, and where the last good checkpoint is, lost no checkpoint,
left no process behind, and gave the parameters of an undisturbed run, bit for bit. The exit code is
1 if a promise is broken. Needs Linux.
"""

import argparse
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gru_any.checkpoint import NAMES
from gru_any.tensors import DamagedError, read

STEPS, SAVE_EVERY = 240, 5
PROMISED = 5.0  # seconds from the fault to the end of the launcher
HANG = 3.0  # GRU_ANY_RANK_TIMEOUT of the runs in which a rank is stopped
KINDS = ("kill", "stop", "interrupt", "terminate", "launcher")
PROMISES = ("in time", "named", "checkpoint", "kept", "gone", "same")


class Fault(NamedTuple):
    """What is sent to whom: to a rank, or to the launcher (rank None)."""

    kind: str
    ranks: int
    rank: int | None

    @property
    def words(self) -> str:
        """Return the fault as the table names it."""
        whom = "the launcher" if self.rank is None else f"rank {self.rank}"
        sent = {"kill": "SIGKILL", "stop": "SIGSTOP", "interrupt": "SIGINT"}
        sent |= {"terminate": "SIGTERM", "launcher": "SIGKILL"}
        return f"{sent[self.kind]} to {whom} of {self.ranks}"


class Outcome(NamedTuple):
    """Which promises a run kept, the seconds that it took to end, and what it printed."""

    kept: dict[str, bool]
    seconds: float
    text: str


# in the processes --------------------------------------------------------------------------------


def work(folder: Path, steps: int) -> None:
    """Train a small model on all ranks, or go on with it; leave its parameters."""
    from gru_any import GRU, Adam, Chain, Dropout, Linear, softmax_cross_entropy
    from gru_any.train import distributed, fit

    comm = distributed.world()
    wide: dict[str, Any] = {"dtype": "float64"}
    model = Chain(
        GRU(3, 16, 2, dropout=0.3, seed=0, **wide),
        Dropout(0.4, **wide),
        Linear(16, 4, seed=1, **wide),
    )

    def batches(epoch: int) -> Any:
        rng = np.random.default_rng(epoch)
        for rows in (6, 5):
            yield rng.standard_normal((12, rows, 3)), rng.integers(0, 4, (12, rows))

    mark(folder / f"pid.{comm.rank}", str(os.getpid()))
    history = fit(
        model, softmax_cross_entropy, batches, Adam(model.params, lr=0.01), steps=steps,
        tbptt=(6, 8), accumulate=2, clip=0.5, average=0.9, bar=False, out=folder / "out",
        save_every=SAVE_EVERY, log_every=10, comm=comm,
    )  # fmt: skip
    if comm.rank == 0 and history.reason != "interrupted":
        np.savez(folder / "end.npz", **model.params)


def mark(path: Path, text: str) -> None:
    """Write a file that is there only when it is whole."""
    part = path.with_name(f".{path.name}")
    part.write_text(text)
    part.rename(path)


# the runs ----------------------------------------------------------------------------------------


def start(ranks: int, folder: Path, steps: int, timeout: float = 60.0) -> subprocess.Popen[str]:
    """Start the training, and return when all ranks are about to call `fit`."""
    for left in folder.glob("pid.*"):
        left.unlink()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    launcher = shutil.which("mpiexec", path=path) or sys.exit("there is no mpiexec")
    usual = {"GRU_ANY_NO_NUMBA": "1", "OMP_NUM_THREADS": "1", "GRU_ANY_RANK_TIMEOUT": str(timeout)}
    process = subprocess.Popen(
        [launcher, "-n", str(ranks), sys.executable, __file__, "--work", str(folder),
         "--steps", str(steps)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, **usual},
    )  # fmt: skip
    limit = time.monotonic() + 60
    while not all((folder / f"pid.{rank}").exists() for rank in range(ranks)):
        if process.poll() is not None or time.monotonic() > limit:
            process.kill()
            sys.exit(f"the training does not start: {process.communicate()[0]}")
        time.sleep(0.002)
    return process


def undisturbed(ranks: int, steps: int) -> tuple[dict[str, np.ndarray], float]:
    """Return the parameters of a run that nothing disturbs, and the seconds that it takes."""
    with tempfile.TemporaryDirectory() as name:
        process = start(ranks, Path(name), steps)
        began = time.monotonic()
        text, _ = process.communicate()
        if process.returncode:
            sys.exit(f"the undisturbed run fails: {text}")
        return dict(np.load(Path(name) / "end.npz")), time.monotonic() - began


def disturbed(fault: Fault, moment: float, steps: int, expected: dict[str, Any]) -> Outcome | None:
    """Start a run, send the signal after so many seconds, and go on; None if it had ended."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = start(fault.ranks, folder, steps, HANG if fault.kind == "stop" else 60)
        pids = [int((folder / f"pid.{rank}").read_text()) for rank in range(fault.ranks)]
        time.sleep(moment)
        before = saved(folder / "out")
        if process.poll() is not None or (folder / "end.npz").exists():
            process.communicate()
            return None
        signals = {"stop": signal.SIGSTOP, "interrupt": signal.SIGINT, "terminate": signal.SIGTERM}
        sent = signals.get(fault.kind, signal.SIGKILL)
        os.kill(process.pid if fault.rank is None else pids[fault.rank], sent)
        began = time.monotonic()
        text = ended(process, pids)
        seconds = time.monotonic() - began
        gone = not any(alive(pid) for pid in pids)
        after = saved(folder / "out")
        allowed = PROMISED + (HANG if fault.kind == "stop" else 0)
        kept = {"in time": seconds < allowed, "kept": after >= before, "gone": gone}
        if fault.rank is not None:
            kept["named"] = named(fault.rank, pids, text, after)
            kept["checkpoint"] = told(text, folder / "out")
        start(fault.ranks, folder, steps).communicate()
        kept["same"] = equal(folder / "end.npz", expected)
        return Outcome(kept, seconds, text)


def ended(process: subprocess.Popen[str], pids: list[int]) -> str:
    """Wait for the end of the launcher and of all ranks, at most half a minute."""
    limit = time.monotonic() + 30
    try:
        text, _ = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)
        text, _ = process.communicate()
        return f"the launcher had not ended after 30 s\n{text}"
    while any(map(alive, pids)) and time.monotonic() < limit:
        time.sleep(0.01)
    return text


def named(rank: int, pids: list[int], text: str, steps: int) -> bool:
    """Whether the text says once which rank it was; before the first step the launcher may."""
    if f"rank {rank} did not come to the work" in text:
        return steps == 0
    if f"rank {rank} (process {pids[rank]} on {platform.node()})" in text:
        return len(re.findall(r"was killed|did not answer|died", text)) == 1
    return steps == 0 and f"PID {pids[rank]} RUNNING AT {platform.node()}" in text


def told(text: str, out: Path) -> bool:
    """Whether the text says where the last good checkpoint is, and it can be read."""
    if found := re.search(r"the last good checkpoint is (\S+)", text):
        return Path(found[1]).parent == out and step_of(Path(found[1])) > 0
    return saved(out) == 0


def saved(out: Path) -> int:
    """Return the step of the newest checkpoint that can be read; 0 without one."""
    while True:
        steps = [step_of(out / name) for name in NAMES]
        if max(steps) > 0 or not any((out / name).exists() for name in NAMES):
            return max(steps)  # else they were being renamed


def step_of(path: Path) -> int:
    """Return the step of a checkpoint; 0 if it is not there or not whole."""
    with suppress(OSError, DamagedError):
        return int(json.loads(read(path)[0]["gru_any.run"])["step"])
    return 0


def equal(path: Path, expected: dict[str, Any]) -> bool:
    """Whether the parameters in a file are these, bit for bit."""
    if not path.exists():
        return False
    found = np.load(path)
    return all(np.array_equal(found[name], array) for name, array in expected.items())


def alive(pid: int) -> bool:
    """Whether a process runs; not if it has ended and only its entry is left."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


# the table ---------------------------------------------------------------------------------------


def faults(ranks: int, kinds: list[str]) -> list[Fault]:
    """Return the faults of a training on so many ranks."""
    to_ranks = [Fault(kind, ranks, rank) for kind in KINDS[:2] if kind in kinds
                for rank in range(ranks)]  # fmt: skip
    return to_ranks + [Fault(kind, ranks, None) for kind in KINDS[2:] if kind in kinds]


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.work:
        work(Path(args.work), args.steps)
        return 0
    rng, broken = random.Random(args.seed), 0
    print("| fault | runs | most seconds to the end | " + " | ".join(PROMISES) + " |")
    print("|---|---|---|" + "---|" * len(PROMISES))
    for ranks in args.ranks:
        expected, duration = undisturbed(ranks, args.steps)
        print(f"{ranks} ranks take {duration:.2f} s undisturbed", file=sys.stderr, flush=True)
        for fault in faults(ranks, args.faults):
            count = args.kills if fault.kind == "kill" else args.others
            outcomes: list[Outcome] = []
            while len(outcomes) < count:
                moment = rng.random() * duration
                outcome = disturbed(fault, moment, args.steps, expected)
                if outcome is None:  # a quiet moment made this run faster
                    duration *= 0.9
                    continue
                outcomes.append(outcome)
                if lost := [name for name, held in outcome.kept.items() if not held]:
                    broken += 1
                    print(f"{fault.words} after {moment:.3f} s: {lost}\n{outcome.text}",
                          file=sys.stderr)  # fmt: skip
            print(row(fault, outcomes), flush=True)
    return int(broken > 0)


def row(fault: Fault, outcomes: list[Outcome]) -> str:
    """Return a line of the table."""
    most = max(outcome.seconds for outcome in outcomes)
    counts = [
        str(sum(outcome.kept[name] for outcome in outcomes)) if name in outcomes[0].kept else ""
        for name in PROMISES
    ]
    return f"| {fault.words} | {len(outcomes)} | {most:.1f} | {' | '.join(counts)} |"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[2, 3], help="sizes of the runs")
    add("--kills", type=int, default=10, help="random moments at which each rank is killed")
    add("--others", type=int, default=3, help="random moments of each other fault")
    add("--faults", nargs="+", choices=KINDS, default=KINDS, help="which to try")
    add("--steps", type=int, default=STEPS, help="of the training")
    add("--seed", type=int, default=0, help="of the moments")
    add("--work", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
