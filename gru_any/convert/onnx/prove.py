"""Check an exported file against the model before it is written."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ...backend import to_numpy
from ...nn.chain import Chain
from ...nn.gru import GRU
from ...nn.layers import Embedding

T, B = 5, 3
CLOSE = 1e-4  # relative to the norm, of float32 on onnxruntime


def prove(content: bytes, model: Any, with_lengths: bool = True) -> None:
    """Run the file and the model on the same numbers.

    Raises
    ------
    RuntimeError
        They differ.
    """
    host = model.to(np)
    x, some, state = _arguments(host)
    lengths = some if with_lengths else None
    y, after = host(x, state, lengths)
    ours = [y, *(after if isinstance(model, Chain) else [after])]
    _compare("this library's own reader", ours, _read_back(content, x, lengths, state), 0.0)
    if model.dtype == "float32":
        feed = {"x": x} if lengths is None else {"x": x, "lengths": lengths}
        states = state if isinstance(model, Chain) else [state]
        for i, h in enumerate(states):
            feed[f"h0_{i}" if isinstance(model, Chain) else "h0"] = h
        theirs = _onnxruntime(content, feed)
        if theirs is not None:
            _compare("onnxruntime", ours, theirs, CLOSE)


def _arguments(model: Any) -> tuple[Any, np.ndarray, Any]:
    """Random x, lengths and first states for a model."""
    rng = np.random.default_rng(0)
    chain = isinstance(model, Chain)
    layers = model.layers if chain else (model,)
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
    return x, np.array([T, 2, 0], np.int32), states if chain else states[0]


def _read_back(content: bytes, x: Any, lengths: Any, state: Any) -> list[Any]:
    from .read import read

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "written.onnx"
        path.write_bytes(content)
        model = read(path, np)
    if isinstance(model, GRU) and isinstance(state, list):
        y, last = model(x, state[0], lengths)
    else:
        y, last = model(x, state, lengths)
    return [y, *(last if isinstance(last, list) else [last])]


def _onnxruntime(content: bytes, feed: dict[str, Any]) -> list[Any] | None:
    """The outputs on onnxruntime, where it is installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feed))


def _compare(who: str, ours: list[Any], theirs: list[Any], tolerance: float) -> None:
    for name, a, b in zip(["y", *["h_n"] * (len(ours) - 1)], ours, theirs, strict=True):
        a, b = to_numpy(a).astype("float64"), to_numpy(b).astype("float64")
        if not np.array_equal(np.isnan(a), np.isnan(b)):
            raise RuntimeError(f"{name} is not a number here or on {who} alone; nothing is written")
        error = float(np.linalg.norm(np.nan_to_num(a - b)))
        if not error <= tolerance * float(np.linalg.norm(np.nan_to_num(a))):
            raise RuntimeError(f"{name} differs by {error:.1e} from {who}; nothing is written")
