"""Measure what wrong backward steps do: four mistakes of learners' derivations, and two controls.

    python scripts/maintenance/mistakes.py --picture docs/mistakes.png

The wrong steps are those of `wrong_steps.py`. For each it prints the verdict of `gradcheck`, the
error of the gradient on `demo_sequence.py` before and after training, the loss that training with
it reaches there, and the loss of a small character model trained with it.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from wrong_steps import AFTER, BEFORE, Mistake, made

from gru_any import GRU, SGD, Adam, Chain, Embedding, Linear, gradcheck, softmax_cross_entropy
from gru_any.inspect.gradcheck import GradientError
from gru_any.train.data import streams
from gru_any.train.loop import evaluate, fit
from gru_any.train.schedules import cosine

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the scripts of the folder above

import train_text
from demo_sequence import HIDDEN, INPUT, ITERATIONS, RATE, TARGETS

BLACK, ORANGE = "#000000", "#e69f00"  # told apart by the colour-blind, and in grey


def demo(reset_after: bool, seed: int) -> tuple[GRU, Any]:
    """Return the GRU and the input of the demo."""
    gru = GRU(INPUT, HIDDEN, reset_after=reset_after, seed=seed, backend="numpy")
    x = np.random.default_rng(seed).random((len(TARGETS), INPUT))
    return gru, x.astype(np.float32)


def gradient(gru: GRU, x: Any) -> tuple[float, dict[str, Any]]:
    """Return the demo's loss and its gradient with the current equations."""
    (y, _), pullback = gru.vjp(x)
    off = y[:, 0] - np.array(TARGETS, dtype=np.float32)
    dy = np.zeros_like(y)
    dy[:, 0] = 2 * off
    return float(np.sum(off**2)), pullback(dy)[0]


def train(mistake: Mistake | None, after: bool, seed: int, iterations: int) -> Any:
    """Train; return the loss before each iteration and after the last, and the GRU."""
    gru, x = demo(after, seed)
    optimiser, losses = SGD(gru.params, lr=RATE), []
    with made(mistake, gru):
        for _ in range(iterations + 1):
            loss, grads = gradient(gru, x)
            losses.append(loss)
            optimiser.step(gru.params, grads)
    return losses, gru


def bits(mistake: Mistake | None, after: bool, text: train_text.Text, steps: int) -> str:
    """Return the bits per character on the validation text after this many steps of 16 x 32."""
    V, home = len(text.characters), {"backend": "numpy"}
    gru = GRU(32, 64, reset_after=after, seed=1, **home)
    model = Chain(Embedding(V, 32, seed=0, **home), gru, Linear(64, V, seed=2, **home))
    with made(mistake, gru), np.errstate(over="ignore"):
        try:
            fit(
                model,
                softmax_cross_entropy,
                lambda epoch: [streams(text.train, 16)],
                Adam(model.params),
                steps=steps,
                tbptt=(32, 32),
                clip=1.0,
                schedule=cosine(5e-3, steps),
                bar=False,
            )
        except FloatingPointError as e:
            return "overflow, step" + str(e).partition("in step")[2].partition(",")[0]
    loss = evaluate(model, softmax_cross_entropy, [streams(text.valid, 16)], chunk=100)
    return f"{loss / math.log(2):.3f}"


def parts(gru: GRU, x: Any) -> list[Any]:
    """Return the gradients of all parameters side by side (3H, .), and their thirds r, z, n."""
    arrays = gradient(gru, x)[1].values()
    G = np.concatenate([v.reshape(len(v), -1) for v in arrays], axis=1)
    return [G, *np.split(G, 3)]


def errors(mistake: Mistake, gru: GRU, x: Any) -> tuple[list[float], list[float]]:
    """Return |wrong - right| / |right| and the cosine between both, for the whole, r, z and n."""
    right = parts(gru, x)
    with made(mistake, gru):
        wrong = parts(gru, x)
    norm, pairs = np.linalg.norm, list(zip(wrong, right, strict=True))
    relative = [float(norm(w - v) / norm(v)) for w, v in pairs]
    return relative, [float(np.sum(w * v) / ((norm(w) * norm(v)) or 1.0)) for w, v in pairs]


def verdict(mistake: Mistake) -> str:
    """Return the error that `gradcheck` finds; it allows 1e-7."""
    gru = GRU(3, 4, reset_after=mistake.reset_after, seed=0, backend="numpy")
    x = np.random.default_rng(0).standard_normal((6, 2, 3))
    try:
        with made(mistake, gru):
            gradcheck(gru, x, np.ones((1, 2, 4)))
    except GradientError as e:
        return str(e).partition("off by ")[2].partition(",")[0]
    return "passes"


def cells(mistake: Mistake, trained: GRU) -> list[str]:
    """Return the cells of a mistake in the table: all that is measured without training."""
    first, cosines = errors(mistake, *demo(mistake.reset_after, 0))
    last, _ = errors(mistake, trained, demo(mistake.reset_after, 0)[1])
    before = [f"{v:.3f}" for v in first] + [f"{v:.2f}" for v in cosines[:2]]
    return [verdict(mistake), *before, f"{last[0]:.3f}"]


def table(after: bool, text: train_text.Text, args: argparse.Namespace) -> dict[str, Any]:
    """Print the figures of one variant; return the losses by mistake, "none" for no mistake."""
    found = {}
    heads = ["mistake", "gradcheck", "all", "r", "z", "n", "cos", "cos r", "all, trained"]
    heads += [*(f"seed {seed}" for seed in range(args.seeds)), "text"]
    print(f"\n### reset {'after' if after else 'before'}\n")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for mistake in tqdm([None, *(AFTER if after else BEFORE)], leave=False):
        name = mistake.name if mistake else "none"
        runs = [train(mistake, after, seed, args.iterations) for seed in range(args.seeds)]
        found[name] = [losses for losses, _ in runs]
        if mistake is None:
            right, start = runs[0][1], ["passes", *"000011", "0"]
        else:
            start = cells(mistake, right)
        ends = [f"{losses[-1]:.2e}" for losses in found[name]]
        worth = bits(mistake, after, text, args.steps)
        tqdm.write(f"| {' | '.join([name, *start, *ends, worth])} |")
    whole, r = parts(*demo(after, 0))[:2]
    share = np.linalg.norm(r) / np.linalg.norm(whole)
    print(f"\nThe rows of r hold {share:.3f} of the gradient's norm.")
    return found


def draw(path: str, found: list[dict[str, Any]]) -> None:
    """Draw the losses by iteration, wrong over right ones, in two rows of panels a variant."""
    import matplotlib.pyplot as plt

    names = [name for name in found[0] if name not in ("none", "da_r = 0")]
    figure, axes = plt.subplots(4, 3, figsize=(9, 10), sharex=True, sharey=True)
    for k, losses in enumerate(found):
        for axis, name in zip(axes[2 * k : 2 * k + 2].flat, names, strict=True):
            axis.semilogy(np.transpose(losses["none"]), color=BLACK, lw=2.4)
            axis.semilogy(np.transpose(losses[name]), "--", color=ORANGE, lw=1.4)
            axis.set_title(f"reset {('before', 'after')[k]}: {name}", fontsize=10)
            axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("loss")
    for axis in axes[-1]:
        axis.set_xlabel("iteration")
    lines = [axes[0, 0].lines[i] for i in (0, -1)]
    figure.legend(lines, ["right", "wrong"], loc="outside upper center", ncols=2)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--seeds", type=int, default=3, help="how many trainings of each (3)")
    parser.add_argument("--steps", type=int, default=800, help="of the character model (800)")
    parser.add_argument("--picture", help="where to draw the losses")
    args = parser.parse_args(arguments)
    text = train_text.split(train_text.read([]))
    found = [table(after, text, args) for after in (False, True)]
    if args.picture:
        draw(args.picture, found)


if __name__ == "__main__":
    main()
