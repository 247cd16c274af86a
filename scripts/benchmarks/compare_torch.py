"""Run the training scripts on PyTorch: steps per second, and the final figures side by side.

    python scripts/benchmarks/compare_torch.py text
    python scripts/benchmarks/compare_torch.py music --data nottingham.npz --threads 2
    python scripts/benchmarks/compare_torch.py long --task copy --length 600 --final

The name is followed by arguments of train_NAME.py. Two processes, one for each library, take turns:
a turn is a number of updates from the start of the data, and the first turn is not counted. The
figure is the ratio of the medians. `--final` trains to the end with each library; the weights from
PyTorch are then loaded into this one, and the same code evaluates both.

PyTorch starts from the same weights, reads the same batches in the same order, validates as often,
and returns the weights that the script would: those with the lowest loss, or their average. It uses
its own losses, its fused optimiser and packed sequences. Its GRU has the reset gate after the
product, so the weights differ after a few updates.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from contenders import threads_of
from on_torch import back, fit_torch, of_keys, of_sequences, of_sums, of_symbols, twin

from gru_any import Chain
from gru_any.train.loop import evaluate, fit

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the scripts of the folder above

ANSWER = "answer: "


class Recipe(NamedTuple):
    """The arguments of `fit`, PyTorch's loss, and a function that evaluates a Chain.

    Where the script chooses weights by validation, the figure is called "valid".
    """

    made: dict[str, Any]
    told: dict[str, Any]
    loss: Any
    figures: dict[str, Any]


# the recipes --------------------------------------------------------------------------------------


def text(arguments: list[str]) -> Recipe:
    s = importlib.import_module("train_text")
    args = s.parse(arguments)
    if args.minutes:
        sys.exit("--minutes ends a run by the clock, the faster library later: give --steps")
    found = s.split(s.read(args.data))
    return Recipe(s.recipe(args, found), {"steps": args.steps, "seed": args.seed}, of_symbols, {
        "validation": lambda m: s.bits_per_character(m, found.valid),
        "test": lambda m: s.bits_per_character(m, found.test),
    })  # fmt: skip


def music(arguments: list[str]) -> Recipe:
    s = importlib.import_module("train_music")
    args = s.parse(arguments)
    parts = s.data(args)
    told = {"steps": args.steps, "epochs": args.epochs, "seed": args.seed}
    full = args.batch * args.tbptt[0] if args.by_frames else None
    return Recipe(s.recipe(args, parts["train"]), told, partial(of_keys, full=full), {
        "valid": lambda m: s.score(m, parts["valid"]), "test": lambda m: s.score(m, parts["test"]),
    })  # fmt: skip


def series(arguments: list[str]) -> Recipe:
    s = importlib.import_module("train_series")
    args = s.parse(arguments)
    names, train, test = s.data(args)
    told = {"steps": args.steps, "epochs": args.epochs, "seed": args.seed}
    judged = {"accuracy": lambda m: (s.scores(m, test).argmax(axis=1) == test.labels).mean()}
    return Recipe(s.recipe(args, names, train), told, of_sequences, judged)


def long(arguments: list[str]) -> Recipe:
    s = importlib.import_module("train_long")
    args = s.parse(arguments)
    made, parts = s.recipe(args), s.parts(args)
    told = {"steps": args.steps, "validate_every": args.validate_every, "seed": args.seed}
    return Recipe(made, told, of_sums if args.task == "adding" else of_symbols, {
        "valid": lambda m: evaluate(m, made["loss"], parts["valid"]),
        "test": lambda m: evaluate(m, made["loss"], parts["test"]),
    })  # fmt: skip


RECIPES = {"text": text, "music": music, "series": series, "long": long}


# side by side -------------------------------------------------------------------------------------


def work(library: str, recipe: Recipe) -> None:
    """Report the number of threads; then answer each number of updates with the seconds of one, and
    "final" with the final figures.
    """

    def answer(found: Any) -> None:
        print(ANSWER + json.dumps(found), flush=True)

    layers = twin(recipe.made["model"]) if library == "torch" else None
    answer(threads_of("torch" if layers else "numba"))
    for line in sys.stdin:
        order = json.loads(line)
        if order == "final":
            answer(final(recipe, layers))
        else:
            start = time.perf_counter()
            train(recipe, layers, steps=order)
            answer((time.perf_counter() - start) / order)


def train(recipe: Recipe, layers: Any, **told: Any) -> None:
    """Train with PyTorch if these are its layers, else with `fit`."""
    if layers is None:
        fit(**recipe.made, **told, bar=False)
    else:
        fit_torch(recipe.made, recipe.loss, layers, **told)


def final(recipe: Recipe, layers: Any) -> dict[str, float]:
    """Train to the end; return the figures and the minutes of CPU time."""
    start, ours, valid = time.process_time(), recipe.made["model"], None

    def chain(layers: Any = None) -> Chain:
        return back(layers, ours) if layers else ours

    if "valid" in recipe.figures:

        def valid(*layers: Any) -> float:  # PyTorch's loop gives its layers
            return float(recipe.figures["valid"](chain(*layers)))

    train(recipe, layers, **recipe.told, valid=valid)
    minutes = (time.process_time() - start) / 60
    figures = {name: float(judge(chain(layers))) for name, judge in recipe.figures.items()}
    return {**figures, "CPU minutes": minutes}


class Worker:
    """A process that runs one of the two libraries."""

    def __init__(
        self, library: str, command: list[str], threads: int | None, script: str = __file__
    ) -> None:
        count = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
        self.library = library
        self.process = subprocess.Popen(
            [sys.executable, script, *command, "--worker", library], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, **(count if threads else {})},
        )  # fmt: skip
        self.threads = self.answer()
        if threads and self.threads != threads:
            sys.exit(f"{library} would use {self.threads} threads, not {threads}")

    def ask(self, order: Any) -> Any:
        """Send a request and return the answer."""
        assert self.process.stdin
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> Any:
        """Return the next answer; print the other lines, which come from the script."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        sys.exit(f"{self.library} died")


def turns(workers: list[Worker], rounds: int, steps: int) -> str:
    """Return the median steps per second of both, and their ratio."""
    seconds: dict[str, list[float]] = {worker.library: [] for worker in workers}
    for turn in range(rounds + 1):
        for worker in workers[:: -1 if turn % 2 else 1]:
            time.sleep(0.15)  # threads of the other may spin for a while
            found = worker.ask(steps)
            if turn:
                seconds[worker.library].append(found)
    ours, theirs = (1 / statistics.median(found) for found in seconds.values())
    return (
        f"gru_any {ours:.4g} steps a second, PyTorch {theirs:.4g}: {ours / theirs:.2f} times "
        f"({rounds} turns of {steps} updates)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("recipe", choices=RECIPES)
    add("--rounds", type=int, default=7, help="turns of each")
    add("--updates", type=int, default=10, help="updates in a turn")
    add("--threads", type=int, help="of each; the environment's without")
    add("--final", action="store_true", help="train to the end instead")
    add("--worker", choices=["gru_any", "torch"], help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.worker:
        work(args.worker, RECIPES[args.recipe]([*rest, "--backend", "numpy"]))
        return
    libraries = ("gru_any", "torch")
    workers = [Worker(library, [args.recipe, *rest], args.threads) for library in libraries]
    print(args.recipe, *rest, f"(threads: {workers[0].threads} and {workers[1].threads})")
    if args.final:
        for worker in workers:
            figures = worker.ask("final")
            print(f"{worker.library}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
    else:
        print(turns(workers, args.rounds, args.updates))
    for worker in workers:
        worker.process.communicate("")


if __name__ == "__main__":
    main()
