"""Classify sequences of unequal length by a GRU that reads them both ways: who spoke the vowel?

    python scripts/train_series.py --data JapaneseVowels_TRAIN.ts JapaneseVowels_TEST.ts

The scores of a sequence are the mean over its steps. The script trains for all `--epochs` on the
whole training part, and reads the test part once, at the end. To compare settings, use
`--hold-out 0.2`, which holds out a fifth of the training part and takes it as the test part. If the
script is started again with the same folder, the run resumes where it stopped. `--synthetic` makes
up a small set.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import training
from array_api_compat import array_namespace

import gru_any
from gru_any import GRU, AdamW, Chain, Dropout, Linear
from gru_any.train.data import Batch, buckets, side_by_side, waste
from gru_any.train.schedules import cosine, warm_up

WHERE = (
    "--data is missing: the PyPI package aeon holds in aeon/datasets/data JapaneseVowels_TRAIN.ts "
    "(SHA-256 68a430ea...) and _TEST.ts (b3d41d6a...), BasicMotions_TRAIN.ts (8dc43cc6...) and "
    "_TEST.ts (79213102...); give --data TRAIN.ts TEST.ts, or --synthetic for a made-up set"
)


class Part(NamedTuple):
    """Sequences (T, I) of several lengths, and the class of each as an index."""

    sequences: list[np.ndarray]
    labels: np.ndarray

    def take(self, which: np.ndarray) -> "Part":
        """Return the sequences with these indices."""
        return Part([self.sequences[i] for i in which], self.labels[which])


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with training.ranks(args):
        run(args)


def run(args: argparse.Namespace) -> None:
    names, train, test = data(args)
    made = recipe(args, names, train)
    model = made["model"]
    print(model)
    lengths = [len(s) for s in train.sequences]
    padding = waste(lengths, buckets(lengths, args.batch))
    print(
        f"{len(lengths)} sequences of {min(lengths)} to {max(lengths)} steps; padding {padding:.1%}"
    )
    settings = {"data": digest(train), "batch": args.batch, "rate": args.rate, "noise": args.noise}
    history = training.train(args, made, settings, epochs=args.epochs, steps=args.steps)
    if not args.first:
        return
    out = Path(args.out)
    history.draw(out / "history.png")
    found = scores(model, test).argmax(axis=1)
    table = np.zeros((len(names), len(names)), int)
    np.add.at(table, (test.labels, found), 1)
    draw(table, names, out / "confusion.png")
    name, accuracy = "held out" if args.hold_out else "test", float((found == test.labels).mean())
    figures = {"part": name, "accuracy": accuracy, "confusion": table.tolist()}
    training.write_result(args, history, figures)
    print(
        f"{history.reason} after {training.seconds(history):.0f} s; {name} accuracy "
        f"{accuracy:.4f}, {int((found != test.labels).sum())} wrong"
    )


# the data ----------------------------------------------------------------------------------------


def data(args: argparse.Namespace) -> tuple[list[str], Part, Part]:
    """Return the classes' names, the training part and the test part, both standardised."""
    if args.synthetic:
        names, train, test = synthetic()
    elif args.data is None:
        sys.exit(WHERE)
    else:
        (names, train), (others, test) = (read(file) for file in args.data)
        if others != names or test.sequences[0].shape[1] != train.sequences[0].shape[1]:
            sys.exit(f"--data: {args.data[1]} has other classes or channels than {args.data[0]}")
    if args.hold_out:
        order = np.random.default_rng(0).permutation(len(train.labels))  # the same for every seed
        kept = max(1, round(args.hold_out * len(order)))
        train, test = train.take(order[kept:]), train.take(order[:kept])
    frames = np.concatenate(train.sequences)
    mean, deviation = frames.mean(axis=0), frames.std(axis=0) + 1e-8

    def standardised(part: Part) -> Part:
        return part._replace(
            sequences=[((s - mean) / deviation).astype("float32") for s in part.sequences]
        )

    return names, standardised(train), standardised(test)


def read(file: str) -> tuple[list[str], Part]:
    """Read a .ts file: a header with the classes, then a line for each sequence."""
    text = training.read_utf8(file)
    try:
        return parse_ts(text)
    except ValueError as e:
        sys.exit(f"--data {file} cannot be read: {e}")


def parse_ts(text: str) -> tuple[list[str], Part]:
    """Parse the text of a .ts file.

    In a line, colons separate the channels and commas their values; the class comes last.
    """
    head, found, body = text.partition("@data")
    names = next((w[2:] for w in map(str.split, head.splitlines()) if w[:1] == ["@classLabel"]), [])
    if not found or not names:
        raise ValueError("it has no @classLabel and @data, so it is no .ts file of classes")
    sequences, labels = [], []
    for number, line in enumerate(body.split("\n")[1:], head.count("\n") + 2):
        if not line.strip():
            continue
        *channels, label = line.strip().split(":")
        rows = [np.array(c.split(","), "float64") for c in channels]  # "?" is a ValueError
        if len({len(row) for row in rows}) != 1 or not np.isfinite(rows).all():
            raise ValueError(f"line {number} has channels of several lengths, or not finite")
        if label not in names or (sequences and sequences[0].shape[1] != len(rows)):
            raise ValueError(f"line {number} has class {label!r} and {len(rows)} channels")
        sequences.append(np.stack(rows, axis=1))
        labels.append(names.index(label))
    if not sequences:
        raise ValueError("it holds no sequence")
    return names, Part(sequences, np.array(labels))


def synthetic(seed: int = 0) -> tuple[list[str], Part, Part]:
    """Make up noisy waves of three frequencies: two parts of 60 sequences of 10 to 40 steps."""
    rng = np.random.default_rng(seed)

    def part() -> Part:
        labels, sequences = rng.integers(0, 3, 60), []
        for label in labels:
            t = np.arange(rng.integers(10, 41))[:, None] + rng.uniform(0, 6, 2)
            sequences.append(np.sin(t * (0.4, 0.8, 1.6)[label]) + rng.normal(0, 0.3, t.shape))
        return Part(sequences, labels)

    return ["slow", "middling", "fast"], part(), part()


def digest(part: Part) -> str:
    return training.digest(part.labels, *part.sequences)


def batches(part: Part, args: argparse.Namespace, epoch: int) -> Iterator[Batch]:
    """Yield groups of similar length, other ones each epoch, with noise on the input."""
    rng = np.random.default_rng([args.seed, epoch])
    order = rng.permutation(len(part.labels))
    lengths = np.array([len(part.sequences[i]) for i in order])
    groups = buckets(lengths + rng.integers(0, 3, len(lengths)), args.batch)
    for g in rng.permutation(len(groups)):
        made = batch(part.take(order[groups[g]]))
        noise = args.noise * rng.standard_normal(made.x.shape)
        yield made._replace(x=(made.x + noise).astype("float32"))


def batch(part: Part) -> Batch:
    """Return a batch of inputs (T, B, I), with the class of the sequence at each step."""
    x, mask = side_by_side(part.sequences)
    return Batch(x, np.broadcast_to(part.labels, mask.shape), mask, mask.sum(axis=0))


# the model ---------------------------------------------------------------------------------------


def recipe(args: argparse.Namespace, names: list[str], train: Part) -> dict[str, Any]:
    """Return the arguments of `fit`."""
    home, seeds = training.home(args), training.seeds(args, 2)
    I, H = train.sequences[0].shape[1], args.hidden
    model = Chain(
        GRU(I, H, args.layers, dropout=args.dropout if args.layers > 1 else 0.0,
            bidirectional=True, seed=seeds[0], **home),
        Dropout(args.dropout, **home),
        Linear(2 * H, len(names), seed=seeds[1], **home),
    )  # fmt: skip
    updates = args.steps or args.epochs * -(-len(train.labels) // args.batch)
    return {
        "model": model,
        "loss": mean_score,
        "reduction": "sequences",
        "batches": lambda epoch: batches(train, args, epoch),
        "optimiser": AdamW(model.params, lr=args.rate, weight_decay=args.decay),
        "clip": args.clip,
        "schedule": warm_up(20, cosine(args.rate, updates)),
    }


def mean_score(y: Any, target: Any, mask: Any) -> tuple[Any, Any]:
    """Return the cross-entropy of the scores, averaged over the steps that count, and dL/dy."""
    xp = array_namespace(y)
    share = xp.astype(mask, y.dtype)
    share = (share / xp.sum(share, axis=0))[..., None]  # (T, B, 1)
    value, d = gru_any.softmax_cross_entropy(xp.sum(y * share, axis=0), target[0, ...])
    return value, share * d


def scores(model: Chain, part: Part) -> np.ndarray:
    """Return the mean score of each class for each sequence: (N, C)."""
    found = np.empty((len(part.labels), model.layers[-1].out_features))
    for group in buckets([len(s) for s in part.sequences], 64):
        x, _, mask, lengths, *_ = batch(part.take(np.array(group)))
        y = gru_any.to_numpy(model(model.backend.put(x), None, lengths)[0])
        found[group] = (y * mask[..., None]).sum(axis=0) / lengths[:, None]
    return found


def draw(table: np.ndarray, names: list[str], path: Path) -> None:
    """Draw the confusion matrix as a PNG."""
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    with training.picture(path, (5, 4.5)) as axis:
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (i, j), count in np.ndenumerate(table):
            if count:
                color = "white" if i == j else "tab:red"
                axis.text(j, i, str(count), ha="center", va="center", color=color)
        axis.set(xticks=range(len(names)), yticks=range(len(names)), xlabel="found", ylabel="true")
        axis.set_xticklabels(names, rotation=30 if max(map(len, names)) > 3 else 0)
        axis.set_yticklabels(names)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = training.parser(
        __doc__, out="out/series", contents="checkpoints, log, weights, pictures",
        seed="of weights, order, noise and dropout",
    )  # fmt: skip
    add = parser.add_argument
    add("--data", nargs=2, metavar=("TRAIN", "TEST"), help=".ts files of the archive")
    add("--synthetic", action="store_true", help="a made-up set")
    add("--hold-out", type=float, default=0.0, help="judge by this part of the training part")
    add("--hidden", type=int, default=64, help="hidden size of each direction")
    add("--layers", type=int, default=1, help="layers of the GRU")
    add("--dropout", type=float, default=0.5, help="between layers and before the output")
    add("--noise", type=float, default=0.2, help="deviation of noise on the standardised input")
    add("--epochs", type=int, default=60, help="readings of the training part")
    add("--steps", type=int, help="stop after so many updates")
    add("--batch", type=int, default=16, help="sequences side by side")
    add("--rate", type=float, default=4e-3, help="highest learning rate of AdamW")
    add("--decay", type=float, default=0.01, help="weight decay of AdamW")
    args = parser.parse_args(arguments)
    if not 0 <= args.hold_out < 1 or args.batch < 1:
        parser.error("--hold-out must be from 0 up to below 1, and --batch above 0")
    return args


if __name__ == "__main__":
    main()
