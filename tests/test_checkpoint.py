"""Models in files."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gru_any import GRU, Chain, Dropout, Embedding, GRUCell, Linear, load, save

MODELS = {
    "gru": lambda **o: GRU(3, 4, 2, bidirectional=True, reset_after=True, seed=0, **o),
    "cell": lambda **o: GRUCell(3, 4, seed=0, **o),
    "chain": lambda **o: Chain(
        Embedding(5, 3, seed=0, **o), GRU(3, 4, 2, dropout=0.1, **o), Dropout(0.2, **o),
        Linear(4, 5, bias=False, **o),
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
