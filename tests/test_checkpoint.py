"""Models in files."""

import json
import os
import platform
import sys

import numpy as np
import pytest
from conftest import finished
from safetensors.numpy import load_file, save_file

from gru_any import (
    GRU,
    Adam,
    Chain,
    Dropout,
    Embedding,
    GRUCell,
    Linear,
    load,
    save,
    softmax_cross_entropy,
)
from gru_any.train import resume
from gru_any.train.data import Batch
from gru_any.train.loop import fit

MODELS = {
    "gru": lambda **o: GRU(3, 4, 2, bidirectional=True, reset_after=True, seed=0, **o),
    "cell": lambda **o: GRUCell(3, 4, seed=0, **o),
    "chain": lambda **o: Chain(
        Embedding(5, 3, seed=0, **o), GRU(3, 4, 2, dropout=0.1, seed=1, **o), Dropout(0.2, **o),
        Linear(4, 5, bias=False, seed=2, **o),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_round_trip_on_every_backend(backend, tmp_path, kind, dtype):
    model = MODELS[kind](backend=backend.name, device=backend.device, dtype=dtype)
    save(tmp_path / "m.safetensors", model)
    for home in ({}, {"backend": backend.name, "device": backend.device}):
        again = load(tmp_path / "m.safetensors", **home)
        assert type(again) is type(model)
        assert again.dtype == dtype
        assert again.backend.name == (home.get("backend") or "numpy")
        for name, array in model.params.items():
            found = again.backend.to_numpy(again.params[name])
            assert np.array_equal(found, backend.host(array))


def test_the_file_is_plain_safetensors(tmp_path):
    model = GRU(3, 4, seed=0)
    save(tmp_path / "m", model)
    arrays = load_file(tmp_path / "m")
    assert sorted(arrays) == sorted(model.params)
    assert np.array_equal(arrays["weight_hh_l0"], model.params["weight_hh_l0"])


def test_a_file_that_was_written_once_still_opens(tmp_path):
    """These bytes are a Linear(1, 1) with weight 2 and bias 3."""
    header = (
        rb'{"__metadata__":{"gru_any":"{\"format\": 1, \"chain\": false, \"dtype\": \"float32\", '
        rb"\"layers\": [[\"Linear\", {\"in_features\": 1, \"out_features\": 1, "
        rb'\"bias\": true}]]}"},'
        rb'"bias":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        rb'"weight":{"dtype":"F32","shape":[1,1],"data_offsets":[4,8]}}'
    )
    content = len(header).to_bytes(8, "little") + header + bytes.fromhex("0000404000000040")
    (tmp_path / "old").write_bytes(content)
    assert load(tmp_path / "old")(np.array([5.0], "float32")) == 13.0
    save(tmp_path / "new", load(tmp_path / "old"))
    assert load_file(tmp_path / "new") == load_file(tmp_path / "old")


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "m"
    with pytest.raises(FileNotFoundError):
        load(path)
    save(path, GRU(3, 4))
    whole = path.read_bytes()
    for content in (b"", whole[:20], whole[:-5], b"\x00" * 100, b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged or no safetensors file"):
            load(path)
    save_file({"w": np.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"was not written by gru_any.save"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"layers": [["Unknown", {}]]}, "does not describe"),
        ({"layers": [["GRU", {"input_size": 3}]]}, "does not describe"),
        ({"layers": [["GRU", {"input_size": 3, "hidden_size": 5}]]}, "expected"),
        ({"layers": []}, "does not describe"),
        ({"layers": 5}, "does not describe"),
        ({"dtype": "float99"}, "float99"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, change, message):
    gru = GRU(3, 4)
    header = {"format": 1, "chain": False, "dtype": "float32", "layers": [["GRU", gru.settings]]}
    arrays = dict(gru.params)
    save_file(arrays, tmp_path / "m", {"gru_any": json.dumps(header | change)})
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "m")
    save_file(arrays, tmp_path / "m", {"gru_any": "not json"})
    with pytest.raises(ValueError, match="does not describe"):
        load(tmp_path / "m")


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m"
    save(path, GRU(3, 4, seed=0))
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(path, GRU(3, 4, seed=1))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(TypeError, match="cannot save dict"):
        save(tmp_path / "m", {"w": 1})


def test_half_precision(tmp_path):
    model = GRU(3, 4, dtype="float16", seed=0)
    save(tmp_path / "m", model)
    again = load(tmp_path / "m")
    assert again.dtype == "float16"
    assert np.array_equal(again.params["weight_hh_l0"], model.params["weight_hh_l0"])


# checkpoints of a training run -------------------------------------------------------------------


def a_run(out, steps=7, losses=(), **given):
    """Train a Chain a little; its weights are those that come back."""
    rng = np.random.default_rng(0)
    batch = Batch(rng.integers(0, 5, (6, 3)), rng.integers(0, 5, (6, 3)))
    model = MODELS["chain"]()
    if losses:
        answers = iter(losses)
        given |= {"valid": lambda: next(answers), "validate_every": 3}
    fit(model, softmax_cross_entropy, lambda epoch: [batch], Adam(model.params, lr=0.1),
        steps=steps, out=out, save_every=2, bar=False, **given)  # fmt: skip
    return model


def same(a, b):
    return a.params.keys() == b.params.keys() and all(
        np.array_equal(a.params[name], w) for name, w in b.params.items()
    )


@pytest.mark.parametrize("average", [None, 0.5])
@pytest.mark.parametrize("losses", [(), (1.0, 2.0, 3.0), (2.0, 1.0, 3.0), (3.0, 2.0, 1.0)])
def test_a_run_is_loaded_with_the_weights_that_fit_gives_back(tmp_path, losses, average):
    model = a_run(tmp_path, losses=losses, average=average)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for path in (tmp_path, str(tmp_path), tmp_path / "checkpoint.safetensors"):
        again = load(path)
        assert repr(again) == repr(model)
        assert same(again, model)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_of_frozen_parameters_the_run_has_them_too(tmp_path):
    model = MODELS["chain"]()
    part = {name: w for name, w in model.params.items() if name[0] == "3"}
    batch = Batch(np.zeros((2, 1), int), np.zeros((2, 1), int))
    fit(model, softmax_cross_entropy, lambda epoch: [batch], Adam(part), steps=3, average=0.9,
        out=tmp_path, bar=False)  # fmt: skip
    assert same(load(tmp_path), model)


def test_a_run_whose_newest_checkpoint_is_damaged(tmp_path, capfd):
    a_run(tmp_path)
    expected = load(tmp_path / "checkpoint.before.safetensors")
    newest = tmp_path / "checkpoint.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    assert same(load(tmp_path), expected)
    assert "its contents do not fit its digest; reading" in capfd.readouterr().err
    with pytest.raises(ValueError, match="is damaged"):
        load(newest)
    assert newest.read_bytes() == content
    (tmp_path / "checkpoint.before.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint can be used"):
        load(tmp_path)


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint of a training run"):
        load(tmp_path)


def test_a_run_of_an_earlier_version_goes_on_but_is_no_model(tmp_path, monkeypatch):
    """Format 1 knew nothing of a closing validation, of pending gradients, and of the model."""
    model = a_run(tmp_path)
    header, arrays = resume.restore(tmp_path)
    for name in ("closing", "pending", "description", "format"):
        del header[name]
    with monkeypatch.context() as older:
        older.setattr(resume, "FORMAT", 1)
        resume.store(tmp_path, header, arrays)
    with pytest.raises(
        ValueError, match="earlier version wrote this checkpoint, without the model"
    ):
        load(tmp_path)
    assert same(a_run(tmp_path), model)
    assert same(a_run(tmp_path, steps=9), a_run(None, steps=9))
    assert same(load(tmp_path), a_run(None, steps=9))


def test_a_run_of_a_newer_version_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr(resume, "FORMAT", 3)
        a_run(tmp_path)
    with pytest.raises(ValueError, match="it has format 3, this version reads up to 2"):
        load(tmp_path)


def test_ties_in_the_header_that_lie_are_refused(tmp_path):
    header = {"format": 1, "chain": True, "dtype": "float32", "tied": {"0.weight_ih_l0": "0.w"},
              "layers": [["GRU", GRU(3, 4).settings]]}  # fmt: skip
    arrays = {f"0.{name}": w for name, w in GRU(3, 4).params.items()}
    save_file(arrays, tmp_path / "m", {"gru_any": json.dumps(header)})
    with pytest.raises(ValueError, match="does not describe a model of this version: tied is"):
        load(tmp_path / "m")


KILLED = """
import os, sys
from gru_any import GRU, save, files
files.os.fsync = lambda handle: os.kill(os.getpid(), 9)  # in the middle of the write
save(sys.argv[1], GRU(2, 3, seed=0))
"""


def test_what_a_killed_save_left_is_cleared_by_the_next(tmp_path):
    path = tmp_path / "model.safetensors"
    for _ in range(2):
        finished([sys.executable, "-c", KILLED, path])
    (left,) = tmp_path.iterdir()  # the second has cleared that of the first
    assert left.name.endswith(".part")
    ours = tmp_path / f".model.safetensors.{platform.node()}.{os.getppid()}.part"
    others = tmp_path / ".model.safetensors.elsewhere.1.part"  # of another machine
    another = tmp_path / left.name.replace("model", "other")
    for file in (ours, others, another):
        file.write_bytes(b"")
    save(path, GRU(2, 3, seed=0))
    assert {p.name for p in tmp_path.iterdir()} == {
        path.name, ours.name, others.name, another.name
    }  # fmt: skip
    assert load(path).params.keys() == GRU(2, 3).params.keys()


def test_a_loaded_cell_computes_what_the_saved_one_did(tmp_path):
    """Whatever the order in the file: with I = H the matrices could be taken for each other."""
    cell = GRUCell(4, 4, reset_after=True, seed=0)
    save(tmp_path / "cell", cell)
    again, x = load(tmp_path / "cell"), np.ones((2, 4), "float32")
    assert list(again.params) == list(cell.params)
    (h, pullback), (h_again, pullback_again) = cell.vjp(x, x), again.vjp(x, x)
    assert np.array_equal(h, h_again)
    for name, grad in pullback(x)[0].items():
        assert np.array_equal(grad, pullback_again(x)[0][name])
