"""Batches sorted by length on the way in and put back on the way out.

PyTorch's exporter does so for packed sequences: TopK of the lengths gives the order, Gather applies
it, ScatterElements into zeros inverts it. A GRU here takes its rows in any order, so both cancel.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .axes import Array, Zeros, size
from .check import Node

KINDS = ("sorted", "order", "inverse")


@dataclass(frozen=True)
class Range:
    """The numbers from 0 to below a size."""

    size: Any


def numbers(node: Node, known: Any, start: Any, stop: Any, step: Any) -> Range:
    """The operator Range, where it counts rows."""
    if np.any(start != np.zeros(1)) or np.any(step != np.ones(1)) or np.size(stop) != 1:
        node.refuse("counts in another way than from 0 in steps of 1")
    return Range(stop.flat[0])


def order(walk: Any, node: Node, lengths: Any, count: Any) -> tuple[Array, Array]:
    """The operator TopK, where it sorts all lengths -> the lengths in order, and the order."""
    options = {"axis": -1, "largest": 1, "sorted": 1} | node.attributes
    whole = lengths.kind == "input" and len(lengths.axes) == 1 and np.size(count) == 1
    if not whole or count.flat[0] != size(lengths.axes[0]) or list(options.values()) != [-1, 1, 1]:
        node.refuse("sorts something else than all lengths, from the longest on")
    return replace(lengths, kind="sorted"), replace(lengths, kind="order")


def inverse(walk: Any, node: Node, zeros: Any, at: Any, rows: Any) -> Array:
    """The operator ScatterElements, where it inverts an order."""
    kinds = isinstance(zeros, Zeros) and isinstance(rows, Range) and isinstance(at, Array)
    if not kinds or at.kind != "order" or rows.size != size(at.axes[0]):
        node.refuse("writes something else than the inverse of an order")
    if node.attributes.get("axis", 0) not in (0, -1):
        node.refuse("writes something else than the inverse of an order")
    return replace(at, kind="inverse")


def arrange(node: Node, v: Array, at: Array) -> Array:
    """The operator Gather, where it sorts the rows of a batch or puts them back."""
    axis = v.axes[node.attributes.get("axis", 0)]
    mark = (at.key[0], axis)
    if len(axis) != 1 or v.order != (() if at.kind == "order" else mark):
        node.refuse("puts rows into an order that is not that of their lengths")
    return replace(v, order=mark if at.kind == "order" else ())
