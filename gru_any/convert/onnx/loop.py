"""A GRU whose steps stand in the body of the operator Loop, as Keras' exporter writes them.

The body is evaluated with symbols in place of numbers. What comes out is compared with

    h' = z * h + (1 - z) * n,   z = sigmoid(x W_z + b_z + h U_z + c_z),   r likewise
    n = tanh(x W_n + b_n + r * (h U_n + c_n))   or   n = tanh(x W_n + b_n + (r * h) U_n)

so that it does not matter in which order an exporter multiplies, adds and cuts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .axes import Array, Layer, Positive, Zeros, size
from .check import Body, Node
from .gru import add_gru, first_state
from .moves import MOVES

X, H = "x", "h"  # what a step reads
WHOLE = 2**31 - 1  # as the end of a slice


@dataclass(eq=False)
class Sum:
    """Products with weights, and biases: what is multiplied -> (W, b). Perhaps r * (h U + c)."""

    terms: dict[Any, tuple[np.ndarray, np.ndarray | None]]
    gated: "Product | None" = None


@dataclass(eq=False)
class Function:
    """sigmoid(v), tanh(v) or, of a sigmoid, 1 - v."""

    name: str
    of: Any


@dataclass(eq=False)
class Product:
    """A gate, or 1 minus it, times something."""

    gate: Function
    other: Any


@dataclass(frozen=True)
class Step:
    """The number of the step, and so much more."""

    more: int


@dataclass(frozen=True)
class Before:
    """Whether the number of the step, and so much more, is less than T."""

    more: int
    T: Any


@dataclass(eq=False)
class Cell:
    """What is known inside of the body."""

    walk: Any
    values: dict[str, Any]
    sequence: Array | None = None


def loop(walk: Any, node: Node, count: Any, running: Any, *carried: Any) -> tuple[Any, ...]:
    """The operator Loop -> what the steps carry on, and the states stacked."""
    body: Body = node.attributes["body"]
    cell = Cell(walk, walk.values | dict(body.constants))
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
    y, h_n = _found(walk, node, cell.sequence, h, carried[states[0]])
    unused = Array("count", None, ())
    ends = [h_n if v is H else unused if isinstance(v, Step) else v for v in start]
    return (*ends, *(y for _ in scans))


def _start(v: Any) -> Any:
    """What a carried value is inside of the body."""
    if isinstance(v, (Zeros, Array)):
        return H
    if isinstance(v, np.ndarray) and v.dtype.kind == "i" and v.ndim == 0 and v == 0:
        return Step(0)
    return v


def _check_steps(node: Node, x: Array, count: Any, running: Any, condition: Any) -> None:
    """Refuse a loop that does not take every step of the sequence."""
    T = size(x.axes[0])
    whole = [
        isinstance(count, np.ndarray) and count.size == 1 and count.flat[0] == T,
        running is None or (isinstance(running, Positive) and running.size == T) or _true(running),
        condition in (Before(0, T), Before(1, T)) or condition is running or _true(condition),
    ]
    if not all(whole):
        node.refuse(f"takes other steps than the {T} of the sequence")


def _true(v: Any) -> bool:
    return isinstance(v, np.ndarray) and v.dtype == bool and bool(v.all())


def _found(walk: Any, node: Node, x: Array, h: Any, start: Any) -> tuple[Array, Array]:
    """Match the next state with the equations."""
    try:
        z, n = _gate_and_candidate(h)
        product: Any = n.gated or next(k for k in n.terms if isinstance(k, Product))
        after, r = n.gated is not None, product.gate
        recurrent = product.other.terms[H] if after else n.terms[product]
        parts = [(r.of.terms[X], r.of.terms[H]), (z.of.terms[X], z.of.terms[H])]
        parts.append((n.terms[X], recurrent))
        ours = [
            r.name == z.name == "sigmoid",
            all(set(v.of.terms) == {X, H} and v.of.gated is None for v in (r, z)),
            set(n.terms) == ({X} if after else {X, product}),
            not after or (set(product.other.terms) == {H} and product.other.gated is None),
        ]
    except (AttributeError, KeyError, StopIteration, ValueError, TypeError):
        ours = [False]
    if not all(ours):
        node.refuse("does not compute the equations of a GRU, as this library has them")
    return _layer(walk, node, x, parts, after, start)


def _gate_and_candidate(h: Any) -> tuple[Function, Sum]:
    """Take z * h + (1 - z) * n apart."""
    (kept, new) = sorted(h, key=lambda product: product.other is not H)
    if kept.other is not H or new.gate.name != "1 - v" or new.gate.of is not kept.gate:
        raise ValueError
    if new.other.name != "tanh":
        raise ValueError
    return kept.gate, new.other.of


def _layer(
    walk: Any, node: Node, x: Array, parts: list[Any], after: bool, start: Any
) -> tuple[Array, Array]:
    inputs, recurrents = ([part[i] for part in parts] for i in (0, 1))
    bias = any(b is not None for _, b in (*inputs, *recurrents))
    params = {"weight_ih": _rows(inputs), "weight_hh": _rows(recurrents)}
    if bias:
        b, c = _biases(inputs), _biases(recurrents)
        walk.summed |= bool(c.any()) and not after
        params |= {"bias_ih": b, "bias_hh": c} if after else {"bias_ih": b + c}
    params = {f"{name}_l0": v for name, v in params.items()}
    units = params["weight_hh_l0"].shape[1]
    if isinstance(start, Array):
        start = start.arranged(((), *start.axes))
    if x.flipped:
        params = {f"{name}_reverse": v for name, v in params.items()}
    direction = "reverse" if x.flipped else "forward"
    walk.open_for_twin(node, x, direction)
    layer = Layer("GRU", {"reset_after": after}, params)
    layer.first = walk.starts(first_state(walk, node, start, 1, units, 0))
    walk.lengths.add(None)
    y, h_n = add_gru(walk, node, x, layer, direction)
    return y.arranged((y.axes[0], *y.axes[2:])), h_n.arranged(h_n.axes[1:])


def _rows(terms: list[Any]) -> np.ndarray:
    return np.concatenate([W for W, _ in terms], axis=1).T


def _biases(terms: list[Any]) -> np.ndarray:
    return np.concatenate([np.zeros_like(W[0]) if b is None else b for W, b in terms])


# the body ----------------------------------------------------------------------------------------


def _evaluate(cell: Cell, node: Node) -> None:
    """Find what one node of the body puts out."""
    if set(node.inputs) - set(cell.values):
        node.refuse("reads what nothing before it makes")
    arguments = [cell.values[name] for name in node.inputs]
    if all(v is None or isinstance(v, (np.ndarray, Zeros)) for v in arguments):
        if node.op not in MOVES:
            node.refuse("is no part of a GRU")
        cell.walk.spend(node, arguments)
        results = MOVES[node.op](node, cell.walk.known, *arguments)
    elif node.op in STEPS:
        results = STEPS[node.op](cell, node, *arguments)
    else:
        node.refuse("is no part of a GRU")
    results = results if isinstance(results, tuple) and node.op == "Split" else (results,)
    cell.values |= dict(zip(node.outputs, results, strict=True))


def _same(cell: Cell, node: Node, v: Any) -> Any:
    return v


def _step_of(cell: Cell, node: Node, v: Any, at: Any) -> Any:
    """Take x_t."""
    if at != Step(0) or not isinstance(v, Array) or len(v.axes) != 3 or node.attributes.get("axis"):
        node.refuse("takes something else than a step of the sequence")
    if cell.sequence not in (None, v):
        node.refuse("takes a step of a second sequence")
    cell.sequence = v
    return X


def _product(cell: Cell, node: Node, v: Any, W: Any) -> Sum:
    reset = isinstance(v, Product) and v.other is H and v.gate.name == "sigmoid"
    if not (v is X or v is H or reset) or not isinstance(W, np.ndarray) or W.ndim != 2:
        node.refuse("multiplies what the equations of a GRU do not")
    return Sum({v: (W, None)})


def _add(cell: Cell, node: Node, *terms: Any) -> Any:
    kinds = {type(v) for v in terms}
    if kinds == {Step, np.ndarray}:
        step, more = sorted(terms, key=lambda v: isinstance(v, np.ndarray))
        return Step(step.more + int(more))
    if kinds == {Product}:
        return terms
    if kinds == {Sum, np.ndarray}:
        v, b = sorted(terms, key=lambda v: isinstance(v, np.ndarray))
        (basis, (W, before)), *more = v.terms.items()
        alone = before is None and not more and v.gated is None
        if alone and b.shape[-1:] == (b.size,) == W.shape[1:]:
            return Sum({basis: (W, b.reshape(-1))})
    if kinds == {Sum, Product}:
        v, product = sorted(terms, key=lambda v: isinstance(v, Product))
        if v.gated is None and isinstance(product.other, Sum):
            return Sum(v.terms, product)
    if kinds == {Sum} and not set(terms[0].terms) & set(terms[1].terms):
        gated = [v.gated for v in terms if v.gated is not None]
        if len(gated) < 2:
            return Sum(terms[0].terms | terms[1].terms, *gated)
    return node.refuse("adds what the equations of a GRU do not")


def _subtract(cell: Cell, node: Node, one: Any, v: Any) -> Function:
    unit = isinstance(one, np.ndarray) and one.size == 1 and one == 1
    if not unit or not isinstance(v, Function) or v.name != "sigmoid":
        node.refuse("subtracts what the equations of a GRU do not")
    return Function("1 - v", v)


def _multiply(cell: Cell, node: Node, *factors: Any) -> Product:
    gates = [v for v in factors if isinstance(v, Function) and v.name != "tanh"]
    if len(gates) != 1:
        node.refuse("multiplies what the equations of a GRU do not")
    return Product(gates[0], factors[factors[0] is gates[0]])


def _function(cell: Cell, node: Node, v: Any) -> Function:
    if not isinstance(v, Sum):
        node.refuse("is taken of what the equations of a GRU do not")
    return Function(node.op.lower(), v)


def _split(cell: Cell, node: Node, v: Any, sizes: Any = None) -> tuple[Any, ...]:
    if not isinstance(v, Sum) or node.attributes.get("axis", 0) not in (1, -1) or sizes is not None:
        node.refuse("cuts what the equations of a GRU do not")
    parts = len(node.outputs)
    width = next(iter(v.terms.values()))[0].shape[1] // parts
    return tuple(_columns(node, v, slice(i * width, i * width + width)) for i in range(parts))


def _cut(cell: Cell, node: Node, v: Any, *bounds: Any) -> Sum:
    """Cut columns, and all rows."""
    starts, ends, axes, *steps = ([int(i) for i in b.flat] for b in bounds)
    slices = dict(zip((a % 2 for a in axes), zip(starts, ends, strict=True), strict=True))
    start, end = slices.get(0, (0, WHOLE))
    if not isinstance(v, Sum) or start or end < WHOLE or (steps and set(steps[0]) != {1}):
        node.refuse("cuts what the equations of a GRU do not")
    return _columns(node, v, slice(*slices.get(1, (0, WHOLE))))


def _columns(node: Node, v: Sum, part: slice) -> Sum:
    if v.gated is not None:
        node.refuse("cuts what the equations of a GRU do not")
    return Sum({k: (W[:, part], None if b is None else b[part]) for k, (W, b) in v.terms.items()})


def _less(cell: Cell, node: Node, step: Any, T: Any) -> Before:
    if not isinstance(step, Step) or not isinstance(T, np.ndarray) or T.size != 1:
        node.refuse("compares what a GRU does not")
    return Before(step.more, T.flat[0])


def _both(cell: Cell, node: Node, a: Any, b: Any) -> Before:
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
