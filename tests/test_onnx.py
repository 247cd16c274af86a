"""ONNX against onnxruntime: what is written runs the same there, what is read, here."""

import itertools

import numpy as np
import pytest
from conftest import require, running

from gru_any import GRU, Chain, Dropout, Embedding, GRUCell, Last, Linear
from gru_any.convert import onnx as convert

onnx, ort = require("onnx"), require("onnxruntime")
helper, numpy_helper = onnx.helper, onnx.numpy_helper
OPTIONS = list(itertools.product([1, 2], *[[False, True]] * 4))


def close(ours, theirs, tolerance=1e-6):
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) <= tolerance * max(np.linalg.norm(theirs), 1e-30)


def session(model):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    model = model if isinstance(model, str) else model.SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def same(a, b):
    assert repr(a) == repr(b)
    assert all(np.array_equal(b.params[name], v) for name, v in a.params.items())


# writing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "both", "after", "bias", "batch_first"), OPTIONS)
def test_a_gru_written_runs_and_reads_the_same(tmp_path, layers, both, after, bias, batch_first):
    gru = GRU(
        3, 4, layers, bidirectional=both, reset_after=after, bias=bias, batch_first=batch_first,
        seed=1,
    )  # fmt: skip
    path = str(tmp_path / "gru.onnx")
    convert.save(path, gru)
    same(gru, convert.load(path))
    rng = np.random.default_rng(0)
    for T, lengths in ((6, [4, 6, 0, 1]), (1, [1])):
        B, D = len(lengths), 1 + both
        x = rng.standard_normal((B, T, 3) if batch_first else (T, B, 3)).astype("float32")
        h0 = rng.standard_normal((layers * D, B, 4)).astype("float32")
        y, h_n = session(path).run(
            ["y", "h_n"], {"x": x, "h0": h0, "lengths": np.array(lengths, np.int32)}
        )
        ours = gru(x, h0, lengths)
        close(ours[0], y)
        close(ours[1], h_n)


def test_a_chain_goes_on_from_its_states(tmp_path):
    chain = Chain(
        Embedding(11, 3, seed=1), GRU(3, 4, 2, dropout=0.5, reset_after=True, seed=2), Dropout(0.1),
        Linear(4, 6, seed=3), GRU(6, 5, seed=4), Linear(5, 11, bias=False, seed=5),
    )  # fmt: skip
    path = str(tmp_path / "chain.onnx")
    convert.save(path, chain)
    x = np.random.default_rng(0).integers(0, 11, (9, 2))
    whole, _ = chain(x)
    run = session(path)
    names = [i.name for i in run.get_inputs()], [o.name for o in run.get_outputs()]
    assert names == (["x", "lengths", "h0_0", "h0_1"], ["y", "h_n_0", "h_n_1"])
    state, parts = [np.zeros((2, 2, 4), "float32"), np.zeros((1, 2, 5), "float32")], []
    for part in (x[:4], x[4:5], x[5:]):
        lengths = np.full(2, len(part), np.int32)
        y, *state = run.run(
            None, {"x": part, "lengths": lengths, "h0_0": state[0], "h0_1": state[1]}
        )
        parts.append(y)
    close(np.concatenate(parts), whole)
    again = convert.load(path)
    assert [type(layer) for layer in again.layers] == [Embedding, GRU, Linear, GRU, Linear]
    assert np.array_equal(again(x)[0], whole)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_precisions_come_back_bit_for_bit(tmp_path, dtype):
    gru = GRU(3, 4, 2, bidirectional=True, reset_after=True, dtype=dtype, seed=0)
    convert.save(tmp_path / "m", gru)
    same(gru, convert.load(tmp_path / "m"))
    assert convert.load(tmp_path / "m").dtype == dtype


def test_from_another_backend(tmp_path):
    require("torch")
    convert.save(tmp_path / "a", GRU(3, 4, seed=0, backend="torch"))
    convert.save(tmp_path / "b", GRU(3, 4, seed=0))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert convert.load(tmp_path / "a", backend="torch").backend.name == "torch"


SEQUENCES = [
    {},
    {"reset_after": True, "bias": False, "num_layers": 2},
    {"reverse": True, "batch_first": True, "activation": "relu", "clip": 0.7},
    {"bidirectional": True, "num_layers": 2, "reset_after": True},
    {"bidirectional": True, "batch_first": True},
]


@pytest.mark.parametrize("started", [False, True], ids=["zeros", "start"])
@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "lengths"])
@pytest.mark.parametrize("settings", SEQUENCES, ids=str)
def test_resets_written(tmp_path, settings, ragged, started):
    """Also of rows without a step, at the first and beyond the last one; twice, as a stream."""
    gru, path = GRU(3, 4, **settings, seed=1), str(tmp_path / "gru.onnx")
    with running("traced"):
        convert.save(path, gru, lengths=ragged, resets=True, start=started)
    rng, run = np.random.default_rng(0), session(path)
    T, B, first = 7, 5, gru.batch_first
    resets = rng.random((T, B)) < 0.4
    resets[0] = [True, False, True, False, True]
    h = rng.standard_normal((gru.num_layers * len(gru.suffixes), B, 4)).astype("float32")
    start = {"start": rng.standard_normal(h.shape).astype("float32")} if started else {}
    lengths = np.array([7, 4, 0, 1, 5], np.int32)
    lengths[0] = 0  # no row has all steps
    assert resets[lengths[lengths < T], np.arange(B)[lengths < T]].any()
    given = {"lengths": lengths} if ragged else {}
    x = rng.standard_normal((T, B, 3)).astype("float32")
    if first:
        x, resets = x.swapaxes(0, 1).copy(), resets.T.copy()
    with running("traced"):
        for _ in range(2):
            y, h_n = run.run(["y", "h_n"], {"x": x, "h0": h, "resets": resets, **given, **start})
            ours = gru(x, h, **given, resets=resets, **start)
            close(ours[0], y)
            close(ours[1], h_n)
            h = h_n


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_resets_written_in_other_dtypes(tmp_path, dtype):
    """On the reference evaluator of onnx: onnxruntime's GRU has no float64."""
    from onnx.reference import ReferenceEvaluator

    gru, path = GRU(3, 4, 2, reset_after=True, dtype=dtype, seed=1), str(tmp_path / "gru.onnx")
    rng = np.random.default_rng(0)
    x, h0, start = (rng.standard_normal(s).astype(dtype) for s in ((6, 3, 3), *[(2, 3, 4)] * 2))
    resets, lengths = rng.random((6, 3)) < 0.4, np.array([6, 0, 3], np.int32)
    with running("traced"):
        convert.save(path, gru, resets=True, start=True)
        expected = gru(x, h0, lengths, resets=resets, start=start)
    given = {"x": x, "h0": h0, "lengths": lengths, "resets": resets, "start": start}
    near = 1e-14 if dtype == "float64" else 2e-3
    for ours, theirs in zip(expected, ReferenceEvaluator(path).run(None, given), strict=True):
        assert theirs.dtype == dtype
        close(ours.astype("float64"), theirs.astype("float64"), near)


def test_resets_of_a_chain_written(tmp_path):
    """Each GRU has a state and a start of its own; the result is one a row."""
    chain = Chain(
        Embedding(11, 3, seed=1), GRU(3, 4, 2, seed=2), Linear(4, 6, seed=3),
        GRU(6, 5, bidirectional=True, seed=4), Last(), Linear(10, 2, seed=5),
    )  # fmt: skip
    path, rng = str(tmp_path / "chain.onnx"), np.random.default_rng(0)
    x, resets = rng.integers(0, 11, (9, 3)), rng.random((9, 3)) < 0.3
    shapes = (2, 3, 4), (2, 3, 5)
    states, starts = ([rng.standard_normal(s).astype("float32") for s in shapes] for _ in range(2))
    with running("traced"):
        convert.save(path, chain, resets=True, start=True)
        y, last = chain(x, states, [9, 2, 0], resets=resets, start=starts)
    run = session(path)
    assert [i.name for i in run.get_inputs()] == [
        "x", "lengths", "resets", "start_0", "h0_0", "start_1", "h0_1"
    ]  # fmt: skip
    feed = {"x": x, "lengths": np.array([9, 2, 0], np.int32), "resets": resets}
    feed |= {f"h0_{i}": h for i, h in enumerate(states)}
    feed |= {f"start_{i}": h for i, h in enumerate(starts)}
    for ours, theirs in zip([y, *last], run.run(None, feed), strict=True):
        close(ours, theirs)


def test_resets_are_not_read_back(tmp_path):
    path = tmp_path / "gru.onnx"
    with running("traced"):
        convert.save(path, GRU(3, 4, seed=0), resets=True)
    with pytest.raises(ValueError, match=r"step by step, by a Scan, as save.*gru_any.save"):
        convert.load(path)
    with pytest.raises(ValueError, match="GRU"):
        convert.load(path, node="GRU")
    for wrong, told in (
        ({"start": True}, "start is True without resets"),
        ({"resets": 1}, "resets is 1, expected True or False"),
    ):
        with pytest.raises((TypeError, ValueError), match=told):
            convert.save(tmp_path / "other", GRU(3, 4, seed=0), **wrong)
    assert not (tmp_path / "other").exists()


def test_a_writer_that_errs_writes_nothing(tmp_path, monkeypatch):
    """A wrong variant, swapped gates or wrong weights are found before the file is there."""
    from gru_any.convert.onnx import graph, prove

    monkeypatch.setattr(graph, "swap_gates", lambda v: v)
    with pytest.raises(RuntimeError, match=r"differs by .* from this library's own reader"):
        convert.save(tmp_path / "m", GRU(3, 4, seed=0))
    monkeypatch.setattr(prove, "_read_back", lambda content, given: None)
    compare = prove._compare

    def of_onnxruntime(who, ours, theirs, tolerance):
        if theirs is not None:
            compare(who, ours, theirs, tolerance)

    monkeypatch.setattr(prove, "_compare", of_onnxruntime)
    with pytest.raises(RuntimeError, match=r"differs by .* from onnxruntime"):
        convert.save(tmp_path / "m", GRU(3, 4, seed=0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (lambda: GRUCell(3, 4), TypeError, "cannot write GRUCell"),
        (lambda: Chain(Linear(3, 4)), ValueError, "no GRU"),
        (lambda: Chain(GRU(3, 3), GRU(3, 3, batch_first=True)), ValueError, "batch_first"),
        (lambda: GRU(3, 4, backend="torch", dtype="bfloat16"), TypeError, "cannot write bfloat16"),
    ],
)
def test_what_cannot_be_written(tmp_path, model, error, words):
    require("torch")
    with pytest.raises(error, match=words):
        convert.save(tmp_path / "m", model())
    assert not list(tmp_path.iterdir())


# reading the operator ----------------------------------------------------------------------------


def one_node(draw, T, B, I, H, layout):
    """A model of one GRU node, with the attributes and inputs that `draw` names."""
    rng, D = draw["rng"], 1 + (draw.get("direction") == "bidirectional")

    def weight(*shape):
        return rng.uniform(-1, 1, shape).astype("float32")

    weights = {"W": weight(D, 3 * H, I), "R": weight(D, 3 * H, H)}
    if draw["bias"]:
        weights["bias"] = weight(D, 6 * H)
    if draw["bias"] == "one":
        weights["bias"][:, 3 * H :] = 0
    if draw["h0"] == "zeros":
        weights["h0"] = np.zeros((B, D, H) if layout else (D, B, H), "float32")
    feed = {"x": weight(B, T, I) if layout else weight(T, B, I)}
    if draw["h0"] == "input":
        feed["h0"] = weight(B, D, H) if layout else weight(D, B, H)
    if draw["lengths"]:
        feed["lengths"] = rng.integers(1, T + 1, B).astype("int32")
    names = {"bias": bool(draw["bias"]), "lengths": draw["lengths"], "h0": draw["h0"]}
    attributes = {k: v for k, v in draw.items() if k in ATTRIBUTES}
    node = helper.make_node(
        "GRU", ["x", "W", "R", *(k if v else "" for k, v in names.items())], ["Y", "Y_h"],
        hidden_size=H, **attributes, **({"layout": 1} if layout else {}),
    )  # fmt: skip
    return model_of([node], feed, weights, ["Y", "Y_h"]), feed


def model_of(nodes, feed, weights, outputs, opset=14):
    kinds = {k: helper.np_dtype_to_tensor_dtype(v.dtype) for k, v in feed.items()}
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info(k, kinds[k], v.shape) for k, v in feed.items()],
        [helper.make_tensor_value_info(k, 1, [None] * (3 + (k == "Y"))) for k in outputs],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def load(model, folder):
    onnx.save(model, folder / "m.onnx")
    return convert.load(folder / "m.onnx")


ATTRIBUTES = (
    "direction", "linear_before_reset", "activations", "activation_alpha", "activation_beta", "clip"
)  # fmt: skip
OTHERS = [
    "Relu", "HardSigmoid", "LeakyRelu", "Softsign", "ScaledTanh", "Affine", "Elu",
    "ThresholdedRelu", "Softplus",
]  # fmt: skip


def drawn(seed):
    """A random choice of everything that the operator has."""
    rng = np.random.default_rng(seed)
    direction = ("forward", "reverse", "bidirectional")[seed % 3]
    D = 1 + (direction == "bidirectional")
    draw = {
        "rng": rng,
        "direction": direction,
        "linear_before_reset": seed // 3 % 2,
        "bias": rng.choice(["", "one", "both"]),
        "h0": rng.choice(["", "zeros", "input"]),
        "lengths": bool(seed // 12 % 2),
    }
    kind = rng.integers(6)
    if kind == 0:
        draw["clip"] = float(rng.uniform(0.1, 2))
    if kind in (1, 2):
        draw["activations"] = ["Sigmoid", "Tanh"] * D
    if kind == 2:
        draw["activation_alpha"], draw["activation_beta"] = [0.3] * 2 * D, [0.7] * 2 * D
    if kind == 3:
        draw["activations"] = [str(rng.choice(OTHERS)), str(rng.choice(OTHERS))] * D
        draw["activation_alpha"], draw["activation_beta"] = [0.3] * 2 * D, [0.7] * 2 * D
    return draw


def turned(model, feed, H):
    """The same model with layout 0, for onnxruntime, which has no other."""
    model, feed = onnx.ModelProto.FromString(model.SerializeToString()), dict(feed)
    (node,) = model.graph.node
    node.attribute.remove(next(a for a in node.attribute if a.name == "layout"))
    for name in {"x", "h0"} & set(feed):
        feed[name] = np.ascontiguousarray(feed[name].transpose(1, 0, 2))
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    if "h0" in weights:
        weights["h0"] = weights["h0"].transpose(1, 0, 2)
    return model_of([node], feed, weights, ["Y", "Y_h"]), feed


def test_a_hundred_random_models(tmp_path):
    """Each equals onnxruntime, and what is written of it again does so too."""
    with running("traced"):  # to compile each pair of functions takes seconds
        random_models(tmp_path)


def random_models(tmp_path):
    seen, others = set(), {"clip": 0, "activations": 0}
    for seed in range(100):
        draw = drawn(seed)
        layout, T, B, I, H = bool(seed // 6 % 2), *(int(n) for n in draw["rng"].integers(2, 7, 4))
        model, feed = one_node(draw, T, B, I, H, layout)
        other, fed = turned(model, feed, H) if layout else (model, feed)
        Y, Y_h = session(other).run(None, fed)
        ours = load(model, tmp_path)
        assert ours.batch_first == layout
        assert ours.reset_after == draw["linear_before_reset"]
        h0 = feed.get("h0")
        h0 = h0.transpose(1, 0, 2) if layout and h0 is not None else h0
        y, h_n = ours(feed["x"], h0, feed.get("lengths"))
        y = y.transpose(1, 0, 2) if layout else y
        close(y, Y.transpose(0, 2, 1, 3).reshape(y.shape), 2e-6)
        close(h_n, Y_h, 2e-6)
        seen.add((draw["direction"], draw["linear_before_reset"], layout, draw["lengths"]))
        for name in others:
            others[name] += name in draw
        if ours.suffixes != ["_reverse"] and seed % 3 != 1:
            convert.save(tmp_path / "again.onnx", ours)
            same(ours, convert.load(tmp_path / "again.onnx"))
    assert min(others.values()) > 10
    assert len(seen) == 3 * 2 * 2 * 2


PAIRS = [
    (["Sigmoid", "Tanh"], {}, {}),
    (["tanh", "RELU"], {}, {"gate_activation": "tanh", "activation": "relu"}),
    (["Elu", "LeakyRelu"], {"activation_alpha": [0.5]},
     {"gate_activation": ("elu", 0.5), "activation": ("leaky_relu", np.float32(0.01))}),
    (["Affine", "HardSigmoid"], {"activation_alpha": [0.5, 0.25], "activation_beta": [0.125]},
     {"gate_activation": ("affine", 0.5, 0.125), "activation": ("hard_sigmoid", 0.25, 0.5)}),
    (["ThresholdedRelu", "ScaledTanh"], {"activation_alpha": [0.5, 2.0], "activation_beta": [0.5]},
     {"gate_activation": ("thresholded_relu", 0.5), "activation": ("scaled_tanh", 2.0, 0.5)}),
    (["Softsign", "Softplus"], {}, {"gate_activation": "softsign", "activation": "softplus"}),
]  # fmt: skip


@pytest.mark.parametrize(("names", "numbers", "expected"), PAIRS, ids=lambda v: str(v)[:20])
@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_activations(tmp_path, names, numbers, expected, after, clip):
    """Their numbers are taken in order, by those that have any; onnxruntime agrees."""
    draw = {"rng": np.random.default_rng(0), "bias": "both", "h0": "", "lengths": False,
            "linear_before_reset": after, "activations": names, **numbers}  # fmt: skip
    draw |= {} if clip is None else {"clip": clip}
    model, feed = one_node(draw, 4, 3, 3, 4, False)
    ours = load(model, tmp_path)
    for name, value in {**expected, "clip": clip}.items():
        found = getattr(ours, name)
        assert found == value or found[1:] == pytest.approx(value[1:])
    Y, Y_h = session(model).run(None, feed)
    with running("traced"):  # tests of the functions themselves run compiled code
        y, h_n = ours(feed["x"])
    close(y, Y[:, 0], 2e-6)
    close(h_n, Y_h, 2e-6)


def test_two_biases_of_reset_before_become_one(tmp_path, caplog):
    draw = {"rng": np.random.default_rng(0), "bias": "both", "h0": "", "lengths": False}
    model, _ = one_node(draw, 3, 2, 3, 4, False)
    onnx.save(model, tmp_path / "m.onnx")
    with caplog.at_level("INFO", "gru_any.convert"):
        gru = convert.load(tmp_path / "m.onnx")
    assert "the two biases of ONNX' GRU were added to the one" in caplog.text
    convert.save(tmp_path / "again.onnx", gru)
    (B,) = (t for t in onnx.load(tmp_path / "again.onnx").graph.initializer if t.name == "B_l0")
    assert not numpy_helper.to_array(B)[:, 12:].any()  # it goes back as (sum, 0)


# the tests that ONNX publishes -------------------------------------------------------------------


def published():
    """Node, inputs, outputs and name of each."""
    from onnx.backend.test.case.node import gru

    cases = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gru, "expect", lambda node, **case: cases.update({case["name"]: (node, case)})
        )
        for name in vars(gru.GRU):
            if name.startswith("export_"):
                getattr(gru.GRU, name)()
    return cases


def test_published(tmp_path):
    """Weights are inputs there; here they are in the model, as in any trained one."""
    cases = published()
    assert len(cases) >= 6
    for node, case in cases.values():
        x, *weights = case["inputs"]
        weights = dict(zip(node.input[1:], weights, strict=True))
        outputs = dict(zip([o for o in node.output if o], case["outputs"], strict=True))
        ours = load(model_of([node], {node.input[0]: x}, weights, list(outputs)), tmp_path)
        y, h_n = ours(x)
        swapped = (1, 0, 2) if ours.batch_first else (0, 1, 2)
        close(h_n.transpose(swapped), outputs["Y_h"])
        if "Y" in outputs:
            Y = outputs["Y"] if ours.batch_first else outputs["Y"].transpose(0, 2, 1, 3)
            close(y, Y.reshape(y.shape))
