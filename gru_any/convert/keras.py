"""Keras 3: `keras.layers.GRU`, with both values of `reset_after`. z keeps, gates z, r, n.

With reset_after (the default there) the bias is (2, 3H): b on top of c; without, (3H,). x is
(B, T, I) in Keras, and so it is for the models made here. Files (`.keras`, `.weights.h5`) need h5py
(extra `keras`), not Keras (https://keras.io/api).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..chain import Chain
from ..checkpoint import write_atomically
from ..gru import GRU
from ..layers import Linear
from .cells import assemble, ours
from .table import Table, floating, read, write

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


def from_arrays(
    weights: Sequence[Any],
    *,
    bidirectional: bool = False,
    reset_after: bool = True,
    use_bias: bool = True,
    batch_first: bool = True,
) -> GRU:
    """A GRU from `get_weights()` of its layers.

    Parameters
    ----------
    weights : list of arrays
        `kernel` (I, 3H), `recurrent_kernel` (H, 3H) and, with use_bias, `bias`, for each layer; of
        a Bidirectional the forward ones and then the backward ones.
    bidirectional, reset_after, use_bias : bool
        As the Keras layers were made.
    batch_first : bool
        x is (B, T, I), as in Keras.

    Raises
    ------
    ValueError, TypeError
        A shape or dtype does not fit.
    """
    count = 3 if use_bias else 2
    if not weights or len(weights) % count:
        raise ValueError(f"{len(weights)} arrays, expected {count} for each layer and direction")
    groups = [weights[i : i + count] for i in range(0, len(weights), count)]
    cells = [read_cell(group, reset_after) for group in groups]
    return assemble(cells, reset_after, bidirectional, batch_first)


def to_arrays(model: Any) -> list[np.ndarray]:
    """The list that `set_weights` takes: of layers of a GRU, or of a Sequential like the Chain."""
    if not isinstance(model, Chain):
        return [array for cell in ours(model) for array in write_cell(cell, model.reset_after)]
    model.params.refuse_untied()
    return [array for layer in model.layers for array in layer_arrays(layer)]


def load(path: Any, layer: Any = None, *, reset_after: bool | None = None) -> Any:
    """A model from a file of Keras 3.

    Parameters
    ----------
    path : str or path
        `.keras`: a model that is a row of InputLayer, Embedding, GRU, Bidirectional, Dropout and
        Dense becomes a Chain, or a GRU where there is nothing else. GRUs on top of each other
        become one of several layers. All steps are returned, also where the last GRU of the model
        returns its last one; take `y[:, -1]`. Dropout inside of a Keras GRU stays behind.
        `.weights.h5`: has no description of the model, and gives its GRU.
    layer : str, a list of them, or None
        The GRU to take out of a larger model, by its name in `.keras`, and by its place in
        `.weights.h5`, such as "gru" or "bidirectional_1". A list makes one GRU of several layers.
    reset_after : bool or None
        Needed for `.weights.h5` without bias, where it cannot be told.

    Raises
    ------
    ValueError, KeyError, TypeError
        The file is damaged, or the model has parts without a counterpart here; the text says which.
    ImportError
        h5py is not installed.
    """
    from . import keras_read

    wanted = [layer] if isinstance(layer, str) else layer
    if Path(path).suffix == ".keras":
        return keras_read.load_archive(path, wanted)
    return keras_read.load_weights(path, wanted, reset_after)


def save(path: Any, model: Any) -> None:
    """Write a GRU or a Chain for Keras 3.

    path : `.keras` for `keras.saving.load_model`, or `.weights.h5` for `load_weights` of a
        Sequential of the same layers. Each layer of a GRU is one in Keras.
    """
    from . import keras_write

    make = keras_write.archive if Path(path).suffix == ".keras" else keras_write.weights
    write_atomically(path, make(model))


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
        return to_arrays(layer)
    arrays = [floating(name, a) for name, a in layer.params.items()]
    return [np.ascontiguousarray(a.T) if isinstance(layer, Linear) else a for a in arrays]
