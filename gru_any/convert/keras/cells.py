"""The arrays of a Keras layer and ours, in memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...nn.gru import GRU
from ...nn.layers import Linear
from ..cells import ours
from ..table import Table, floating, read, write

BEFORE = Table(
    "Keras with reset_after=False",
    reset_after=False,
    rows={"kernel": "W_z W_r W_n", "recurrent_kernel": "U_z U_r U_n", "bias": "b_z b_r b_n"},
    turned=True,
    bias_optional=True,
)
AFTER = Table(
    "Keras with reset_after=True",
    reset_after=True,
    rows=BEFORE.rows | {"recurrent_bias": "c_z c_r c_n"},  # the two rows of its bias
    turned=True,
    bias_optional=True,
)


def read_cell(weights: Sequence[Any], reset_after: bool) -> dict[str, np.ndarray]:
    """The arrays of a Keras cell -> ours."""
    arrays = [floating(f"array {i}", a) for i, a in enumerate(weights)]
    bias: Any = arrays[2:]
    if bias and bias[0].ndim != 1 + reset_after:
        other = "before" if reset_after else "after"
        raise ValueError(f"the bias is {bias[0].shape}, which is one with the reset gate {other}")
    if bias and reset_after:
        bias = list(bias[0])
    table = AFTER if reset_after else BEFORE
    return read(table, dict(zip(table.rows, arrays[:2] + bias, strict=False)))


def write_cell(cell: Any, reset_after: bool) -> list[np.ndarray]:
    """Our arrays of one layer and direction -> those of a Keras cell."""
    kernel, recurrent, *bias = write(AFTER if reset_after else BEFORE, cell, reset_after).values()
    return [kernel, recurrent, *([np.stack(bias)] if len(bias) == 2 else bias)]


def layer_arrays(layer: Any) -> list[np.ndarray]:
    """What a layer of a Chain is in Keras."""
    if isinstance(layer, GRU):
        return [array for cell in ours(layer) for array in write_cell(cell, layer.reset_after)]
    arrays = [floating(name, a) for name, a in layer.params.items()]
    return [np.ascontiguousarray(a.T) if isinstance(layer, Linear) else a for a in arrays]
