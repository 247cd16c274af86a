"""Keras 2 and 3: `keras.layers.GRU`, with both values of `reset_after`. Gates in order z, r, n.

With reset_after (the default there) the bias is (2, 3H): b on top of c; without, (3H,). x is
(B, T, I) in Keras, and so it is for the models made here. Files (`.keras`, `.weights.h5`, `.h5`)
need h5py (extra `keras`), not Keras (https://keras.io/api).
"""

import pathlib
from collections.abc import Sequence

from ...arguments import flag
from ...files import write_atomically
from ...nn.chain import Chain
from ...nn.gru import GRU
from ...nn.params import Layer
from ...typing import Array, HostArray, Path
from ..cells import assemble
from ..files import naming
from .cells import Model, layer_arrays, read_cell


def from_arrays(
    weights: Sequence[Array],
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
    bidirectional = flag("bidirectional", bidirectional)
    reset_after = flag("reset_after", reset_after)
    count = 3 if flag("use_bias", use_bias) else 2
    if not weights or len(weights) % count:
        raise ValueError(f"{len(weights)} arrays, expected {count} for each layer and direction")
    groups = [weights[i : i + count] for i in range(0, len(weights), count)]
    cells = [read_cell(group, reset_after) for group in groups]
    return assemble(cells, reset_after, bidirectional, flag("batch_first", batch_first), copy=False)


def to_arrays(model: Layer | Chain) -> list[HostArray]:
    """The list that `set_weights` takes: of layers of a GRU, or of a Sequential like the Chain."""
    if not isinstance(model, Chain):
        return layer_arrays(model)
    model.params.refuse_untied()
    return [array for layer in model.layers for array in layer_arrays(layer)]


def load(
    path: Path,
    layer: str | Sequence[str] | None = None,
    *,
    reset_after: bool | None = None,
    go_backwards: bool | None = None,
    activation: str | None = None,
    recurrent_activation: str | None = None,
) -> Model:
    """A model from a file of Keras.

    Parameters
    ----------
    path : str or path
        `.keras`, or `.h5` with a whole model, of Keras 2 or 3: the model, whose call returns what
        the one in Keras returns. Its layers must follow one another, and be GRU, RNN of GRUCells,
        Bidirectional of either, Embedding, Dropout, Dense and TimeDistributed(Dense), or models of
        these. It becomes a Chain, or a GRU where there is nothing else; GRUs on top of each other
        become one of several layers; a `Last` stands where `return_sequences` is False.
        `.weights.h5`, or `.h5` of weights: only the GRU, with the outputs of all steps, since the
        file does not describe the model. Nor does it show whether a GRU was made with
        `activation="relu"` or `go_backwards=True`: if it was, say so by the arguments below.
    layer : str, a list of them, or None
        Layers to take out of a larger model, also one that branches, by their names, which are
        paths such as "encoder/gru" in a model inside of the model. In `.weights.h5` they are the
        places, such as "gru", "bidirectional_1" or "sequential/gru". GRUs become one GRU of
        several layers, with the outputs of all steps, or with `go_backwards` a
        `GRU(reverse=True)`. With other layers among them they become a Chain, and a warning says
        what you must do yourself, such as apply an activation or a mask.
    reset_after, go_backwards, activation, recurrent_activation : None, or as in Keras
        What the GRUs were made with. Needed where a file cannot tell: `reset_after` of weights
        without bias. A value that contradicts the file is an error, and so is an activation that
        has no counterpart.

    Raises
    ------
    ValueError, KeyError, TypeError
        The file is damaged, or the model has parts without a counterpart here; the text says which.
    ImportError
        h5py is not installed.
    """
    from . import read

    names = [layer] if isinstance(layer, str) else layer
    if names is not None and not (
        isinstance(names, (list, tuple)) and names and all(isinstance(n, str) for n in names)
    ):
        raise TypeError(f"layer is {layer!r}, expected a name or a list of names")
    given: dict[str, bool | str | None] = {
        "reset_after": reset_after,
        "go_backwards": go_backwards,
        "activation": activation,
        "recurrent_activation": recurrent_activation,
    }
    given = {name: value for name, value in given.items() if value is not None}
    for name in {"reset_after", "go_backwards"} & set(given):
        given[name] = flag(name, given[name])
    with naming(path):
        return read.load(path, names and list(names), given)


def save(path: Path, model: Layer | Chain) -> None:
    """Write a GRU or a Chain for Keras 3.

    path : `.keras` for `keras.saving.load_model`, or `.weights.h5` for `load_weights` of a
        Sequential of the same layers. Each layer of a GRU is one in Keras, which returns all steps
        unless a Last follows.
    """
    from . import write

    make = write.archive if pathlib.Path(path).suffix == ".keras" else write.weights
    write_atomically(path, make(model))
