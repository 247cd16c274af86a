"""A GRU whose steps stand in the body of the operator Loop, as Keras' exporter writes them.

The body is evaluated with symbols in place of arrays. What comes out is compared with

    h' = z * h + (1 - z) * n,   z = sigmoid(x W_z + b_z + h U_z + c_z),   r likewise
    n = tanh(x W_n + b_n + r * (h U_n + c_n))   or   n = tanh(x W_n + b_n + (r * h) U_n)

so that it does not matter in which order an exporter multiplies, adds and slices.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ...typing import HostArray
from .axes import FoundLayer, Length, Positive, SymbolicArray, Value, Zeros, size
from .check import Body, Node
from .gru import GRUOutputs, add_gru, first_state
from .moves import MOVES
from .walk import Walk

WHOLE = 2**31 - 1  # as the end of a slice


class Variable(NamedTuple):
    """What a step reads: x or h."""

    name: str


X, H = Variable("x"), Variable("h")


class Affine(NamedTuple):
    """The product of something with weights, and a bias."""

    W: HostArray
    b: HostArray | None


@dataclass(eq=False)
class Sum:
    """Affine functions of x, of h or of r * h, and perhaps r * (h U + c)."""

    terms: "dict[Variable | Product, Affine]"
    gated: "Product | None" = None


@dataclass(eq=False)
class Function:
    """sigmoid(v), tanh(v) or, of a sigmoid, 1 - v."""

    name: str
    of: "Sum | Function"


@dataclass(eq=False)
class Product:
    """A gate, or 1 minus it, times something."""

    gate: Function
    other: "Symbol"


class Blend(NamedTuple):
    """The sum of two products."""

    one: Product
    two: Product


@dataclass(frozen=True)
class Step:
    """The number of the step, plus `more`."""

    more: int


@dataclass(frozen=True)
class Before:
    """Whether the number of the step, plus `more`, is less than T."""

    more: int
    T: Length


Symbol: TypeAlias = Value | Variable | Sum | Function | Product | Blend | Step | Before


class Equations(NamedTuple):
    """The affine functions of x and of h for r, z and n, and where the reset gate acts."""

    inputs: list[Affine]
    recurrents: list[Affine]
    after: bool


@dataclass(eq=False)
class Cell:
    """The values inside of the body, and the sequence that its steps read."""

    walk: Walk
    values: dict[str, Symbol]
    sequence: SymbolicArray | None = None


def loop(
    walk: Walk, node: Node, count: Value, running: Value, *carried: Value
) -> tuple[Value, ...]:
    """The operator Loop; return what the steps carry on, and the states of all steps."""
    body: Body = node.attributes["body"]
    cell = Cell(walk, {**walk.values, **dict(body.constants)})
    start = [_start(v) for v in carried]
    cell.values |= dict(zip(body.inputs, [Step(0), running, *start], strict=True))
    for inner in body.nodes:
        _evaluate(cell, inner)
    condition, *after = (cell.values[name] for name in body.outputs)
    last, scans = after[: len(start)], after[len(start) :]
    states = [i for i, v in enumerate(start) if v is H]
    if len(states) != 1 or cell.sequence is None:
        node.refuse("carries another number of states than one from step to step")
    h = last[states[0]]
    for before, now in zip(start, last, strict=True):
        counted = isinstance(before, Step) and now == Step(1)
        if before is not H and not counted and (now is not before or isinstance(before, Step)):
            node.refuse("changes from step to step what a GRU does not")
    _check_steps(node, cell.sequence, count, running, condition)
    if any(scan is not h for scan in scans):
        node.refuse("puts out something else than the states of a GRU")
    equations = _equations(h)
    if equations is None:
        node.refuse("does not compute the equations of a GRU, as this library has them")
    y, h_n = _layer(walk, node, cell.sequence, equations, carried[states[0]])
    unused = SymbolicArray("count", None, ())
    ends = [
        h_n if v is H else unused if isinstance(v, Step) else given
        for given, v in zip(carried, start, strict=True)
    ]
    return (*ends, *(y for _ in scans))


def _start(v: Value) -> Symbol:
    """Return the symbol for a carried value within the body of the loop."""
    if isinstance(v, (Zeros, SymbolicArray)):
        return H
    if isinstance(v, np.ndarray) and v.dtype.kind == "i" and v.ndim == 0 and v == 0:
        return Step(0)
    return v


def _check_steps(
    node: Node, x: SymbolicArray, count: Value, running: Value, condition: Symbol
) -> None:
    """Refuse a loop that does not take every step of the sequence."""
    T = size(x.axes[0])
    whole = [
        isinstance(count, np.ndarray) and count.size == 1 and count.flat[0] == T,
        running is None or (isinstance(running, Positive) and running.size == T) or _true(running),
        condition in (Before(0, T), Before(1, T)) or condition is running or _true(condition),
    ]
    if not all(whole):
        node.refuse(f"takes other steps than the {T} of the sequence")


def _true(v: Symbol) -> bool:
    return isinstance(v, np.ndarray) and v.dtype == bool and bool(v.all())


def _equations(h: Symbol) -> Equations | None:
    """Match the next state with the equations; None where it is something else."""
    match h:
        case Blend(Product(z, Variable("h")), Product(Function("1 - v", gate), new)):
            pass
        case Blend(Product(Function("1 - v", gate), new), Product(z, Variable("h"))):
            pass
        case _:
            return None
    match new:
        case Function("tanh", Sum(terms, gated)) if gate is z:
            pass
        case _:
            return None
    match gated or [k for k in terms if isinstance(k, Product)]:
        case Product(r, Sum(inner, None)) if set(terms) == {X} and set(inner) == {H}:
            recurrent = inner[H]
        case [Product(r, Variable("h")) as reset] if set(terms) == {X, reset}:
            recurrent = terms[reset]
        case _:
            return None
    inputs, recurrents = [], []
    for v in (r, z):
        match v:
            case Function("sigmoid", Sum(inner, None)) if set(inner) == {X, H}:
                inputs.append(inner[X])
                recurrents.append(inner[H])
            case _:
                return None
    return Equations([*inputs, terms[X]], [*recurrents, recurrent], gated is not None)


def _layer(
    walk: Walk, node: Node, x: SymbolicArray, equations: Equations, start: Value
) -> GRUOutputs:
    inputs, recurrents, after = equations
    params = {"weight_ih": _rows(inputs), "weight_hh": _rows(recurrents)}
    if any(b is not None for _, b in (*inputs, *recurrents)):
        b, c = _biases(inputs), _biases(recurrents)
        walk.summed |= bool(c.any()) and not after
        params |= {"bias_ih": b, "bias_hh": c} if after else {"bias_ih": b + c}
    H = params["weight_hh"].shape[1]
    if isinstance(start, SymbolicArray):
        start = start.arranged(((), *start.axes))
    suffix, direction = ("_reverse", "reverse") if x.flipped else ("", "forward")
    params = {f"{name}_l0{suffix}": v for name, v in params.items()}
    walk.open_for_twin(node, x, direction)
    layer = FoundLayer("GRU", {"reset_after": after}, params)
    layer.first = walk.first_state(first_state(walk, node, start, 1, H, 0))
    walk.lengths.add(None)
    y, h_n = add_gru(walk, node, x, layer, direction)
    return GRUOutputs(y.arranged((y.axes[0], *y.axes[2:])), h_n.arranged(h_n.axes[1:]))


def _rows(parts: Sequence[Affine]) -> HostArray:
    return np.concatenate([W for W, _ in parts], axis=1).T


def _biases(parts: Sequence[Affine]) -> HostArray:
    return np.concatenate([np.zeros_like(W[0]) if b is None else b for W, b in parts])


# the body ----------------------------------------------------------------------------------------


def _evaluate(cell: Cell, node: Node) -> None:
    """Find what one node of the body puts out."""
    if set(node.inputs) - set(cell.values):
        node.refuse("reads what nothing before it makes")
    arguments = [cell.values[name] for name in node.inputs]
    results: Any
    if all(v is None or isinstance(v, (np.ndarray, Zeros)) for v in arguments):
        if node.op not in MOVES:
            node.refuse("is no part of a GRU")
        cell.walk.spend(node, arguments)
        results = MOVES[node.op](node, *arguments)
    elif node.op in STEPS:
        results = STEPS[node.op](cell, node, *arguments)
    else:
        node.refuse("is no part of a GRU")
    results = results if node.op == "Split" else (results,)
    cell.values |= dict(zip(node.outputs, results, strict=True))


def _same(cell: Cell, node: Node, v: Symbol) -> Symbol:
    return v


def _step_of(cell: Cell, node: Node, v: Symbol, at: Symbol) -> Variable:
    """Take x_t."""
    if not isinstance(v, SymbolicArray) or len(v.axes) != 3 or node.attributes.get("axis"):
        node.refuse("takes something else than a step of the sequence")
    if at != Step(0):
        node.refuse("takes something else than a step of the sequence")
    if cell.sequence not in (None, v):
        node.refuse("takes a step of a second sequence")
    cell.sequence = v
    return X


def _product(cell: Cell, node: Node, v: Symbol, W: Symbol) -> Sum:
    if isinstance(W, np.ndarray) and W.ndim == 2:
        match v:
            case Variable() | Product(Function("sigmoid"), Variable("h")):
                return Sum({v: Affine(W, None)})
    return node.refuse("multiplies what the equations of a GRU do not")


def _add(cell: Cell, node: Node, *terms: Symbol) -> Symbol:
    match sorted(terms, key=lambda v: isinstance(v, (np.ndarray, Product))):
        case [Step(more), np.ndarray() as number]:
            return Step(more + int(number))
        case [Product() as one, Product() as two]:
            return Blend(one, two)
        case [Sum(of, None), np.ndarray() as b] if len(of) == 1:
            ((v, (W, before)),) = of.items()
            if before is None and b.shape[-1:] == (b.size,) == W.shape[1:]:
                return Sum({v: Affine(W, b.reshape(-1))})
        case [Sum(of, None), Product(_, Sum()) as gated]:
            return Sum(of, gated)
        case [Sum(one, a), Sum(two, b)] if not set(one) & set(two) and (a is None or b is None):
            return Sum(one | two, a or b)
    return node.refuse("adds what the equations of a GRU do not")


def _subtract(cell: Cell, node: Node, one: Symbol, v: Symbol) -> Function:
    unit = isinstance(one, np.ndarray) and one.size == 1 and one == 1
    if not unit or not isinstance(v, Function) or v.name != "sigmoid":
        node.refuse("subtracts what the equations of a GRU do not")
    return Function("1 - v", v)


def _multiply(cell: Cell, node: Node, a: Symbol, b: Symbol) -> Product:
    gates = [v for v in (a, b) if isinstance(v, Function) and v.name != "tanh"]
    if len(gates) != 1:
        node.refuse("multiplies what the equations of a GRU do not")
    return Product(gates[0], b if a is gates[0] else a)


def _function(cell: Cell, node: Node, v: Symbol) -> Function:
    if not isinstance(v, Sum):
        node.refuse("is taken of what the equations of a GRU do not")
    return Function(node.op.lower(), v)


def _split(cell: Cell, node: Node, v: Symbol, sizes: Symbol = None) -> tuple[Sum, ...]:
    if not isinstance(v, Sum) or node.attributes.get("axis", 0) not in (1, -1) or sizes is not None:
        node.refuse("cuts what the equations of a GRU do not")
    parts = len(node.outputs)
    width = next(iter(v.terms.values())).W.shape[1] // parts
    return tuple(_columns(node, v, slice(i * width, i * width + width)) for i in range(parts))


def _cut(cell: Cell, node: Node, v: Symbol, *bounds: Symbol) -> Sum:
    """Take columns, with all their rows."""
    numbers = [[int(i) for i in b.flat] for b in bounds if isinstance(b, np.ndarray)]
    starts, ends, axes, *steps = numbers
    slices = dict(zip((a % 2 for a in axes), zip(starts, ends, strict=True), strict=True))
    start, end = slices.get(0, (0, WHOLE))
    whole = start == 0 and end >= WHOLE and len(numbers) == len(bounds)
    if not isinstance(v, Sum) or not whole or (steps and set(steps[0]) != {1}):
        node.refuse("cuts what the equations of a GRU do not")
    return _columns(node, v, slice(*slices.get(1, (0, WHOLE))))


def _columns(node: Node, v: Sum, part: slice) -> Sum:
    if v.gated is not None:
        node.refuse("cuts what the equations of a GRU do not")
    cut = {k: Affine(W[:, part], None if b is None else b[part]) for k, (W, b) in v.terms.items()}
    return Sum(cut)


def _less(cell: Cell, node: Node, step: Symbol, T: Symbol) -> Before:
    if not isinstance(step, Step) or not isinstance(T, np.ndarray) or T.size != 1:
        node.refuse("compares what a GRU does not")
    return Before(step.more, T.flat[0])


def _both(cell: Cell, node: Node, a: Symbol, b: Symbol) -> Before:
    if not isinstance(a, Before) or not isinstance(b, Before) or a.T != b.T:
        node.refuse("combines what a GRU does not")
    return Before(max(a.more, b.more), a.T)


STEPS: dict[str, Callable[..., Any]] = {
    "Identity": _same,
    "Cast": _same,
    "Gather": _step_of,
    "MatMul": _product,
    "Add": _add,
    "Sub": _subtract,
    "Mul": _multiply,
    "Sigmoid": _function,
    "Tanh": _function,
    "Split": _split,
    "Slice": _cut,
    "Less": _less,
    "And": _both,
}
