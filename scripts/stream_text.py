"""Type text as a trained model predicts it, one character at a time.

    python scripts/train_text.py           # about a minute; leaves its weights in out/text
    python scripts/stream_text.py out/text --prompt "The "

It needs nothing beyond the library. Each character is one step of a Stream.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import gru_any
from gru_any.stream import Stream


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    characters, model = load(args.folder, args.backend)
    if unknown := sorted(set(args.prompt) - set(characters)):
        sys.exit(f"--prompt holds {unknown}; the model knows {characters!r}")
    print(args.prompt, end="", flush=True)
    start, count = time.perf_counter(), 0
    try:
        for c in typed(model, characters, args):
            print(c, end="", flush=True)
            count += 1
            time.sleep(args.delay)
    except KeyboardInterrupt:
        pass
    seconds = time.perf_counter() - start
    print(f"\n{count} characters in {seconds:.2f} s", file=sys.stderr)


def load(folder: str, backend: str | None) -> tuple[str, Any]:
    """Load the characters and the model that train_text.py left in this folder."""
    try:
        characters = json.loads((Path(folder) / "characters.json").read_text("utf-8"))
        return characters, gru_any.load(Path(folder) / "model.safetensors", backend)
    except (OSError, ValueError) as e:
        sys.exit(f"{folder} holds no model of train_text.py: {e}")


def typed(model: Any, characters: str, args: argparse.Namespace) -> Iterator[str]:
    """Read the prompt; then yield one character after another, each drawn and read in turn."""
    stream, rng = Stream(model), np.random.default_rng(args.seed)

    def read(c: str) -> np.ndarray:
        y = stream.step(model.backend.put(np.array([characters.index(c)])))
        return gru_any.to_numpy(y)[0].astype(np.float64)

    for c in args.prompt:
        logits = read(c)
    for _ in range(args.length):
        yield (c := drawn(characters, logits / args.temperature, rng))
        logits = read(c)


def drawn(characters: str, logits: np.ndarray, rng: np.random.Generator) -> str:
    """Draw a character with the probabilities that the model predicts."""
    p = np.exp(logits - logits.max())
    return characters[rng.choice(len(characters), p=p / p.sum())]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("folder", help="where train_text.py left its weights (its --out)")
    add("--prompt", default="The ", help="what the text begins with")
    add("--length", type=int, default=400, metavar="N", help="characters to type")
    add("--temperature", type=float, default=0.7, help="lower is more careful")
    add("--delay", type=float, default=0.02, help="seconds to wait after each character")
    add("--seed", type=int, default=0, help="of what is drawn")
    add("--backend", help="numpy, cupy, auto, or an array-API library")
    args = parser.parse_args(arguments)
    if args.temperature <= 0 or not args.prompt or args.delay < 0:
        parser.error("--temperature must be above 0, --delay not below, --prompt not empty")
    return args


if __name__ == "__main__":
    main()
