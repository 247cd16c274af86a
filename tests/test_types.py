"""The types say something: few parameters are `Any`, and mypy notices mistakes made on purpose."""

import ast
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from conftest import finished, require

import gru_any

PACKAGE = Path(gru_any.__file__).parent
ROOT = Path(__file__).parent.parent
SHARE = 0.05  # of the parameters may be a bare Any
NOTICED = 14  # of the mistakes below, at least


class Mistake(NamedTuple):
    """In this function of this file, the first text replaced by the second."""

    kind: str
    file: str
    function: str
    right: str
    wrong: str


MISTAKES = [
    Mistake("a misspelt method of a runner",
            "nn/sweep.py", "Sweep._read", "self.run.upcast(", "self.run.upcats("),
    Mistake("a wrong number of arguments to a runner",
            "nn/sweep.py", "Sweep._block", ".as_contiguous(", ".as_contiguous(h, "),
    Mistake("an array and a slice that changed places",
            "nn/sweep.py", "Sweep._recompute", "x, h, block, mask", "x, block, h, mask"),
    Mistake("None, where it was not asked for",
            "nn/sweep.py", "Sweep.gates",
            "None if self.mask is None else self.mask.steps(block)",
            "self.mask.steps(block)"),
    Mistake("a tuple unpacked in the wrong number",
            "nn/sweep.py", "Sweep._block_back", "(W, _, (U, *vectors))", "(W, (U, *vectors))"),
    Mistake("a field left out",
            "nn/stack.py", "Stack.sweep", "mask, reverse, self.dtype", "reverse, self.dtype"),
    Mistake("a misspelt attribute of a layout",
            "nn/layout.py", "SequenceLayout._check_states",
            "self.hidden_size", "self.hidden_sizes"),
    Mistake("a backend in place of a runner",
            "nn/gru.py", "GRU._forward",
            "self._stack(self._runner", "self._stack(self.backend"),
    Mistake("a step function in place of a variant",
            "nn/gru.py", "GRU._stack",
            "self.variant if", "equations.reset_after if"),
    Mistake("a function that a module does not have",
            "nn/cell.py", "GRUCell.variant", "equations.variant(", "equations.variants("),
    Mistake("a step function in place of its schedule",
            "codegen/cuda_source.py", "forward_scan",
            "forward_schedule(step, vectors, keep, DEVICE, extra), number", "step, number"),
    Mistake("a string in place of a path",
            "train/run.py", "Run._restore", 'Log(self.folder / "log.jsonl"', 'Log("log.jsonl"'),
    Mistake("a misspelt keyword",
            "train/optim.py", "clip_by_value", "above=True", "over=True"),
    Mistake("a missing return",
            "train/data.py", "waste", "return 1 -", "1 -"),
    Mistake("a wrong type returned",
            "arguments.py", "flag", "return bool(value)", "return repr(value)"),
]  # fmt: skip


def function(text, name):
    """The node of a function or method."""
    node = ast.parse(text)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return node


def plant(folder, mistake):
    """Make the mistake in a copy of the package."""
    path = folder / mistake.file
    text = path.read_text("utf-8")
    node = function(text, mistake.function)
    there = ast.get_source_segment(text, node)
    assert there.count(mistake.right) == 1, f"{mistake.function} no longer holds {mistake.right}"
    path.write_text(text.replace(there, there.replace(mistake.right, mistake.wrong)), "utf-8")


def test_few_parameters_are_any(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts/maintenance")
    import any_share

    trees = [ast.parse(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")]
    every = [parameter for tree in trees for parameter in any_share.parameters(tree)]
    assert sum(map(any_share.is_bare, every)) <= SHARE * len(every)


def test_mypy_notices_mistakes(tmp_path):
    """All are made in one copy, each in a function of its own; the errors tell which were seen."""
    require("mypy")
    assert len({(mistake.file, mistake.function) for mistake in MISTAKES}) == len(MISTAKES) == 15
    copy = tmp_path / "gru_any"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for mistake in MISTAKES:
        plant(copy, mistake)
    with suppress(FileNotFoundError):  # what is known of the libraries, from an earlier run
        shutil.copytree(ROOT / ".mypy_cache", tmp_path / "cache")
    command = [sys.executable, "-m", "mypy", "gru_any", "--cache-dir", str(tmp_path / "cache")]
    command += ["--config-file", str(ROOT / "pyproject.toml"), "--no-error-summary"]
    done = finished(command, cwd=tmp_path)
    errors = re.findall(r"^gru_any/(.+?):(\d+): error: .*$", done.stdout, re.M)
    assert errors, done.stdout + done.stderr
    where = {}
    for mistake in MISTAKES:
        node = function((copy / mistake.file).read_text("utf-8"), mistake.function)
        where[mistake.kind] = mistake.file, range(node.lineno, node.end_lineno + 1)
    seen = {
        kind: [(path, line) for path, line in errors if path == file and int(line) in lines]
        for kind, (file, lines) in where.items()
    }
    others = set(errors) - {error for found in seen.values() for error in found}
    assert not others, f"errors where no mistake was made: {others}"
    missed = [kind for kind, found in seen.items() if not found]
    assert len(MISTAKES) - len(missed) >= NOTICED, f"not noticed: {missed}"
