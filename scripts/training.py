"""What the training scripts share: the command line, the run and its results, and the pictures."""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import gru_any
from gru_any.backend import NUMPY
from gru_any.train import compress, distributed, fit
from gru_any.train.history import History

try:
    import matplotlib
    import tqdm  # noqa: F401
except ImportError as e:
    sys.exit(f'{e.name} is missing: pip install "gru-any[train]", in a clone ".[train]"')

# the command line --------------------------------------------------------------------------------


def parser(
    description: str, *, out: str, contents: str, seed: str, shard: bool = True
) -> argparse.ArgumentParser:
    """Return a parser with the arguments that all training scripts have.

    description : the docstring of the script, of which the first paragraph is shown
    out, contents : the default of --out, and what the folder holds at the end
    seed : what --seed decides
    shard : whether ranks can keep parts of the optimiser's state
    """
    made = argparse.ArgumentParser(
        description=description.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = made.add_argument
    add("--out", metavar="DIR", default=out, help=contents)
    add("--backend", default="auto", help="numpy, cupy, auto, or an array-API library")
    add("--device", help="such as cuda:1")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--seed", type=int, default=0, help=seed)
    add("--quiet", action="store_true", help="no progress bar")
    add("--distributed", action="store_true", help="share each batch among the ranks of mpiexec")
    add("--compress", choices=compress.DTYPES, help="what ranks send gradients as, else float32")
    if shard:
        add("--shard", action="store_true", help="each rank keeps a part of the optimiser's state")
    return made


@contextmanager
def ranks(args: argparse.Namespace) -> Iterator[None]:
    """Set args.comm, and args.first: whether this process is the one that writes and prints."""
    args.comm, args.first = None, True
    if not args.distributed:
        if (started := distributed.launched()) > 1:
            sys.exit(f"{started} processes were started: give --distributed to share one run")
        yield
        return
    try:
        args.comm = distributed.world()
    except RuntimeError as e:
        sys.exit(f"--distributed: {e}")
    args.first = args.comm.rank == 0
    if not args.first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if args.device is None and args.backend in ("auto", "cupy") and args.comm.size > 1:
        args.device = distributed.local_rank(args.comm)
    try:
        with distributed.ranks_of(args.comm, NUMPY).guard():
            yield
    except BaseException:
        if args.first:
            raise
        sys.exit(1)  # the same happened on all ranks, and the first one tells of it


def positive(text: str) -> int:
    """Convert an argument to an integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def read_utf8(file: str) -> str:
    """Return the text of a file that --data names; end the script if it cannot be read."""
    try:
        return Path(file).read_text("utf-8")
    except UnicodeDecodeError as e:
        sys.exit(f"--data {file} is not UTF-8: {e}")
    except OSError as e:
        sys.exit(f"--data {file} cannot be read: {e.strerror}")


def digest(*arrays: np.ndarray) -> str:
    """Return the SHA-256 of the bytes of all arrays together."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(array.tobytes())
    return found.hexdigest()


# the model ---------------------------------------------------------------------------------------


def home(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of every layer that say where it lives."""
    return {"backend": args.backend, "device": args.device}


def seeds(args: argparse.Namespace, count: int) -> list[int]:
    """Return independent seeds, all derived from --seed."""
    return [int(s) for s in np.random.SeedSequence(args.seed).generate_state(count)]


# the run -----------------------------------------------------------------------------------------


def train(
    args: argparse.Namespace,
    recipe: dict[str, Any],
    settings: dict[str, Any],
    bar: Callable[[dict[str, float]], dict[str, str]] | bool = True,
    **more: Any,
) -> History:
    """Run `fit` in the folder --out, or resume the run there, and save the model's weights.

    recipe, more : arguments of `fit`
    settings : what else decides the numbers; a run with other settings is not resumed
    """
    history = fit(
        **recipe,
        **more,
        seed=args.seed,
        out=args.out,
        settings=settings,
        bar=not args.quiet and bar,
        comm=args.comm,
        compress=args.compress,
        shard=args.shard,
    )
    if args.first:
        gru_any.save(Path(args.out) / "model.safetensors", recipe["model"])
    return history


def seconds(history: History) -> float:
    """Return how long the training took, including earlier parts of a run that was resumed."""
    return history.records[-1]["seconds"] if history.records else 0.0


def write_result(args: argparse.Namespace, history: History, figures: dict[str, Any]) -> None:
    """Write the figures to result.json in the folder --out, with the seconds that they took."""
    result = {**figures, "seconds": seconds(history), "cpu_seconds": time.process_time()}
    (Path(args.out) / "result.json").write_text(json.dumps(result))


@contextmanager
def picture(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """Give the axes of a figure of this size in inches, and write it as a PNG at the end."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    yield axes
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
