"""Pictures of what a trained GRU does: gates, memory, gradients over time, spectra.

    python scripts/train_text.py --hidden 64 --embedding 32 --steps 8000 --out out/small
    python scripts/look_inside.py --load out/small

Without --load, a small model is trained first. Each picture is written as PNG, and its figures are
printed too.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import gru_any
from gru_any import GRU, Chain
from gru_any.inspect.values import activity, fading, half_life, saturation, spectrum
from gru_any.nn import init

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as e:
    sys.exit(f'{e.name} is missing: pip install "gru-any[train]", in a clone ".[train]"')

TEXT = 'The "for" statement is used to iterate over the elements of a sequence (such as a string).'
# Okabe and Ito's colours, which the colour-blind tell apart; dashes for those who print in grey
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]
INITIALISERS = {
    "uniform, 1/sqrt(H) (the default)": None,
    "orthogonal": lambda rng, shape: init.orthogonal(rng, shape, blocks=3),
    "orthogonal, z biased by +2": lambda rng, shape: init.orthogonal(rng, shape, blocks=3),
    "Glorot uniform": lambda rng, shape: init.glorot_uniform(rng, shape, blocks=3),
}


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    characters, model = load(args.load) if args.load else small(args)
    gru = next((layer for layer in model.layers if isinstance(layer, GRU)), None)
    if gru is None or "_reverse" in gru.suffixes:
        sys.exit(f"--load {args.load}: no GRU that reads forward alone is in it")
    unknown = sorted(set(args.text) - set(characters))
    if unknown or len(args.text) < 10:
        sys.exit(f"--text is too short or holds {unknown}; the model knows {characters!r}")
    x = np.array([characters.index(c) for c in args.text])[:, None]
    seen = activity(model, x)[0]
    last = {name: v[-1, :, 0] for name, v in seen.items()}  # (T, H) of the last layer
    inputs = embedded(model, characters, args)
    pictures = {
        "gates": lambda: gates(args.text, last),
        "memory": lambda: memory(args.text, last["z"], half_life(last["z"])),
        "saturation": lambda: saturated(last),
        "spectrum": lambda: spectra(gru, args.seed),
        "fading": lambda: faded(gru, inputs, args.seed),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures.items():
        figure = draw()
        figure.savefig(args.out / f"{name}.png", dpi=100, pil_kwargs={"optimize": True})
        pyplot.close(figure)
    print(f"pictures in {args.out}")


# the model ---------------------------------------------------------------------------------------


def load(folder: str) -> tuple[str, Chain]:
    """Load the model and the characters that train_text.py saved."""
    try:
        characters = json.loads((Path(folder) / "characters.json").read_text("utf-8"))
        model = gru_any.load(Path(folder) / "model.safetensors", "numpy")
    except (OSError, ValueError) as e:
        sys.exit(f"--load {folder}: {e}; python scripts/train_text.py --out {folder} makes one")
    return characters, model


def small(args: argparse.Namespace) -> tuple[str, Chain]:
    """Train a small model on the help topics of CPython."""
    import train_text

    folder = str(args.out / "model")
    sizes = ["--hidden", "32", "--embedding", "16", "--steps", str(args.steps), "--batch", "16"]
    train_text.main([*sizes, "--out", folder, "--sample", "0", "--quiet", "--backend", "numpy"])
    return load(folder)


def embedded(model: Chain, characters: str, args: argparse.Namespace) -> Any:
    """Return the inputs of the GRU: 100 steps of the text from each of 32 places."""
    text = args.text * (1 + 200 // len(args.text))
    starts = np.random.default_rng(args.seed).integers(len(text) - 100, size=32)
    x = np.array([[characters.index(text[s + t]) for s in starts] for t in range(100)])
    for layer in model.layers:
        if isinstance(layer, GRU):
            return x
        x = layer(x)
    return x


# pictures ----------------------------------------------------------------------------------------


def gates(text: str, last: dict[str, np.ndarray]) -> Figure:
    """Draw heat maps of gates, candidate and state; units with a short memory stand on top."""
    order = np.argsort(half_life(last["z"]))
    figure, axes = pyplot.subplots(4, 1, figsize=(11, 12), layout="constrained")
    titles = {
        "r": "reset gate r (0: the candidate does not hear the state)",
        "z": "update gate z (1: the state is kept)",
        "n": "candidate n",
        "h": "state h",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        signed = name in "nh"
        colours = {"cmap": "cividis" if signed else "viridis", "vmin": -1.0 if signed else 0.0}
        image = axis.imshow(
            last[name][:, order].T, aspect="auto", vmax=1.0, interpolation="nearest", **colours
        )
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_ylabel("unit, by memory")
        axis.set_yticks([])
        letters(axis, text, 8)
        figure.colorbar(image, ax=axis, pad=0.01, aspect=15)
    return figure


def letters(axis: Axes, text: str, size: int) -> None:
    """Label the axis with the characters."""
    axis.set_xticks(range(len(text)), map(shown, text), family="monospace", fontsize=size)
    axis.tick_params(axis="x", length=0)


def shown(character: str) -> str:
    """Return a visible sign for a character."""
    return {" ": "␣", "\n": "↵"}.get(character, character).replace("$", r"\$")


def memory(text: str, z: np.ndarray, steps: np.ndarray) -> Figure:
    """Draw in how many steps each unit forgets one half, and the gates of three units."""
    figure, axes = pyplot.subplot_mosaic(
        [["all", "0"], ["all", "1"], ["all", "2"]], figsize=(12, 5), width_ratios=[1, 2.4],
        layout="constrained",
    )  # fmt: skip
    order = np.argsort(steps)
    whole = axes["all"]
    whole.plot(np.arange(len(steps)), steps[order], "o", color=COLOURS[0], markersize=4)
    whole.set(yscale="log", xlabel="unit, by memory", ylabel="half-life in characters")
    whole.axhline(1, color="black", linewidth=0.8, linestyle=":")
    for row, place in enumerate((len(order) // 4, len(order) * 7 // 8, len(order) - 1)):
        axis, unit = axes[str(row)], order[place]
        axis.bar(range(len(text)), z[:, unit], width=0.9, color=COLOURS[0])
        title = f"unit {unit}: half-life {steps[unit]:.1f} characters"
        axis.set_title(title, loc="left", fontsize=10)
        axis.set(ylabel="z", ylim=(0, 1), xlim=(-0.6, len(text) - 0.4))
        letters(axis, text, 7)
    low, middle, high = np.percentile(steps, [5, 50, 95])
    print(
        f"half-life in characters: 5 % below {low:.2f}, median {middle:.2f}, 5 % above "
        f"{high:.1f}, longest {steps.max():.0f}"
    )
    return finished(figure, axes.values())


def saturated(last: dict[str, np.ndarray]) -> Figure:
    """Draw for each unit the share of characters at which its gate is closed, and open."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4.6), layout="constrained")
    for axis, name, title in zip(axes, "rz", ("reset gate r", "update gate z"), strict=True):
        below, above = saturation(last[name])
        axis.plot([0, 1], [1, 0], color="black", linewidth=0.8, linestyle=":")
        axis.plot(below, above, "o", color=COLOURS[0], alpha=0.7, markersize=6)
        axis.set(title=title, xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
        axis.set(xlabel="share of characters below 0.1", ylabel="share above 0.9")
        print(f"{title}: below 0.1 {below.mean():.1%}, above 0.9 {above.mean():.1%} of all values")
    print(f"candidate n: {(np.abs(last['n']) > 0.9).mean():.1%} beyond +-0.9")
    return finished(figure, axes)


def spectra(gru: GRU, seed: int) -> Figure:
    """Draw the eigenvalues of the recurrent weights before and after training."""
    name = [k for k in gru.params if k.startswith("weight_hh")][-1]
    new = GRU(**gru.settings, seed=seed)
    figure, axes = pyplot.subplots(
        1, 3, figsize=(11, 4.2), layout="constrained", sharex=True, sharey=True
    )
    circle = np.exp(2j * np.pi * np.linspace(0, 1, 200))
    for axis, gate, third in zip(axes, "rzn", range(3), strict=True):
        axis.plot(circle.real, circle.imag, color="black", linewidth=0.8, linestyle=":")
        for model, label, style in ((new, "fresh", "x"), (gru, "trained", "o")):
            values, U = spectrum(model)[name][gate], np.split(model.params[name], 3)[third]
            colour = COLOURS[label == "fresh"]
            axis.plot(
                values.real, values.imag, style, color=colour, label=label, markersize=5,
                markerfacecolor="none",
            )  # fmt: skip
            norm = np.linalg.norm(U, 2)
            print(f"U_{gate}, {label}: spectral radius {abs(values[0]):.2f}, norm {norm:.2f}")
        axis.set(title=f"$U_{gate}$", aspect="equal", xlabel="real part")
    axes[0].set_ylabel("imaginary part")
    axes[2].legend(loc="upper right", fontsize=9)
    return finished(figure, axes)


def faded(gru: GRU, x: np.ndarray, seed: int) -> Figure:
    """Draw the norm of the gradient by distance from the loss, variant and initialisation."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharey=True)
    for axis, after in zip(axes, (False, True), strict=True):
        for number, how in enumerate(INITIALISERS):
            line = fading(initialised(gru, after, how, seed), x, seed)[-1]
            axis.plot(line, color=COLOURS[number], linestyle=("-", "--", "-.", ":")[number])
            axis.lines[-1].set(label=how, linewidth=1.8)
            print(f"reset {'after' if after else 'before'}, {how}: after 50 steps {line[50]:.1e}")
        if after == gru.reset_after:
            line = fading(gru, x, seed)[-1]
            axis.plot(line, color="black", linewidth=1.8, label="trained")
            print(f"trained: after 50 steps {line[50]:.1e}")
        title = "reset after the product" if after else "reset before the product"
        axis.set(yscale="log", title=title, xlabel="steps before the loss", ylim=(1e-12, 3))
        axis.legend(loc="lower left", fontsize=9)
    axes[0].set_ylabel("what is left of dL/dh")
    return finished(figure, axes)


def initialised(gru: GRU, after: bool, how: str, seed: int) -> GRU:
    """Return a GRU of the same sizes with initial weights."""
    new = GRU(**{**gru.settings, "reset_after": after}, dtype=gru.dtype, seed=seed)
    draw, rng, H = INITIALISERS[how], np.random.default_rng(seed), gru.hidden_size
    for name, array in new.params.items():
        if draw and name.startswith("weight_hh"):
            array[:] = draw(rng, array.shape)
        if "+2" in how and name.startswith("bias_ih"):
            array[H : 2 * H] += 2
    return new


def finished(figure: Figure, axes: Any) -> Figure:
    """Add a light grid, and remove the frame above and on the right."""
    axis: Axes
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--load", metavar="DIR", help="what train_text.py saved (default: train a small one)")
    add("--out", type=Path, default=Path("out/inside"), metavar="DIR", help="where pictures go")
    add("--text", default=TEXT, help="what the model reads, 10 characters at least")
    add("--steps", type=int, default=600, help="of training, where nothing is loaded")
    add("--seed", type=int, default=0, help="of fresh weights and directions")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
