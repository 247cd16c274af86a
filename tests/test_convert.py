"""Tables of weights: there and back bit for bit, and what cannot be converted is refused."""

import logging
import sys

import numpy as np
import pytest
from conftest import finished
from hypothesis import given
from hypothesis import strategies as st

from gru_any import GRU, Chain, Embedding, Linear, convert
from gru_any.convert import chainer, equinox, flax, haiku, haste, keras, mlx, torch

I, H = 3, 4
# what becomes of a GRU with reset_after, or before, written and read again
AFTER = {
    "torch": lambda g: torch.from_arrays(torch.to_arrays(g)),
    "keras": lambda g: keras.from_arrays(
        keras.to_arrays(g), bidirectional=len(g.suffixes) == 2, use_bias=g.bias
    ),
    "linen": lambda g: flax.from_arrays(flax.to_arrays(g)),
    "equinox": lambda g: cells(equinox, g),
    "mlx": lambda g: cells(mlx, g),
    "chainer": lambda g: cells(chainer, g),
    "haste": lambda g: cells(haste, g),
}
BEFORE = {
    "keras": lambda g: keras.from_arrays(
        keras.to_arrays(g),
        bidirectional=len(g.suffixes) == 2,
        use_bias=g.bias,
        reset_after=False,
    ),
    "haiku": lambda g: cells(haiku, g),
    "chainer": lambda g: cells(chainer, g),
}
ONE_BIAS = ("linen", "equinox", "mlx")
ALWAYS_BIAS = ("linen", "haiku", "chainer", "haste")


def cells(library, gru):
    return library.from_arrays(library.to_arrays(gru), bidirectional=len(gru.suffixes) == 2)


def random_gru(seed, reset_after, **settings):
    """Every number random, some 0 and some -0."""
    gru, rng = GRU(I, H, reset_after=reset_after, **settings), np.random.default_rng(seed)
    for array in gru.params.values():
        array[...] = rng.standard_normal(array.shape)
        array[rng.random(array.shape) < 0.1] = 0.0
        array[rng.random(array.shape) < 0.1] = -0.0
    return gru


def same_bits(found, expected):
    assert found.tobytes() == expected.tobytes()


SETTINGS = st.fixed_dictionaries(
    {
        "num_layers": st.integers(1, 3),
        "bidirectional": st.booleans(),
        "bias": st.booleans(),
        "dtype": st.sampled_from(["float16", "float32", "float64"]),
    }
)


@pytest.mark.parametrize(
    ("reset_after", "name"), [(True, n) for n in AFTER] + [(False, n) for n in BEFORE]
)
@given(seed=st.integers(0, 99), settings=SETTINGS)
def test_there_and_back(reset_after, name, seed, settings):
    gru = random_gru(seed, reset_after, **settings)
    again = (AFTER if reset_after else BEFORE)[name](gru)
    assert again.settings["num_layers"] == gru.num_layers
    assert (again.suffixes, again.dtype) == (gru.suffixes, gru.dtype)
    assert again.bias == (gru.bias or name in ALWAYS_BIAS)
    for key, found in again.params.items():
        expected = gru.params.get(key, np.zeros_like(found))
        if name in ONE_BIAS and "bias" in key:
            expected = one_bias(gru, key, found)
        same_bits(found + 0.0, expected + 0.0)  # +0 and -0 are the same bias
        if "weight" in key:
            same_bits(found, expected)


def one_bias(gru, key, found):
    """Where r and z have one bias: (b + c, 0), n's two stay two."""
    if not gru.bias:
        return np.zeros_like(found)
    b, c = gru.params[key.replace("_hh_", "_ih_")], gru.params[key.replace("_ih_", "_hh_")]
    rz, n = slice(2 * H), slice(2 * H, None)
    if "_hh_" in key:
        return np.concatenate([np.zeros_like(c[rz]), c[n]])
    return np.concatenate([b[rz] + c[rz], b[n]])


def test_the_sum_of_two_biases_is_reported(caplog):
    caplog.set_level(logging.INFO, logger="gru_any.convert")
    gru = random_gru(0, True)
    equinox.to_arrays(gru)
    assert "Equinox: two biases are added and the sum is rounded once" in caplog.text
    caplog.clear()
    equinox.to_arrays(equinox.from_arrays(equinox.to_arrays(gru)[0]))
    gru.params["bias_hh_l0"][: 2 * H] = 0
    equinox.to_arrays(gru)
    haste.to_arrays(gru)
    assert caplog.text.count("two biases") == 2  # r and z, of the gru as it was


def test_links_of_chainer_have_two_biases_that_are_added():
    arrays = chainer.to_arrays(random_gru(0, False))
    rng = np.random.default_rng(1)
    arrays |= {k: rng.standard_normal(H).astype("float32") for k in arrays if k.endswith("/b")}
    gru = chainer.from_arrays(arrays)
    b = [arrays[f"W{k}/b"] + arrays[f"U{k}/b"] for k in ("_r", "_z", "")]
    same_bits(gru.params["bias_ih_l0"], np.concatenate([b[0], -b[1], b[2]]))
    again = chainer.to_arrays(gru)
    assert np.array_equal(again["W_z/b"], b[1])
    assert not again["U_z/b"].any()


# by hand: where each number goes -----------------------------------------------------------------


def numbered(reset_after):
    """H = I = 1: W is 1, 2, 3, U 4, 5, 6, b 7, 8, 9, c 10, 20, 30; r, z, n each."""
    gru = GRU(1, 1, reset_after=reset_after)
    values = {"weight_ih_l0": [1, 2, 3], "weight_hh_l0": [4, 5, 6], "bias_ih_l0": [7, 8, 9]}
    values["bias_hh_l0"] = [10, 20, 30]
    for name, array in gru.params.items():
        array[...] = np.reshape(values[name], array.shape)
    return gru


def listed(tree):
    if isinstance(tree, dict):
        return {k: listed(v) for k, v in tree.items()}
    return [listed(v) for v in tree] if isinstance(tree, list) else tree.ravel().tolist()


def test_where_each_number_goes_reset_after():
    gru = numbered(True)
    assert listed(keras.to_arrays(gru)) == [[2, 1, 3], [5, 4, 6], [8, 7, 9, 20, 10, 30]]
    assert listed(haste.to_arrays(gru)) == [
        {
            "kernel": [2, 1, 3],
            "recurrent_kernel": [5, 4, 6],
            "bias": [8, 7, 9],
            "recurrent_bias": [20, 10, 30],
        }
    ]
    assert listed(mlx.to_arrays(gru)) == [
        {"Wx": [1, 2, 3], "Wh": [4, 5, 6], "b": [17, 28, 9], "bhn": [30]}
    ]
    assert listed(flax.to_arrays(gru)[0]["cell"]) == {
        "ir": {"kernel": [1], "bias": [17]},
        "iz": {"kernel": [2], "bias": [28]},
        "in": {"kernel": [3], "bias": [9]},
        "hr": {"kernel": [4]},
        "hz": {"kernel": [5]},
        "hn": {"kernel": [6], "bias": [30]},
    }
    flat = listed(chainer.to_arrays(gru))
    assert [flat[f"0/w{i}"] for i in range(6)] == [[1], [2], [3], [4], [5], [6]]
    assert [flat[f"0/b{i}"] for i in range(6)] == [[7], [8], [9], [10], [20], [30]]


def test_where_each_number_goes_reset_before():
    gru = numbered(False)
    assert listed(keras.to_arrays(gru)) == [[2, 1, 3], [5, 4, 6], [8, 7, 9]]
    assert listed(haiku.to_arrays(gru)) == [{"w_i": [-2, 1, 3], "w_h": [-5, 4, 6], "b": [-8, 7, 9]}]
    link = listed(chainer.to_arrays(gru))
    assert (link["W_z/W"], link["U_z/W"], link["W_z/b"]) == ([-2], [-5], [-8])
    assert (link["W/W"], link["U/W"], link["W/b"], link["U/b"]) == ([3], [6], [9], [0])


# refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", [torch, equinox, flax, mlx, haste])
def test_reset_before_has_no_home(library):
    term = r"U_n \(r \* h\) of n = tanh\(W_n x \+ b_n \+ U_n \(r \* h\)\) has no counterpart in"
    with pytest.raises(ValueError, match=term):
        library.to_arrays(GRU(I, H))


def test_reset_after_has_no_home_in_haiku():
    term = r"r \* \(U_n h \+ c_n\) of n = tanh\(W_n x \+ b_n \+ r \* \(U_n h \+ c_n\)\)"
    with pytest.raises(ValueError, match=term + " has no counterpart in Haiku"):
        haiku.to_arrays(GRU(I, H, reset_after=True))


def test_a_bias_without_a_counterpart_is_refused_unless_it_is_zero():
    gru = random_gru(0, True)
    term = r"c_n of n = tanh\(W_n x \+ b_n \+ r \* \(U_n h \+ c_n\)\) is not 0 and has no"
    with pytest.raises(ValueError, match=term + " counterpart in Flax nnx"):
        flax.to_arrays(gru, "nnx")
    gru.params["bias_hh_l0"][2 * H :] = 0
    again = flax.from_arrays(flax.to_arrays(gru, "nnx"))
    same_bits(again.params["weight_hh_l0"], gru.params["weight_hh_l0"])
    assert not again.params["bias_hh_l0"].any()


def test_names_must_fit():
    (cell,) = mlx.to_arrays(GRU(I, H, reset_after=True))
    with pytest.raises(KeyError, match=r"missing \['Wh'\], unused \[\]"):
        mlx.from_arrays({k: a for k, a in cell.items() if k != "Wh"})
    with pytest.raises(KeyError, match=r"missing \[\], unused \['Wy'\]"):
        mlx.from_arrays(cell | {"Wy": cell["Wx"]})
    with pytest.raises(KeyError, match=r"missing \['bhn'\]"):
        mlx.from_arrays(cell | {"bhn": None})
    state = torch.to_arrays(GRU(I, H, 2, reset_after=True))
    with pytest.raises(KeyError, match=r"no names of torch\.nn\.GRU or GRUCell: fc\.weight; there"):
        torch.from_arrays(state | {"fc.weight": state["weight_ih_l0"]})
    with pytest.raises(KeyError, match="layers or directions are missing"):
        torch.from_arrays({k: a for k, a in state.items() if "_l0" not in k})
    with pytest.raises(KeyError, match=r"layer 0 lacks \['weight_hh'\]"):
        torch.from_arrays({k: a for k, a in state.items() if k != "weight_hh_l0"})
    with pytest.raises(KeyError, match="layer _l1 has"):
        torch.from_arrays({k: a for k, a in state.items() if k != "bias_hh_l1"})
    with pytest.raises(KeyError, match=r"no name begins with .*rnn\."):
        torch.from_arrays(state, "rnn.")
    with pytest.raises(KeyError, match="from 0/w0 on"):
        chainer.from_arrays({"1/w0": state["weight_ih_l0"]})


def test_shapes_and_dtypes_must_fit():
    (cell,) = mlx.to_arrays(GRU(I, H, reset_after=True))
    with pytest.raises(ValueError, match=r"Wh is \(10, 4\), expected 2-D, in 3 equal parts"):
        mlx.from_arrays(cell | {"Wh": cell["Wh"][:10]})
    with pytest.raises(ValueError, match=r"U_r in Wh is \(3, 4\), expected \(4, 4\)"):
        mlx.from_arrays(cell | {"Wh": cell["Wh"][:9]})
    with pytest.raises(TypeError, match="Wx has dtype int64"):
        mlx.from_arrays(cell | {"Wx": cell["Wx"].astype(int)})
    with pytest.raises(TypeError, match="float32 and float64"):
        mlx.from_arrays(cell | {"Wx": cell["Wx"].astype("float64")})
    (wide,) = mlx.to_arrays(GRU(I, 5, reset_after=True))
    with pytest.raises(ValueError, match=r"weight_ih_l1 is \(15, 3\), expected \(12, 4\)"):
        mlx.from_arrays([cell, wide])
    with pytest.raises(ValueError, match="1 cells, expected a forward and a reverse one"):
        mlx.from_arrays(cell, bidirectional=True)
    weights = keras.to_arrays(GRU(I, H))
    with pytest.raises(ValueError, match=r"bias is \(12,\), which is one with the reset gate bef"):
        keras.from_arrays(weights)
    for module in (flax, haiku):
        with pytest.raises(ValueError, match="no arrays, expected those of one layer at least"):
            module.from_arrays([])
    with pytest.raises(ValueError, match="2 arrays, expected 3"):
        keras.from_arrays(weights[:2])


def test_what_is_no_gru_is_refused():
    with pytest.raises(TypeError, match="is a Linear, expected a GRU"):
        mlx.to_arrays(Linear(2, 3))
    with pytest.raises(ValueError, match='expected "linen" or "nnx"'):
        flax.to_arrays(GRU(I, H, reset_after=True), "haiku")


@pytest.mark.parametrize("library", [torch, keras, equinox, flax, mlx, chainer, haste])
def test_the_reverse_direction_alone_has_no_home(library):
    with pytest.raises(ValueError, match="reverse=True alone has no counterpart"):
        library.to_arrays(GRU(I, H, reset_after=True, reverse=True))


def test_foreign_byte_order_and_bfloat16():
    jnp = pytest.importorskip("jax.numpy")
    (cell,) = mlx.to_arrays(GRU(I, H, reset_after=True, seed=0))
    swapped = mlx.from_arrays({k: a.astype(">f4") for k, a in cell.items()})
    same_bits(swapped.params["weight_ih_l0"], cell["Wx"])
    half = mlx.from_arrays({k: jnp.asarray(a, "bfloat16") for k, a in cell.items()})
    assert half.dtype == "float32"
    assert np.allclose(half.params["weight_ih_l0"], cell["Wx"], rtol=2**-8)


# what is needed ----------------------------------------------------------------------------------

ALL = """
import sys, pathlib
blocked = ["torch", "keras", "tensorflow", "jax", "flax", "equinox", "haiku", "mlx", "chainer",
           "haste_pytorch", "onnx", "numba"]
sys.modules.update(dict.fromkeys(blocked))
import gru_any
from gru_any import GRU, convert
folder = pathlib.Path(sys.argv[1])
gru = GRU(3, 4, reset_after=True, seed=0)
for name, end in (("torch", "t.safetensors"), ("keras", "k.keras"), ("keras", "k.weights.h5"),
                  ("equinox", "e.eqx"), ("mlx", "m.npz"), ("mlx", "m.safetensors"),
                  ("chainer", "c.npz")):
    library = getattr(convert, name)
    library.save(folder / end, gru)
    again = library.load(folder / end)
    assert (again.params["weight_hh_l0"] == gru.params["weight_hh_l0"]).all(), name
for name in ("torch", "flax", "equinox", "mlx", "chainer", "haste", "keras"):
    library = getattr(convert, name)
    library.from_arrays(library.to_arrays(gru))
convert.haiku.from_arrays(convert.haiku.to_arrays(GRU(3, 4)))
save, module = convert.torch.save, convert.torch.as_module
for call, *arguments in ((save, folder / "x.pt", gru), (module, gru)):
    try:
        call(*arguments)
    except ImportError as e:
        assert "pip install torch" in str(e)
    else:
        raise SystemExit("torch was there")
"""


def test_no_framework_is_needed(tmp_path):
    pytest.importorskip("h5py")
    command = [sys.executable, "-c", ALL, str(tmp_path)]
    finished(command, code=0)


def test_h5py_is_asked_for_by_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"gru-any\[keras\]"):
        keras.save(tmp_path / "m.keras", GRU(I, H))


def test_the_package_names_its_modules():
    assert {"torch", "keras", "flax", "mlx"} <= set(dir(convert))
    with pytest.raises(AttributeError, match="has no 'theano'"):
        convert.theano  # noqa: B018


def test_a_chain_in_torch_names():
    chain = Chain(Embedding(7, I, seed=0), GRU(I, H, reset_after=True, seed=1), Linear(H, 2))
    arrays = torch.to_arrays(chain)
    assert sorted(arrays)[:2] == ["0.weight", "1.bias_hh_l0"]
    again = torch.from_arrays(arrays, ["0.", "1.", "2."])
    x = np.array([[1, 2]])
    assert np.array_equal(again(x)[0], chain(x)[0])
