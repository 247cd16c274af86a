"""The arrays of a Keras layer and ours, in memory."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from ...nn.chain import Chain
from ...nn.gru import GRU
from ...nn.layers import Dropout, Embedding, Last, Linear
from ...nn.params import Layer
from ...typing import Array, HostArray
from ..cells import ours
from ..table import Cell, Table, floating, read, write

Model: TypeAlias = GRU | Linear | Embedding | Dropout | Last | Chain  # what a file can become

BEFORE = Table(
    "Keras with reset_after=False",
    reset_after=False,
    rows={"kernel": "W_z W_r W_n", "recurrent_kernel": "U_z U_r U_n", "bias": "b_z b_r b_n"},
    transposed=True,
    bias_optional=True,
)
AFTER = Table(
    "Keras with reset_after=True",
    reset_after=True,
    rows=BEFORE.rows | {"recurrent_bias": "c_z c_r c_n"},  # the two rows of its bias
    transposed=True,
    bias_optional=True,
)


def read_cell(weights: Sequence[Array], reset_after: bool) -> Cell:
    """Convert the arrays of a Keras cell to ours."""
    arrays = [floating(f"array {i}", a) for i, a in enumerate(weights)]
    bias = arrays[2:]
    if bias and bias[0].ndim != 1 + reset_after:
        other = "before" if reset_after else "after"
        raise ValueError(f"the bias is {bias[0].shape}, which is one with the reset gate {other}")
    if bias and reset_after:
        bias = list(bias[0])
    table = AFTER if reset_after else BEFORE
    return read(table, dict(zip(table.rows, arrays[:2] + bias, strict=False)))


def write_cell(cell: Cell, reset_after: bool) -> list[HostArray]:
    """Convert our arrays of one layer and direction to those of a Keras cell."""
    kernel, recurrent, *bias = write(AFTER if reset_after else BEFORE, cell, reset_after).values()
    return [kernel, recurrent, *([np.stack(bias)] if len(bias) == 2 else bias)]


def layer_arrays(layer: Layer) -> list[HostArray]:
    """Return the arrays of a layer as Keras' `get_weights()` lists them."""
    if isinstance(layer, GRU):
        return [array for cell in ours(layer) for array in write_cell(cell, layer.reset_after)]
    arrays = [floating(name, a) for name, a in layer.params.items()]
    return [np.ascontiguousarray(a.T) if isinstance(layer, Linear) else a for a in arrays]
