"""The source of a step function as formulas: its lines without sizes and namespaces, or LaTeX."""

import ast
import inspect
import math
import textwrap
from collections.abc import Callable

LETTERS = {"sigmoid": r"\sigma", "tanh": r"\tanh"}
SIGNS = {ast.Add: " + ", ast.Sub: " - ", ast.Mult: r" \odot ", ast.MatMult: r"\, "}


def formulas(function: Callable[..., object], result: str, **sizes: int) -> list[ast.Assign]:
    """Return the assignments in the source of a function.

    The first value that it returns is called `result`; names in `sizes` are replaced by numbers.
    """
    lines = []
    for node in _source(function).body:
        if isinstance(node, ast.Return):
            value = node.value.elts[0] if isinstance(node.value, ast.Tuple) else node.value
            node = ast.Assign([ast.Name(result)], value)  # type: ignore[arg-type]
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) not in sizes:
            lines.append(ast.fix_missing_locations(_Tidy(sizes).visit(node)))
    return lines


def called(function: Callable[..., object]) -> dict[str, str]:
    """Return the docstrings of the functions that a function calls by name."""
    calls = [node for node in ast.walk(_source(function)) if isinstance(node, ast.Call)]
    names = dict.fromkeys(n.func.id for n in calls if isinstance(n.func, ast.Name))
    return {name: inspect.getdoc(function.__globals__[name]) or "" for name in names}


def _source(function: Callable[..., object]) -> ast.FunctionDef:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    return tree


class _Tidy(ast.NodeTransformer):
    """Drops the namespace `xp`, and writes sizes as numbers."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Write `xp.f(v)` and `f(xp, v)` as `f(v)`."""
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute):
            node.func = ast.Name(node.func.attr)
        node.args = [a for a in node.args if not (isinstance(a, ast.Name) and a.id == "xp")]
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """Write H as its number."""
        return ast.Constant(self.sizes[node.id]) if node.id in self.sizes else node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        """Write 1.0 as 1."""
        whole = isinstance(node.value, float) and node.value.is_integer()
        return ast.Constant(int(node.value)) if whole else node  # type: ignore[arg-type]

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        """Write 2 * 16 as 32."""
        self.generic_visit(node)
        sides = [side.value for side in (node.left, node.right) if isinstance(side, ast.Constant)]
        whole = len(sides) == 2 and isinstance(node.op, ast.Mult)
        return ast.Constant(math.prod(sides)) if whole else node  # type: ignore[arg-type]


def latex(node: ast.AST) -> str:
    """Return a formula, or a part of one, as LaTeX."""
    if isinstance(node, ast.Assign):
        return f"{latex(node.targets[0])} &= {latex(node.value)}"
    if isinstance(node, ast.Name):
        base, _, below = node.id.partition("_")
        return f"{base}_{{{below}}}" if below else base
    if isinstance(node, ast.Tuple):
        return r",\; ".join(map(latex, node.elts))
    if isinstance(node, ast.Attribute):  # the transpose
        return f"{latex(node.value)}^{{\\top}}"
    if isinstance(node, ast.Subscript):
        rows = node.slice.elts[0] if isinstance(node.slice, ast.Tuple) else node.slice
        return f"{latex(node.value)}_{{{ast.unparse(rows)}}}"
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        arguments = ", ".join(map(latex, node.args))
        return LETTERS.get(name, rf"\operatorname{{{name}}}") + f"({arguments})"
    if isinstance(node, ast.BinOp):
        return _sides(node)
    return ast.unparse(node)


def _sides(node: ast.BinOp) -> str:
    """Write both sides of an operator, with parentheses around a sum in a product."""
    sums = (ast.Add, ast.Sub)

    def side(part: ast.AST, right: bool) -> str:
        inner = isinstance(part, ast.BinOp) and isinstance(part.op, sums)
        apart = not isinstance(node.op, sums) or (right and isinstance(node.op, ast.Sub))
        return f"({latex(part)})" if inner and apart else latex(part)

    return side(node.left, False) + SIGNS[type(node.op)] + side(node.right, True)
