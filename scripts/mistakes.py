"""What a wrong backward step does: the four mistakes of learners' derivations, and two controls.

    python scripts/mistakes.py --picture docs/mistakes.png

Each mistake is one line put in the place of the right one of `gru_any/equations.py`. Printed are
what `gradcheck` says of it, the error of the gradient on `demo_sequence.py` before training and
after it, and the loss that training with the wrong gradient reaches there.
"""

import argparse
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from demo_sequence import HIDDEN, INPUT, ITERATIONS, RATE, TARGETS
from tqdm import tqdm

from gru_any import GRU, SGD, equations, gradcheck
from gru_any.backend import run
from gru_any.checks import GradientError

BLACK, ORANGE = "#000000", "#e69f00"  # told apart by the colour-blind, and in grey


class Mistake(NamedTuple):
    """A wrong backward step: lines (right, wrong). U_r, U_z, U_n are the thirds of U."""

    name: str
    reset_after: bool
    lines: tuple[tuple[str, str], ...]


def mistakes(reset_after: bool, tanh: Any, reset: Any, state: Any, both: str) -> list[Mistake]:
    """The four, all at once, and the controls: no gradient to r, and its sign turned.

    tanh, reset: (right, wrong); state: (right, wrong with 3, wrong with 4); both: with 3 and 4.
    """
    right, transpose, order = state
    gate, formula = reset[0].split(" = ")
    lines = {
        "1 tanh": (tanh,),
        "2 reset gate": (reset,),
        "3 transpose": ((right, transpose),),
        "4 order": ((right, order),),
        "all four": (tanh, reset, (right, both)),
        "da_r = 0": ((reset[0], f"{gate} = 0.0 * r"),),
        "da_r = -da_r": ((reset[0], f"{gate} = -{formula}"),),
    }
    return [Mistake(name, reset_after, changed) for name, changed in lines.items()]


TANH = (
    "da_n = g * (1.0 - z) * (1.0 - n * n)",
    "da_n = g * (1.0 - z) * (1.0 - n) * (1.0 - n)",
)
BEFORE = mistakes(
    False,
    TANH,
    (
        "da_r = ds * h * r * (1.0 - r)",
        "da_r = da_n * (h @ U_n.T + b_n) * r * (1.0 - r)",
    ),
    (
        "return g * z + ds * r + da[..., : 2 * H] @ U[: 2 * H, :], (da,)",
        "return g * z + (da_n @ U_n.T) * r + da_r @ U_r.T + da_z @ U_z.T, (da,)",
        "return g * z + (da_n * r) @ U_n + da_r @ U_r + da_z @ U_z, (da,)",
    ),
    "return g * z + (da_n * r) @ U_n.T + da_r @ U_r.T + da_z @ U_z.T, (da,)",
)
AFTER = mistakes(
    True,
    TANH,
    (
        "da_r = da_n * m * r * (1.0 - r)",
        "da_r = (da_n @ U_n) * h * r * (1.0 - r)",
    ),
    (
        "return g * z + dq @ U, (da, dq)",
        "return g * z + (da_n * r) @ U_n.T + da_r @ U_r.T + da_z @ U_z.T, (da, dq)",
        "return g * z + (da_n @ U_n) * r + da_r @ U_r + da_z @ U_z, (da, dq)",
    ),
    "return g * z + (da_n @ U_n.T) * r + da_r @ U_r.T + da_z @ U_z.T, (da, dq)",
)


@contextmanager
def made(mistake: Mistake | None, gru: GRU) -> Iterator[None]:
    """The equations with the mistake in them, inside of the context."""
    if mistake is None:
        yield
        return
    name = "reset_after_backward" if mistake.reset_after else "reset_before_backward"
    right, way = getattr(equations, name), run.chosen
    text = inspect.getsource(right)
    for line, wrong in mistake.lines:
        assert text.count(line) == 1, f"{name} no longer holds {line}"
        text = text.replace(line, wrong)
    names = dict(vars(equations))
    exec(text, names)

    def backward(xp: Any, g: Any, h: Any, saved: Any, U: Any) -> Any:
        H, b = h.shape[-1], gru.params["bias_ih_l0"]
        names.update(U_r=U[:H, :], U_z=U[H : 2 * H, :], U_n=U[2 * H :, :], b_n=b[2 * H :])
        return names[name](xp, g, h, saved, U)

    setattr(equations, name, backward)
    run.chosen = "plain"  # one call a step, so that the names above are those of the call
    try:
        yield
    finally:
        setattr(equations, name, right)
        run.chosen = way


def demo(reset_after: bool, seed: int) -> tuple[GRU, Any]:
    """The GRU and the input of the demo."""
    gru = GRU(INPUT, HIDDEN, reset_after=reset_after, seed=seed, backend="numpy")
    x = np.random.default_rng(seed).random((len(TARGETS), INPUT))
    return gru, x.astype(np.float32)


def gradient(gru: GRU, x: Any) -> tuple[float, dict[str, Any]]:
    """The demo's loss and its gradient, by the equations as they now are."""
    (y, _), pullback = gru.vjp(x)
    off = y[:, 0] - np.array(TARGETS, dtype=np.float32)
    dy = np.zeros_like(y)
    dy[:, 0] = 2 * off
    return float(np.sum(off**2)), pullback(dy)[0]


def train(mistake: Mistake | None, after: bool, seed: int, iterations: int) -> Any:
    """The losses, before the first iteration to after the last; the GRU."""
    gru, x = demo(after, seed)
    optimiser, losses = SGD(gru.params, lr=RATE), []
    with made(mistake, gru):
        for _ in range(iterations + 1):
            loss, grads = gradient(gru, x)
            losses.append(loss)
            optimiser.step(gru.params, grads)
    return losses, gru


def parts(gru: GRU, x: Any) -> list[Any]:
    """The gradient of all parameters side by side (3H, .), and its thirds r, z, n."""
    arrays = gradient(gru, x)[1].values()
    G = np.concatenate([v.reshape(len(v), -1) for v in arrays], axis=1)
    return [G, *np.split(G, 3)]


def errors(mistake: Mistake, gru: GRU, x: Any) -> tuple[list[float], list[float]]:
    """Of the whole, r, z, n: |wrong - right| / |right|, and the cosine between the two."""
    right = parts(gru, x)
    with made(mistake, gru):
        wrong = parts(gru, x)
    norm, pairs = np.linalg.norm, list(zip(wrong, right, strict=True))
    relative = [float(norm(w - v) / norm(v)) for w, v in pairs]
    return relative, [float(np.sum(w * v) / ((norm(w) * norm(v)) or 1.0)) for w, v in pairs]


def verdict(mistake: Mistake) -> str:
    """By how much `gradcheck` finds the gradient off; it allows 1e-7."""
    gru = GRU(3, 4, reset_after=mistake.reset_after, seed=0, backend="numpy")
    x = np.random.default_rng(0).standard_normal((6, 2, 3))
    try:
        with made(mistake, gru):
            gradcheck(gru, x, np.ones((1, 2, 4)))
    except GradientError as e:
        return str(e).partition("off by ")[2].partition(",")[0]
    return "passes"


def row(mistake: Mistake, trained: GRU, losses: list[Any]) -> str:
    """One line of the table."""
    x = demo(mistake.reset_after, 0)[1]
    first, cosines = errors(mistake, *demo(mistake.reset_after, 0))
    last, _ = errors(mistake, trained, x)
    cells = [
        mistake.name,
        verdict(mistake),
        *(f"{v:.3f}" for v in first),
        *(f"{v:.2f}" for v in cosines[:2]),
    ]
    return " | ".join([*cells, f"{last[0]:.3f}", *(f"{of_seed[-1]:.2e}" for of_seed in losses)])


def table(after: bool, seeds: int, iterations: int) -> dict[str, Any]:
    """Print what became of one variant; return the losses by name, "right" for the right ones."""
    found = {}
    right = [train(None, after, seed, iterations) for seed in range(seeds)]
    print(f"\n### reset {'after' if after else 'before'}\n")
    print("| mistake | gradcheck | all | r | z | n | cos | cos r | all, trained |", end="")
    print("".join(f" seed {seed} |" for seed in range(seeds)))
    print("|---" * (9 + seeds) + "|")
    found["right"] = [losses for losses, _ in right]
    print("| none | passes |" + " 0 |" * 4 + " 1 | 1 | 0 |", end="")
    print("".join(f" {losses[-1]:.2e} |" for losses in found["right"]))
    for mistake in tqdm(AFTER if after else BEFORE, leave=False):
        wrong = [train(mistake, after, seed, iterations)[0] for seed in range(seeds)]
        tqdm.write(f"| {row(mistake, right[0][1], wrong)} |")
        found[mistake.name] = wrong
    whole, r = parts(*demo(after, 0))[:2]
    share = np.linalg.norm(r) / np.linalg.norm(whole)
    print(f"\nThe rows of r hold {share:.3f} of the gradient's norm.")
    return found


def draw(path: str, found: list[dict[str, Any]]) -> None:
    """The loss by iteration, wrong equations over right ones, two rows of panels a variant."""
    import matplotlib.pyplot as plt

    names = [name for name in found[0] if name not in ("right", "da_r = 0")]
    figure, axes = plt.subplots(4, 3, figsize=(9, 10), sharex=True, sharey=True)
    for k, losses in enumerate(found):
        for axis, name in zip(axes[2 * k : 2 * k + 2].flat, names, strict=True):
            axis.semilogy(np.transpose(losses["right"]), color=BLACK, lw=2.4)
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
    parser.add_argument("--picture", help="where to draw the losses")
    args = parser.parse_args(arguments)
    found = [table(after, args.seeds, args.iterations) for after in (False, True)]
    if args.picture:
        draw(args.picture, found)


if __name__ == "__main__":
    main()
