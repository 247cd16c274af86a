"""compare_torch.py: both libraries do the same where the equations are the same, and take turns."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import require

SCRIPTS = Path(__file__).parent.parent / "scripts" / "benchmarks"
SMALL = ["--hidden", "8", "--rate", "0.01", "--backend", "numpy"]
MUSIC = [
    "--synthetic",
    *SMALL,
    "--epochs",
    "3",
    "--batch",
    "13",
    "--dropout",
    "0",
    "--warm-up",
    "3",
]
LONG = [*SMALL, "--length", "12", "--steps", "23", "--validate-every", "5", "--task"]
COMMANDS = {
    "music": ("music", MUSIC),
    "music, averaged": (
        "music",
        [*MUSIC, "--by-frames", "--average", "0.8", "--tbptt", "10", "15"],
    ),
    "music, recalled": ("music", [*MUSIC, "--recall", "--steps", "9"]),
    "music, layers": ("music", [*MUSIC, "--layers", "2", "--steps", "9"]),
    "series": ("series", ["--synthetic", *SMALL, "--epochs", "5", "--dropout", "0"]),
    "adding": ("long", [*LONG, "adding"]),
    "copy": ("long", [*LONG, "copy"]),
}


@pytest.fixture
def scripts(monkeypatch):
    require("torch")
    monkeypatch.syspath_prepend(SCRIPTS.parent)
    monkeypatch.syspath_prepend(SCRIPTS)


def second_is_best():
    calls = itertools.count(1)
    return {"valid": lambda model: abs(next(calls) - 2)}


@pytest.mark.parametrize("name", COMMANDS)
def test_both_loops_end_with_the_same_weights(scripts, name):
    """Our loop on a model with PyTorch's equations: same losses, batches, steps, weights chosen."""
    import compare_torch
    import on_torch

    recipe = compare_torch.RECIPES[COMMANDS[name][0]](COMMANDS[name][1])
    made = recipe.made
    layers, other = (on_torch.twin(made["model"]) for _ in range(2))
    model, optimiser = on_torch.back(other, made["model"]), made["optimiser"]
    settings = {"lr": optimiser.lr, "weight_decay": optimiser.weight_decay}
    made |= {"model": model, "optimiser": type(optimiser)(model.params, **settings)}
    before = {k: v.copy() for k, v in model.params.items()}
    if "valid" in recipe.figures:  # the second validation is the best
        ours, theirs = (recipe._replace(figures=second_is_best()) for _ in range(2))
    else:
        ours = theirs = recipe
    compare_torch.final(ours, None)
    compare_torch.final(theirs, layers)
    for k, v in on_torch.back(layers, model).params.items():
        way = np.abs(v - before[k]).max()
        assert way > 0.005
        np.testing.assert_allclose(v, model.params[k], atol=1e-3 * way, err_msg=k)


def test_the_figures_stand_side_by_side(scripts, monkeypatch, capsys):
    """As a person runs it: two processes of so many threads, and the figures of both."""
    import compare_torch

    command = ["series", "--synthetic", "--rate", "0.02", "--hidden", "8", "--epochs", "20"]
    monkeypatch.setattr(sys, "argv", ["compare_torch.py", *command, "--threads", "1", "--final"])
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS.parents[1]))
    compare_torch.main()
    head, *figures = capsys.readouterr().out.splitlines()
    assert head.endswith("(threads: 1 and 1)")
    for library, line in zip(("gru_any", "torch"), figures, strict=True):
        assert line.startswith(f"{library}: accuracy ")
        assert float(line.split()[2].strip(",")) > 0.8
        assert "CPU minutes" in line


def test_turns(scripts):
    """The first turn is left out; the ratio is that of the medians; they go first by turns."""
    import compare_torch

    asked = []

    class Worker:
        def __init__(self, library, seconds):
            self.library, self.seconds = library, iter(seconds)

        def ask(self, steps):
            asked.append((self.library, steps))
            return next(self.seconds)

    workers = [Worker("gru_any", [9, 1, 2, 4]), Worker("torch", [1, 8, 3, 9])]
    assert compare_torch.turns(workers, rounds=3, steps=5) == (
        "gru_any 0.5 steps a second, PyTorch 0.125: 4.00 times (3 turns of 5 updates)"
    )
    assert [library for library, _ in asked] == ["gru_any", "torch", "torch", "gru_any"] * 2
    assert {steps for _, steps in asked} == {5}


def test_what_is_refused(scripts):
    import compare_torch

    with pytest.raises(SystemExit, match="by the clock"):
        compare_torch.text(["--minutes", "1"])
