"""The source of a step function as formulas: its lines without sizes and namespaces, or LaTeX.

The activations f of a step are written by their names, and their gradients as their own formulas.
"""

import ast
import inspect
import math
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from ..activations import DEFINITIONS, Activation, Activations

LETTERS = {"sigmoid": r"\sigma", "tanh": r"\tanh"}
SIGNS = {ast.Add: " + ", ast.Sub: " - ", ast.Mult: r" \odot ", ast.MatMult: r"\, "}


def formulas(function: Callable[..., object], result: str, **sizes: int) -> list[ast.Assign]:
    """Return the assignments in the source of a function.

    The first value that it returns is called `result`; names in `sizes` are replaced by numbers.
    """
    lines, tidy = [], _Tidy(sizes, _activations(function))
    for node in _source(function).body:
        if isinstance(node, ast.Return):
            value = node.value.elts[0] if isinstance(node.value, ast.Tuple) else node.value
            node = ast.Assign([ast.Name(result)], value)  # type: ignore[arg-type]
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) not in sizes:
            lines.append(ast.fix_missing_locations(tidy.visit(node)))
    return lines


def called(function: Callable[..., object]) -> dict[str, str]:
    """Return a description of each function that the formulas of `function` call."""
    calls = [node for node in ast.walk(_source(function)) if isinstance(node, ast.Call)]
    names = dict.fromkeys(n.func.id for n in calls if isinstance(n.func, ast.Name))
    found = {name: inspect.getdoc(_plain(function).__globals__[name]) or "" for name in names}
    for f in _activations(function) or ():
        found[f.name] = _described(f)
        if f.clip is not None:
            found["clip"] = f"v, at least {-f.clip:g} and at most {f.clip:g}"
    return found


def _described(f: Activation) -> str:
    names, text = DEFINITIONS[f.name].numbers, inspect.getdoc(DEFINITIONS[f.name].function) or ""
    numbers = [f"{name} = {value:g}" for name, value in zip(names, f.numbers, strict=True)]
    return "; ".join([text, *([", ".join(numbers)] if numbers else [])])


def _plain(function: Callable[..., object]) -> Any:
    """Return the function of the equations, whatever its activations are."""
    return function.func if isinstance(function, partial) else function


def _activations(function: Callable[..., object]) -> Activations | None:
    """Return the activations of a step; None where it takes none."""
    f = inspect.signature(function).parameters.get("f")
    return None if f is None else f.default


def _source(function: Callable[..., object]) -> ast.FunctionDef:
    tree = ast.parse(textwrap.dedent(inspect.getsource(_plain(function)))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    return tree


class _Tidy(ast.NodeTransformer):
    """Drops the namespace `xp`, writes sizes as numbers, and activations as what they are."""

    def __init__(self, sizes: dict[str, int], f: Activations | None) -> None:
        self.sizes, self.f = sizes, f

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Write `xp.f(v)` and `f(xp, v)` as `f(v)`."""
        self.generic_visit(node)
        node.args = [a for a in node.args if not (isinstance(a, ast.Name) and a.id == "xp")]
        match node.func:
            case ast.Attribute(ast.Attribute(ast.Name("f"), name), "backward") if self.f:
                return _gradient(getattr(self.f, name), *node.args)
            case ast.Attribute(ast.Name("f"), name) if self.f:
                return _function(getattr(self.f, name), *node.args)
            case ast.Attribute(_, name):
                node.func = ast.Name(name)
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


def _function(f: Activation, v: ast.expr) -> ast.Call:
    v = v if f.clip is None else ast.Call(ast.Name("clip"), [v], [])
    return ast.Call(ast.Name(f.name), [v], [])


def _gradient(f: Activation, dy: ast.expr, y: ast.expr) -> ast.AST:
    """Return the formula of dv, for these dy and y."""
    definition = DEFINITIONS[f.name]
    (line,) = [node for node in _source(definition.gradient).body if isinstance(node, ast.Return)]
    numbers = zip(definition.numbers, map(ast.Constant, f.numbers), strict=True)
    dv = _Put({"dy": dy, "y": y, **dict(numbers)}).visit(_Tidy({}, None).visit(line)).value
    return dv if f.clip is None else ast.Call(ast.Name("unclipped"), [dv, y], [])


class _Put(ast.NodeTransformer):
    """Puts expressions in the place of names."""

    def __init__(self, values: dict[str, ast.expr]) -> None:
        self.values = values

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """Return the expression for a name."""
        return self.values.get(node.id, node)


def normalised(
    product: Sequence[ast.AST], forward: Sequence[ast.AST], backward: Sequence[ast.AST]
) -> tuple[list[ast.AST], list[ast.AST], list[ast.AST]]:
    """Return the formulas with layer normalisation of the products with W and U."""
    *lines, last = backward
    through = ast.parse("dv = dN(gain_hh * dq)").body
    put = _Put({"dq": ast.Name("dv")})
    return (
        [_Normalised("gain_ih").visit(line) for line in product],
        [_Normalised("gain_hh").visit(line) for line in forward],
        [*lines, *through, put.visit(last)],
    )


class _Normalised(ast.NodeTransformer):
    """Puts gain * N(v @ M) in the place of v @ M."""

    def __init__(self, gain: str) -> None:
        self.gain = gain

    def visit_BinOp(self, node: ast.BinOp) -> ast.BinOp:
        """Return the expression for a product, or what is found inside of another one."""
        if not isinstance(node.op, ast.MatMult):
            return cast(ast.BinOp, self.generic_visit(node))
        return ast.BinOp(ast.Name(self.gain), ast.Mult(), ast.Call(ast.Name("N"), [node], []))


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
