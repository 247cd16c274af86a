"""Train a GRU to write text, one character at a time.

With no argument it learns the help topics that ship with CPython, shows the loss falling, writes a
sample, and saves the weights:

    python scripts/train_text.py

Your own text: `--data FILE...`. A sample from saved weights: `--load DIR --prompt "The "`. A run
that was stopped goes on when the same command is given again.
"""

import argparse
import json
import math
import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import training

import gru_any
from gru_any import GRU, Adam, Chain, Dropout, Embedding, Linear
from gru_any.backend import BackendError
from gru_any.train import evaluate, spread
from gru_any.train.data import streams
from gru_any.train.schedules import cosine, warm_up


class Text(NamedTuple):
    """A text as indices into its characters, in three consecutive parts."""

    characters: str
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    try:
        with training.ranks(args):
            run(args)
    except (BackendError, FloatingPointError, OSError, ValueError) as e:
        sys.exit(f"{type(e).__name__}: {e}")
    except KeyboardInterrupt:  # before or after the training, during which fit handles it
        sys.exit("stopped")


def run(args: argparse.Namespace) -> None:
    if args.load:
        characters, model = load(args.load, args)
        prompt = prompted(args.prompt, characters)
    else:
        text = split(read(args.data))
        characters, prompt = text.characters, prompted(args.prompt, text.characters)
        model = train(text, args)
    if args.prompts:
        for text in continued(model, characters, args):
            print(text)
    elif args.sample and args.first:
        rng = np.random.default_rng(args.seed)
        print(write(model, characters, prompt, args.sample, args.temperature, rng))


# the text ----------------------------------------------------------------------------------------


def read(files: list[str]) -> str:
    """Return the text of the files, or CPython's own help topics, and print which it is."""
    if files:
        text = "".join(training.read_utf8(file) for file in files)
    else:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            sys.exit("this Python has no pydoc_data.topics; name a text of yours: --data FILE")
        text = "".join(topics[name] for name in sorted(topics))
    source = ", ".join(files) or f"pydoc_data.topics of CPython {platform.python_version()}"
    digest = training.digest(np.frombuffer(text.encode(), np.uint8))
    print(f"text: {source}; {len(text):,} characters, SHA-256 {digest}")
    return text


def split(text: str) -> Text:
    """Split a text: the first 90 % for training, then 5 % for validation and 5 % for the test."""
    if len(text) < 1000:
        sys.exit(f"the text has {len(text)} characters; 1000 are the least to learn anything from")
    characters = "".join(sorted(set(text)))
    number = {c: i for i, c in enumerate(characters)}
    data = np.array([number[c] for c in text])
    a, b = len(data) * 90 // 100, len(data) * 95 // 100
    return Text(characters, data[:a], data[a:b], data[b:])


# the model ---------------------------------------------------------------------------------------


def build(characters: str, args: argparse.Namespace) -> Chain:
    """Return an Embedding, a GRU, and a Linear layer with one output for each character."""
    home, seeds = training.home(args), training.seeds(args, 3)
    drop = args.dropout if args.layers > 1 else 0.0
    return Chain(
        Embedding(len(characters), args.embedding, seed=seeds[0], **home),
        GRU(args.embedding, args.hidden, args.layers, dropout=drop, seed=seeds[1], **home),
        Dropout(args.dropout, **home),
        Linear(args.hidden, len(characters), seed=seeds[2], **home),
    )


def recipe(args: argparse.Namespace, text: Text) -> dict[str, Any]:
    """Return the arguments of `fit`: parallel streams, cut in time, with the state carried over."""
    model = build(text.characters, args)
    try:
        data = streams(text.train, args.batch)
    except ValueError as e:
        sys.exit(f"--batch {args.batch}: {e}")
    if len(data.x) < args.chunk:
        sys.exit(
            f"--chunk {args.chunk}: the training part has {len(text.train)} characters, expected "
            f"{args.batch * args.chunk + 1} at least, for --batch {args.batch} streams"
        )
    return {
        "model": model,
        "loss": gru_any.softmax_cross_entropy,
        "batches": lambda epoch: [data],
        "optimiser": Adam(model.params, lr=args.rate),
        "tbptt": (args.chunk, args.chunk),
        "clip": args.clip,
        "schedule": warm_up(args.steps // 50, cosine(args.rate, args.steps)),
    }


def train(text: Text, args: argparse.Namespace) -> Chain:
    """Train a model, save it, and print how good it is."""
    made = recipe(args, text)
    model = made["model"]
    print(model)
    settings = {"data": training.digest(text.train), "batch": args.batch, "rate": args.rate}
    history = training.train(
        args, made, settings, lambda record: shown(record, args.chunk * args.batch),
        steps=args.steps, minutes=args.minutes,
    )  # fmt: skip
    if not args.first:
        return model
    if history.reason == "interrupted":
        print(
            "\nstopped; the weights so far are kept, and the same command goes on",
            file=sys.stderr,
        )
    (Path(args.out) / "characters.json").write_text(json.dumps(text.characters), "utf-8")
    history.draw(Path(args.out) / "history.png")
    print(f"trained for {training.seconds(history):.0f} s; weights, log and picture in {args.out}")
    for name, part in (("validation", text.valid), ("test", text.test)):
        print(f"{name}: {bits_per_character(model, part):.3f} bits per character")
    return model


def shown(record: dict[str, Any], per_step: int) -> dict[str, str]:
    """Return what the progress bar shows: loss, bits per character, characters per second."""
    rate = record["step"] * per_step / record["seconds"]
    bits = record["loss"] / math.log(2)
    return {"loss": f"{record['loss']:.3f}", "bits/char": f"{bits:.3f}", "char/s": f"{rate:,.0f}"}


def bits_per_character(model: Chain, data: np.ndarray) -> float:
    """Return the mean of -log2 p over the part, read once from its start as one sequence."""
    part = [streams(data, 1)]
    return evaluate(model, gru_any.softmax_cross_entropy, part, chunk=2000) / math.log(2)


def prompted(prompt: str | None, characters: str) -> str:
    """Return the prompt, or "The "; end the script if the model does not know a character."""
    if prompt is None:
        return "".join(c for c in "The " if c in characters) or characters[0]
    unknown = sorted(set(prompt) - set(characters))
    if unknown or not prompt:
        what = f"holds {unknown}" if unknown else "is empty"
        sys.exit(f"--prompt {what}; the model knows {characters!r}")
    return prompt


def write(
    model: Chain, characters: str, prompt: str, length: int, temperature: float, rng: Any
) -> str:
    """Continue the prompt by characters drawn from the model's predictions."""
    out, state, fresh = list(prompt), None, [characters.index(c) for c in prompt]
    for _ in range(length):
        y, state = model(model.backend.put(np.array(fresh)[:, None]), state)
        logits = gru_any.to_numpy(y)[-1, 0].astype(np.float64) / temperature
        p = np.exp(logits - logits.max())
        fresh = [int(rng.choice(len(characters), p=p / p.sum()))]
        out.append(characters[fresh[0]])
    return "".join(out)


def continued(model: Chain, characters: str, args: argparse.Namespace) -> list[str]:
    """Return the prompts of a file, a line each, continued; the ranks share them."""
    prompts = [prompted(line, characters) for line in training.read_utf8(args.prompts).splitlines()]

    def one(i: int) -> str:
        rng = np.random.default_rng([args.seed, i])
        return write(model, characters, prompts[i], args.sample, args.temperature, rng)

    return spread(one, range(len(prompts)), args.comm)


# saved weights, and the command line -------------------------------------------------------------


def load(folder: str, args: argparse.Namespace) -> tuple[str, Chain]:
    try:
        characters = json.loads((Path(folder) / "characters.json").read_text("utf-8"))
        return characters, gru_any.load(
            Path(folder) / "model.safetensors", args.backend, args.device
        )
    except (OSError, ValueError) as e:
        sys.exit(f"--load {folder}: {e}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = training.parser(
        __doc__, out="out/text", contents="checkpoints, log, weights and picture",
        seed="of weights, dropout and sample",
    )  # fmt: skip
    add, positive = parser.add_argument, training.positive
    add("--data", nargs="+", default=[], metavar="FILE", help="UTF-8 text in place of CPython's")
    add("--load", metavar="DIR", help="do not train: take the weights of an earlier --out")
    add("--hidden", type=positive, default=256, help="hidden size")
    add("--layers", type=positive, default=1, help="layers of the GRU")
    add("--embedding", type=positive, default=64, help="numbers for each character")
    add("--dropout", type=float, default=0.0, help="between layers and before the output")
    add("--steps", type=positive, default=2000, help="steps of the optimiser")
    add("--minutes", type=float, help="stop after so many minutes")
    add("--batch", type=positive, default=32, help="streams read side by side")
    add("--chunk", type=positive, default=64, help="characters between two updates")
    add("--rate", type=float, default=4e-3, help="highest learning rate of Adam")
    add("--sample", type=int, default=400, metavar="N", help="characters to write at the end")
    add("--prompt", help='what the sample begins with; else "The "')
    add("--prompts", metavar="FILE", help="continue each line of this file; the ranks share them")
    add("--temperature", type=float, default=0.7, help="lower is more careful")
    args = parser.parse_args(arguments)
    if not args.temperature > 0 or not 0 <= args.dropout < 1 or min(args.seed, args.sample) < 0:
        parser.error(
            "--temperature must be above 0, --dropout from 0 up to below 1, --seed and --sample "
            "at least 0"
        )
    return args


if __name__ == "__main__":
    main()
