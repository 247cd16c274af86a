"""Files of models: headers that lie, bits that flip, processes that die."""

import errno
import json
import os
import platform
import subprocess
import sys
import threading
import time
import tracemalloc
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import THOROUGH, finished, started
from safetensors.numpy import load_file, save_file

from gru_any import GRU, Chain, Embedding, GRUCell, Last, Linear, load, save
from gru_any.files import read_whole
from gru_any.train import resume

KILLS = int(os.environ.get("GRU_ANY_KILLS", "3"))


@contextmanager
def little(most):
    """Fail where more than `most` bytes are allocated."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most


def written(path, model, change=None, text=None):
    """Write a model as an earlier version did, without a digest; its description may be changed."""
    layers = model.layers if isinstance(model, Chain) else [model]
    header = {"format": 1, "chain": isinstance(model, Chain), "dtype": "float32",
              "layers": [[type(layer).__name__, layer.settings] for layer in layers]}  # fmt: skip
    if change:
        header |= {"layers": [[header["layers"][0][0], header["layers"][0][1] | change]]}
    save_file(dict(model.params), path, {"gru_any": text or json.dumps(header)})


# headers that lie --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (lambda: GRU(1, 1), {"hidden_size": 15000}, r"\(3, 1\), expected \(45000, 1\)"),
        (lambda: GRU(1, 1), {"hidden_size": 10**5}, r"\(3, 1\), expected \(300000, 1\)"),
        (lambda: GRU(1, 1), {"hidden_size": 10**400}, "expected"),
        (lambda: GRU(1, 1), {"input_size": 10**12}, r"\(3, 1\), expected \(3, 1000000000000\)"),
        (lambda: GRU(1, 1), {"num_layers": 10**6}, r"missing \['bias_ih_l1'"),
        (lambda: GRUCell(1, 1), {"hidden_size": 10**5}, "expected"),
        (lambda: Linear(1, 1), {"out_features": 10**10}, r"\(1, 1\), expected \(10000000000, 1\)"),
        (lambda: Embedding(1, 1), {"size": 10**10}, r"\(1, 1\), expected \(1, 10000000000\)"),
    ],
)
def test_sizes_are_compared_before_anything_is_allocated(tmp_path, make, change, message):
    written(tmp_path / "m", make(), change)
    with little(2e6), pytest.raises(ValueError, match=message):
        load(tmp_path / "m")


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 100_000, "9" * 5000, "\\ud800", "null"])
def test_headers_that_are_no_description(tmp_path, text):
    written(tmp_path / "m", GRU(1, 1), text=text)
    with pytest.raises(ValueError, match=r"m does not describe a model of this version"):
        load(tmp_path / "m")


def test_one_array_cannot_become_a_thousand(tmp_path):
    """Ties share the array, so a file of one matrix and a thousand ties stays small."""
    n, H = 300, 256
    header = {
        "format": 1,
        "chain": True,
        "dtype": "float32",
        "tied": {f"{i}.weight": "0.weight" for i in range(1, n)},
        "layers": [["Linear", {"in_features": H, "out_features": H, "bias": False}]] * n,
    }
    save_file({"0.weight": np.ones((H, H), "float32")}, tmp_path / "m",
              {"gru_any": json.dumps(header)})  # fmt: skip
    with little(8 * 4 * H * H):
        model = load(tmp_path / "m")
    assert model.params["0.weight"] is model.layers[-1].params["weight"]


def test_a_parameter_beside_the_one_that_it_is_tied_to(tmp_path):
    header = {
        "format": 1,
        "chain": True,
        "dtype": "float32",
        "tied": {"1.weight": "0.weight"},
        "layers": [["Linear", {"in_features": 2, "out_features": 2, "bias": False}]] * 2,
    }
    arrays = {f"{i}.weight": np.full((2, 2), i, "float32") for i in range(2)}
    save_file(arrays, tmp_path / "m", {"gru_any": json.dumps(header)})  # fmt: skip
    with pytest.raises(ValueError, match=r"\['1.weight'\] are stored, and also tied to other"):
        load(tmp_path / "m")


@pytest.mark.parametrize("name", ["2.weight", "-1.weight", "00.weight", "weight", "\u0660.weight"])
def test_names_of_no_layer(tmp_path, name):
    model = Chain(Linear(2, 2), Linear(2, 2))
    save(tmp_path / "m", model)
    header = {"format": 1, "chain": True, "dtype": "float32",
              "layers": [["Linear", layer.settings] for layer in model.layers]}  # fmt: skip
    arrays = dict(model.params) | {name: np.ones((2, 2), "float32")}
    save_file(arrays, tmp_path / "m", {"gru_any": json.dumps(header)})
    with pytest.raises(ValueError, match="belongs to none of 2 layers"):
        load(tmp_path / "m")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_model_is_loaded_within_twice_its_file(tmp_path, dtype):
    save(tmp_path / "m", GRU(256, 512, 2, dtype=dtype, seed=0))
    size = (tmp_path / "m").stat().st_size
    with little(2.1 * size):
        load(tmp_path / "m")


# digests -----------------------------------------------------------------------------------------


def test_no_flipped_bit_is_loaded(tmp_path):
    """A thousand bits of a small file, or all of them, one after the other."""
    path = tmp_path / "m"
    save(path, Chain(GRU(1, 1, seed=0), Last(), Linear(1, 1, seed=0)))
    whole, accepted = bytearray(path.read_bytes()), []
    bits = np.arange(8 * len(whole))
    if not THOROUGH:
        bits = np.random.default_rng(0).permutation(bits)[:1000]
    for bit in bits:
        whole[bit // 8] ^= 1 << bit % 8
        path.write_bytes(whole)
        whole[bit // 8] ^= 1 << bit % 8
        with suppress(ValueError):
            load(path)
            accepted.append(bit)
    assert not accepted
    path.write_bytes(whole)
    load(path)


def test_a_checkpoint_is_read_only_with_its_digest(tmp_path):
    resume.store(
        tmp_path, {"closing": None, "best": None, "description": {}}, {"weights/a": np.ones(3)}
    )
    path = tmp_path / resume.NAMES[0]
    whole, rng = bytearray(path.read_bytes()), np.random.default_rng(0)
    for bit in rng.integers(8 * len(whole), size=500):
        changed = whole.copy()
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="checkpoint"):
            resume.restore(tmp_path)


def test_a_file_without_a_digest_is_still_read(tmp_path):
    model = GRU(3, 4, seed=0)
    written(tmp_path / "m", model)
    again = load(tmp_path / "m")
    assert all(np.array_equal(again.params[k], a) for k, a in model.params.items())


def test_the_digest_is_that_of_what_is_returned(tmp_path):
    """Computed here anew, from the file as another library reads it."""
    import hashlib

    save(tmp_path / "m", GRU(1, 1, seed=0))
    content = (tmp_path / "m").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    description, found = header["gru_any"].split(', "digest": ')
    total = hashlib.sha256((description + "}").encode())
    for name, a in sorted(load_file(tmp_path / "m").items()):
        total.update(f"{name} {a.dtype} {a.shape}".encode() + a.tobytes())
    assert found == f'"{total.hexdigest()}"' + "}"


def test_one_model_is_one_file(tmp_path):
    for name in "abcdefgh":
        save(tmp_path / name, GRU(1, 1, seed=0))
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


# what is no file ---------------------------------------------------------------------------------


def test_pipes_devices_and_folders_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "pipe", "is a pipe, expected a regular file"),
        ("/dev/zero", "is a device, expected a regular file"),
        (tmp_path, "is a folder, expected a regular file"),
    ):
        with pytest.raises(OSError, match=message):
            read_whole(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_whole(tmp_path / "none")


@pytest.mark.parametrize(
    "change",
    [lambda f: f.truncate(5), lambda f: f.write(b"more"), lambda f: os.utime(f.name, (0, 0))],
)
def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch, change):
    (tmp_path / "m").write_bytes(bytes(1000))
    fstat = os.fstat

    def slow(handle):
        found = fstat(handle)
        with open(tmp_path / "m", "ab") as file:
            change(file)
        return found

    monkeypatch.setattr("gru_any.files.os.fstat", slow)
    with pytest.raises(OSError, match="had 1000 bytes, and changed while it was read"):
        read_whole(tmp_path / "m")


# processes that die ------------------------------------------------------------------------------

SAVING = """
import sys
from gru_any import GRU, save
models = [GRU(64, 64, seed=seed) for seed in range(2)]
while True:
    for model in models:
        save(sys.argv[1], model)
    print("ready", flush=True)
"""


def test_a_save_that_is_killed_at_any_moment(tmp_path):
    """One of the two models is there, whole, after every kill; what was left is cleared."""
    path, rng = tmp_path / "m", np.random.default_rng(0)
    models = [GRU(64, 64, seed=seed) for seed in range(2)]
    found = []
    for _ in range(KILLS):
        with started([sys.executable, "-c", SAVING, path], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(rng.uniform(0.01, 0.1))
        weight = load(path).params["weight_hh_l0"]
        found.append([np.array_equal(weight, m.params["weight_hh_l0"]) for m in models].index(True))
        assert len(list(tmp_path.iterdir())) <= 2  # with what the last one left
    assert KILLS < 20 or set(found) == {0, 1}
    save(path, models[0])
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


# disks and folders that fail ---------------------------------------------------------------------


class Failing:
    """A file whose disk is full after a few bytes."""

    def __init__(self, file, code):
        self.file, self.code = file, code

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, content):
        self.file.write(content[:100])
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("stage", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("old", [True, False])
def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch, stage, code, old):
    path = tmp_path / "m"
    if old:
        save(path, GRU(3, 4, seed=0))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as broken:
        if stage == "write":
            broken.setattr("builtins.open", lambda *a, into=open, **k: Failing(into(*a, **k), code))
        else:
            broken.setattr("builtins.open" if stage == "open" else f"os.{stage}", fail)
        with pytest.raises(OSError, match=r"m was not written \(") as raised:
            save(path, GRU(3, 4, seed=1))
    assert raised.value.errno == code
    assert os.strerror(code) in str(raised.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_disk_that_is_full_at_the_first_checkpoint(tmp_path, monkeypatch):
    """The error names no earlier checkpoint where there is none, and the earlier one later."""
    header, arrays = {"closing": None, "best": None}, {"weights/a": np.ones(3)}

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left") as raised:
        resume.store(tmp_path, header, arrays)
    assert "last good" not in str(raised.value)
    monkeypatch.undo()
    resume.store(tmp_path, header, arrays)
    monkeypatch.setattr("os.fsync", fail)
    newest = tmp_path / resume.NAMES[0]
    with pytest.raises(OSError, match=f"the last good checkpoint is {newest}"):
        resume.store(tmp_path, header, arrays)
    monkeypatch.undo()
    assert resume.restore(tmp_path)[1]["weights/a"].sum() == 3


SMALL = """
import resource, signal, sys
from gru_any import GRU, save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save(sys.argv[1], GRU(64, 64))
except OSError as e:
    print(e)
"""


def test_the_system_stops_a_write(tmp_path):
    done = finished([sys.executable, "-c", SMALL, tmp_path / "m"], code=0)
    assert "m was not written (File too large)" in done.stdout
    assert not list(tmp_path.iterdir())


FULL = """
import os, subprocess, sys
import numpy as np
from pathlib import Path
from gru_any import GRU, load, save
from gru_any.train import resume

folder = Path(sys.argv[1])
save(folder / "m", GRU(3, 4, seed=0))
before = (folder / "m").read_bytes()
def tried(call):
    try:
        call()
    except OSError as e:
        print(e)
    assert (folder / "m").read_bytes() == before and load(folder / "m").hidden_size == 4
tried(lambda: save(folder / "m", GRU(200, 200)))
run = folder / "run"
run.mkdir()
tried(lambda: resume.store(run, {}, {"a": np.ones(50_000)}))
resume.store(run, {}, {"a": np.ones(5_000)})
tried(lambda: resume.store(run, {}, {"a": np.ones(50_000)}))
assert resume.restore(run)[1]["a"].size == 5_000
subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
tried(lambda: save(folder / "m", GRU(3, 4)))
print(sorted(p.name for p in folder.rglob("*")))
"""


def test_a_disk_that_is_really_full_and_then_read_only(tmp_path):
    """A file system of 200 kB, in a namespace of its own, which not every machine allows."""
    mount = f'mount -t tmpfs -o size=200k tmpfs {tmp_path} || exit 77; exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", mount, "-", sys.executable, "-c", FULL, tmp_path]
    try:
        done = finished(command)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if done.returncode in (1, 77) and "Traceback" not in done.stderr:
        pytest.skip(f"no file system can be mounted: {done.stderr}")
    full, first, later, readonly, left = done.stdout.splitlines()
    assert "m was not written (No space left on device)" in full
    assert "No space left" in first
    assert "last good" not in first
    assert f"the last good checkpoint is {tmp_path / 'run' / resume.NAMES[0]}" in later
    assert "m was not written (Read-only file system)" in readonly
    assert left == "['checkpoint.safetensors', 'm', 'run']"


def test_a_folder_that_vanished(tmp_path):
    with pytest.raises(FileNotFoundError, match="m was not written"):
        save(tmp_path / "gone" / "m", GRU(1, 1))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load(tmp_path / "gone" / "m")


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / f".m.{platform.node()}.{os.getpid()}.part").symlink_to(tmp_path / "victim")
    save(tmp_path / "m", GRU(1, 1))
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "victim"]


def test_a_file_that_is_written_in_place_while_it_is_read(tmp_path):
    """What is returned is one of the two models, whatever the reader meets."""
    path, models = tmp_path / "m", [GRU(32, 32, seed=seed) for seed in range(2)]
    contents = []
    for model in models:
        save(path, model)
        contents.append(path.read_bytes())
    stop, found = threading.Event(), []

    def write():
        while not stop.is_set():
            for content in contents:
                with open(path, "r+b") as file:
                    file.truncate(len(content) // 2)
                    file.write(content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            with suppress(ValueError, OSError):
                found.append(load(path).params["weight_hh_l0"])
    finally:
        stop.set()
        writer.join()
    kept = [m.params["weight_hh_l0"] for m in models]
    assert all(any(np.array_equal(w, k) for k in kept) for w in found)


# the fuzzer --------------------------------------------------------------------------------------

WATCHED = """
import os, sys, tempfile
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from fuzz_files import Reader, watched

folder = Path(tempfile.mkdtemp())
def writes(path):
    (folder / "elsewhere").write_text("")
def runs(path):
    exec("1 + 1")
def starts(path):
    os.system("true")
def fills(path):
    return b"x" * 2**27
def fails(path):
    raise AttributeError("no word of ours")
def refuses(path):
    raise ValueError("in words")
for load in (refuses, runs, starts, writes, fills, fails):
    try:
        watched(Reader(load, "bin", "raw", ""), folder)(b"content")
        print(load.__name__, "passes")
    except Exception as e:
        print(load.__name__, type(e).__name__)
"""


def test_the_fuzzer_notices_harm():
    """Code that is run, files that are written, memory, and errors that are no words of ours."""
    folder = Path(__file__).parent.parent / "scripts/maintenance"
    done = finished([sys.executable, "-c", WATCHED, folder], code=0)
    assert done.stdout.split("\n") == [
        "refuses passes", "runs AssertionError", "starts AssertionError", "writes AssertionError",
        "fills MemoryError", "fails AttributeError", "",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["signed", "header", "json"])
def test_what_the_fuzzer_changes_is_still_a_file(tmp_path, monkeypatch, kind):
    """The digest and the lengths are written anew, so that a change comes as far as the reader."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "scripts/maintenance")
    import fuzz_files

    save(tmp_path / "m", Chain(GRU(2, 3, seed=0), Linear(3, 2, seed=0)))
    whole, found = (tmp_path / "m").read_bytes(), []
    change = {**fuzz_files.CHANGES, "json": fuzz_files.changed_json}[kind]
    for seed in range(1, 90, 3):  # those that change JSON as JSON
        if kind == "json":
            found.append(json.loads(change(None, b'{"a": [1, {"b": "c"}]}', 1000, seed)))
            continue
        (tmp_path / "m").write_bytes(change(lambda c, n: c, whole, 10_000, seed))
        try:
            load(tmp_path / "m")
            found.append("loaded")
        except ValueError as e:
            found.append(str(e).rpartition(": ")[2])
    assert len({str(v) for v in found}) > 8
    assert not [v for v in found if "digest" in v and kind == "signed"]
