"""Negative indices counted from the end, which Keras' exporter spells out before an Embedding.

    (x < 0) * (x + n) + (1 - (x < 0)) * x

An Embedding here takes 0 to n - 1 alone, for which this is x.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from .axes import Array
from .check import Node

KINDS = ("shifted", "negative", "natural", "wrapped", "kept")


def shift(node: Node, x: Array, n: np.ndarray) -> Array:
    """X + n."""
    return replace(x, kind="shifted", key=(x.key[0], int(n)))


def negative(walk: Any, node: Node, x: Any, zero: Any) -> Array:
    """The operator Less: x < 0."""
    if not isinstance(x, Array) or x.kind not in ("input", "number"):
        node.refuse("compares what is no index")
    if not isinstance(zero, np.ndarray) or zero.size != 1 or zero.any():
        node.refuse("compares an index with something else than 0")
    return replace(x, kind="negative", key=(x.key[0], 0))


def natural(walk: Any, node: Node, x: Any) -> Array:
    """The operator Not: x >= 0."""
    if x.kind != "negative":
        node.refuse("negates what is not whether an index is negative")
    return replace(x, kind="natural")


def choose(walk: Any, node: Node, *factors: Any) -> Array:
    """The operator Mul: one of the two terms."""
    found = {getattr(v, "kind", ""): v for v in factors}
    if set(found) == {"negative", "shifted"} and len({v.key[0] for v in factors}) == 1:
        return replace(found["shifted"], kind="wrapped")
    if set(found) == {"natural", "input"} and len({v.key[0] for v in factors}) == 1:
        return replace(found["input"], kind="kept")
    return node.refuse("multiplies what no layer does")


def whole(walk: Any, node: Node, *terms: Any) -> Array:
    """The operator Add: the sum of both terms, for which n is kept until the Embedding."""
    found = {v.kind: v for v in terms}
    if set(found) != {"wrapped", "kept"} or len({v.key[0] for v in terms}) != 1:
        node.refuse("adds what is not the two halves of an index")
    walk.rows = found["wrapped"].key[1]
    return replace(found["kept"], kind="input")
