"""Check an exported file against the model before it is written."""

import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ...backend import to_numpy
from ...nn.chain import Chain
from ...nn.gru import GRU
from ...nn.layers import Embedding
from ...typing import Array, HostArray

T, B = 5, 3
CLOSE = 1e-4  # relative to the norm, of float32 on onnxruntime


class Inputs(NamedTuple):
    """What a model is run on; a first state, and perhaps a start, for each GRU."""

    x: HostArray
    states: list[HostArray]
    steps: dict[str, Any]  # lengths and resets, if the file has them
    starts: list[HostArray]


def prove(content: bytes, model: GRU | Chain, lengths: bool, resets: bool, start: bool) -> None:
    """Run the file and the model on the same inputs.

    Raises
    ------
    RuntimeError
        They differ.
    """
    host = model.to(np)
    given = _inputs(host, lengths, resets, start)
    ours = _outputs(host, given)
    if not resets:  # else there is a Scan, which `load` does not read
        _compare("this library's own reader", ours, _read_back(content, given), 0.0)
    if model.dtype == "float32":
        feed = {"x": given.x, **given.steps}
        for name, arrays in (("h0", given.states), ("start", given.starts)):
            for i, array in enumerate(arrays):
                feed[f"{name}_{i}" if isinstance(model, Chain) else name] = array
        theirs = _onnxruntime(content, feed)
        if theirs is not None:
            _compare("onnxruntime", ours, theirs, CLOSE)


def _inputs(model: GRU | Chain, lengths: bool, resets: bool, start: bool) -> Inputs:
    """Draw inputs for a model; one sequence has no steps."""
    rng = np.random.default_rng(0)
    layers = model.layers if isinstance(model, Chain) else (model,)
    grus = [layer for layer in layers if isinstance(layer, GRU)]
    states = [
        rng.standard_normal((g.num_layers * len(g.suffixes), B, g.hidden_size)).astype(model.dtype)
        for g in grus
    ]
    shape = (B, T) if grus[0].batch_first else (T, B)
    head = next(layer for layer in layers if layer.params)
    if isinstance(head, Embedding):
        x = rng.integers(0, head.n, shape)
    else:
        width = head.input_size if isinstance(head, GRU) else head.in_features
        x = rng.standard_normal((*shape, width)).astype(model.dtype)
    steps: dict[str, Any] = {"lengths": np.array([T, 2, 0], np.int32)} if lengths else {}
    steps |= {"resets": rng.random(shape) < 0.4} if resets else {}
    starts = [rng.standard_normal(h.shape).astype(h.dtype) for h in states] if start else []
    return Inputs(x, states, steps, starts)


def _outputs(model: GRU | Chain, given: Inputs) -> list[Array]:
    x, states, steps, starts = given
    if isinstance(model, Chain):
        y, last = model(x, states, **steps, start=starts or None)
        return [y, *last]
    return list(model(x, states[0], **steps, start=starts[0] if starts else None))


def _read_back(content: bytes, given: Inputs) -> list[Array]:
    from .read import read

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "written.onnx"
        path.write_bytes(content)
        return _outputs(read(path, np), given)


def _onnxruntime(content: bytes, feed: dict[str, HostArray]) -> list[Array] | None:
    """Return the outputs on onnxruntime; None where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feed))


def _compare(who: str, ours: Sequence[Array], theirs: Sequence[Array], tolerance: float) -> None:
    for name, a, b in zip(["y", *["h_n"] * (len(ours) - 1)], ours, theirs, strict=True):
        a, b = to_numpy(a).astype("float64"), to_numpy(b).astype("float64")
        if not np.array_equal(np.isnan(a), np.isnan(b)):
            raise RuntimeError(f"{name} is not a number here or on {who} alone; nothing is written")
        error = float(np.linalg.norm(np.nan_to_num(a - b)))
        if not error <= tolerance * float(np.linalg.norm(np.nan_to_num(a))):
            raise RuntimeError(f"{name} differs by {error:.1e} from {who}; nothing is written")
