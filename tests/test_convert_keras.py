"""Models of Keras, read from its three kinds of file, against what Keras computes."""

import io
import json
import zipfile

import numpy as np
import pytest
from conftest import PATHS, THOROUGH, require, running

from gru_any import GRU, Chain, Dropout, Embedding, Last, Linear, gradcheck
from gru_any.convert import keras as convert

# Keras' own use of NumPy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

B, T, I, H = 3, 6, 3, 4
RNG = np.random.default_rng(0)
X = RNG.standard_normal((B, T, I))
WORDS = RNG.integers(0, 7, (B, T))
EXACT = 1e-6  # keras.ops.matmul on PyTorch rounds to float32, whatever the dtype
ENDINGS = ["keras", "h5"]


@pytest.fixture(scope="module")
def keras():
    require("h5py")
    keras = require("keras")
    keras.utils.set_random_seed(0)
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    yield keras
    keras.config.set_floatx(before)


@pytest.fixture(scope="module")
def L(keras):
    return keras.layers


def filled(model):
    """All weights random, biases too."""
    rng = np.random.default_rng(1)
    model.set_weights([rng.standard_normal(w.shape) for w in model.get_weights()])
    return model


def row(keras, *layers, x=None):
    return filled(keras.Sequential([keras.Input((T, I) if x is None else x), *layers]))


def computed(model, x=X):
    return model(x).detach().numpy()


def through(ours, x=X, **settings):
    y = ours(x, **settings)
    return y[0] if isinstance(y, tuple) else y


def close(found, expected, tolerance=EXACT):
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def same(ours, model, x=X, tolerance=EXACT, **settings):
    close(through(ours, x, **settings), computed(model, x), tolerance)


def saved(model, path, ending="keras"):
    path = path / f"m.{ending}"
    with pytest.MonkeyPatch.context() as patch:  # Keras calls its older format legacy
        patch.setattr("absl.logging.warning", lambda *_: None)
        model.save(path)
    return path


# one result a sequence ---------------------------------------------------------------------------


def test_layers_at_one_address(keras, L, tmp_path, monkeypatch):
    """While it reads a file, Keras may take a layer for one that it has freed."""

    def address(of):
        return 1 if isinstance(of, L.GRU) else id(of)

    ours = GRU(I, H, 2, bidirectional=True, dtype="float64", batch_first=True, seed=0)
    convert.save(tmp_path / "m.keras", ours)
    monkeypatch.setattr("keras.src.saving.serialization_lib.id", address, raising=False)
    same(ours, keras.saving.load_model(tmp_path / "m.keras"))


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_return_sequences_false(keras, L, tmp_path, ending, both, after, bias):
    def gru(**settings):
        layer = L.GRU(H, reset_after=after, use_bias=bias, **settings)
        return L.Bidirectional(layer) if both else layer

    model = row(keras, gru(return_sequences=True), gru(), L.Dense(5), L.Dense(2))
    ours = convert.load(saved(model, tmp_path, ending))
    assert [type(layer) for layer in ours.layers] == [GRU, Last, Linear, Linear]
    assert ours.layers[0].num_layers == 2
    same(ours, model)
    alone = row(keras, gru())
    same(convert.load(saved(alone, tmp_path, ending)), alone)
    convert.save(tmp_path / "again.keras", ours)
    same(ours, keras.saving.load_model(tmp_path / "again.keras"))
    convert.save(tmp_path / "again.weights.h5", ours)
    again = row(keras, gru(return_sequences=True), gru(), L.Dense(5), L.Dense(2))
    again.load_weights(tmp_path / "again.weights.h5")
    same(ours, again)


def test_return_sequences_false_with_lengths_and_gradients(keras, L, tmp_path):
    """Against Keras' mask, right-padded."""
    torch = require("torch")
    layer = L.Bidirectional(L.GRU(H))
    model = row(keras, layer, L.Dense(2))
    ours = convert.load(saved(model, tmp_path))
    lengths = [6, 1, 4]
    x = torch.tensor(X, requires_grad=True)
    mask = torch.tensor(np.arange(T)[None] < np.array(lengths)[:, None])
    y = model.layers[1](layer(x, mask=mask))
    y.sum().backward()
    (found, _), pullback = ours.vjp(X, lengths=lengths)
    close(found, y.detach().numpy())
    grads, dx, _ = pullback(np.ones_like(found))
    close(dx, x.grad.numpy())
    kernel = model.layers[1].kernel.value.grad.numpy()
    close(grads["2.weight"].T, kernel)
    gradcheck(ours, X, method="complex", lengths=lengths)


@pytest.mark.parametrize("ending", ENDINGS)
def test_go_backwards(keras, L, tmp_path, ending):
    model = row(keras, L.GRU(H, return_sequences=True), L.GRU(H, go_backwards=True), L.Dense(2))
    ours = convert.load(saved(model, tmp_path, ending))
    assert [type(layer) for layer in ours.layers] == [GRU, GRU, Last, Linear]
    same(ours, model)
    steps = row(keras, L.GRU(H, go_backwards=True, return_sequences=True, name="back"))
    path = saved(steps, tmp_path, ending)
    with pytest.raises(ValueError, match=r"the last step first.*GRU\(reverse=True\)"):
        convert.load(path)
    one = convert.load(path, "back")
    close(through(one)[:, ::-1], computed(steps))
    with pytest.raises(ValueError, match="go_backwards is False, but True in the file"):
        convert.load(path, "back", go_backwards=False)
    steps.save_weights(tmp_path / "m.weights.h5")
    again = convert.load(tmp_path / "m.weights.h5", go_backwards=True)
    assert np.array_equal(through(again), through(one))


# what training leaves in a file ------------------------------------------------------------------


@pytest.mark.parametrize("ending", [*ENDINGS, "weights.h5"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("optimiser", ["Adam", "SGD", "Lion"])
def test_compiled_models(keras, L, tmp_path, ending, trained, optimiser):
    gru = L.GRU(H, return_sequences=True, dropout=0.1, recurrent_dropout=0.1)
    layers = [gru] if ending == "weights.h5" else [gru, L.Dropout(0.3), L.Dense(2)]
    model = row(keras, *layers)
    optimiser = getattr(keras.optimizers, optimiser)()
    model.compile(optimiser, "mse", metrics=["mae"], weighted_metrics=["mse"])
    if trained:
        model.train_on_batch(X, np.ones((B, T, model.output_shape[-1])))
    if ending == "weights.h5":
        model.save_weights(tmp_path / "m.weights.h5")
        same(convert.load(tmp_path / "m.weights.h5"), model)
    else:
        same(convert.load(saved(model, tmp_path, ending)), model)


@pytest.mark.parametrize("ending", ENDINGS)
def test_recurrent_dropout(keras, L, tmp_path, ending):
    """It is read and written; layers that differ in it are GRUs of their own."""

    def gru(p):
        return L.Bidirectional(L.GRU(H, return_sequences=True, recurrent_dropout=p))

    model = row(keras, gru(0.1), gru(0.1), gru(0.3), gru(1.0))
    ours = convert.load(saved(model, tmp_path, ending))
    assert [layer.num_layers for layer in ours.layers] == [2, 1, 1]
    assert [layer.recurrent_dropout for layer in ours.layers] == [0.1, 0.3, 0.0]
    same(ours, model)
    convert.save(tmp_path / "again.keras", ours)
    again = convert.load(tmp_path / "again.keras")
    assert [layer.settings for layer in again.layers] == [layer.settings for layer in ours.layers]


def test_layers_that_are_frozen_read_alike(keras, L, tmp_path):
    both = L.Bidirectional(L.GRU(H))
    model = row(keras, both, L.Dense(2))
    both.forward_layer.trainable = False  # the older format moves its weights to the end
    for ending in ENDINGS:
        same(convert.load(saved(model, tmp_path, ending)), model)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_backward_layer_of_its_own(keras, L, tmp_path, ending):
    back = L.GRU(H, go_backwards=True, name="mine")
    both = L.Bidirectional(L.GRU(H), backward_layer=back)
    model = row(keras, both, L.Dense(2))
    both.forward_layer.trainable = False
    same(convert.load(saved(model, tmp_path, ending)), model)
    for settings, message in (
        ({"reset_after": False}, "differ in reset_after"),
        ({"activation": "gelu"}, "in place of the tanh"),
        ({"activation": "relu"}, "differ in their activations"),
    ):
        back = L.GRU(H, go_backwards=True, **settings)
        model = row(keras, L.Bidirectional(L.GRU(H), backward_layer=back))
        with pytest.raises(ValueError, match=message):
            convert.load(saved(model, tmp_path, ending))


# activations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "softsign", "softplus", "linear", "elu", "leaky_relu",
                                  "hard_sigmoid"])  # fmt: skip
@pytest.mark.parametrize("after", [False, True])
def test_activations(keras, L, tmp_path, name, after):
    """As the candidate's and as the gates'; read, and written again."""
    model = keras.Sequential([
        keras.Input((T, I)),
        L.Bidirectional(L.GRU(H, activation=name, reset_after=after, return_sequences=True)),
        L.GRU(H, recurrent_activation=name, activation=name, reset_after=after),
        L.Dense(2),
    ])  # fmt: skip
    rng = np.random.default_rng(1)
    model.set_weights([0.3 * rng.standard_normal(w.shape) for w in model.get_weights()])
    # to compile each function for each variant takes minutes
    with running(PATHS[-1] if THOROUGH or (name, after) == ("elu", True) else "traced"):
        for ending in ENDINGS:
            ours = convert.load(saved(model, tmp_path, ending))
            same(ours, model)
        convert.save(tmp_path / "again.keras", ours)
        same(ours, keras.saving.load_model(tmp_path / "again.keras"))


def test_a_hard_sigmoid_of_keras_2(tmp_path):
    """It is steeper there; the file says which version wrote it."""
    layer = entry("GRU", return_sequences=True, recurrent_activation="hard_sigmoid")
    for version, alpha in (("2.13.1", 0.2), ("3.0.0", 1 / 6)):
        path = archive(tmp_path / "m.keras", [layer], CELL, version)
        assert convert.load(path).gate_activation == ("hard_sigmoid", alpha, 0.5)


def test_activations_that_keras_does_not_have(tmp_path):
    for settings, message in (
        ({"clip": 1.0}, "the model has clip=1.0, which would be lost"),
        ({"activation": ("elu", 0.5)}, r"activation=\('elu', 0.5\) is no function that Keras has"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.save(tmp_path / "m.keras", GRU(3, 4, **settings))
        assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="has activation='relu', which would be lost"):
        convert.to_arrays(GRU(3, 4, activation="relu"))


# dtypes ------------------------------------------------------------------------------------------


def test_quantised_models_are_named(keras, L, tmp_path):
    for mode in ("int8", "float8"):
        model = keras.Sequential(
            [keras.Input((T, I)), L.GRU(H, return_sequences=True, dtype="float32", name="gru"),
             L.Dense(2, dtype="float32", name="dense")]
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)  # that a GRU is left as it is
            model.quantize(mode)
        path = saved(model, tmp_path)
        with pytest.raises(ValueError, match="dense is quantised"):
            convert.load(path)
        assert convert.load(path, "gru").hidden_size == H
        model.save_weights(tmp_path / "m.weights.h5")
        assert convert.load(tmp_path / "m.weights.h5", "gru").hidden_size == H


def test_mixed_precision_has_float32_weights(keras, L, tmp_path):
    for policy in ("mixed_bfloat16", "mixed_float16"):
        model = row(keras, L.GRU(H, dtype=policy), L.Dense(2, dtype=policy))
        model.compile("adam", "mse")
        ours = convert.load(saved(model, tmp_path))
        assert ours.dtype == "float32"
        x = X.astype("float32")
        assert np.abs(through(ours, x) - model(x).detach().float().numpy()).max() < 0.05
        for array, weight in zip(convert.layer_arrays(ours.layers[0]), model.get_weights()):  # noqa: B905
            assert np.array_equal(array, weight)


def hdf5(arrays):
    h5py, buffer = require("h5py"), io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for path, array in arrays.items():
            file[path] = array
            if array.dtype.str == "|V2":
                file[path].attrs["dtype"] = "bfloat16"
    return buffer.getvalue()


CELL = {
    "layers/gru/cell/vars/0": RNG.standard_normal((I, 3 * H)).astype("float32"),
    "layers/gru/cell/vars/1": RNG.standard_normal((H, 3 * H)).astype("float32"),
    "layers/gru/cell/vars/2": RNG.standard_normal((2, 3 * H)).astype("float32"),
}


def test_bfloat16_arrays(tmp_path):
    """As Keras writes them: two opaque bytes, the upper half of a float32."""
    halves = {k: (a.view("<u4") >> 16).astype("<u2") for k, a in CELL.items()}
    path = tmp_path / "m.weights.h5"
    path.write_bytes(hdf5({k: a.view("V2") for k, a in halves.items()}))
    found = convert.to_arrays(convert.load(path))
    for array, half in zip(found, halves.values(), strict=True):
        assert np.array_equal(array, (half.astype("<u4") << 16).view("<f4"))


@pytest.mark.parametrize("dtype", ["int32", "int8", "bool", "complex64", "V1", "V2", "S3", "O"])
def test_a_bias_of_another_dtype_is_not_left_out(tmp_path, dtype):
    arrays = dict(CELL)
    if dtype.startswith(("V", "S", "O")):
        text = require("h5py").string_dtype()
        wrong = np.full((2, 3 * H), "", text) if dtype == "O" else np.zeros((2, 3 * H), dtype)
    else:
        wrong = np.ones((2, 3 * H), dtype)
    (tmp_path / "m.weights.h5").write_bytes(hdf5(arrays | {"layers/gru/cell/vars/2": wrong}))
    if dtype == "V2":  # marked as bfloat16, it is
        assert convert.load(tmp_path / "m.weights.h5").dtype == "float32"
        return
    with pytest.raises(TypeError, match=r"layers/gru/cell/vars/2 has dtype.*expected a real float"):
        convert.load(tmp_path / "m.weights.h5")


def archive(path, layers, arrays, version="3.0.0"):
    description = {"class_name": "Sequential", "config": {"layers": layers}}
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("config.json", json.dumps(description))
        file.writestr("metadata.json", json.dumps({"keras_version": version}))
        file.writestr("model.weights.h5", hdf5(arrays))
    return path


def entry(kind, **config):
    return {"class_name": kind, "config": {"name": kind.lower(), **config}}


ONE = np.ones((4, 2), "float32")


@pytest.mark.parametrize(
    ("layers", "more", "message"),
    [
        ([entry("GRU")], {"layers/lstm/cell/vars/0": ONE}, r"no layer takes.*layers/lstm/cell"),
        ([entry("GRU")], {"layers/gru/vars/0": ONE}, r"unused \['vars/0'\]"),
        ([entry("GRU")], {"layers/gru/cell/lora/0": ONE}, r"unused \['cell/lora/0'\]"),
        ([entry("GRU")], {"vars/0": ONE}, "it holds 'vars/0'"),
        ([entry("GRU"), entry("Dense")], {}, r"the Dense 'dense' has the arrays \[\]"),
        ([entry("GRU"), entry("Dense")], {"layers/dense/vars/0": ONE}, r"\['vars/0'\], expected"),
        ([entry("GRU"), entry("Dropout", rate=0.1)], {"layers/dropout/vars/0": ONE}, r"vars/0"),
        ([entry("GRU", use_bias=False)], {}, r"unused \['cell/vars/2'\]"),
        ([entry("GRU", reset_after=False)], {}, "is one with the reset gate after"),
        ([entry("GRU", return_sequences="False")], {}, "return_sequences is 'False', expected"),
        ([entry("GRU", time_major=True)], {}, "time_major has no counterpart"),
        ([entry("CuDNNGRU")], {}, "a CuDNNGRU with"),
        ([entry("RNN", cell=entry("LSTMCell"))], {}, "an RNN of .'LSTMCell'. has no counterpart"),
    ],
)
def test_no_array_and_no_setting_is_passed_over(tmp_path, layers, more, message):
    path = archive(tmp_path / "m.keras", layers, CELL | more)
    with pytest.raises(ValueError, match=message):
        convert.load(path)


def test_what_old_files_leave_out(tmp_path):
    """Without reset_after in the description the bias tells it."""
    path = archive(tmp_path / "m.keras", [entry("GRU", return_sequences=True)], CELL)
    assert convert.load(path).reset_after
    bias = CELL["layers/gru/cell/vars/2"][0]
    archive(path, [entry("GRU", return_sequences=True)], CELL | {"layers/gru/cell/vars/2": bias})
    assert not convert.load(path).reset_after
    none = {k: a for k, a in CELL.items() if not k.endswith("2")}
    archive(path, [entry("GRU", return_sequences=True, use_bias=False)], none)
    with pytest.raises(ValueError, match="say reset_after=True or"):
        convert.load(path)
    assert not convert.load(path, reset_after=False).reset_after
    assert convert.load(path, reset_after=False, activation="relu").activation == "relu"
    with pytest.raises(ValueError, match="'gelu' in place of the tanh"):
        convert.load(path, reset_after=False, activation="gelu")


# settings by hand --------------------------------------------------------------------------------


def test_settings_by_hand_are_checked(tmp_path):
    path = tmp_path / "m.weights.h5"
    path.write_bytes(hdf5(CELL))
    plain = convert.load(path, activation="tanh", recurrent_activation="sigmoid", reset_after=True)
    reverse = convert.load(path, go_backwards=True)
    x = X.astype("float32")
    assert np.allclose(through(reverse, x[:, ::-1])[:, ::-1], through(plain, x), atol=1e-6)
    for settings, error, message in (
        ({"activation": "gelu"}, ValueError, "'gelu' in place of the tanh in n ="),
        ({"recurrent_activation": "silu"}, ValueError, "'silu' in place of the sigmoid in z ="),
        ({"recurrent_activation": "hard_sigmoid"}, ValueError, "does not say which version wrote"),
        ({"reset_after": False}, ValueError, "is one with the reset gate after"),
        ({"reset_after": "False"}, TypeError, "reset_after is 'False', expected True or False"),
        ({"go_backwards": 1}, TypeError, "go_backwards is 1, expected True or False"),
        ({"layer": 3}, TypeError, "layer is 3, expected a name or a list of names"),
        ({"layer": []}, TypeError, r"layer is \[\], expected a name or a list of names"),
        ({"layer": [0]}, TypeError, r"layer is \[0\], expected a name"),
    ):
        with pytest.raises(error, match=message):
            convert.load(path, **settings)
    for name in ("bidirectional", "reset_after", "use_bias", "batch_first"):
        with pytest.raises(TypeError, match=f"{name} is 'False', expected True or False"):
            convert.from_arrays(list(CELL.values()), **{name: "False"})


def test_what_may_stand_between_two_grus_of_weights_alone(keras, L, tmp_path):
    first, last = L.GRU(H), L.GRU(H, return_sequences=True)
    model = row(keras, first, L.RepeatVector(T), last)
    model.save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(ValueError, match=r"\['repeat_vector'\] which may stand between"):
        convert.load(tmp_path / "m.weights.h5")
    one, two = (convert.load(tmp_path / "m.weights.h5", name) for name in ("gru", "gru_1"))
    h = np.repeat(one.last(X)[0][:, None], T, axis=1)
    close(two(h)[0], computed(model))
    older(tmp_path / "m.h5", {"gru": cell_names("gru/", CELL.values())})
    with require("h5py").File(tmp_path / "m.h5", "a") as file:
        file["gru/stray:0"] = ONE
    with pytest.raises(ValueError, match=r"no layer takes the arrays \['gru/stray:0'\]"):
        convert.load(tmp_path / "m.h5")
    steps = {"return_sequences": True}
    stack = row(keras, L.GRU(H, **steps), L.Dropout(0.1), L.GRU(H, **steps))
    stack.save_weights(tmp_path / "m.weights.h5")
    same(convert.load(tmp_path / "m.weights.h5"), stack)


# layers of other names ---------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [*ENDINGS, "weights.h5"])
@pytest.mark.parametrize("after", [False, True])
def test_cells_in_an_rnn(keras, L, tmp_path, ending, after):
    def cell(size):
        return L.GRUCell(size, reset_after=after)

    steps = {"return_sequences": True}
    models = [
        row(keras, L.RNN(cell(H), **steps)),
        row(keras, L.RNN([cell(H), cell(H)], **steps)),
        row(keras, L.RNN(L.StackedRNNCells([cell(H)]), **steps)),
        row(keras, L.Bidirectional(L.RNN(cell(H), **steps))),
    ]
    if ending != "weights.h5":
        models += [
            row(keras, L.RNN([cell(H), cell(5)])),
            row(keras, L.RNN([cell(H), cell(H)], go_backwards=True), L.Dense(2)),
            row(keras, L.RNN([cell(2), cell(5)], go_backwards=True), L.Dense(2)),
            row(keras, L.GRU(H, reset_after=after, **steps), L.RNN(cell(H), **steps)),
        ]
    for model in models:
        if ending == "weights.h5":
            model.save_weights(tmp_path / "m.weights.h5")
            same(convert.load(tmp_path / "m.weights.h5"), model)
        else:
            same(convert.load(saved(model, tmp_path, ending)), model)
    two = row(keras, L.Bidirectional(L.RNN([cell(H), cell(H)])))
    if ending == "keras":
        with pytest.raises(ValueError, match="a Bidirectional of several cells"):
            convert.load(saved(two, tmp_path))


def test_cells_whose_order_a_file_loses(keras, L, tmp_path):
    cells = [L.GRUCell(I), L.GRUCell(I)]
    model = row(keras, L.RNN(cells))
    cells[0].trainable = False
    same(convert.load(saved(model, tmp_path)), model)
    with pytest.raises(ValueError, match="differ in trainable"):
        convert.load(saved(model, tmp_path, "h5"))


@pytest.mark.parametrize("ending", ENDINGS)
def test_layers_that_mean_the_same(keras, L, tmp_path, ending):
    model = filled(
        keras.Sequential(
            [
                keras.Input(batch_shape=(B, T), dtype="int32"),
                L.Embedding(7, I),
                L.TimeDistributed(L.Dense(5)),
                L.GRU(H, return_sequences=True, unroll=True, stateful=True, implementation=1),
                L.Dropout(0.5),
                L.TimeDistributed(L.Dense(2, use_bias=False)),
            ]
        )
    )
    ours = convert.load(saved(model, tmp_path, ending))
    kinds = [Embedding, Linear, GRU, Dropout, Linear]
    assert [type(layer) for layer in ours.layers] == kinds
    same(ours, model, WORDS)


def test_lora_is_merged_in_the_file(keras, L, tmp_path):
    model = row(keras, L.GRU(H), L.Dense(2))
    model.layers[1].enable_lora(1)
    filled(model)
    same(convert.load(saved(model, tmp_path)), model)


# models inside of models, and such as branch -----------------------------------------------------


def nested(keras, L):
    words = keras.Input((T,), dtype="int32")
    inner = keras.Sequential([L.Embedding(7, I), L.GRU(H, return_sequences=True, name="deep")])
    inner = keras.Sequential([inner, L.GRU(H, return_sequences=True)], name="encoder")
    x = keras.Input((T, H))
    y = L.GRU(5, name="gru")(L.Dense(3, name="narrow")(x))
    head = keras.Model(x, L.Dense(2)(y), name="head")
    return filled(keras.Model(words, head(inner(words))))


@pytest.mark.parametrize("ending", ENDINGS)
def test_nested_models(keras, L, tmp_path, ending):
    model = nested(keras, L)
    path = saved(model, tmp_path, ending)
    ours = convert.load(path)
    kinds = [Embedding, GRU, Linear, GRU, Last, Linear]
    assert [type(layer) for layer in ours.layers] == kinds
    same(ours, model, WORDS)
    gru = convert.load(path, "head/gru")
    for array, weight in zip(
        convert.to_arrays(gru), model.get_layer("head").get_layer("gru").get_weights(), strict=True
    ):
        assert np.array_equal(array, weight)
    with pytest.raises(ValueError, match=r"no layer \['gru'\], only .*'head/gru'"):
        convert.load(path, "gru")


def test_nested_models_by_place(keras, L, tmp_path):
    model = nested(keras, L)
    model.save_weights(tmp_path / "m.weights.h5")
    gru = convert.load(tmp_path / "m.weights.h5", "functional/gru")
    assert np.array_equal(
        convert.to_arrays(gru)[0], model.get_layer("head").get_layer("gru").get_weights()[0]
    )
    with pytest.raises(KeyError, match=r"only of \['functional/dense', .*'sequential/sequential"):
        convert.load(tmp_path / "m.weights.h5", "gru")


@pytest.mark.parametrize("ending", ENDINGS)
def test_models_that_branch_by_name(keras, L, tmp_path, ending):
    x = keras.Input((T, I))
    one = L.GRU(H, name="one", return_sequences=True)(x)
    two = L.Bidirectional(L.GRU(H), name="two")(x)
    flat = L.Dense(2, name="flat")(two)
    top = L.GRU(5, name="top")(one)
    model = filled(keras.Model(x, L.Concatenate()([top, flat])))
    path = saved(model, tmp_path, ending)
    with pytest.raises(ValueError, match=r"does not follow .* alone.*takes layers by their names"):
        convert.load(path)
    grus, dense = (convert.load(path, name) for name in ("one", "flat"))
    assert isinstance(grus, GRU)
    assert isinstance(dense, Linear)
    branch = convert.load(path, ["two", "flat"])
    assert [type(layer) for layer in branch.layers] == [GRU, Last, Linear]
    expected = computed(model)
    last = convert.load(path, "top")(grus(X)[0])[0][:, -1]
    close(np.concatenate([last, through(branch)], axis=1), expected)


def test_layers_that_are_shared_or_called_twice(keras, L, tmp_path):
    x = keras.Input((T, I))
    gru = L.GRU(I, return_sequences=True)
    keras.Model(x, gru(gru(x))).save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match="alone"):
        convert.load(tmp_path / "m.keras")
    inner = keras.Sequential([keras.Input((T, I)), gru])
    keras.Model(x, inner(inner(x))).save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match="alone"):
        convert.load(tmp_path / "m.keras")
    h = keras.Input((I,))
    keras.Model([x, h], gru(x, initial_state=h)).save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match="alone"):
        convert.load(tmp_path / "m.keras")


# what is left to the user ------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_masks_by_lengths(keras, L, tmp_path, ending):
    lengths = [6, 2, 4]
    words = np.where(np.arange(T) < np.array(lengths)[:, None], WORDS % 6 + 1, 0)
    names = ["words", "gru", "dense"]
    layers = [L.Embedding(7, I, mask_zero=True, name="words"), L.GRU(H, name="gru")]
    dense = L.Dense(2, activation="softmax", name="dense")
    x = keras.Input((T,), dtype="int32")
    functional = keras.Model(x, dense(layers[1](layers[0](x))))
    for model in (keras.Sequential([keras.Input((T,)), *layers, dense]), filled(functional)):
        path = saved(model, tmp_path, ending)
        with pytest.raises(ValueError, match=r"'mask_zero': True.*lengths"):
            convert.load(path)
        with pytest.warns(UserWarning, match="is left to you") as warned:
            ours = convert.load(path, names)
        assert [str(w.message).partition(" has")[0] for w in warned] == [
            "a Embedding with {'name': 'words', 'mask_zero': True}",
            "a Dense with {'name': 'dense', 'activation': 'softmax'}",
        ]
        assert all(w.filename == __file__ for w in warned)
        scores = np.exp(through(ours, words, lengths=lengths))
        expected = computed(model, words)
        close(scores / scores.sum(1, keepdims=True), expected)


def test_masking(keras, L, tmp_path):
    model = row(keras, L.Masking(0.0), L.GRU(H, name="gru"))
    path = saved(model, tmp_path)
    with pytest.raises(ValueError, match="it makes a mask out of x"):
        convert.load(path)
    padded = np.where(np.arange(T)[:, None] < 4, X, 0.0)
    h_n = convert.load(path, "gru").last(padded, lengths=[4] * B)
    close(h_n[0], computed(model, padded))


# the older format --------------------------------------------------------------------------------


def older(path, layers, config=None):
    """A file as Keras 2 writes it: layer -> {weight name: array}."""
    h5py = require("h5py")
    with h5py.File(path, "w") as file:
        group = file
        if config is not None:
            file.attrs["model_config"] = json.dumps(config)
            group = file.create_group("model_weights")
            slots = file.create_group("optimizer_weights")
            slots.attrs["weight_names"] = [b"Adam/iter:0"]
            slots["Adam/iter:0"] = np.int64(3)
        group.attrs["layer_names"] = [name.encode() for name in layers]
        group.attrs["keras_version"] = b"2.11.0"
        for name, weights in layers.items():
            of_layer = group.create_group(name)
            names = [weight.encode() for weight in weights]
            if len(names) < 7:
                of_layer.attrs["weight_names"] = names
            else:  # as where they do not fit into one attribute
                of_layer.attrs["weight_names0"] = names[:4]
                of_layer.attrs["weight_names1"] = names[4:]
            for weight, array in weights.items():
                of_layer[weight] = array
    return path


def cell_names(prefix, arrays):
    leaves = ("kernel", "recurrent_kernel", "bias")
    return {f"{prefix}{leaf}:0": a for leaf, a in zip(leaves, arrays, strict=False)}


@pytest.mark.parametrize(
    ("one", "forward", "backward"),
    [
        ("gru_1/gru_cell_3/", "both/forward_gru/gru_cell_5/", "both/backward_gru/gru_cell_6/"),
        ("gru_1/", "both/forward_gru_1/", "both/backward_gru_1/"),  # before TensorFlow 2
    ],
)
def test_files_of_keras_2(keras, L, tmp_path, one, forward, backward):
    model = row(keras, L.GRU(H, return_sequences=True), L.Bidirectional(L.GRU(H)), L.Dense(2))
    gru, both, dense = (layer.get_weights() for layer in model.layers)
    weights = {
        "gru_1": cell_names(one, gru),
        "drop": {},
        "both": cell_names(forward, both[:3]) | cell_names(backward, both[3:]),
        "dense": {"dense/kernel:0": dense[0], "dense/bias:0": dense[1]},
    }
    settings = {"units": H, "reset_after": True, "implementation": 2, "time_major": False}
    config = [
        entry("InputLayer", batch_input_shape=[None, T, I]),
        {"class_name": "GRU", "config": {**settings, "name": "gru_1", "return_sequences": True}},
        {"class_name": "Dropout", "config": {"name": "drop", "rate": 0.1, "noise_shape": None}},
        {"class_name": "Bidirectional",
         "config": {"name": "both", "layer": {"class_name": "GRU", "config": settings}}},
        {"class_name": "Dense", "config": {"name": "dense", "units": 2, "activation": "linear"}},
    ]  # fmt: skip
    whole = {"class_name": "Sequential", "config": {"name": "s", "layers": config}}
    same(convert.load(older(tmp_path / "m.h5", weights, whole)), model)
    same(convert.load(older(tmp_path / "m.keras", weights, whole)), model)
    whole["config"] = config  # of the first versions
    same(convert.load(older(tmp_path / "m.h5", weights, whole)), model)
    # functional: inbound_nodes as lists
    before = "inputlayer"
    config[0]["name"], config[0]["inbound_nodes"] = before, []
    for layer in config[1:]:
        layer["name"] = layer["config"]["name"]
        layer["inbound_nodes"] = [[[before, 0, 0, {}]]]
        before = layer["name"]
    whole = {
        "class_name": "Functional",
        "config": {"name": "m", "layers": config, "output_layers": [["dense", 0, 0]]},
    }
    same(convert.load(older(tmp_path / "m.h5", weights, whole)), model)
    config[4]["inbound_nodes"] = [[["both", 0, 0, {"mask": ["drop", 0, 0]}]]]
    with pytest.raises(ValueError, match="'dense' does not follow 'both' alone"):
        convert.load(older(tmp_path / "m.h5", weights, whole))
    # weights alone
    for name, arrays in (("gru_1", gru), ("both", both)):
        ours = convert.load(older(tmp_path / "m.h5", weights), name)
        for a, b in zip(convert.to_arrays(ours), arrays, strict=True):
            assert np.array_equal(a, b)
    with pytest.raises(ValueError, match="name a GRU with layer"):
        convert.load(tmp_path / "m.h5")
    alone = convert.load(older(tmp_path / "m.h5", {"gru_1": weights["gru_1"]}))
    assert np.array_equal(convert.to_arrays(alone)[2], gru[2])


def test_files_of_keras_2_that_lie(tmp_path):
    arrays = list(CELL.values())
    weights = {"gru": cell_names("gru/", arrays) | {"gru/extra:0": arrays[0]}}
    config = {"class_name": "Sequential", "config": {"layers": [entry("GRU")]}}
    with pytest.raises(ValueError, match=r"unused \['gru/extra'\]"):
        convert.load(older(tmp_path / "m.h5", weights, config))
    weights = {"gru": cell_names("gru/", arrays), "other": {"other/kernel:0": arrays[0]}}
    with pytest.raises(ValueError, match=r"no layer takes.*other/other/kernel:0"):
        convert.load(older(tmp_path / "m.h5", weights, config))
    weights["gru"]["gru/bias:0"] = arrays[2].astype("int32")
    with pytest.raises(ValueError, match=r"gru/bias:0 has dtype int32"):
        convert.load(older(tmp_path / "m.h5", weights, config))
    h5py = require("h5py")
    for attribute, message in (("weight_names", "lists .*gone"), ("model_config", "is damaged")):
        with h5py.File(older(tmp_path / "m.h5", {"gru": {}}, config), "a") as file:
            owner = file["model_weights/gru"] if attribute == "weight_names" else file
            owner.attrs[attribute] = [b"gone"] if attribute == "weight_names" else "{"
        with pytest.raises(ValueError, match=message):
            convert.load(tmp_path / "m.h5")
    assert isinstance(
        convert.load(older(tmp_path / "m.h5", {"gru": cell_names("gru/", arrays)})), GRU
    )


def test_a_chain_is_written_with_its_last(tmp_path):
    chain = Chain(GRU(I, H, reverse=True, reset_after=True), Last())
    with pytest.raises(ValueError, match="reverse=True alone has no counterpart"):
        convert.save(tmp_path / "m.keras", chain)
