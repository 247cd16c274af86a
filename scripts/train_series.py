"""Classify sequences of unequal length by a GRU that reads them both ways: who spoke the vowel?

    python scripts/train_series.py --data JapaneseVowels_TRAIN.ts JapaneseVowels_TEST.ts

The scores of a sequence are the mean over its steps. There are as many epochs as were asked for,
all on the whole training part, and the test part is read once, at the end. Settings are judged by
`--hold-out 0.2`, which keeps a fifth of the training part back in place of the test part. Started
again on the same folder, a run goes on where it stopped. `--synthetic` makes up a small set.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

import gru_any
from gru_any import GRU, AdamW, Chain, Dropout, Linear
from gru_any.train.data import Batch, buckets, side_by_side, waste
from gru_any.train.loop import fit
from gru_any.train.schedules import cosine, warm_up

WHERE = (
    "--data is missing: the PyPI package aeon holds in aeon/datasets/data JapaneseVowels_TRAIN.ts "
    "(SHA-256 68a430ea...) and _TEST.ts (b3d41d6a...), BasicMotions_TRAIN.ts (8dc43cc6...) and "
    "_TEST.ts (79213102...); give --data TRAIN.ts TEST.ts, or --synthetic for a made-up set"
)


class Part(NamedTuple):
    """Sequences (T, I) of several lengths, and the number of each one's class."""

    sequences: list[np.ndarray]
    labels: np.ndarray

    def take(self, which: np.ndarray) -> "Part":
        """Those of these numbers."""
        return Part([self.sequences[i] for i in which], self.labels[which])


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
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
    history = fit(
        **made, epochs=args.epochs, steps=args.steps, seed=args.seed, out=args.out,
        settings=settings, bar=not args.quiet,
    )  # fmt: skip
    out = Path(args.out)
    gru_any.save(out / "model.safetensors", model)
    history.draw(out / "history.png")
    found = scores(model, test).argmax(axis=1)
    table = np.zeros((len(names), len(names)), int)
    np.add.at(table, (test.labels, found), 1)
    draw(table, names, out / "confusion.png")
    name, accuracy = "held out" if args.hold_out else "test", float((found == test.labels).mean())
    seconds = history.records[-1]["seconds"] if history.records else 0.0
    result = {"part": name, "accuracy": accuracy, "confusion": table.tolist(), "seconds": seconds}
    (out / "result.json").write_text(json.dumps({**result, "cpu_seconds": time.process_time()}))
    wrong = int((found != test.labels).sum())
    print(f"{history.reason} after {seconds:.0f} s; {name} accuracy {accuracy:.4f}, {wrong} wrong")


# the data ----------------------------------------------------------------------------------------


def data(args: argparse.Namespace) -> tuple[list[str], Part, Part]:
    """The names of the classes, what to learn from, and what to judge by, both standardised."""
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
    """A .ts file: a header with the classes, then a line for each sequence."""
    try:
        return parse_ts(Path(file).read_text("utf-8"))
    except UnicodeDecodeError as e:
        sys.exit(f"--data {file} is not UTF-8: {e}")
    except OSError as e:
        sys.exit(f"--data {file} cannot be read: {e.strerror}")
    except ValueError as e:
        sys.exit(f"--data {file} cannot be read: {e}")


def parse_ts(text: str) -> tuple[list[str], Part]:
    """Channels stand between colons, their values between commas, the class at the end."""
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
    """Noisy waves of three frequencies: two parts of 60 sequences of 10 to 40 steps."""
    rng = np.random.default_rng(seed)

    def part() -> Part:
        labels, sequences = rng.integers(0, 3, 60), []
        for label in labels:
            t = np.arange(rng.integers(10, 41))[:, None] + rng.uniform(0, 6, 2)
            sequences.append(np.sin(t * (0.4, 0.8, 1.6)[label]) + rng.normal(0, 0.3, t.shape))
        return Part(sequences, labels)

    return ["slow", "middling", "fast"], part(), part()


def digest(part: Part) -> str:
    found = hashlib.sha256(part.labels.tobytes())
    for sequence in part.sequences:
        found.update(sequence.tobytes())
    return found.hexdigest()


def batches(part: Part, args: argparse.Namespace, epoch: int) -> Iterator[Batch]:
    """Groups of like length, other ones each epoch; noise on the input."""
    rng = np.random.default_rng([args.seed, epoch])
    order = rng.permutation(len(part.labels))
    lengths = np.array([len(part.sequences[i]) for i in order])
    groups = buckets(lengths + rng.integers(0, 3, len(lengths)), args.batch)
    for g in rng.permutation(len(groups)):
        made = batch(part.take(order[groups[g]]))
        noise = args.noise * rng.standard_normal(made.x.shape)
        yield made._replace(x=(made.x + noise).astype("float32"))


def batch(part: Part) -> Batch:
    """Inputs (T, B, I), and at each step the class of the sequence."""
    x, mask = side_by_side(part.sequences)
    return Batch(x, np.broadcast_to(part.labels, mask.shape), mask, mask.sum(axis=0))


# the model ---------------------------------------------------------------------------------------


def recipe(args: argparse.Namespace, names: list[str], train: Part) -> dict[str, Any]:
    """What `fit` needs."""
    home = {"backend": args.backend, "device": args.device}
    seeds = [int(s) for s in np.random.SeedSequence(args.seed).generate_state(2)]
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
        "batches": lambda epoch: batches(train, args, epoch),
        "optimiser": AdamW(model.params, lr=args.rate, weight_decay=args.decay),
        "clip": args.clip,
        "schedule": warm_up(20, cosine(args.rate, updates)),
    }


def mean_score(y: Any, target: Any, mask: Any) -> tuple[Any, Any]:
    """Cross-entropy of the mean over the steps that count."""
    xp = array_namespace(y)
    share = xp.astype(mask, y.dtype)
    share = (share / xp.sum(share, axis=0))[..., None]  # (T, B, 1)
    value, d = gru_any.softmax_cross_entropy(xp.sum(y * share, axis=0), target[0, ...])
    return value, share * d


def scores(model: Chain, part: Part) -> np.ndarray:
    """The mean score of each class, for each sequence: (N, C)."""
    found = np.empty((len(part.labels), model.layers[-1].out_features))
    for group in buckets([len(s) for s in part.sequences], 64):
        x, _, mask, lengths, _ = batch(part.take(np.array(group)))
        y = gru_any.to_numpy(model(model.backend.put(x), None, lengths)[0])
        found[group] = (y * mask[..., None]).sum(axis=0) / lengths[:, None]
    return found


def draw(table: np.ndarray, names: list[str], path: Path) -> None:
    """The confusion matrix as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5, 4.5), layout="constrained")
    axis.imshow(
        table / np.maximum(table.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1
    )
    for (i, j), count in np.ndenumerate(table):
        if count:
            color = "white" if i == j else "tab:red"
            axis.text(j, i, str(count), ha="center", va="center", color=color)
    axis.set(xticks=range(len(names)), yticks=range(len(names)), xlabel="found", ylabel="true")
    axis.set_xticklabels(names, rotation=30 if max(map(len, names)) > 3 else 0)
    axis.set_yticklabels(names)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", nargs=2, metavar=("TRAIN", "TEST"), help=".ts files of the archive")
    add("--synthetic", action="store_true", help="a made-up set")
    add("--hold-out", type=float, default=0.0, help="judge by this part of the training part")
    add("--out", metavar="DIR", default="out/series", help="checkpoints, log, weights, pictures")
    add("--backend", default="auto", help="numpy, cupy, auto, or an array-API library")
    add("--device", help="such as cuda:1")
    add("--hidden", type=int, default=64, help="hidden size of each direction")
    add("--layers", type=int, default=1, help="layers of the GRU")
    add("--dropout", type=float, default=0.5, help="between layers and before the output")
    add("--noise", type=float, default=0.2, help="deviation of noise on the standardised input")
    add("--epochs", type=int, default=60, help="readings of the training part")
    add("--steps", type=int, help="stop after so many updates")
    add("--batch", type=int, default=16, help="sequences side by side")
    add("--rate", type=float, default=4e-3, help="highest learning rate of AdamW")
    add("--decay", type=float, default=0.01, help="weight decay of AdamW")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--seed", type=int, default=0, help="of weights, order, noise and dropout")
    add("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(arguments)
    if not 0 <= args.hold_out < 1 or args.batch < 1:
        parser.error("--hold-out must be from 0 up to below 1, and --batch above 0")
    return args


if __name__ == "__main__":
    main()
