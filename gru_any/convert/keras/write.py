"""Writing files of Keras 3: `.weights.h5`, and `.keras`, a zip file of it and of config.json."""

import io
import json
import zipfile
from collections.abc import Iterator

from ...nn.chain import Chain
from ...nn.gru import GRU
from ...nn.layers import Embedding, Last, Linear
from ...nn.params import Layer
from ...typing import HostArray
from ..cells import ours
from .archive import Config, Part, places_of
from .cells import layer_arrays, write_cell
from .functions import MERGE_MODES, write_functions
from .hdf5 import write_hdf5

WRITTEN = "activation", "gate_activation", "merge"  # of a GRU's options
CELLS = {1: ("cell/vars",), 2: ("forward_layer/cell/vars", "backward_layer/cell/vars")}


def weights(model: Layer | Chain) -> bytes:
    """Return the content of a `.weights.h5`."""
    parts = list(_parts_of(model))
    arrays: dict[str, HostArray] = {}
    for place, (_, found) in zip(places_of([part for part, _ in parts]), parts, strict=True):
        arrays.update({f"layers/{place}/{name}": array for name, array in found.items()})
    return write_hdf5(arrays)


def archive(model: Layer | Chain) -> bytes:
    """Return the content of a `.keras` file."""
    dtype = model.dtype
    parts = [part for part, _ in _parts_of(model)]
    layers = model.layers if isinstance(model, Chain) else [model]
    integers = isinstance(layers[0], Embedding)
    size = () if integers else (getattr(layers[0], "input_size", None),)
    entry = {"batch_shape": [None, None, *size], "dtype": "int32" if integers else dtype}
    description = {
        **_entry("Sequential", {"name": "sequential", "dtype": dtype}),
        "module": "keras",
        "build_config": {"input_shape": entry["batch_shape"]},
    }
    description["config"]["layers"] = [
        _entry("InputLayer", {**entry, "name": "input_layer"}),
        *(_entry(part.kind, {**part.config, "dtype": dtype}) for part in parts),
    ]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("metadata.json", json.dumps({"keras_version": "3.0.0", "date_saved": ""}))
        file.writestr("config.json", json.dumps(description))
        file.writestr("model.weights.h5", weights(model))
    return buffer.getvalue()


def _entry(kind: str, config: Config) -> Config:
    return {
        "module": "keras.layers",
        "class_name": kind,
        "config": config,
        "registered_name": None,
    }


def _parts_of(model: Layer | Chain) -> Iterator[tuple[Part, dict[str, HostArray]]]:
    """Each Keras layer of a model, with its arrays by their place in the HDF5 file."""
    if isinstance(model, Chain):
        model.params.refuse_untied()
    layers = model.layers if isinstance(model, Chain) else (model,)
    for i, layer in enumerate(layers):
        if isinstance(layer, GRU):
            last = any(isinstance(after, Last) for after in layers[i + 1 : i + 2])
            yield from _gru_parts(layer, f"layer_{i}", last)
        if isinstance(layer, (GRU, Last)):
            continue
        found = {f"vars/{k}": array for k, array in enumerate(layer_arrays(layer))}
        if isinstance(layer, Embedding):
            config = {"input_dim": layer.n, "output_dim": layer.size}
        elif isinstance(layer, Linear):
            config = {"units": layer.out_features, "use_bias": layer.bias}
        else:
            config = {"rate": layer.p}
        kind = "Dense" if isinstance(layer, Linear) else type(layer).__name__
        yield Part(kind, {"name": f"layer_{i}", **config}), found


def _gru_parts(gru: GRU, name: str, last: bool) -> Iterator[tuple[Part, dict[str, HostArray]]]:
    cells = [write_cell(cell, gru.reset_after) for cell in ours(gru, *WRITTEN)]
    config = {
        "units": gru.hidden_size,
        "use_bias": gru.bias,
        "reset_after": gru.reset_after,
        **write_functions(gru),
        **({"recurrent_dropout": gru.recurrent_dropout} if gru.recurrent_dropout else {}),
    }
    D, mode = len(gru.suffixes), next(k for k, v in MERGE_MODES.items() if v == gru.merge)
    if mode is None:
        raise ValueError("merge=None makes two outputs, which a Sequential of Keras cannot have")
    for i in range(gru.num_layers):
        of_layer = cells[i * D : (i + 1) * D]
        if i and gru.dropout:
            yield Part("Dropout", {"name": f"{name}_{i}_dropout", "rate": gru.dropout}), {}
        found = {
            f"{prefix}/{k}": array
            for prefix, cell in zip(CELLS[D], of_layer, strict=True)
            for k, array in enumerate(cell)
        }
        sequences = not last or i + 1 < gru.num_layers
        inner = {"name": f"{name}_{i}", **config, "return_sequences": sequences}
        if D == 1:
            yield Part("GRU", inner), found
        else:
            # both written out, as Keras does: it may confuse them where it derives the second
            forward, backward = (
                _entry("GRU", {**inner, "name": f"{way}_{name}_{i}", "dtype": gru.dtype, **back})
                for way, back in (("forward", {}), ("backward", {"go_backwards": True}))
            )
            both = {"merge_mode": mode, "layer": forward, "backward_layer": backward}
            yield Part("Bidirectional", {"name": f"{name}_{i}", **both}), found
