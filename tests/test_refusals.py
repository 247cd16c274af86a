"""Bad input: each is refused in words that name the argument, or gives the right numbers."""

import json

import numpy as np
import pytest
from conftest import require

from gru_any import GRU, Chain, Embedding, GRUCell, Linear, asarray, squared_error, to_numpy
from gru_any.backend import BackendError
from gru_any.errors import ShapeError, check_shape

X = np.zeros((5, 2, 3), "float32")


@pytest.fixture
def gru():
    return GRU(3, 4, 2, seed=0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3,), r"x is \(3,\), expected \(T, B, I\), I = 3"),
        ((1, 5, 2, 3), r"x is \(1, 5, 2, 3\), expected \(T, B, I\)"),
        ((5, 2, 4), r"x is \(5, 2, 4\), expected \(T, B, I\) with I = 3: axis 2 is 4, I is 3"),
        ((5, 4), r"x is \(5, 4\), expected \(T, I\) with I = 3: axis 1 is 4"),
    ],
)
def test_x_of_a_wrong_shape(gru, shape, message):
    with pytest.raises(ShapeError, match=message):
        gru(np.zeros(shape, "float32"))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 4), r"h0 is \(2, 3, 4\), expected \(L\*D, B, H\).*axis 1 is 3, B is 2"),
        ((2, 1, 4), "axis 1 is 1, B is 2"),
        ((1, 2, 4), r"axis 0 is 1, L\*D is 2"),
        ((2, 2, 5), "axis 2 is 5, H is 4"),
        ((2, 4), r"h0 is \(2, 4\), expected \(L\*D, B, H\)"),
    ],
)
def test_h0_of_a_wrong_shape(gru, shape, message):
    with pytest.raises(ShapeError, match=message):
        gru(X, np.zeros(shape, "float32"))


def test_h0_without_a_batch(gru):
    with pytest.raises(ShapeError, match=r"expected \(L\*D, H\)"):
        gru(X[:, 0], np.zeros((2, 1, 4), "float32"))


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([5], ValueError, r"lengths is \(1,\), expected \(B,\) = \(2,\)"),
        ([[5, 5]], ValueError, r"lengths is \(1, 2\)"),
        ([5, -1], ValueError, "lengths holds -1, expected 0 to T = 5"),
        ([6, 1], ValueError, "lengths holds 6, expected 0 to T = 5"),
        ([5.0, 1.0], TypeError, "lengths has dtype float64, expected integers"),
        ([True, False], TypeError, "lengths has dtype bool"),
    ],
)
def test_lengths(gru, lengths, error, message):
    with pytest.raises(error, match=message):
        gru(X, None, lengths)
    with pytest.raises(error, match=message):
        gru.vjp(X, None, np.array(lengths))


def test_lengths_without_a_batch(gru):
    with pytest.raises(ValueError, match=r"x \(T, I\) has no batch"):
        gru(X[:, 0], None, [5])


def test_a_shape_error_says_what_is_known():
    with pytest.raises(ShapeError, match=r"h is \(2, 3\), expected \(B, H\) with B = 2, H = 4"):
        check_shape("h", np.zeros((2, 3)), "(B, H)", {"B": 2, "H": 4})
    check_shape("x", np.zeros((7, 2, 3)), "(..., I)", {"I": 3})


@pytest.mark.parametrize("bad", [np.int64, np.float64, np.float16, np.bool_, ">f4"])
def test_another_dtype(gru, bad):
    with pytest.raises(TypeError, match=r"x has dtype .*, expected float32.*asarray\(x"):
        gru(X.astype(bad))
    with pytest.raises(TypeError, match="h0 has dtype"):
        gru(X, np.zeros((2, 2, 4), bad))
    if np.dtype(bad).kind == "f":
        assert np.array_equal(gru(asarray(X.astype(bad), gru))[0], gru(X)[0])


@pytest.mark.parametrize(
    "bad",
    [X.tolist(), 5, None, "x", np.float32(1), np.ma.masked_array(X[:, 0]), X[:, 0].view(np.matrix)],
    ids=["list", "int", "None", "str", "scalar", "masked", "matrix"],
)
def test_what_is_no_array(gru, bad):
    with pytest.raises(TypeError, match=r"x is a .*, expected an array of numpy on cpu"):
        gru(bad)
    with pytest.raises(TypeError, match="x is a"):
        Linear(3, 4)(bad)
    with pytest.raises(TypeError, match="x is a"):
        GRUCell(3, 4)(bad)


def every_second(v):
    wide = np.zeros((*(2 * n for n in v.shape),), "float32")
    wide[::2, ::2, ::2] = v
    return wide[::2, ::2, ::2]


def field(v):
    records = np.zeros(v.shape, [("value", "float32"), ("mark", "int8")])  # of five bytes
    records["value"] = v
    return records["value"]


@pytest.mark.parametrize("strided", [every_second, field])
def test_strided_arrays_give_the_same_numbers(gru, strided):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 2, 3)).astype("float32")
    dy = rng.standard_normal((5, 2, 4)).astype("float32")
    h0 = rng.standard_normal((2, 2, 4)).astype("float32")

    (y, h), pullback = gru.vjp(x, h0)
    (y2, h2), pullback2 = gru.vjp(strided(x), np.asfortranarray(h0))
    results, results2 = pullback(dy), pullback2(strided(dy))
    pairs = [(y, y2), (h, h2), *zip(results[1:], results2[1:], strict=True)]
    pairs += [(results[0][k], results2[0][k]) for k in results[0]]
    for a, b in pairs:
        assert np.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_cotangents(gru):
    _, pullback = gru.vjp(X)
    with pytest.raises(ShapeError, match=r"dy is \(5, 2, 3\), expected \(T, B, D\*H\)"):
        pullback(X)
    with pytest.raises(ShapeError, match="axis 0 is 4, T is 5"):
        pullback(np.zeros((4, 2, 4), "float32"))
    with pytest.raises(TypeError, match="dy has dtype float64"):
        pullback(np.zeros((5, 2, 4)))
    with pytest.raises(ShapeError, match="dh_n is"):
        pullback(None, np.zeros((2, 2, 5), "float32"))


@pytest.mark.parametrize("call", ["gru", "linear", "cell"])
def test_cotangents_of_other_layers(call):
    layer = {"gru": GRU, "linear": Linear, "cell": GRUCell}[call](3, 4)
    _, pullback = layer.vjp(X if call != "cell" else X[0])
    with pytest.raises(ValueError, match="expected"):
        pullback(np.zeros((9, 9, 9), "float32"))


def test_arrays_of_another_library(backend):
    if backend.name == "numpy":
        pytest.skip("numpy: needs a second library")
    here, there = GRU(3, 4), GRU(3, 4, backend=backend.name, device=backend.device)
    with pytest.raises(TypeError, match="x is an array of numpy, expected an array of"):
        there(X)
    with pytest.raises(TypeError, match=f"x is an array of {backend.name}, expected"):
        here(backend.put(X))
    with pytest.raises(TypeError, match="h0 is an array of numpy"):
        there(backend.put(X), np.zeros((1, 2, 4), "float32"))
    with pytest.raises(TypeError, match="weight_ih_l0 is an array of"):
        here.params["weight_ih_l0"] = there.params["weight_ih_l0"]


def test_arrays_on_another_device():
    xp = require("array_api_strict")
    gru = GRU(3, 4, backend="array_api_strict", device="device1")
    with pytest.raises(TypeError, match=r"x is on .*CPU_DEVICE.*, expected an array of"):
        gru(xp.asarray(X))


def test_a_tensor_that_requires_grad_is_refused():
    torch = require("torch")
    gru = GRU(3, 4, backend="torch")
    x = torch.zeros(5, 2, 3, requires_grad=True)
    with pytest.raises(TypeError, match=r"x requires grad.*x\.detach\(\)"):
        gru(x)
    gru(x.detach())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "input_size is 0"),
        ((3, -1), "hidden_size is -1"),
        ((3, 4.0), "hidden_size is 4.0"),
        ((3, 4, 0), "num_layers is 0"),
    ],
)
def test_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        GRU(*arguments)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "asarray", "", np.float32, None])
def test_what_is_no_dtype_of_a_model(dtype):
    with pytest.raises(
        ValueError, match=r"dtype is .*, expected one of float16, bfloat16, float32"
    ):
        GRU(3, 4, dtype=dtype)


def test_a_dtype_that_the_library_lacks():
    with pytest.raises(ValueError, match="dtype is 'bfloat16', which numpy does not have"):
        GRU(3, 4, dtype="bfloat16")


def test_recompute():
    for bad in (0, -1, "log", 2.5, True):
        with pytest.raises(ValueError, match="recompute is"):
            GRU(3, 4, recompute=bad)


def test_complex_serves_the_forward_call_alone():
    gru = GRU(3, 4, dtype="complex128")
    x = X.astype("complex128")
    assert gru(x)[0].dtype == np.complex128
    with pytest.raises(TypeError, match="complex128 serves the plain forward call alone"):
        gru.vjp(x)
    with pytest.raises(TypeError, match="complex128"):
        GRUCell(3, 4, dtype="complex128").vjp(x[0])


@pytest.mark.parametrize("make", [lambda v: GRU(3, v), lambda v: GRU(v, 4), lambda v: Linear(v, 2)])
@pytest.mark.parametrize("bad", [True, np.bool_(True), 4.0, "4", 0, -1, None, np.array([4])])
def test_sizes_are_integers_and_no_bools(make, bad):
    with pytest.raises(ValueError, match="expected an integer of at least 1"):
        make(bad)


def test_settings_given_as_numpy_scalars_can_be_written_to_json():
    gru = GRU(np.int64(3), np.uint8(4), np.int32(2), dropout=np.float32(0.5), bias=np.True_)
    assert json.loads(json.dumps(gru.settings)) == gru.settings
    assert gru.settings["dropout"] == 0.5
    layer = Linear(np.int64(3), np.int16(2), bias=np.False_)
    assert json.loads(json.dumps(layer.settings)) == layer.settings


@pytest.mark.parametrize("name", ["bias", "batch_first", "bidirectional", "reset_after", "reverse"])
@pytest.mark.parametrize("bad", ["False", 0, 1, None])
def test_a_switch_is_true_or_false(name, bad):
    with pytest.raises(TypeError, match=f"{name} is {bad!r}, expected True or False"):
        GRU(3, 4, **{name: bad})


@pytest.mark.parametrize("bad", ["0.5", True, None, np.array([0.5]), 0.5j])
def test_dropout_is_a_number(bad):
    with pytest.raises(TypeError, match="expected 0 <= dropout < 1"):
        GRU(3, 4, 2, dropout=bad)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (np.array([5, 3], object), "lengths has dtype object, expected numbers"),
        (["5", "3"], "lengths has dtype <U1"),
        ([5, True], r"lengths is \[5, True\]"),
        ([5, None], "lengths has dtype object"),
        (range(3, 5), "lengths is a range, expected an array or a list"),
        ({5, 3}, "lengths is a set"),
        ("53", "lengths is a str"),
        (np.random.default_rng(0), "lengths is a Generator"),
        (np.ma.array([5, 3], mask=[0, 1]), "lengths is a MaskedArray.*mask would be lost"),
    ],
)
def test_lengths_that_are_no_integers(gru, lengths, message):
    for call in (gru, gru.vjp, gru.last):
        with pytest.raises(TypeError, match=message):
            call(X, None, lengths)


def test_lengths_of_rows_that_differ(gru):
    with pytest.raises(ValueError, match="lengths is no array of numbers"):
        gru(X, None, [[5], [3, 4]])


@pytest.mark.parametrize("library", ["numpy", "torch", "jax.numpy"])
@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "bool"])
def test_the_way_from_integers_to_x(library, dtype):
    xp = require(library)
    gru = GRU(3, 4, seed=0, backend=library)
    x = xp.asarray(np.ones((5, 2, 3), dtype))
    with pytest.raises(TypeError, match=r"x has dtype .*with x \* 1\.0, since .* keeps integers"):
        gru(asarray(x, like=gru))
    assert np.isfinite(to_numpy(gru(asarray(x * 1.0, like=gru))[0])).all()


def test_states_from_a_file(tmp_path):
    model = Chain(GRU(3, 4, seed=0), GRU(4, 6, seed=1))
    state = model(X)[1]
    np.savez(tmp_path / "state.npz", *state)
    again = list(np.load(tmp_path / "state.npz").values())
    np.testing.assert_array_equal(model(X, again)[0], model(X, state)[0])
    one = Chain(GRU(3, 4, seed=0))
    np.save(tmp_path / "one.npy", one(X)[1])
    np.testing.assert_array_equal(one(X, np.load(tmp_path / "one.npy"))[0], one(X, one(X)[1])[0])


def test_no_mask_is_lost(gru):
    masked = np.ma.array(X, mask=X == 0)
    for call in (gru, gru.last, Linear(3, 2), lambda x: GRUCell(3, 4)(x[0])):
        with pytest.raises(
            TypeError, match=r"x is a MaskedArray.*mask would be lost: give its filled\(0\)"
        ):
            call(masked)
    for call in (lambda x: asarray(x, like=gru), to_numpy):
        with pytest.raises(TypeError, match=r"x is a MaskedArray.*mask would be lost"):
            call(masked)
    weights = {k: np.ma.array(v, mask=v > 0) for k, v in gru.params.items()}
    with pytest.raises(TypeError, match="weight_ih_l0 is a MaskedArray"):
        gru.load_params(weights)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_matrices_are_refused_where_their_product_is_another():
    square = np.matrix(np.eye(3) + 1)
    for call in (lambda x: squared_error(x, x), lambda x: squared_error(np.eye(3), x)):
        with pytest.raises(TypeError, match=r"is a matrix, expected numpy\.asarray"):
            call(square)
    assert type(to_numpy(square)) is np.ndarray
    assert type(asarray(square, like=GRU(3, 4))) is np.ndarray


def test_asarray_does_not_truncate():
    with pytest.raises(TypeError, match="x has dtype float64, and like has dtype int64"):
        asarray([1.5], like=np.zeros(2, "int64"))
    assert asarray([1, 2], like=np.zeros(2, "int64")).tolist() == [1, 2]


@pytest.mark.parametrize("seed", ["3", 3.0, True, -1, b"a", np.array(3), np.float32(3)])
@pytest.mark.parametrize("layer", [GRU, GRUCell, Linear, Embedding])
def test_a_seed_is_an_integer(layer, seed):
    with pytest.raises((TypeError, ValueError), match=r"seed is .*expected an integer of at least"):
        layer(3, 4, seed=seed)


def test_seeds_of_numpy():
    first = GRU(3, 4, seed=7).params["weight_ih_l0"]
    for seed in (np.int64(7), np.random.SeedSequence(7), np.random.default_rng(7)):
        np.testing.assert_array_equal(GRU(3, 4, seed=seed).params["weight_ih_l0"], first)


@pytest.mark.parametrize("dtype", [np.float64, np.dtype("float64"), float, "f8", ">f4", []])
def test_dtypes_are_given_by_name(dtype):
    for make in (lambda: GRU(3, 4, dtype=dtype), lambda: GRU(3, 4).to(dtype=dtype)):
        with pytest.raises(ValueError, match=r"dtype is .*expected one of float16") as e:
            make()
        known = dtype is np.float64 or isinstance(dtype, np.dtype)
        assert ('write dtype="float64"' in str(e.value)) == known


def test_dtypes_of_another_library_are_given_by_name():
    dtype = require("torch").bfloat16
    with pytest.raises(ValueError, match=r'dtype is torch.*write dtype="bfloat16"'):
        GRU(3, 4, backend="torch", dtype=dtype)


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        ("nunpy", None, "'nunpy' cannot be imported.*use \"numpy\""),
        ("json", None, "'json' has no Python Array API.*use \"numpy\""),
        (True, None, 'backend is True, expected a name or a module: use "numpy"'),
        ("numpy", True, "device is True"),
        ("cupy", False, "device is False"),
    ],
)
def test_backends_that_are_refused(backend, device, message):
    with pytest.raises(BackendError, match=message):
        GRU(3, 4, backend=backend, device=device)


@pytest.mark.parametrize("bad", [None, [], "weights", GRU(3, 4)])
def test_what_holds_no_parameters(gru, bad):
    for model in (gru, Chain(GRU(3, 4))):
        with pytest.raises(TypeError, match=f"parameters are a {type(bad).__name__}, expected"):
            model.load_params(bad)


def test_parameters_are_checked_however_they_are_replaced(gru):
    params, version = gru.params, gru.params.version
    for bad in ({"weight_ih_l0": [1.0]}, {"weight_ih_l0": np.zeros((1, 3), "float32")}):
        with pytest.raises((TypeError, ShapeError), match="weight_ih_l0 is"):
            params.update(bad)
        with pytest.raises((TypeError, ShapeError), match="weight_ih_l0 is"):
            params |= bad
    with pytest.raises(KeyError, match="'another' is no parameter"):
        params.setdefault("another", 1)
    for take in (lambda: params.pop("bias_ih_l0"), params.popitem, params.clear):
        with pytest.raises(TypeError, match="cannot be taken out"):
            take()
    assert len(params) == 6
    params |= {"bias_ih_l0": np.ones(12, "float32")}
    assert gru.params is params
    assert params.version > version
    _, pullback = gru.vjp(X)
    params.update(GRU(3, 4, 2, seed=1).params)
    with pytest.raises(RuntimeError, match="replaced between vjp"):
        pullback(np.zeros((5, 2, 4), "float32"))


@pytest.mark.parametrize("state", [{"0": 1}, 0, "h"])
def test_states_of_a_chain_are_a_list(state):
    with pytest.raises(TypeError, match=r"state is a .*, expected a list, one for each GRU"):
        Chain(GRU(3, 4))(X, state)
