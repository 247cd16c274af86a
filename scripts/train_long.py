"""What a GRU carries over T steps: the adding problem and copy memory.

    python scripts/train_long.py --task adding --length 200

adding: each of T steps has a number from 0 to 1 and a mark, which is 1 at two of the steps. The
answer, at the last step, is the sum of the two marked numbers (Hochreiter and Schmidhuber 1997; Le
et al. 2015). The constant answer 1 has a squared error of 2/12 = 0.1667, the variance of the sum of
two such numbers.

copy: the input is ten symbols out of eight, then T - 1 blanks, then eleven times the sign to
recall. The answer, T + 20 steps long, is blank up to the last ten steps, which repeat the ten
symbols (Bai et al. 2018). To answer "blank" for T + 10 steps and to guess the rest has a
cross-entropy of 10 ln 8 / (T + 20) per step. Short sequences come first: T of an update is drawn
from 1 up to a bound that grows.

Every update has fresh sequences; validation and test have fixed ones of their own. If the script is
started again with the same folder, the run resumes where it stopped.
"""

import argparse
import math
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import training

import gru_any
from gru_any import GRU, Adam, Chain, Linear
from gru_any.backend.modes import forget
from gru_any.train import evaluate
from gru_any.train.data import Batch
from gru_any.train.schedules import cosine, warm_up

SYMBOLS, RECALLED = 10, 10  # blank, eight symbols, the sign to recall; how many are recalled


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with training.ranks(args):
        run(args)


def run(args: argparse.Namespace) -> None:
    made = recipe(args)
    model, loss = made["model"], made["loss"]
    print(model)
    trivial = trivial_loss(args)
    kept = parts(args)
    settings = {name: getattr(args, name) for name in ("task", "length", "batch", "rate", "grow")}
    history = training.train(
        args, made, settings, steps=args.steps, validate_every=args.validate_every,
        valid=lambda: evaluate(model, loss, kept["valid"], comm=args.comm),
    )  # fmt: skip
    test = evaluate(model, loss, kept["test"], comm=args.comm)
    if not args.first:
        return
    draw(history, args, trivial, Path(args.out) / "curve.png")
    training.write_result(args, history, {"test": test, "trivial": trivial, "valid": history.best})
    print(
        f"{history.reason} after {training.seconds(history):.0f} s; test {test:.3g}, "
        f"the trivial answer {trivial:.3g}"
    )
    if model.backend.host:
        for recompute in (None, "sqrt"):
            ms, mb = cost({**vars(args), "recompute": recompute})
            print(f"a gradient, recompute={recompute!r}: {ms:.0f} ms of CPU, {mb:.1f} MB at once")


# the tasks ---------------------------------------------------------------------------------------


def trivial_loss(args: argparse.Namespace) -> float:
    """Return the loss of an answer that ignores the input."""
    if args.task == "adding":
        return 2 / 12
    return RECALLED * math.log(SYMBOLS - 2) / (args.length + 2 * RECALLED)


def sequences(args: argparse.Namespace, rng: np.random.Generator, rows: int) -> Batch:
    return TASKS[args.task](args.length, rng, rows)


def fresh(args: argparse.Namespace, update: int) -> list[Batch]:
    """Return the sequences of an update, as one batch.

    With --grow their T is at most a bound, which grows geometrically from 10 to --length over the
    first four fifths of the run.
    """
    rng, T = np.random.default_rng([args.seed, update]), args.length
    if args.grow:
        start = min(10, T)
        bound = start * (T / start) ** min(1.0, update / (0.8 * args.steps))
        least = 2 if args.task == "adding" else 1  # of which two are marked
        T = int(rng.integers(least, round(bound) + 1))
    return [TASKS[args.task](T, rng, args.batch)]


def parts(args: argparse.Namespace) -> dict[str, list[Batch]]:
    """Return the fixed sequences: 500 for validation, 1000 for the test."""
    return {
        name: [sequences(args, np.random.default_rng([number, i]), 50) for i in range(count)]
        for number, (name, count) in enumerate([("valid", 10), ("test", 20)], 10**6)
    }


def adding(T: int, rng: np.random.Generator, rows: int) -> Batch:
    """Return inputs (T, B, 2), and a target (T, B, 1) that counts at the last step."""
    numbers, marks = rng.random((T, rows)), np.zeros((T, rows))
    for row in range(rows):
        marks[rng.choice(T, 2, replace=False), row] = 1
    target, mask = np.zeros((T, rows, 1), "float32"), np.zeros((T, rows), bool)
    target[-1, :, 0], mask[-1] = (numbers * marks).sum(axis=0), True
    return Batch(np.stack([numbers, marks], axis=-1).astype("float32"), target, mask)


def copy(T: int, rng: np.random.Generator, rows: int) -> Batch:
    """Return one-hot inputs (T + 20, B, 10), and a target (T + 20, B)."""
    symbols = rng.integers(1, SYMBOLS - 1, (RECALLED, rows))
    x = np.zeros((T + 2 * RECALLED, rows), int)
    x[:RECALLED], x[T + RECALLED - 1 :] = symbols, SYMBOLS - 1
    target = np.zeros_like(x)
    target[-RECALLED:] = symbols
    return Batch(np.eye(SYMBOLS, dtype="float32")[x], target)


TASKS = {"adding": adding, "copy": copy}
LOSSES = {"adding": gru_any.squared_error, "copy": gru_any.softmax_cross_entropy}


# the model ---------------------------------------------------------------------------------------


def recipe(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `fit`; each epoch is one batch of fresh sequences."""
    model = build(args)
    return {
        "model": model,
        "loss": LOSSES[args.task],
        "batches": lambda update: fresh(args, update),
        "optimiser": Adam(model.params, lr=args.rate),
        "clip": args.clip,
        "schedule": warm_up(50, cosine(args.rate, args.steps)),
    }


def build(args: argparse.Namespace) -> Chain:
    """Return GRU and linear layer; with --chrono z begins where a state lasts 1 to T steps."""
    home, seeds = training.home(args), training.seeds(args, 3)
    inputs, outputs = (2, 1) if args.task == "adding" else (SYMBOLS, SYMBOLS)
    gru = GRU(inputs, args.hidden, recompute=args.recompute, seed=seeds[0], **home)
    if args.chrono:
        bias = np.zeros(3 * args.hidden)
        lasts = np.random.default_rng(seeds[2]).uniform(1, args.length - 1, args.hidden)
        bias[args.hidden : 2 * args.hidden] = np.log(lasts)
        gru.params["bias_ih_l0"] = gru_any.asarray(bias, like=gru)
    return Chain(gru, Linear(args.hidden, outputs, seed=seeds[1], **home))


def cost(settings: dict[str, Any]) -> tuple[float, float]:
    """Return the CPU milliseconds of one gradient, and its peak memory in megabytes."""
    args = argparse.Namespace(**settings)
    made, batch = recipe(args), sequences(args, np.random.default_rng(0), args.batch)
    model, loss = made["model"], made["loss"]

    def gradient() -> Any:
        (y, _), pullback = model.vjp(model.backend.put(batch.x))
        return pullback(loss(y, batch.target, mask=batch.mask)[1])

    gradient()
    start = time.process_time()
    gradient()
    seconds = time.process_time() - start
    forget(model.backend)
    tracemalloc.start()
    gradient()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return 1e3 * seconds, peak / 1e6


def draw(history: Any, args: argparse.Namespace, trivial: float, path: Path) -> None:
    """Draw training and validation loss beside the trivial answer, as a PNG."""
    steps, losses = history.column("valid")
    with training.picture(path, (7, 4)) as axis:
        axis.semilogy(*history.column("loss"), color="tab:blue", alpha=0.5, label="training")
        axis.semilogy(steps, losses, "o-", color="tab:orange", markersize=3, label="validation")
        axis.axhline(trivial, color="gray", linestyle="--", label=f"trivial answer, {trivial:.3g}")
        axis.set(xlabel="step", ylabel="loss", title=f"{args.task}, T = {args.length}")
        axis.grid(alpha=0.3)
        axis.legend()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = training.parser(
        __doc__, out="out/long", contents="checkpoints, log, weights, picture",
        seed="of weights and sequences",
    )  # fmt: skip
    add = parser.add_argument
    add("--task", choices=TASKS, default="adding", help="what to learn")
    add("--length", type=int, default=200, help="T")
    add("--hidden", type=int, default=64, help="hidden size; 128 for copy")
    add("--grow", action=argparse.BooleanOptionalAction, default=False,
        help="short sequences first; yes for copy")  # fmt: skip
    add("--chrono", action=argparse.BooleanOptionalAction, default=True,
        help="z as in Tallec and Ollivier 2018, else as in PyTorch")  # fmt: skip
    add("--recompute", choices=["sqrt"], help="less memory, more time, the same numbers")
    add("--steps", type=int, default=1500, help="updates; 10000 for copy")
    add("--batch", type=int, default=8, help="sequences side by side")
    add("--rate", type=float, default=1e-2, help="highest learning rate of Adam")
    add("--validate-every", type=int, default=100, help="steps; 500 for copy")
    if parser.parse_known_args(arguments)[0].task == "copy":
        parser.set_defaults(hidden=128, grow=True, steps=10000, validate_every=500)
    args = parser.parse_args(arguments)
    if args.length < 3 or args.steps < 1:
        parser.error("--length must be 3 at least, and --steps 1")
    return args


if __name__ == "__main__":
    main()
