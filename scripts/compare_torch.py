"""The recipes of this folder on PyTorch: steps per second, and the final figures side by side.

    python scripts/compare_torch.py text
    python scripts/compare_torch.py music --data nottingham.npz
    python scripts/compare_torch.py long --task copy --length 600 --final

What follows the name are the arguments of train_NAME.py. Two processes take turns, each with its
own library: a turn is so many updates from the start of the data, and the first is left out. The
figure is the ratio of the medians. `--final` trains the recipe to its end on PyTorch; the weights
are then loaded into this library, and the same code judges them.

PyTorch starts from the same weights, sees the same batches, and uses its own losses, its fused
optimiser and packed sequences. Its GRU has the reset gate after the product, so that after a few
updates the weights are others.
"""

import argparse
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import gru_any
from gru_any import GRU, Chain, Dropout, Embedding, Linear
from gru_any.data import Piece, ahead, cut
from gru_any.train import evaluate, fit


class Recipe(NamedTuple):
    """What to train; how many updates in all; what judges a Chain, the first of it for choosing."""

    made: dict[str, Any]
    steps: int
    seed: int
    figures: Any


# the recipes --------------------------------------------------------------------------------------


def text(arguments: list[str]) -> Recipe:
    s = importlib.import_module("train_text")
    args = s.parse(arguments)
    found = s.split(s.read(args.data))
    return Recipe(s.recipe(args, found), args.steps, args.seed, {
        "valid": lambda m: s.bits_per_character(m, found.valid),
        "test": lambda m: s.bits_per_character(m, found.test),
    })  # fmt: skip


def music(arguments: list[str]) -> Recipe:
    s = importlib.import_module("train_music")
    args = s.parse(arguments)
    if args.by_frames:
        sys.exit("--by-frames has no counterpart here: leave it out")
    parts = s.synthetic() if args.synthetic else s.read(args.data)
    made = s.recipe(args, parts["train"])
    updates = sum(1 for batch in made["batches"](0) for _ in cut(batch, args.tbptt))
    return Recipe(made, args.steps or args.epochs * updates, args.seed, {
        "valid": lambda m: s.score(m, parts["valid"]), "test": lambda m: s.score(m, parts["test"]),
    })  # fmt: skip


def series(arguments: list[str]) -> Recipe:
    s = importlib.import_module("train_series")
    args = s.parse(arguments)
    names, train, test = s.data(args)
    made = s.recipe(args, names, train)
    updates = args.steps or args.epochs * sum(1 for _ in made["batches"](0))
    judged = {"accuracy": lambda m: (s.scores(m, test).argmax(axis=1) == test.labels).mean()}
    return Recipe(made, updates, args.seed, judged)


def long(arguments: list[str]) -> Recipe:
    s = importlib.import_module("train_long")
    args = s.parse(arguments)
    made, test = s.recipe(args), s.parts(args)["test"]
    judged = {"test": lambda m: evaluate(m, made["loss"], test)}
    return Recipe(made, args.steps, args.seed, judged)


RECIPES = {"text": text, "music": music, "series": series, "long": long}


# PyTorch ------------------------------------------------------------------------------------------


def twin(chain: Chain) -> Any:
    """The layers of a chain as PyTorch's, with the same weights."""
    import torch

    made = []
    for layer in chain.layers:
        if isinstance(layer, GRU):
            made.append(
                torch.nn.GRU(
                    layer.input_size, layer.hidden_size, layer.num_layers,
                    dropout=layer.dropout, bidirectional=layer.settings["bidirectional"],
                )
            )  # fmt: skip
        elif isinstance(layer, Linear):
            made.append(torch.nn.Linear(layer.in_features, layer.out_features))
        elif isinstance(layer, Embedding):
            made.append(torch.nn.Embedding(*layer.params["weight"].shape))
        else:
            made.append(torch.nn.Dropout(layer.p))
        weights = {k: torch.tensor(gru_any.to_numpy(v)) for k, v in layer.params.items()}
        for name, weight in made[-1].named_parameters():
            torch.nn.init.zeros_(weight)  # bias_hh, which reset before has not
            weight.data += weights.get(name, 0)
    return torch.nn.ModuleList(made)


def back(layers: Any, chain: Chain) -> Chain:
    """The weights of PyTorch's layers in a chain of this library."""
    made: list[Any] = []
    for theirs, ours in zip(layers, chain.layers, strict=True):
        if isinstance(ours, GRU):
            made.append(GRU(**{**ours.settings, "reset_after": True, "recompute": None}))
        elif isinstance(ours, Dropout):
            made.append(Dropout(ours.p))
        else:
            made.append(ours.to("numpy"))
        made[-1].load_params({k: v.detach().numpy() for k, v in theirs.named_parameters()})
    return Chain(*made)


def run(layers: Any, x: Any, state: Any, lengths: Any) -> tuple[Any, Any]:
    """All layers, on packed sequences where there are lengths -> y, the new state."""
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    after = []
    for layer in layers:
        if not isinstance(layer, torch.nn.GRU):
            x = layer(x)
            continue
        if lengths is not None:
            x = pack_padded_sequence(x, torch.as_tensor(lengths), enforce_sorted=False)
        x, h = layer(x, None if state is None else state[len(after)])
        if lengths is not None:
            x = pad_packed_sequence(x)[0]
        after.append(h.detach())
    return x, after


def loss_of(name: str, y: Any, target: Any, mask: Any) -> Any:
    """PyTorch's own loss for a recipe."""
    from torch.nn import functional

    if name == "music":
        kept = mask[..., None].to(y.dtype).expand(y.shape)
        total = functional.binary_cross_entropy_with_logits(y, target, kept, reduction="sum")
        return total / mask.sum()
    if name == "series":
        kept = mask.to(y.dtype)
        mean = (y * (kept / kept.sum(0))[..., None]).sum(0)
        return functional.cross_entropy(mean, target[0])
    if target.dtype.is_floating_point:
        return functional.mse_loss(y[-1], target[-1])
    return functional.cross_entropy(y.flatten(0, 1), target.flatten())


def optimiser_of(made: dict[str, Any], layers: Any) -> Any:
    import torch

    ours = made["optimiser"]
    kind = getattr(torch.optim, type(ours).__name__)
    return kind(layers.parameters(), ours.lr, weight_decay=ours.weight_decay, fused=True)


def pieces(made: dict[str, Any]) -> Iterator[tuple[int, Piece]]:
    """The pieces of all epochs, the next one prepared while the present one computes."""

    def all_of_them() -> Iterator[tuple[int, Piece]]:
        epoch = 0
        while True:
            for batch in made["batches"](epoch):
                for piece in cut(batch, made.get("tbptt")):
                    yield epoch, piece
            epoch += 1

    return ahead(all_of_them())


def fit_torch(name: str, made: dict[str, Any], layers: Any, steps: int, valid: Any = None) -> None:
    """The loop of `gru_any.train.fit`; with `valid`, the weights of the best epoch."""
    import torch

    optimiser, state, best, epoch_before = optimiser_of(made, layers), None, math.inf, 0
    weights: Any = None
    layers.train()
    for step, (epoch, piece) in enumerate(pieces(made)):
        if valid and (epoch > epoch_before or step == steps):
            epoch_before, loss = epoch, valid(layers)
            if loss < best:
                best = loss
                weights = {k: v.clone() for k, v in layers.state_dict().items()}
        if step == steps:
            break
        x, target, mask, lengths = piece.batch
        optimiser.param_groups[0]["lr"] = made["schedule"](step)
        y, state = run(layers, torch.as_tensor(x), None if piece.first else state, lengths)
        target = torch.as_tensor(target.copy() if not target.flags.writeable else target)
        loss = loss_of(name, y, target, None if mask is None else torch.as_tensor(mask))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layers.parameters(), made["clip"])
        optimiser.step()
    if weights:
        layers.load_state_dict(weights)


def final(name: str, recipe: Recipe) -> None:
    """Train to the end, and print the figures."""
    import torch

    torch.manual_seed(recipe.seed)
    start, made, figures = time.process_time(), recipe.made, recipe.figures
    layers = twin(made["model"])
    chosen = figures["valid"] if name == "music" else None  # as train_music.py chooses
    valid = chosen and (lambda layers: chosen(back(layers, made["model"])))
    fit_torch(name, made, layers, recipe.steps, valid)
    minutes = (time.process_time() - start) / 60
    chain = back(layers, made["model"])
    print(f"PyTorch, {recipe.steps} updates, {minutes:.1f} CPU minutes: "
          + ", ".join(f"{k} {judge(chain):.4g}" for k, judge in figures.items()))  # fmt: skip


# steps per second ---------------------------------------------------------------------------------


def work(library: str, name: str, recipe: Recipe) -> None:
    """Answer numbers of updates with the seconds of one."""
    made = recipe.made
    layers = twin(made["model"]) if library == "torch" else None
    for line in sys.stdin:
        steps, start = int(line), time.perf_counter()
        if layers is None:
            fit(**made, steps=steps, bar=False)
        else:
            fit_torch(name, made, layers, steps)
        print(json.dumps((time.perf_counter() - start) / steps), flush=True)


def turns(name: str, arguments: list[str], rounds: int, steps: int) -> None:
    """Print the median steps per second of both, and their ratio."""
    command = [sys.executable, __file__, name, *arguments, "--worker"]
    workers = {
        library: subprocess.Popen([*command, library], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True)
        for library in ("gru_any", "torch")
    }  # fmt: skip
    seconds: dict[str, list[float]] = {library: [] for library in workers}
    for turn in range(rounds + 1):
        for library, worker in sorted(workers.items(), reverse=bool(turn % 2)):
            assert worker.stdin
            assert worker.stdout
            print(steps, file=worker.stdin, flush=True)
            answer = worker.stdout.readline()
            while answer and not answer[:1].isdigit():  # what the script says of its data
                answer = worker.stdout.readline()
            if not answer:
                sys.exit(f"{library} died")
            if turn:
                seconds[library].append(json.loads(answer))
    for worker in workers.values():
        worker.communicate("")
    ours, theirs = (1 / statistics.median(seconds[library]) for library in ("gru_any", "torch"))
    print(
        f"{name} {' '.join(arguments)}: gru_any {ours:.4g} steps a second, PyTorch {theirs:.4g}: "
        f"{ours / theirs:.2f} times ({rounds} turns of {steps} updates, "
        f"{os.environ.get('OMP_NUM_THREADS', 'all')} threads)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("recipe", choices=RECIPES)
    add("--rounds", type=int, default=7, help="turns of each")
    add("--updates", type=int, default=10, help="updates in a turn")
    add("--final", action="store_true", help="train on PyTorch to the end instead")
    add("--worker", choices=["gru_any", "torch"], help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.worker or args.final:
        recipe = RECIPES[args.recipe]([*rest, "--backend", "numpy"])
        if args.worker:
            work(args.worker, args.recipe, recipe)
        else:
            final(args.recipe, recipe)
    else:
        turns(args.recipe, [*rest], args.rounds, args.updates)


if __name__ == "__main__":
    main()
