"""Which runtimes give the numbers of a written file, and which of them heed lengths."""

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import require, running

from gru_any import GRU, Chain, Embedding, Last, Linear
from gru_any.convert import onnx

T, B = 6, 4
FULL, RAGGED = [T] * B, [6, 3, 1, 5]
# OpenVINO starts a process at its import, which JAX, where it is loaded, warns of
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. <function _at_fork")
PAGE = Path(__file__).parent.parent / "docs/onnx.md"
MODELS = {
    "one": lambda: GRU(3, 4, seed=0),
    "after": lambda: GRU(3, 4, reset_after=True, seed=0),
    "reverse": lambda: GRU(3, 4, reverse=True, seed=0),
    "both": lambda: GRU(3, 4, 2, bidirectional=True, reset_after=True, seed=0, batch_first=True),
    "chain": lambda: Chain(Embedding(9, 3, seed=0), GRU(3, 4, 2, seed=1), Linear(4, 2, seed=2)),
}


def onnxruntime(path, feed):
    session = require("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, feed)


def openvino(path, feed):
    core = require("openvino").Core()
    model = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = model(feed)
    return [found[output] for output in model.outputs]


def reference(path, feed):
    require("onnx")
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(path).run(None, feed)


RUNTIMES = {"onnxruntime": onnxruntime, "OpenVINO": openvino, "onnx.reference": reference}


def difference(run, model, path, lengths, given, reset=False):
    """The largest difference of any output from the model's; lengths None: no such input."""
    require("onnx")
    onnx.save(path, model, lengths=lengths is not None, resets=reset)
    rng, chain = np.random.default_rng(0), isinstance(model, Chain)
    gru = model.layers[1] if chain else model
    shape = (B, T) if gru.batch_first else (T, B)
    x = rng.integers(0, 9, shape) if chain else rng.standard_normal((*shape, 3)).astype("float32")
    rows = gru.num_layers * len(gru.suffixes)
    h0 = rng.standard_normal((rows, B, 4)).astype("float32")
    feed = {"x": x, "h0_0" if chain else "h0": h0}
    feed |= {} if lengths is None else {"lengths": np.array(lengths, np.int32)}
    options = {"resets": rng.random(shape) < 0.3} if reset else {}
    feed |= options
    y, h_n = model(x, [h0] if chain else h0, given, **options)
    expected = [y, h_n[0] if chain else h_n]
    return max(np.abs(a - b).max() for a, b in zip(run(path, feed), expected, strict=True))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lengths", [None, FULL])
def test_every_runtime_gives_the_numbers_of_whole_sequences(tmp_path, runtime, name, lengths):
    path = str(tmp_path / "model.onnx")
    assert difference(RUNTIMES[runtime], MODELS[name](), path, lengths, None) < 2e-6


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_page_says_who_heeds_lengths(tmp_path, runtime):
    """Should one that does not begin to, this fails, and the page has good news to tell."""
    path = str(tmp_path / "model.onnx")
    worst = max(difference(RUNTIMES[runtime], make(), path, RAGGED, RAGGED)
                for make in MODELS.values())  # fmt: skip
    heeds = re.search(rf"^\| {runtime} \|.*\| (yes|no)", PAGE.read_text("utf-8"), re.M)[1]
    assert heeds == ("yes" if worst < 2e-6 else "no"), f"off by {worst:.2f}"


def test_a_file_without_lengths_is_read_back(tmp_path):
    require("onnx")
    for make in MODELS.values():
        path = tmp_path / "model.onnx"
        onnx.save(path, make(), lengths=False)
        for name, w in onnx.load(path).params.items():
            assert np.array_equal(w, make().params[name])
    with pytest.raises(TypeError, match="lengths is 'no', expected True or False"):
        onnx.save(path, MODELS["one"](), lengths="no")


@pytest.mark.parametrize("runtime", ["onnxruntime", "OpenVINO"])
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "bidirectional": True}])
def test_one_result_a_row(tmp_path, runtime, with_lengths, settings):
    require("onnx")
    path = str(tmp_path / "model.onnx")
    gru = GRU(3, 4, seed=0, batch_first=True, **settings)
    model = Chain(gru, Last(), Linear(4 * len(gru.suffixes), 2, seed=1))
    onnx.save(path, model, lengths=with_lengths)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((B, T, 3)).astype("float32")
    h0 = np.zeros((gru.num_layers * len(gru.suffixes), B, 4), "float32")
    lengths = RAGGED if runtime == "onnxruntime" and with_lengths else FULL
    feed = {"x": x, "h0_0": h0}
    feed |= {"lengths": np.array(lengths, np.int32)} if with_lengths else {}
    y, _ = model(x, lengths=lengths)
    assert np.abs(RUNTIMES[runtime](path, feed)[0] - y).max() < 2e-6
    again = onnx.load(path)
    assert [type(layer) for layer in again.layers] == [GRU, Last, Linear]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", MODELS)
def test_files_with_resets_heed_lengths_everywhere(tmp_path, runtime, name):
    given = RUNTIMES[runtime], MODELS[name](), str(tmp_path / "model.onnx"), RAGGED, RAGGED, True
    with running("traced"):
        if runtime == "onnx.reference" and name in ("reverse", "both"):
            with pytest.raises(RuntimeError, match="Scan is not implemented for other"):
                difference(*given)
        else:
            assert difference(*given) < 2e-6
