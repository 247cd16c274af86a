"""Batches sorted by length on the way in and put back on the way out.

PyTorch's exporter does so for packed sequences: TopK of the lengths gives the order, Gather applies
it, ScatterElements into zeros inverts it. A GRU here takes its rows in any order, so both cancel.
"""

from dataclasses import replace

import numpy as np

from .axes import Order, Range, SymbolicArray, Value, Zeros, size, symbolic
from .check import Node
from .walk import Walk

KINDS = ("sorted", "order", "inverse")


def order(
    walk: Walk, node: Node, lengths: Value, count: Value
) -> tuple[SymbolicArray, SymbolicArray]:
    """The operator TopK, where it sorts all lengths; return the sorted lengths, and the order."""
    lengths = symbolic(lengths)
    options = {"axis": -1, "largest": 1, "sorted": 1} | node.attributes
    whole = lengths.kind == "input" and len(lengths.axes) == 1
    number = count.flat[0] if isinstance(count, np.ndarray) and count.size == 1 else None
    if not whole or number != size(lengths.axes[0]) or list(options.values()) != [-1, 1, 1]:
        node.refuse("sorts something else than all lengths, from the longest on")
    return replace(lengths, kind="sorted"), replace(lengths, kind="order")


def inverse(walk: Walk, node: Node, zeros: Value, at: Value, rows: Value) -> SymbolicArray:
    """The operator ScatterElements, where it inverts an order."""
    if not isinstance(at, SymbolicArray) or at.kind != "order" or not isinstance(zeros, Zeros):
        node.refuse("writes something else than the inverse of an order")
    if not isinstance(rows, Range) or rows.size != size(at.axes[0]):
        node.refuse("writes something else than the inverse of an order")
    if node.attributes.get("axis", 0) not in (0, -1):
        node.refuse("writes something else than the inverse of an order")
    return replace(at, kind="inverse")


def arrange(node: Node, v: SymbolicArray, at: SymbolicArray) -> SymbolicArray:
    """The operator Gather, where it sorts the rows of a batch or puts them back."""
    axis = v.axes[node.attributes.get("axis", 0)]
    by = Order(at.key[0], axis)
    if len(axis) != 1 or v.order != (None if at.kind == "order" else by):
        node.refuse("puts rows into an order that is not that of their lengths")
    return replace(v, order=by if at.kind == "order" else None)
