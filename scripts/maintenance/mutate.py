"""Test the tests: change one term of the equations at a time, and see whether a test fails.

Each + becomes a -, each factor of a product is dropped, each transpose is left out, each bias lost,
and (1 - n^2) becomes (1 - n)^2. A change that no test notices is printed, and the exit code is 1.

    python scripts/maintenance/mutate.py
    python scripts/maintenance/mutate.py --random 60     of time, layers, losses, optimisers, data

A random change turns a comparison, a condition, a constant or an operator.
"""

import argparse
import ast
import copy
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
PYTEST = ["-qx", "-n0", "-p", "no:cacheprovider", "--hypothesis-profile=noticed"]
TESTS = [
    "tests/test_sequences.py",
    "tests/test_gradients.py",
    "tests/test_against_others.py",
    "-k",
    "(test_sequences and (by_hand or ragged_batch)) or "
    "(not test_sequences and (any_gru or torch or onnx))",
]
OF_FUNCTIONS = ["tests/test_activations.py", "-k", "by_hand or by_complex_step or clipped"]
EQUATIONS = {"gru_any/equations.py": TESTS, "gru_any/activations.py": OF_FUNCTIONS}
# what is changed at random, and the tests that should notice
LAWS = "tests/test_laws.py tests/test_sequences.py tests/test_last.py tests/test_gradients.py"
OPTIONS = "tests/test_start.py tests/test_regularisation.py tests/test_parts_of_gradients.py"
CALLS = "tests/test_one_block.py tests/test_refusals.py tests/test_layers.py"
TRAIN = "tests/test_layouts.py tests/test_train_input.py tests/test_train.py"
HERE = ["-k", "not torch and not jax and not cupy and not fake_cuda and not compiled"]
OTHERS = {
    "gru_any/nn/sweep.py": [*LAWS.split(), *OPTIONS.split(), "tests/test_tied.py", *HERE],
    "gru_any/nn/stack.py": [*LAWS.split(), *OPTIONS.split(), *HERE],
    "gru_any/nn/gru.py": [*LAWS.split(), *CALLS.split(), *HERE],
    "gru_any/train/optim.py": ["tests/test_optim.py", "tests/test_mixed.py"],
    "gru_any/nn/losses.py": ["tests/test_losses.py", "tests/test_first_mistakes.py"],
    "gru_any/train/data.py": [*TRAIN.split(), *HERE],
}
PRELOADED = ["numpy", "torch", "onnxruntime", "array_api_strict", "safetensors.numpy"]
LONGEST = 600  # seconds for the tests of one change
Mutant: TypeAlias = tuple[str, str, str, list[str]]  # what was changed, file, its text, tests
PATHS = {"plain": {"GRU_ANY_PLAIN": "1"}, "traced": {"GRU_ANY_NO_NUMBA": "1"}, "compiled": {}}
BY_HAND = [
    ("gru_any/nn/weights.py", "b[: 2 * H] + c[: 2 * H]", "b[: 2 * H]"),
    ("gru_any/nn/weights.py", "return Weights(W, b, (U,))", "return Weights(W, None, (U,))"),
    ("gru_any/activations.py", "(1.0 - y * y)", "((1.0 - y) * (1.0 - y))"),
]


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield wrong nodes in place of one node of a formula."""
    if isinstance(node, ast.BinOp):
        if isinstance(node.op, (ast.Add, ast.Sub)):
            other = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
            yield ast.BinOp(node.left, other, node.right)
        if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult)):
            yield node.left
            yield node.right
    if isinstance(node, ast.Attribute) and node.attr == "T":
        yield node.value


def mutants() -> Iterator[Mutant]:
    """Every change of the equations."""
    for file, old, new in BY_HAND:
        text = (ROOT / file).read_text("utf-8")
        assert old in text, f"{file} no longer holds {old}"
        yield f"{file}: {old} -> {new}", file, text.replace(old, new), TESTS
    for file, tests in EQUATIONS.items():
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        for i, node in enumerate(ast.walk(tree)):
            if isinstance(node, ast.expr):
                for wrong in replacements(node):
                    yield changed(file, tree, i, wrong, tests)


def changed(file: str, tree: ast.Module, i: int, wrong: ast.AST, tests: list[str]) -> Mutant:
    """The file with something else in the place of the i-th node."""
    new, old = copy.deepcopy(tree), next(n for k, n in enumerate(ast.walk(tree)) if k == i)
    target = next(n for k, n in enumerate(ast.walk(new)) if k == i)
    note = f"line {old.lineno}: {ast.unparse(old)} -> {ast.unparse(wrong)}"
    Replace(target, wrong).visit(new)
    return f"{file} {note}", file, ast.unparse(ast.fix_missing_locations(new)), tests


def alternatives(node: ast.AST) -> Iterator[ast.AST]:
    """Yield wrong nodes in place of one expression of ordinary code."""
    yield from replacements(node)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARED:
        yield ast.Compare(node.left, [COMPARED[type(node.ops[0])]()], node.comparators)
    if isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield ast.BoolOp(other, node.values)
    if isinstance(node, ast.IfExp):
        yield ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield ast.Constant(not node.value)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield ast.Constant(node.value + 1)


def random_mutants(count: int, seed: int) -> list[Mutant]:
    """Some of all changes of the files in OTHERS; words, types and messages stay."""
    places = []
    for file, tests in OTHERS.items():
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        inert = {id(n) for kind in INERT for node in ast.walk(tree) if isinstance(node, kind)
                 for n in ast.walk(node)}  # fmt: skip
        inert |= {id(n) for node in ast.walk(tree) for part in ("annotation", "returns")
                  if getattr(node, part, None) for n in ast.walk(getattr(node, part))}  # fmt: skip
        for i, node in enumerate(ast.walk(tree)):
            if isinstance(node, ast.expr) and id(node) not in inert:
                places += [(file, tree, i, wrong, tests) for wrong in alternatives(node)]
    return [changed(*place) for place in random.Random(seed).sample(places, count)]


COMPARED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
            ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is}  # fmt: skip
INERT = (ast.JoinedStr, ast.Raise)  # messages


class Replace(ast.NodeTransformer):
    """Replaces one node of a syntax tree by another."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        """Replace this node, or look inside of it."""
        return self.new if node is self.old else self.generic_visit(node)


def noticed(path: str, file: str, text: str, tests: list[str]) -> bool:
    """Run the tests on a copy of the package with the changed file: does one of them fail?

    To be called in a process of its own, in which this library has not been imported.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in ("gru_any", "tests", "scripts"):
            shutil.copytree(ROOT / name, Path(folder) / name)
        shutil.copy(ROOT / "pyproject.toml", folder)
        (Path(folder) / file).write_text(text, "utf-8")
        os.environ.update({"PYTHONPATH": folder, "OMP_NUM_THREADS": "1"} | PATHS[path])
        sys.path.insert(0, folder)
        sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
        os.chdir(folder)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        signal.alarm(LONGEST)  # a loop that no longer ends is noticed too
        import pytest

        return pytest.main([*PYTEST, *tests]) != 0


def all_noticed(path: str, found: list[Mutant], jobs: int) -> list[bool]:
    """Whether the tests notice each of the changes, in processes that have imported the others."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)

    def run(mutant: Mutant) -> bool:
        with context.Pool(1) as pool:
            waiting = pool.apply_async(noticed, (path, *mutant[1:]))
            try:
                return waiting.get(LONGEST + 60)
            except multiprocessing.TimeoutError:
                return True

    with ThreadPoolExecutor(jobs) as pool:
        return list(tqdm(pool.map(run, found), total=len(found), mininterval=10))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", type=int, help="the first N changes")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--path", choices=PATHS, default="plain", help="how blocks are run (plain)")
    parser.add_argument("--random", type=int, help="so many random changes of the other files")
    parser.add_argument("--seed", type=int, default=0, help="which of them (0)")
    args = parser.parse_args()
    chosen = random_mutants(args.random, args.seed) if args.random else list(mutants())
    found = chosen[: args.only]
    same = {tuple(tests): (file, tests) for _, file, _, tests in found}.values()
    unchanged = [(file, file, (ROOT / file).read_text("utf-8"), tests) for file, tests in same]
    if any(all_noticed(args.path, unchanged, args.jobs)):
        print("the tests fail without any change; mend that first")
        return 2
    results = all_noticed(args.path, found, args.jobs)
    for (note, *_), caught in zip(found, results, strict=True):
        if not caught:
            print("not noticed:", note)
    print(f"{sum(results)} of {len(found)} changes noticed")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
