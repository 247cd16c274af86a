"""Would weights of 8 bits pay? Size, loss and speed, of a model that train_text.py left.

    python scripts/train_text.py && python scripts/benchmarks/int8.py out/text

Each row of each matrix is rounded to 127 steps either way of its own largest number; biases stay.
"""

import argparse
import math
import sys
import timeit
from pathlib import Path
from typing import Any

import numpy as np

from gru_any import softmax_cross_entropy
from gru_any.train.data import streams
from gru_any.train.loop import evaluate

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the scripts of the folder above

from stream_text import load
from train_text import read, split


def rounded(W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """W (rows, columns) -> int8 and a scale for each row."""
    scale = np.maximum(np.abs(W).max(axis=1, keepdims=True), 1e-30) / 127
    return np.rint(W / scale).astype(np.int8), scale.astype(np.float32)


def bits(model: Any, data: np.ndarray) -> float:
    """Per character, on the test part."""
    return evaluate(model, softmax_cross_entropy, [streams(data, 1)], chunk=2000) / math.log(2)


def speed(H: int, rng: np.random.Generator) -> str:
    """Times of h U^T: in float32, in int8 as NumPy has it, in int8 made float32 first."""
    U = rng.standard_normal((3 * H, H)).astype("float32")
    h = rng.standard_normal((1, H)).astype("float32")
    Q, scale = rounded(U)
    calls = {
        "float32": lambda: h @ U.T,
        "int8": lambda: (h @ Q.T) * scale.T,
        "int8, made float32 first": lambda: (h @ Q.astype(np.float32).T) * scale.T,
    }
    times = {k: min(timeit.repeat(call, number=20, repeat=30)) / 20 for k, call in calls.items()}
    return ", ".join(f"{k} {1e6 * t:.0f} us" for k, t in times.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="where train_text.py left its weights (its --out)")
    parser.add_argument("--data", nargs="+", default=[], help="the text it was trained on")
    args = parser.parse_args()
    _, model = load(args.folder, "numpy")
    test = split(read(args.data)).test
    before, size, small = bits(model, test), 0, 0
    for array in model.params.values():
        size += array.nbytes
        if array.ndim == 2:
            Q, scale = rounded(array)
            array[...] = Q * scale
            small += Q.nbytes + scale.nbytes
        else:
            small += array.nbytes
    print(f"{Path(args.folder)}: {size / 1e6:.2f} MB in float32, {small / 1e6:.2f} MB in int8")
    print(f"bits per character: {before:.4f} in float32, {bits(model, test):.4f} in int8")
    for H in (64, 256, 512):
        print(f"one product h U^T at H = {H}: {speed(H, np.random.default_rng(0))}")


if __name__ == "__main__":
    main()
