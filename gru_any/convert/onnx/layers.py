"""The operators that are layers: what each must be given, and what it puts out."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ...typing import HostArray
from . import index, last, sort, sums
from .axes import Atom, FoundLayer, Results, SymbolicArray, Value, size, symbolic
from .check import Node, dtype_name
from .directions import combined, cut, join, reverse_sequence
from .gru import empty, gru, keep
from .loop import loop
from .reshape import reshape
from .walk import COMBINED, Walk


def embedding(walk: Walk, node: Node, table: Value, x: Value) -> SymbolicArray | None:
    """The operator Gather, where it takes rows of a table of weights."""
    if isinstance(table, SymbolicArray):
        if isinstance(x, SymbolicArray) and x.kind in ("order", "inverse"):
            return sort.arrange(node, table, x)
        if table.kind == "layer" and isinstance(x, np.ndarray) and x.size == 1:
            return _picked(walk, node, table, x)
    if not isinstance(table, np.ndarray) or table.dtype.kind != "f":
        return None
    if node.attributes.get("axis", 0) or walk.stage:
        node.refuse("takes something else than rows of a table by the integers of the input")
    x = walk.sequence(node, x)
    if not walk.types[walk.entry].startswith("int"):
        node.refuse(f"takes rows by an input of dtype {walk.types[walk.entry]}")
    n, width = walk.check_weight(node, "table", table, (-1, -1)).shape
    if walk.vocabulary not in (None, n):
        node.refuse(
            f"counts negative indices from {walk.vocabulary}, expected {n}, the rows of the table"
        )
    layer = FoundLayer("Embedding", {"n": n, "size": width}, {"weight": table})
    features = (Atom("embedding", width),)
    return SymbolicArray("layer", walk.put_out(node, layer, features), (*x.axes, features))


def _picked(walk: Walk, node: Node, v: SymbolicArray, at: HostArray) -> SymbolicArray | None:
    """Return the element that Gather or Slice takes: one step, or one of two directions."""
    axis = node.attributes.get("axis", 0) % len(v.axes)
    if at.dtype.kind != "i":
        return None
    found = sums.half(v, axis, int(at.flat[0])) if len(v.axes[axis]) == 1 else None
    if found and at.flat[0] in (0, 1) and not at.ndim:
        return found
    if any(atom.name.startswith(("directions", "units")) for atom in v.axes[axis]):
        node.refuse(COMBINED)
    state = last.step(walk, node, v, axis, int(at.flat[0]))
    if state is None or not at.ndim:
        return state
    return state.arranged((*state.axes[:axis], *((),) * at.ndim, *state.axes[axis:]))


def sliced(walk: Walk, node: Node, v: Value, *bounds: Value) -> SymbolicArray | None:
    """The operator Slice, where it takes one of two directions; else as `cut`."""
    v, given = symbolic(v), list[Any]([*bounds, *[None] * 4][:4])
    named = (node.attributes.get(k) for k in ("starts", "ends", "axes", "steps"))
    numbers = [n if b is None else b for b, n in zip(given, named, strict=True)]
    plain = [np.ravel(n).tolist() if n is not None and np.size(n) == 1 else None for n in numbers]
    if v.kind == "layer" and plain[0] and plain[1] and plain[2] and plain[3] in (None, [1]):
        start, stop, place = plain[0][0], plain[1][0], plain[2][0]
        if all(isinstance(n, int) for n in (start, stop, place)):
            found = sums.part(v, place % len(v.axes), start, stop)
            if found:
                return found
    return cut(walk, node, v, *bounds)


def linear(walk: Walk, node: Node, x: Value, W: Value) -> SymbolicArray:
    """The operator MatMul with a constant on the right."""
    x = walk.sequence(node, x)
    W = walk.check_weight(node, "weight", W, (-1, -1))
    walk.check_features(node, x.axes[-1], W.shape[0])
    settings = {"in_features": W.shape[0], "out_features": W.shape[1], "bias": False}
    features = (Atom(f"outputs {len(walk.layers)}", W.shape[1]),)
    stage = walk.put_out(node, FoundLayer("Linear", settings, {"weight": W.T}), features)
    return SymbolicArray("layer", stage, (*x.axes[:-1], features))


def gemm(walk: Walk, node: Node, x: Value, W: Value, b: Value = None) -> SymbolicArray:
    """The operator Gemm without factors."""
    a = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0} | node.attributes
    if a["alpha"] != 1 or (a["beta"] != 1 and b is not None) or a["transA"]:
        node.refuse(f"has the factors {a}, expected a plain product")
    W = walk.check_weight(node, "weight", W, (-1, -1))
    y = linear(walk, node, x, W.T if a["transB"] else W)
    return y if b is None else add(walk, node, y, b)


def add(walk: Walk, node: Node, *terms: Value) -> SymbolicArray:
    """The operator Add of two directions, of parts of an index, or of a bias to a Linear layer."""
    x, b = sorted(terms, key=lambda v: isinstance(v, np.ndarray))
    kinds = [v.kind if isinstance(v, SymbolicArray) else "" for v in (x, b)]
    if set(kinds) <= {"half", "layer", "state"}:
        return sums.added(walk, node, x, b)
    if kinds[1] in index.KINDS:
        return index.whole(walk, node, x, b)
    if isinstance(b, np.ndarray) and b.dtype.kind == "i" and b.size == 1 and kinds[0] == "input":
        return index.shift(node, symbolic(x), b)
    return _bias(walk, node, x, b)


def _bias(walk: Walk, node: Node, x: Value, b: Value) -> SymbolicArray:
    """Add a bias to the Linear layer just before."""
    x, layer = walk.sequence(node, x), walk.layers[-1] if walk.layers else None
    if not isinstance(b, np.ndarray) or layer is None or layer.kind != "Linear":
        node.refuse("adds what is not the bias of a Linear layer just before")
    width = layer.settings["out_features"]
    walk.check_features(node, x.axes[-1], width)
    if layer.settings["bias"]:
        node.refuse("adds a second bias to a Linear layer")
    if b.dtype.name != walk.dtype or b.size not in (1, width) or b.size != math.prod(b.shape[-1:]):
        node.refuse(f"adds numbers of shape {b.shape}, expected a bias ({width},)")
    layer.params["bias"] = np.broadcast_to(b.reshape(-1), (width,))
    layer.settings["bias"] = True
    walk.stage += 1
    return SymbolicArray("layer", walk.stage, x.axes)


def cast(walk: Walk, node: Node, v: Value) -> SymbolicArray:
    """The operator Cast, where it changes nothing."""
    v, target = symbolic(v), dtype_name(node.attributes["to"])
    dtype = walk.types[v.key[0]] if v.kind == "input" else walk.dtype
    if v.kind == "input" and dtype.startswith("int") and target == "float32":
        return replace(v, kind="number")
    integers = target.startswith("int") and (v.kind in INTEGERS or dtype.startswith("int"))
    if target != dtype and not integers:
        node.refuse(f"casts from {dtype} to {target}; a model here has one dtype")
    return v


def multiply(walk: Walk, node: Node, a: Value, b: Value) -> SymbolicArray:
    """The operator Mul of a sum of directions by a number, or of the parts of an index."""
    return sums.scaled(walk, node, a, b) or index.choose(walk, node, a, b)


def divide(walk: Walk, node: Node, v: Value, by: Value) -> SymbolicArray:
    """The operator Div of a sum of directions by a number."""
    if isinstance(by, np.ndarray) and by.size == 1 and by.all():
        return sums.scaled(walk, node, v, np.asarray(1 / by)) or node.refuse(COMBINED)
    return node.refuse(COMBINED)


def sum_or_split(walk: Walk, node: Node, v: Value, *others: Value) -> Results:
    """The operators Sum, Mean, ReduceSum and ReduceMean of two directions, and Split into them."""
    factor = 0.5 if "Mean" in node.op else 1.0
    if node.op.startswith("Reduce") and len(others) < 2:
        return sums.reduced(walk, node, v, others[0] if others else None, factor)
    if node.op in ("Sum", "Mean") and len(others) == 1:
        return sums.added(walk, node, v, others[0], factor)
    if node.op == "Split" and isinstance(v, SymbolicArray) and len(node.outputs) == 2:
        place = node.attributes.get("axis", 0) % len(v.axes)
        width = size(v.axes[place][1:])
        given: Any = others[0] if others else node.attributes.get("split", [width] * 2)
        halves = [sums.half(v, place, d, kept=True) for d in (0, 1)]
        if None not in halves and np.ravel(given).tolist() == [width, width]:
            return tuple(halves)
    return combined(walk, node, v, *others)


INTEGERS = (*index.KINDS, *sort.KINDS)
LAYERS: dict[str, Callable[..., Results]] = {
    "GRU": gru,
    "Loop": loop,
    "Gather": embedding,
    "MatMul": linear,
    "Gemm": gemm,
    "Add": add,
    "Cast": cast,
    "Reshape": reshape,
    "ReverseSequence": reverse_sequence,
    "Slice": sliced,
    **dict.fromkeys(("Sum", "Mean", "Split", "ReduceSum", "ReduceMean"), sum_or_split),
    **dict.fromkeys(("Max", "ReduceMax"), combined),
    "Concat": join,
    "Equal": empty,
    "Less": index.negative,
    "Not": index.natural,
    "Mul": multiply,
    "Div": divide,
    "TopK": sort.order,
    "ScatterElements": sort.inverse,
    "Where": keep,
}
