"""Files of torch.save, read without PyTorch: its own reader is the oracle."""

import io
import pickle
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import require

from gru_any import GRU
from gru_any.convert import torch as convert
from gru_any.convert.torch.pickled import read_pt

DATA = Path(__file__).parent / "data"


def packed(program, **storages):
    """The zip file of a pickle that is written by hand."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key.removeprefix('_')}", content)
    return buffer.getvalue()


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def number(value):
    return b"J" + value.to_bytes(4, "little", signed=True)


def tensor(numel, shape, strides, offset=0, storage="FloatStorage"):
    """The part of a pickle that makes a tensor of storage 0."""
    persistent = b"(" + text("storage") + b"ctorch\n" + storage.encode() + b"\n"
    persistent += text("0") + text("cpu") + number(numel) + b"tQ"
    axes = [b"(" + b"".join(map(number, n)) + b"t" for n in (shape, strides)]
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + persistent + number(offset)
        + b"".join(axes) + b"\x89}tR"
    )  # fmt: skip


def of_dict(*items):
    """A whole pickle: {name: value}."""
    return b"\x80\x02}" + b"".join(key + value + b"s" for key, value in items) + b"."


def read(content, path="m.pt"):
    return read_pt(path, content)


def test_no_pytorch_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    one, two = convert.load(DATA / "torch.pt"), convert.load(DATA / "torch.safetensors")
    assert all(np.array_equal(one.params[k], a) for k, a in two.params.items())


@pytest.mark.parametrize(("zipped", "protocol"), [(False, 2), *((True, n) for n in (2, 3, 4, 5))])
@pytest.mark.filterwarnings("ignore")
def test_all_tensors_are_those_that_pytorch_reads(zipped, protocol):
    torch = require("torch")
    base = torch.arange(24.0).reshape(2, 3, 4)
    module = torch.nn.GRU(3, 4, 2, bidirectional=True)
    tensors = {
        **module.state_dict(), "parameter": torch.nn.Parameter(base), "slice": base[1:, ::2, 1:3],
        "transposed": base.permute(2, 0, 1), "expanded": base[0, 0, 0].expand(2),
        "none": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "half": base.half(),
        "bfloat16": base.bfloat16().T, "double": base.double(), "long": torch.arange(5),
        "byte": torch.arange(5, dtype=torch.uint8), "bool": base > 5,
        "complex": torch.ones(2, dtype=torch.complex64),
        **({"unsigned": torch.ones(2).to(torch.uint16)} if zipped else {}),
    }  # fmt: skip
    buffer = io.BytesIO()
    torch.save(tensors, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    theirs, ours = (
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=False),
        read(buffer.getvalue()),
    )
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        wide = expected.float() if expected.dtype == torch.bfloat16 else expected
        assert ours[name].shape == tuple(expected.shape), name
        assert np.array_equal(ours[name], wide.detach().numpy()), name
        assert ours[name].dtype == wide.detach().numpy().dtype, name


def test_names_of_one_tensor_are_tied(tmp_path):
    torch = require("torch")
    table = torch.ones(5, 3)
    gru = torch.nn.GRU(3, 3).state_dict()
    torch.save({"e.weight": table, "d.weight": table, **{f"g.{k}": v for k, v in gru.items()}},
               tmp_path / "m.pt")  # fmt: skip
    model = convert.load(tmp_path / "m.pt", ["e.", "g.", "d."])
    assert dict(model.tied) == {"2.weight": "0.weight"}


HOSTILE = {
    "a storage of 4 GB": (of_dict((text("w"), tensor(2**30, [2**30], [1]))), "promises"),
    "steps out of it": (of_dict((text("w"), tensor(4, [2, 2], [2, 9]))), "promises"),
    "steps to before it": (of_dict((text("w"), tensor(4, [2, 2], [2, -1], 2))), "promises"),
    "an offset out of it": (of_dict((text("w"), tensor(4, [1], [1], 4))), "promises"),
    "an offset before it": (of_dict((text("w"), tensor(4, [1], [1], -1))), "promises"),
    "a negative size": (of_dict((text("w"), tensor(4, [-1, -4], [1, 1]))), "promises"),
    "a thousand axes": (of_dict((text("w"), tensor(4, [1] * 1000, [1] * 1000))), "dim"),
    "axes without strides": (of_dict((text("w"), tensor(4, [1, 1], [1]))), "other axes"),
    "a call": (of_dict((text("w"), b"cposix\nsystem\n(" + text("echo") + b"tR")), "posix.system"),
    "an import": (b"\x80\x02cos\nsystem\n.", "no flat state_dict"),
    "an object": (of_dict((text("w"), b"cposix\nsystem\n(\x81")), "NEWOBJ"),
    "memory": (of_dict((text("w"), b"c__builtin__\nbytearray\n(" + number(2**31 - 1) + b"tR")),
               "bytearray"),
    "a nested key": (b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"Ns.", "a name is a tuple"),
    "a nested value": (of_dict((text("w"), b")" + b"\x85" * 100_000)), "no flat state_dict"),
    "an empty stack": (b"\x80\x02s.", "more off its stack"),
    "no mark": (b"\x80\x02t.", "m.pt"),
    "a memo that is not there": (b"\x80\x02h\x05.", "5"),
    "no end": (b"\x80\x02}", "m.pt"),
    "a length": (b"\x80\x02X\xff\xff\xff\x7f.", "m.pt"),
    "a frame": (b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f}.", "m.pt"),
    "a list of itself": (b"\x80\x02]q\x00h\x00a.", "no flat state_dict"),
    "an open mark": (b"\x80\x02}(.", "more off its stack"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_pickles_that_do_harm(tmp_path, kind, capfd):
    program, message = HOSTILE[kind]
    path = tmp_path / "m.pt"
    path.write_bytes(packed(program, _0=bytes(16)))
    tracemalloc.start()
    with pytest.raises((ValueError, KeyError, TypeError), match=message) as raised:
        convert.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(raised.value)
    assert peak < 20e6
    assert not capfd.readouterr().out


def test_many_names_of_one_storage_grow_no_more_than_twice(tmp_path):
    H, layers = 256, 200
    one = {"weight_ih": [3 * H, H], "weight_hh": [3 * H, H], "bias_ih": [3 * H], "bias_hh": [3 * H]}
    items = [
        (text(f"{name}_l{i}"), tensor(3 * H * H, shape, [H, 1][-len(shape) :]))
        for i in range(layers)
        for name, shape in one.items()
    ]
    (tmp_path / "m.pt").write_bytes(packed(of_dict(*items), _0=bytes(12 * H * H)))
    with pytest.raises(ValueError, match="which could fill the memory"):
        convert.load(tmp_path / "m.pt")
    (tmp_path / "m.pt").write_bytes(packed(of_dict(*items[:4]), _0=bytes(12 * H * H)))
    assert isinstance(convert.load(tmp_path / "m.pt"), GRU)


def test_a_member_that_unpacks_to_more_than_it_says(tmp_path):
    """The directory says 16 bytes; 64 MB of zeros are behind it."""
    content = bytearray()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", of_dict((text("w"), tensor(4, [4], [1]))))
        archive.writestr("archive/data/0", bytes(2**26))
    content = bytearray(buffer.getvalue())
    size = (2**26).to_bytes(4, "little")
    while size in content:
        at = content.index(size)
        content[at : at + 4] = (16).to_bytes(4, "little")
    (tmp_path / "m.pt").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match="damaged"):
        convert.load(tmp_path / "m.pt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "m.pt", "w", method) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    with pytest.raises(ValueError, match="neither stored nor deflated"):
        convert.load(tmp_path / "m.pt")


def test_an_old_file_that_lies(tmp_path):
    torch = require("torch")
    buffer = io.BytesIO()
    torch.save(dict(GRU(1, 1, reset_after=True).params) and {"w": torch.ones(3)}, buffer,
               _use_new_zipfile_serialization=False)  # fmt: skip
    whole = buffer.getvalue()
    count = (3).to_bytes(8, "little")
    for content in (
        whole.replace(count, (2**60).to_bytes(8, "little")), whole[:-1], whole[:-20],
        whole.replace(b"K\x03Nt", b"J\xff\xff\xff\x7fNt"), pickle.dumps({"w": 1}, protocol=2),
    ):  # fmt: skip
        (tmp_path / "m.pt").write_bytes(content)
        with pytest.raises((ValueError, KeyError), match=r"m\.pt"):
            convert.load(tmp_path / "m.pt")
