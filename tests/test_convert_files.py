"""Files of weights: those written once by other libraries, and those that nobody should trust."""

import errno
import importlib
import io
import json
import os
import pickle
import shutil
import tracemalloc
import zipfile
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import require
from safetensors.numpy import save as safetensors

from gru_any import GRU
from gru_any.convert import chainer, equinox, keras, mlx, torch

DATA = Path(__file__).parent / "data"
EXPECTED = json.loads((DATA / "expected.json").read_text())
X = np.array(EXPECTED["x"], "float32")  # (B, T, I)
GIB = 2**30

WRITTEN = {
    "torch": (torch, "torch.safetensors", {"batch_first": True}),
    "keras_after": (keras, "keras_after.keras", {}),
    "keras_before": (keras, "keras_before.keras", {}),
    "keras.weights": (keras, "keras.weights.h5", {"layer": "gru"}),
    "keras_trained.keras": (keras, "keras_trained.keras", {}),
    "keras_trained.h5": (keras, "keras_trained.h5", {}),
    "equinox": (equinox, "equinox.eqx", {"batch_first": True}),
    "mlx": (mlx, "mlx.safetensors", {}),
    "mlx_npz": (mlx, "mlx.npz", {}),
    "chainer": (chainer, "chainer.npz", {"prefix": "gru/"}),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_that_was_written_once_still_opens(name):
    library, file, settings = WRITTEN[name]
    if library is keras:
        require("h5py")
    model = library.load(DATA / file, **settings)
    x = X if getattr(model, "batch_first", True) else X.transpose(1, 0, 2)
    y = model(x)[0]
    y = y if x is X else y.transpose(1, 0, 2)
    expected = np.array(EXPECTED[name.removesuffix("_npz")])
    assert np.linalg.norm(y - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", WRITTEN)
def test_the_parameters_are_the_models_own(name):
    library, file, settings = WRITTEN[name]
    if library is keras:
        require("h5py")
    params = list(library.load(DATA / file, **settings).params.values())
    assert all(a.flags.c_contiguous and a.flags.writeable and a.dtype.isnative for a in params)
    assert not any(np.shares_memory(a, b) for a, b in combinations(params, 2))


@pytest.mark.parametrize("make", [chainer, equinox, mlx])
def test_arrays_in_memory_are_copied(make):
    gru = GRU(3, 4, reset_after=True, seed=0)
    given = make.to_arrays(gru)
    cells = given if isinstance(given, list) else [given]
    for a in make.from_arrays(given).params.values():
        assert not any(np.shares_memory(a, b) for cell in cells for b in cell.values())


@pytest.mark.parametrize(
    ("library", "name"),
    [(torch, "m.safetensors"), (torch, "m.pt"), (keras, "m.keras"), (keras, "m.weights.h5"),
     (mlx, "m.npz"), (mlx, "m.safetensors"), (chainer, "m.npz"), (equinox, "m.eqx")],
)  # fmt: skip
def test_weights_are_read_within_twice_their_file(tmp_path, library, name):
    require("h5py"), require("torch")
    library.save(tmp_path / name, GRU(256, 256, reset_after=True, seed=0))
    library.load(tmp_path / name)  # what is imported on first use
    tracemalloc.start()
    library.load(tmp_path / name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.1 * (tmp_path / name).stat().st_size


def test_a_pt_file_is_read():
    one, two = torch.load(DATA / "torch.pt"), torch.load(DATA / "torch.safetensors")
    assert all(np.array_equal(one.params[k], a) for k, a in two.params.items())


def test_there_and_back(tmp_path):
    require("h5py"), require("torch")
    for name, file, settings in (
        ("torch", "m.safetensors", {}), ("torch", "m.pt", {}), ("keras", "m.keras", {}),
        ("keras", "m.weights.h5", {}), ("equinox", "m.eqx", {"bidirectional": True}),
        ("mlx", "m.npz", {"bidirectional": True}), ("chainer", "m.npz", {"bidirectional": True}),
    ):  # fmt: skip
        library = importlib.import_module(f"gru_any.convert.{name}")
        gru = GRU(3, 4, 2, bidirectional=True, reset_after=True, seed=0)
        for array in gru.params.values():  # so that no sum is rounded
            array[...] = np.round(array * 8) / 8
        library.save(tmp_path / file, gru)
        if name == "mlx":
            settings = {**settings, "prefix": [f"layers.{i}." for i in range(4)]}
        again = library.load(tmp_path / file, **settings)
        x = np.ones((2, 4, 3), "float32")
        y, expected = again(x)[0], gru(x)[0]
        if again.batch_first:
            y = again(x.transpose(1, 0, 2))[0].transpose(1, 0, 2)
        assert np.allclose(y, expected, rtol=0, atol=1e-6), name


@pytest.mark.parametrize(
    ("file", "load"),
    [
        ("torch.safetensors", torch.load),
        ("torch.pt", torch.load),
        ("keras_after.keras", keras.load),
        ("keras.weights.h5", keras.load),
        ("equinox.eqx", equinox.load),
        ("mlx.npz", mlx.load),
        ("chainer.npz", chainer.load),
    ],
)
def test_truncated_and_foreign_files(tmp_path, file, load):
    require("h5py")
    if file.endswith(".pt"):
        require("torch")
    whole = (DATA / file).read_bytes()
    path = tmp_path / file
    for content in (b"", whole[:10], whole[: len(whole) // 2], b"\x00" * 500, b"\xff" * 500):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged|expected 2 or 4|promises"):
            load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none" / file)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*WRITTEN, "torch.pt"])
def test_changed_bytes_are_refused_in_words_or_do_no_harm(tmp_path, name):
    library, file, settings = WRITTEN.get(name, (torch, "torch.pt", {}))
    if library is keras:
        require("h5py")
    if name == "torch.pt":
        require("torch")
    whole, rng = (DATA / file).read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(rng.integers(1, 6)):
            span = len(content) if rng.random() < 0.5 else min(400, len(content))
            content[rng.integers(span)] = rng.integers(256)
        (tmp_path / file).write_bytes(content)
        try:
            library.load(tmp_path / file, **settings)
        except (ValueError, KeyError, TypeError):
            refused += 1
    assert refused > 20


# promises ----------------------------------------------------------------------------------------


def npy(header, data=b""):
    text = str(header).encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def npz(path, compression=zipfile.ZIP_STORED, **entries):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)


HUGE = {"descr": "<f4", "fortran_order": False, "shape": (2**20, 2**20)}


@pytest.fixture
def little():
    """Fails where a test allocates more than 50 MB."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_safetensors_that_promise_terabytes(tmp_path, little):
    entry = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    header = json.dumps({"weight_ih_l0": entry}).encode()
    for content in (len(header).to_bytes(8, "little") + header, (2**60).to_bytes(8, "little")):
        (tmp_path / "m.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="damaged or no safetensors file"):
            torch.load(tmp_path / "m.safetensors")


def test_npy_and_npz_that_promise_terabytes(tmp_path, little):
    (tmp_path / "m.eqx").write_bytes(npy(HUGE))
    with pytest.raises(ValueError, match=r"promises \(1048576, 1048576\)"):
        equinox.load(tmp_path / "m.eqx")
    npz(tmp_path / "m.npz", Wx=npy(HUGE))
    with pytest.raises(ValueError, match="promises"):
        mlx.load(tmp_path / "m.npz")
    for shape in ((-1, -1), (-3,), (2**70,), (0, -1)):
        npz(tmp_path / "m.npz", Wx=npy(HUGE | {"shape": shape}))
        with pytest.raises(ValueError, match=r"m.npz, Wx.npy promises \(") as raised:
            mlx.load(tmp_path / "m.npz")
        assert "seek" not in str(raised.value)


def test_a_zip_bomb(tmp_path, little):
    zeros = npy(HUGE | {"shape": (2**22,)}, bytes(2**24))
    npz(tmp_path / "m.npz", zipfile.ZIP_DEFLATED, **dict.fromkeys("abc", zeros))
    del zeros
    with pytest.raises(ValueError, match="do not compress so well"):
        chainer.load(tmp_path / "m.npz")
    with zipfile.ZipFile(tmp_path / "m.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", bytes(2**25))
    with pytest.raises(ValueError, match="do not compress so well"):
        keras.load(tmp_path / "m.keras")


class Bomb:
    def __reduce__(self):
        return print, ("this must never run",)


def test_pickles_are_not_run(tmp_path, capsys):
    array = np.array([Bomb()], dtype=object)
    with open(tmp_path / "m.eqx", "wb") as file:
        np.save(file, array)
    np.savez(tmp_path / "m.npz", Wx=array)
    for load, name in ((equinox.load, "m.eqx"), (mlx.load, "m.npz"), (chainer.load, "m.npz")):
        with pytest.raises(ValueError, match="pickled objects, which could run code"):
            load(tmp_path / name)
    theirs = require("torch")
    theirs.save({"weight_ih_l0": Bomb()}, tmp_path / "m.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    for name, message in (
        ("m.pt", "more than tensors: .*print"),
        ("plain.pt", "no file of"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.load(tmp_path / name)
    assert "never" not in capsys.readouterr().out


def test_a_pt_file_with_more_than_weights(tmp_path, little):
    theirs = require("torch")
    tensor = theirs.zeros(1)
    theirs.save({"state_dict": {"weight_ih_l0": tensor}, "epoch": 3}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="no flat state_dict"):
        torch.load(tmp_path / "m.pt")
    theirs.save({"weight_ih_l0": tensor.expand(2**20, 2**20)}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"promises \(1048576, 1048576\)"):
        torch.load(tmp_path / "m.pt")


def test_names_with_path_separators_touch_nothing(tmp_path):
    array = np.ones((12, 3), "float32")
    np.savez(tmp_path / "m.npz", **{"../../outside": array, "/etc/outside": array})
    (tmp_path / "m.safetensors").write_bytes(safetensors({"../../outside": array}))
    for load, name in ((mlx.load, "m.npz"), (mlx.load, "m.safetensors")):
        with pytest.raises(KeyError, match="outside"):
            load(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.npz", "m.safetensors"]


# dtypes ------------------------------------------------------------------------------------------


def raw_safetensors(**entries):
    """Of name=(dtype, shape, bytes), dtypes included that NumPy lacks."""
    header, content = {}, b""
    for name, (dtype, shape, data) in entries.items():
        offsets = [len(content), len(content) + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        content += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content


def of_torch():
    return dict(GRU(3, 4, reset_after=True, seed=0).params)


def of_mlx():
    return mlx.to_arrays(GRU(3, 4, reset_after=True, seed=0))[0]


def of_chainer():
    return chainer.to_arrays(GRU(3, 4, seed=0))


WITH_DTYPES = {
    "m.safetensors": (torch, of_torch, "bias_ih_l0", "."),
    "mlx.safetensors": (mlx, of_mlx, "b", "."),
    "mlx.npz": (mlx, of_mlx, "bhn", "."),
    "chainer.npz": (chainer, of_chainer, "W_r/b", "/"),
}


@pytest.mark.parametrize("file", WITH_DTYPES)
@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64"])
def test_no_weight_is_left_out_for_its_dtype(tmp_path, file, dtype):
    library, make, name, dot = WITH_DTYPES[file]
    arrays, path = make(), tmp_path / file

    def write(arrays):
        if path.suffix == ".npz":
            np.savez(path, **arrays)
        else:
            path.write_bytes(safetensors(arrays))

    write(arrays | {name: arrays[name].astype(dtype)})
    with pytest.raises(TypeError, match=f"{name} has dtype {dtype}, expected a real floating"):
        library.load(path)
    # beside the prefix that is read it does no harm
    inside = {f"rnn{dot}{key}": array for key, array in arrays.items()}
    write(inside | {f"norm{dot}num_batches_tracked": np.zeros((), dtype)})
    assert library.load(path, f"rnn{dot}").bias
    write(inside | {f"rnn{dot}count": np.zeros((), dtype)})
    with pytest.raises((TypeError, KeyError), match="count"):
        library.load(path, f"rnn{dot}")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I16", "U64"])
def test_dtypes_of_safetensors_that_are_not_read_are_named(tmp_path, dtype):
    size = {"F8": 1, "I1": 2, "U6": 8}[dtype[:2]]
    entries = {k: ("F32", list(a.shape), a.tobytes()) for k, a in of_torch().items()}
    path, other = tmp_path / "m.safetensors", {"weight_hh_l0": (dtype, [12, 4], bytes(48 * size))}
    path.write_bytes(raw_safetensors(**(entries | other)))
    known = {"I16": "int16", "U64": "uint64"}
    with pytest.raises(TypeError, match=f"weight_hh_l0 has dtype {known.get(dtype, dtype)}"):
        torch.load(path)
    named = {f"rnn.{k}": entry for k, entry in entries.items()}
    path.write_bytes(raw_safetensors(**named, aside=other["weight_hh_l0"]))
    assert np.array_equal(torch.load(path, "rnn.").params["bias_hh_l0"], of_torch()["bias_hh_l0"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("int", "weight_hh_l0 has dtype int32"),
        ("bool", "weight_hh_l0 has dtype bool"),
        ("float8", "weight_hh_l0 has dtype float8_e4m3fn"),
        ("complex", "weight_hh_l0 has dtype complex64"),
        ("sparse", "weight_hh_l0 is sparse"),
        ("csr", "weight_hh_l0 is sparse"),
        ("quantised", "weight_hh_l0 is quantised"),
        ("meta", "weight_hh_l0 is on meta"),
        ("nested", "weight_hh_l0 is nested"),
    ],
)
def test_tensors_of_other_kinds_are_named(tmp_path, kind, message):
    theirs = require("torch")
    make = {
        "int": lambda w: w.int(),
        "bool": lambda w: w > 0,
        "float8": lambda w: w.to(theirs.float8_e4m3fn),
        "complex": lambda w: w.to(theirs.complex64),
        "sparse": lambda w: w.to_sparse(),
        "csr": lambda w: w.to_sparse_csr(),
        "quantised": lambda w: theirs.quantize_per_tensor(w, 0.1, 0, theirs.qint8),
        "meta": lambda w: w.to("meta"),
        "nested": lambda w: theirs.nested.nested_tensor([w, w]),
    }[kind]
    weights = {k: theirs.from_numpy(a) for k, a in of_torch().items()}
    strange = weights | {"weight_hh_l0": make(weights["weight_hh_l0"])}
    with pytest.raises(TypeError, match=message):
        torch.from_arrays(strange)
    theirs.save(strange, tmp_path / "m.pt")
    with pytest.raises(TypeError, match=message):
        torch.load(tmp_path / "m.pt")
    inside = {f"rnn.{k}": t for k, t in weights.items()}
    theirs.save(inside | {"norm.count": strange["weight_hh_l0"]}, tmp_path / "m.pt")
    again = torch.load(tmp_path / "m.pt", "rnn.")
    assert all(np.array_equal(again.params[k], a) for k, a in of_torch().items())


def test_halves_are_read_as_before(tmp_path):
    theirs = require("torch")
    weights = {k: theirs.from_numpy(a) for k, a in of_torch().items()}
    for dtype, expected in ((theirs.float16, "float16"), (theirs.bfloat16, "float32")):
        halves = {k: t.to(dtype) for k, t in weights.items()}
        theirs.save(halves, tmp_path / "m.pt")
        gru = torch.load(tmp_path / "m.pt")
        assert gru.dtype == expected
        assert np.array_equal(gru.params["bias_hh_l0"], halves["bias_hh_l0"].float().numpy())


def test_names_that_are_no_strings(tmp_path):
    theirs = require("torch")
    theirs.save({0: theirs.ones(3), "weight_hh_l0": theirs.ones(3)}, tmp_path / "m.pt")
    with pytest.raises(TypeError, match="a name is 0, expected a string"):
        torch.load(tmp_path / "m.pt")


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("names", [("Wx.npy", "Wx.npy"), ("Wx.npy", "Wx")])
def test_two_arrays_of_one_name(tmp_path, names):
    arrays = of_mlx()
    np.savez(tmp_path / "m.npz", Wh=arrays["Wh"], b=arrays["b"], bhn=arrays["bhn"])
    for scale, name in enumerate(names):
        buffer = io.BytesIO()
        np.save(buffer, scale * arrays["Wx"])
        with zipfile.ZipFile(tmp_path / "m.npz", "a") as archive:
            archive.writestr(name, buffer.getvalue())
    with pytest.raises(ValueError, match="two arrays of one name"):
        mlx.load(tmp_path / "m.npz")


# HDF5 and Keras' archives ------------------------------------------------------------------------


def hdf5(fill):
    h5py, buffer = require("h5py"), io.BytesIO()
    with h5py.File(buffer, "w") as file:
        fill(h5py, file)
    return buffer.getvalue()


def huge(h5py, file):
    file.create_dataset("layers/gru/cell/vars/0", (2**20, 2**20), "<f4", chunks=(64, 64))


def huge_chunk(h5py, file):
    data = file.create_dataset(
        "layers/gru/cell/vars/0", (4,), "<f4", chunks=(2**22,), maxshape=(None,), compression="gzip"
    )
    data[:] = 0


def external_link(h5py, file):
    file["layers/gru/cell/vars/0"] = h5py.ExternalLink("/etc/passwd", "/")


def external_data(h5py, file):
    file.create_dataset("layers/gru/cell/vars/0", (8,), "<f4", external=[("/etc/hostname", 0, 32)])


def circle(h5py, file):
    file.create_group("layers/a")
    file["layers/a/again"] = file["layers"]


def strange(h5py, file):
    file["elsewhere"] = np.ones(3, "float32")


def a_scalar(h5py, file):
    file["layers/gru/cell/vars/0"] = np.float32(1)
    file["layers/gru/cell/vars/1"] = np.ones((2, 2, 2), "float32")


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (huge, r"promises \(1048576, 1048576\), which is not in this file"),
        (huge_chunk, "is compressed, which could fill the memory"),
        (external_link, "is a link to elsewhere"),
        (external_data, "which is not in this file"),
        (circle, "is there twice, or in a circle"),
        (strange, "as Keras 3 writes"),
        (a_scalar, "say reset_after"),
    ],
)
def test_hdf5_files_that_lie(tmp_path, little, fill, message):
    (tmp_path / "m.weights.h5").write_bytes(hdf5(fill))
    with pytest.raises(ValueError, match=message):
        keras.load(tmp_path / "m.weights.h5")


def test_hdf5_of_other_shapes(tmp_path):
    (tmp_path / "m.weights.h5").write_bytes(hdf5(a_scalar))
    with pytest.raises(ValueError, match=r"kernel is \(\), expected 2-D"):
        keras.load(tmp_path / "m.weights.h5", reset_after=True)
    with pytest.raises(KeyError, match=r"no weights of \['lstm'\]"):
        keras.load(tmp_path / "m.weights.h5", "lstm")


def test_a_damaged_heap_of_strings(tmp_path):
    """HDF5's library walks some of these without end."""
    require("h5py")
    whole = bytearray((DATA / "keras_trained.h5").read_bytes())
    heap = whole.index(b"GCOL")
    for place, value in ((heap + 8, 8), (heap + 10, 255), (heap + 24, 255), (heap + 31, 255)):
        changed = whole.copy()
        changed[place] ^= value
        (tmp_path / "m.h5").write_bytes(changed)
        with pytest.raises(ValueError, match=f"heap of strings at byte {heap} is damaged"):
            keras.load(tmp_path / "m.h5")


def test_a_text_that_is_said_to_be_longer_than_the_file(tmp_path):
    """HDF5's library makes room for it before it looks: 4 GB for a file of 29 kB."""
    require("h5py")
    whole = (DATA / "keras_trained.h5").read_bytes()
    at = whole.index(b"layer_names\0")
    sizes = [int.from_bytes(whole[at - 8 + i :][:2], "little") for i in (2, 4, 6)]
    data = at + sum(-(-n // 8) * 8 for n in sizes)
    assert int.from_bytes(whole[data : data + 4], "little") < 100
    for text in range(2):
        changed = bytearray(whole)
        changed[data + 16 * text : data + 16 * text + 4] = b"\xfd\xff\xff\xf7"
        (tmp_path / "m.h5").write_bytes(changed)
        with pytest.raises(ValueError, match="'layer_names' is longer than the file"):
            keras.load(tmp_path / "m.h5")


@pytest.mark.parametrize("version", ["earliest", "v110", "latest"])
def test_texts_are_found_in_files_of_each_version(version):
    """So that the check of their lengths sees what the library sees."""
    from gru_any.convert.keras.hdf5 import _check_texts

    h5py, buffer = require("h5py"), io.BytesIO()
    names = ["first", "second layer"]
    with h5py.File(buffer, "w", libver=version) as file:
        file.attrs["layer_names"] = names
        for i in range(12):  # so that they no longer stand in the header of the group
            file.attrs[f"other{i}"] = i
    content = bytearray(buffer.getvalue())
    _check_texts(content, "layer_names", 2, 32)
    long = (12).to_bytes(4, "little")
    places = [i for i in range(len(content) - 16) if content[i : i + 4] == long]
    noticed = 0
    for place in places:
        changed = content.copy()
        changed[place : place + 4] = b"\xff\xff\xff\x7f"
        try:
            _check_texts(changed, "layer_names", 2, 32)
        except ValueError:
            noticed += 1
    assert noticed


def entry(kind, **config):
    return {"class_name": kind, "config": {"name": kind, **config}}


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("[", "Expecting value"),
        ("5", "no model that has a counterpart"),
        ("[" * 100000, "recursion"),
        ({"class_name": "Functional", "config": {}}, "'layers'"),
        ({"class_name": "Custom", "config": {}}, "expected a row of layers"),
        ([entry("LSTM")], "a LSTM with"),
        ([entry("Lambda", code="x")], "a Lambda with"),
        ([entry("Dense", activation="relu")], "'activation': 'relu'"),
        ([entry("Embedding", mask_zero=True)], "'mask_zero': True"),
        ([entry("GRU")], "expected cell/vars/0, 1 and 2"),
        ([entry("Bidirectional", merge_mode="max")], "merge_mode 'max'"),
        ([entry("Bidirectional", layer=entry("LSTM"))], "a Bidirectional LSTM"),
        ([{"class_name": "GRU"}], "'config'"),
        ([entry("Dropout", rate="much")], "counterpart"),
    ],
)
def test_archives_that_lie(tmp_path, description, message):
    content = hdf5(lambda h5py, file: None)
    if isinstance(description, list):
        description = {"class_name": "Sequential", "config": {"layers": description}}
    if not isinstance(description, str):
        description = json.dumps(description)
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.writestr("config.json", description)
        archive.writestr("model.weights.h5", content)
    with pytest.raises(ValueError, match=message):
        keras.load(tmp_path / "m.keras")


def test_an_archive_without_its_parts(tmp_path):
    require("h5py")
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(ValueError, match=r"no \.keras file"):
        keras.load(tmp_path / "m.keras")


def test_a_failed_save_keeps_the_old_file(tmp_path):
    shutil.copy(DATA / "torch.safetensors", tmp_path / "m.safetensors")
    before = (tmp_path / "m.safetensors").read_bytes()
    with pytest.raises(ValueError, match="has no counterpart in PyTorch"):
        torch.save(tmp_path / "m.safetensors", GRU(3, 4))
    assert (tmp_path / "m.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", [*WRITTEN, "torch.pt"])
def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, name):
    library, file, _ = WRITTEN.get(name, (torch, "torch.pt", {}))
    if library is keras or name == "torch.pt":
        require("h5py" if library is keras else "torch")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / file
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="was not written"):
        library.save(path, GRU(3, 4, reset_after=True))
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "ending", ["safetensors", "pt", "keras", "weights.h5", "h5", "npz", "eqx", "onnx"]
)
def test_pipes_and_folders_are_refused(tmp_path, ending):
    require("h5py"), require("onnx")
    from gru_any.convert import onnx

    library = {"npz": mlx, "eqx": equinox, "onnx": onnx, "pt": torch, "safetensors": torch}
    load = library.get(ending, keras).load
    os.mkfifo(tmp_path / f"pipe.{ending}")
    (tmp_path / f"folder.{ending}").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match=f"is a {name}, expected a regular file"):
            load(tmp_path / f"{name}.{ending}")


# many small parts --------------------------------------------------------------------------------


def many_groups(h5py, file):
    for i in range(30):
        file.create_group(f"layers/{i}")


def test_files_of_very_many_parts(tmp_path, monkeypatch):
    """Each takes more memory than bytes of the file, so their number has a limit."""
    from gru_any import tensors
    from gru_any.convert import files
    from gru_any.convert.keras import archive
    from gru_any.convert.keras import hdf5 as keras_hdf5
    from gru_any.convert.torch import pickled

    (tmp_path / "m.weights.h5").write_bytes(hdf5(many_groups))
    npz(tmp_path / "m.npz", **{f"a{i}": npy({"descr": "<f4", "fortran_order": False, "shape": (0,)})
                               for i in range(30)})  # fmt: skip
    shutil.copy(DATA / "torch.safetensors", tmp_path / "m.safetensors")
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive_of_torch:
        archive_of_torch.writestr("m/data.pkl", b"\x80\x02" + b"]" * 30 + b".")
    shutil.copy(DATA / "keras_after.keras", tmp_path / "m.keras")
    for module, name, load, ending, message in (
        (keras_hdf5, "MOST_ITEMS", keras.load, "weights.h5", "more than 20 groups and arrays"),
        (files, "MOST_MEMBERS", mlx.load, "npz", "more than 20 members"),
        (tensors, "MOST_HEADER", torch.load, "safetensors", "expected at most 20"),
        (pickled, "MOST_OPERATIONS", torch.load, "pt", "so many operations"),
        (archive, "MOST_TEXT", keras.load, "keras", "characters, expected at most 20"),
    ):
        with monkeypatch.context() as lower:
            lower.setattr(module, name, 20)
            with pytest.raises(ValueError, match=message):
                load(tmp_path / f"m.{ending}")


def test_the_time_of_many_layers_grows_with_their_number():
    """Each array is looked at once, not once for each layer."""
    from gru_any.convert.keras.archive import Part, Source, _by_place, guessed, locate

    arrays = {f"layers/gru_{i}/cell/vars/{n}": X for i in range(3000) for n in range(3)}
    source = Source(None, arrays, None, [], _by_place(arrays))
    assert len(list(guessed(source, {}))) == 3000
    nested = ["layers/a/layers/b/vars/0", "layers/a/vars/0", "layers/a/layers/b"]
    source = Source(None, {}, None, [], _by_place(nested))
    assert locate(source, Part("", {}, "", "a/b")) == {"vars/0": nested[0]}
    assert locate(source, Part("", {}, "", "a")) == {"vars/0": nested[1]}
