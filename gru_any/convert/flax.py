"""Flax, linen and nnx: `GRUCell`. Reset after, gates in order r, z, n.

linen has one kernel for each gate and operand, and biases b_r, b_z, b_n and c_n. nnx has one matrix
for the input, with a bias, and one for the state, without: c_n has no counterpart there
(https://flax.readthedocs.io).
"""

from collections.abc import ItemsView, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

from ..nn.gru import GRU
from ..typing import Array, Arrays
from .cells import cells_of, gru_of
from .table import Table

LINEN = Table(
    "Flax linen",
    reset_after=True,
    rows={
        "ir/kernel": "W_r",
        "ir/bias": "b_r+c_r",
        "iz/kernel": "W_z",
        "iz/bias": "b_z+c_z",
        "in/kernel": "W_n",
        "in/bias": "b_n",
        "hr/kernel": "U_r",
        "hz/kernel": "U_z",
        "hn/kernel": "U_n",
        "hn/bias": "c_n",
    },
    transposed=True,
)
NNX = Table(
    "Flax nnx",
    reset_after=True,
    rows={
        "dense_i/kernel": "W_r W_z W_n",
        "dense_i/bias": "b_r+c_r b_z+c_z b_n",
        "dense_h/kernel": "U_r U_z U_n",
    },
    transposed=True,
)
TABLES = {"linen": LINEN, "nnx": NNX}
DIRECTIONS = ("forward_rnn", "backward_rnn")

Nested: TypeAlias = dict[str, Any]  # an array, or more of the same, by name


@runtime_checkable
class Tree(Protocol):
    """Nested mappings of Flax, whose keys are names or paths."""

    def items(self) -> ItemsView[Any, Any]:
        """Return the keys with what stands under them: arrays or trees."""


def from_arrays(layers: Tree | Iterable[Tree], *, batch_first: bool = True) -> GRU:
    """A GRU from the parameters of its layers; x is (B, T, I) unless `batch_first=False`.

    Parameters
    ----------
    layers : nested mappings of one layer, or a list of them
        As linen's `init` or nnx's `state` and `to_pure_dict(state(...))` give them of a GRUCell, an
        RNN over one, or a Bidirectional over two such RNNs; also flat, by path. The state of random
        numbers (`rngs`) and collections other than `params` are ignored.

    Raises
    ------
    KeyError, ValueError, TypeError
        A name is missing or unused; a shape or dtype does not fit.
    """
    trees = [layers] if isinstance(layers, Tree) else layers
    cells = [[dict(_flat(cell)) for cell in _directions(_weights(tree))] for tree in trees]
    directions = {len(layer) for layer in cells}
    if len(directions) > 1:
        raise ValueError("some layers have two directions and some one: make one GRU of each kind")
    flat = [cell for layer in cells for cell in layer]
    table = NNX if any("dense_i/kernel" in cell for cell in flat[:1]) else LINEN
    return gru_of(table, flat, directions == {2}, batch_first)


def to_arrays(gru: GRU, api: str = "linen") -> list[Nested]:
    """The parameters of each layer, for an RNN over a GRUCell, or a Bidirectional over two.

    Flax always has biases: without them here, they are written as zeros.

    Parameters
    ----------
    gru : GRU with reset_after
    api : "linen" or "nnx"

    Raises
    ------
    ValueError
        reset_after is False; or c_n is not 0, for which nnx has no counterpart.
    """
    if api not in TABLES:
        raise ValueError(f'api is {api!r}, expected "linen" or "nnx"')
    cells = [{"cell": _nested(cell)} for cell in cells_of(TABLES[api], gru)]
    if len(gru.suffixes) == 1:
        return cells
    pairs = zip(cells[::2], cells[1::2], strict=True)
    return [dict(zip(DIRECTIONS, pair, strict=True)) for pair in pairs]


def _directions(layer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The cells of a layer, forward before reverse, without the modules around them."""
    if set(layer) == set(DIRECTIONS):
        return [cell for name in DIRECTIONS for cell in _directions(layer[name])]
    inner = list(layer.values())
    if len(inner) == 1 and isinstance(inner[0], Mapping):
        return _directions(inner[0])
    return [layer]


def _weights(tree: Tree) -> Nested:
    """The parameters as nested dicts, without what else a module or its variables hold."""
    named = dict(_flat(tree))
    if any(name.startswith("params/") for name in named):
        named = {name: v for name, v in named.items() if name.startswith("params/")}
    return _nested({name: v for name, v in named.items() if "rngs" not in name.split("/")})


def _flat(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Array]]:
    """Each array by its path, which may be a tuple in a flat state of nnx."""
    for key, value in tree.items():
        name = prefix + ("/".join(map(str, key)) if isinstance(key, tuple) else str(key))
        if isinstance(value, Tree):
            yield from _flat(value, f"{name}/")
        else:
            yield name, value


def _nested(flat: Arrays) -> Nested:
    tree: Nested = {}
    for name, array in flat.items():
        *folders, leaf = name.split("/")
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[leaf] = array
    return tree
