"""Print figures of the code: size, import circles, and the parameters annotated with a bare `Any`.

    python scripts/maintenance/any_share.py [FILE OR FOLDER]...

Without an argument the code is gru_any. A bare `Any` tells neither a reader nor a type checker
anything. An alias such as `Array`, which a checker takes for `Any`, tells the reader; it is not
counted. Lines are those of code, without blank lines, comments and docstrings.
"""

import ast
import io
import statistics
import sys
import tokenize
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "gru_any"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLANK = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


def code_lines(text: str, tree: ast.Module) -> set[int]:
    """Return the numbers of the lines that contain code."""
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.string]
    lines = {n for t in tokens if t.type not in BLANK for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return lines


def parameters(tree: ast.Module) -> list[ast.arg]:
    """Return the parameters of all functions, without `self` and `cls`."""
    given = [node.args for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    every = [p for a in given for p in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg)]
    return [p for p in every if p is not None and p.arg not in ("self", "cls")]


def is_bare(parameter: ast.arg) -> bool:
    """Return whether the annotation is just `Any`."""
    return isinstance(parameter.annotation, ast.Name) and parameter.annotation.id == "Any"


def imported(path: Path, tree: ast.Module) -> set[Path]:
    """Return the files that a file imports by relative names."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for alias in node.names:
                tried = [base / f"{alias.name}.py", base / alias.name / "__init__.py"]
                tried += [base.with_suffix(".py"), base / "__init__.py"]
                found.add(next(file for file in tried if file.exists()))
    return found


def sizes(name: str, counts: list[int]) -> str:
    """Return the count, and the median, 90th percentile and maximum of the lines."""
    ordered = sorted(counts)
    percentile = ordered[9 * len(ordered) // 10]
    return f"{len(ordered)} {name} of {statistics.median(ordered):.0f}/{percentile}/{ordered[-1]}"


def main(arguments: list[str]) -> None:
    roots = [Path(argument).resolve() for argument in arguments] or [PACKAGE]
    files = [f for root in roots for f in (sorted(root.rglob("*.py")) if root.is_dir() else [root])]
    trees = {path: ast.parse(path.read_text("utf-8")) for path in files}
    lines = {path: code_lines(path.read_text("utf-8"), tree) for path, tree in trees.items()}
    functions = [
        len(lines[path] & set(range(node.lineno, (node.end_lineno or 0) + 1)))
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS)
    ]
    every = [parameter for tree in trees.values() for parameter in parameters(tree)]
    count = sum(map(is_bare, every))
    circle = "none"
    try:
        TopologicalSorter({path: imported(path, tree) for path, tree in trees.items()}).prepare()
    except CycleError as e:
        circle = " -> ".join(f"{path.parent.name}/{path.stem}" for path in e.args[1])
    print(f"{count} of {len(every)} parameters with a bare Any: {count / max(len(every), 1):.1%}")
    print(f"{sum(map(len, lines.values()))} lines of code (below: median/90th percentile/maximum)")
    print(sizes("files", [len(found) for found in lines.values()]))
    print(sizes("functions", functions))
    print(f"import circles: {circle}")


if __name__ == "__main__":
    main(sys.argv[1:])
