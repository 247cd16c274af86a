"""Test the tests: change one term of the equations at a time, and see whether a test fails.

Each + becomes a -, each factor of a product is dropped, each transpose is left out, each bias lost,
and (1 - n^2) becomes (1 - n)^2. A change that no test notices is printed, and the exit code is 1.
"""

import argparse
import ast
import copy
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
EQUATIONS = "gru_any/equations.py"
PYTEST = ["pytest", "-qx", "-n0", "-p", "no:cacheprovider", "--hypothesis-profile=noticed"]
TESTS = ["tests/test_sequences.py", "-k", "by_hand or ragged_batch"]
PROOFS = [
    "tests/test_gradients.py",
    "tests/test_against_others.py",
    "-k",
    "any_gru or torch or onnx",
]
PATHS = {"plain": {"GRU_ANY_PLAIN": "1"}, "traced": {"GRU_ANY_NO_NUMBA": "1"}, "compiled": {}}
BY_HAND = [
    ("gru_any/nn/weights.py", "b[: 2 * H] + c[: 2 * H]", "b[: 2 * H]"),
    ("gru_any/nn/weights.py", "return Weights(W, b, (U,))", "return Weights(W, None, (U,))"),
    ("gru_any/equations.py", "(1.0 - n * n)", "((1.0 - n) * (1.0 - n))"),
]


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """What can go wrong at one place of a formula."""
    if isinstance(node, ast.BinOp):
        if isinstance(node.op, (ast.Add, ast.Sub)):
            other = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
            yield ast.BinOp(node.left, other, node.right)
        if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult)):
            yield node.left
            yield node.right
    if isinstance(node, ast.Attribute) and node.attr == "T":
        yield node.value


def mutants() -> Iterator[tuple[str, str, str]]:
    """(what was changed, file, its new text)."""
    for file, old, new in BY_HAND:
        text = (ROOT / file).read_text("utf-8")
        assert old in text, f"{file} no longer holds {old}"
        yield f"{file}: {old} -> {new}", file, text.replace(old, new)
    text = (ROOT / EQUATIONS).read_text("utf-8")
    tree = ast.parse(text)
    for i, node in enumerate(ast.walk(tree)):
        if isinstance(node, ast.expr):
            for wrong in replacements(node):
                changed = copy.deepcopy(tree)
                target = next(n for k, n in enumerate(ast.walk(changed)) if k == i)
                note = f"line {node.lineno}: {ast.unparse(node)} -> {ast.unparse(wrong)}"
                Replace(target, wrong).visit(changed)
                yield note, EQUATIONS, ast.unparse(ast.fix_missing_locations(changed))


class Replace(ast.NodeTransformer):
    """Replaces one node of a syntax tree by another."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        """Replace this node, or look inside of it."""
        return self.new if node is self.old else self.generic_visit(node)


def noticed(path: str, file: str, text: str) -> bool:
    """Run the tests on a copy of the package with the changed file: does one of them fail?"""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("gru_any", "tests"):
            shutil.copytree(ROOT / name, Path(folder) / name)
        shutil.copy(ROOT / "pyproject.toml", folder)
        (Path(folder) / file).write_text(text, "utf-8")
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"} | PATHS[path]
        return any(
            subprocess.run(
                [sys.executable, "-m", *PYTEST, *tests],
                cwd=folder,
                env=environment,
                capture_output=True,
            ).returncode
            != 0
            for tests in (TESTS, PROOFS)
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", type=int, help="the first N changes")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--path", choices=PATHS, default="plain", help="how blocks are run (plain)")
    args = parser.parse_args()
    found = list(mutants())[: args.only]
    if noticed(args.path, EQUATIONS, (ROOT / EQUATIONS).read_text("utf-8")):
        print("the tests fail without any change; mend that first")
        return 2
    with ThreadPoolExecutor(args.jobs) as pool:
        caught = pool.map(lambda mutant: noticed(args.path, *mutant[1:]), found)
        results = list(tqdm(caught, total=len(found)))
    for (note, _, _), caught in zip(found, results, strict=True):
        if not caught:
            print("not noticed:", note)
    print(f"{sum(results)} of {len(found)} changes noticed")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
