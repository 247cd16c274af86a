"""Small weights: what they cost in accuracy, and what they save in memory and time.

    python scripts/train_text.py
    python scripts/train_music.py --data nottingham.npz --out out/nottingham
    OMP_NUM_THREADS=1 python scripts/benchmarks/int8.py --text out/text \
        --music nottingham.npz out/nottingham

Each model is frozen with weights of float32, bfloat16 and int8 and read over its whole test part.
Then steps of a stream of one row are timed in turns, beside PyTorch's dynamic int8 GRU: in the time
of the calling thread, to which other programs on the machine add little.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

import gru_any
from gru_any import GRU, softmax_cross_entropy
from gru_any.deploy import freeze
from gru_any.stream import Stream
from gru_any.train.data import streams
from gru_any.train.loop import evaluate

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the scripts of the folder above

WEIGHTS = ("float32", "bfloat16", "int8")


def accuracy(title: str, model: Any, measure: Callable[[Any], float]) -> None:
    """Print the size and the figure of a model for each kind of weights."""
    frozen = {weights: freeze(model, weights) for weights in WEIGHTS}
    found = {weights: measure(m) for weights, m in frozen.items()}
    print(title)
    for weights, figure in found.items():
        change = figure / found["float32"] - 1
        size = frozen[weights].nbytes / 1e6
        print(f"  {weights:8} {size:6.2f} MB in memory  {figure:.5f}  ({change:+.4%})")


def text(folder: str, files: list[str]) -> None:
    """Bits per character of a model of train_text.py."""
    from stream_text import load
    from train_text import read, split

    _, model = load(folder, "numpy")
    test = [streams(split(read(files)).test, 1)]
    accuracy(
        f"{Path(folder).name}, bits per character",
        model,
        lambda m: evaluate(m, softmax_cross_entropy, test, chunk=2000) / math.log(2),
    )


def music(file: str, folder: str) -> None:
    """Nats per frame of a model of train_music.py."""
    from train_music import read, score

    model = gru_any.load(Path(folder) / "model.safetensors", "numpy")
    test = read(file)["test"]
    accuracy(f"{Path(file).name}, nats per frame", model, lambda m: score(m, test))


# speed --------------------------------------------------------------------------------------------


def pytorch(H: int, small: bool) -> Callable[[], Any]:
    """A step of PyTorch's GRU, with weights of int8 or not."""
    import torch

    torch.set_num_threads(1)
    layer: Any = torch.nn.GRU(H, H).eval()
    if small:
        layer = torch.ao.quantization.quantize_dynamic(
            torch.nn.Sequential(layer), {torch.nn.GRU}, dtype=torch.qint8
        )[0]
    x, h = torch.ones(1, 1, H), torch.zeros(1, 1, H)

    def step() -> None:
        with torch.inference_mode():
            layer(x, h)

    return step


def contenders(H: int, reset_after: bool) -> dict[str, Callable[[], Any]]:
    gru, x = GRU(H, H, reset_after=reset_after, seed=0), np.ones((1, H), "float32")
    found: dict[str, Callable[[], Any]] = {}
    for weights in WEIGHTS:
        stream = Stream(freeze(gru, weights))
        found[weights] = lambda stream=stream: stream.step(x)
    try:
        found["PyTorch"], found["PyTorch int8"] = pytorch(H, False), pytorch(H, True)
    except ImportError:
        print("PyTorch is not installed")
    return found


def seconds(call: Callable[[], Any], number: int) -> float:
    """How long a call computes in this thread."""
    start = time.thread_time()
    for _ in range(number):
        call()
    return (time.thread_time() - start) / number


def speed(sizes: Iterable[int], rounds: int) -> None:
    """Print the medians of the times, and of how many times as fast as our float32."""
    for H in sizes:
        for reset_after in (True, False):
            calls = contenders(H, reset_after)
            number = max(3, int(0.03 / min(seconds(calls["float32"], 3) for _ in range(3))))
            times: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(rounds):
                for name, call in calls.items():
                    call()
                    times[name].append(seconds(call, number))
            told = []
            for name, own in times.items():
                ratio = statistics.median(a / b for a, b in zip(times["float32"], own, strict=True))
                told.append(f"{name} {1e6 * statistics.median(own):.0f} us ({ratio:.2f})")
            variant = "after" if reset_after else "before"
            print(f"a step at H = I = {H}, reset {variant}: {', '.join(told)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--text", help="where train_text.py left its weights (its --out)")
    parser.add_argument("--data", nargs="+", default=[], help="the text it was trained on")
    parser.add_argument(
        "--music",
        nargs=2,
        action="append",
        default=[],
        metavar=("FILE", "FOLDER"),
        help="a set, and where train_music.py left its weights",
    )
    parser.add_argument("--sizes", nargs="*", type=int, default=[64, 256, 512, 1024], help="H")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    if args.text:
        text(args.text, args.data)
    for file, folder in args.music:
        music(file, folder)
    speed(args.sizes, args.rounds)


if __name__ == "__main__":
    main()
