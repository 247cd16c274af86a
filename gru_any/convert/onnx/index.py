"""Negative indices counted from the end, which Keras' exporter spells out before an Embedding.

    (x < 0) * (x + n) + (1 - (x < 0)) * x

An Embedding here takes 0 to n - 1 alone, for which this is x.
"""

from dataclasses import replace

import numpy as np

from ...typing import HostArray
from .axes import SymbolicArray, Value, symbolic
from .check import Node
from .walk import Walk

KINDS = ("shifted", "negative", "natural", "wrapped", "kept")


def shift(node: Node, x: SymbolicArray, n: HostArray) -> SymbolicArray:
    """x + n."""
    return replace(x, kind="shifted", key=(x.key[0], int(n)))


def negative(walk: Walk, node: Node, x: Value, zero: Value) -> SymbolicArray:
    """The operator Less: x < 0."""
    if not isinstance(x, SymbolicArray) or x.kind not in ("input", "number"):
        node.refuse("compares what is no index")
    if not isinstance(zero, np.ndarray) or zero.size != 1 or zero.any():
        node.refuse("compares an index with something else than 0")
    return replace(x, kind="negative", key=(x.key[0], 0))


def natural(walk: Walk, node: Node, x: Value) -> SymbolicArray:
    """The operator Not: x >= 0."""
    x = symbolic(x)
    if x.kind != "negative":
        node.refuse("negates what is not whether an index is negative")
    return replace(x, kind="natural")


def choose(walk: Walk, node: Node, *factors: Value) -> SymbolicArray:
    """The operator Mul: one of the two terms."""
    found = {v.kind if isinstance(v, SymbolicArray) else "": v for v in factors}
    for one, other, kind in (("negative", "shifted", "wrapped"), ("natural", "input", "kept")):
        if set(found) == {one, other}:
            term = symbolic(found[other])
            if term.key[0] == symbolic(found[one]).key[0]:
                return replace(term, kind=kind)
    return node.refuse("multiplies what no layer does")


def whole(walk: Walk, node: Node, *terms: Value) -> SymbolicArray:
    """The operator Add: the sum of both terms. The Embedding checks that n is its own."""
    found = {symbolic(v).kind: symbolic(v) for v in terms}
    if set(found) != {"wrapped", "kept"} or len({v.key[0] for v in found.values()}) != 1:
        node.refuse("adds what is not the two halves of an index")
    walk.vocabulary = found["wrapped"].key[1]
    return replace(found["kept"], kind="input")
