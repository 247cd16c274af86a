"""The scripts, as a person runs them, with few steps."""

import ast
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from conftest import THOROUGH, finished, require, running, started

SCRIPTS = Path(__file__).parent.parent / "scripts"
SMALL = ["--steps", "30", "--hidden", "16", "--batch", "8", "--chunk", "16", "--backend", "numpy"]


def run(script, *arguments, ok=True):
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    done = finished([sys.executable, SCRIPTS / script, *arguments], env=environment)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Return a function that runs train_text.py, which must stop, and returns what it said."""
    monkeypatch.syspath_prepend(SCRIPTS)
    from train_text import main

    def refused(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments)])
        assert stopped.value.code not in (None, 0)
        return "".join(capsys.readouterr()) + str(stopped.value)

    return refused


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "data.txt").write_text("Über den Wolken, so sagt man. " * 200, "utf-8")
    text = run(
        "train_text.py", *SMALL, "--data", folder / "data.txt", "--out", folder / "out",
        "--prompt", "den", "--sample", 20, "--layers", 2, "--dropout", 0.1, "--rate", 0.02,
    )  # fmt: skip
    return folder, text


def test_training(trained):
    folder, text = trained
    assert "6,000 characters, SHA-256 " in text
    assert "100%" in text
    for word in ("bits/char", "char/s", "loss", "validation: ", "test: ", "bits per character"):
        assert word in text
    assert any(line.startswith("den") for line in text.splitlines())
    bits = float(text.partition("test: ")[2].split()[0])
    assert 0 < bits < np.log2(20)
    assert sorted(p.name for p in (folder / "out").iterdir()) == [
        "characters.json", "checkpoint.safetensors", "history.png", "log.jsonl",
        "model.safetensors",
    ]  # fmt: skip


def test_a_sample_from_saved_weights(trained):
    folder, _ = trained
    command = ["train_text.py", "--load", folder / "out", "--sample", 30, "--backend", "numpy"]
    one, two = (run(*command, "--prompt", "so ", "--seed", 3) for _ in range(2))
    assert one == two
    assert one.startswith("so ")
    assert len(one) == 3 + 30 + 1
    assert "the model knows" in run(*command, "--prompt", "xyz", ok=False)


def test_ctrl_c_keeps_the_weights(tmp_path):
    (tmp_path / "data.txt").write_text("to be or not to be " * 500, "utf-8")
    command = [sys.executable, str(SCRIPTS / "train_text.py"), *SMALL, "--steps", "1000000"]
    command += ["--data", str(tmp_path / "data.txt"), "--out", str(tmp_path / "out")]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # under nohup it would be ignored
    with started(
        [*command, "--prompt", "to", "--sample", "10"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS.parent), "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert "characters" in process.stdout.readline()
        log = tmp_path / "out" / "log.jsonl"
        while not (log.exists() and log.stat().st_size):  # until it has made some steps
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "the weights so far are kept" in err
    assert "test: " in out
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_music_by_every_road(tmp_path):
    command = ["train_music.py", "--synthetic", "--epochs", 2, "--hidden", 16, "--quiet"]
    text = run(*command, "--backend", "numpy", "--out", tmp_path)
    assert 0 < float(text.partition("test ")[2].split()[0]) < 88 * np.log(2)
    assert (tmp_path / "history.png").exists()
    result = json.loads((tmp_path / "result.json").read_text())
    assert f"({result['test_by_piece']:.3f} where" in text
    assert 0 < abs(result["test_by_piece"] / result["test"] - 1) < 0.1  # the lengths differ
    again = run(*command, "--backend", "numpy", "--out", tmp_path)
    assert "nothing is changed" in again
    assert again.partition("test ")[2].split()[0] == text.partition("test ")[2].split()[0]
    assert "--data is missing" in run("train_music.py", ok=False)


def test_music_files(tmp_path, monkeypatch):
    """The layouts hold the same pieces; what is no music is refused."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import pickle

    import train_music

    parts = train_music.synthetic()
    notes = {
        k: [[tuple(int(n) + 21 for n in np.flatnonzero(frame)) for frame in p] for p in pieces]
        for k, pieces in parts.items()
    }
    (tmp_path / "a.pickle").write_bytes(pickle.dumps(notes))
    packed = {f"{k}_lengths": np.array([len(p) for p in v]) for k, v in parts.items()}
    packed |= {f"{k}_frames": np.packbits(np.concatenate(v), axis=1) for k, v in parts.items()}
    np.savez(tmp_path / "a.npz", **packed)
    for name in ("a.pickle", "a.npz"):
        found = train_music.read(str(tmp_path / name))
        assert train_music.digest(found) == train_music.digest(parts)
    (tmp_path / "code.pickle").write_bytes(pickle.dumps({"train": print}))
    np.savez(tmp_path / "b.npz", **{**packed, "test_lengths": np.array([3])})
    (tmp_path / "c.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:500])
    (tmp_path / "d.pickle").write_bytes(pickle.dumps({**notes, "test": [[(5,)]]}))
    (tmp_path / "e.pickle").write_bytes(b"")
    (tmp_path / "f.pickle").write_bytes(pickle.dumps({**notes, "valid": []}))
    (tmp_path / "h.pickle").write_bytes(pickle.dumps(["train"]))
    np.savez(tmp_path / "h.npz", **{**packed, "train_frames": packed["train_frames"] / 2})
    np.savez(tmp_path / "i.npz", **{**packed, "train_frames": packed["train_frames"][:, :5]})
    for name, message in {
        "code.pickle": "plain lists", "b.npz": "add up to 3", "c.npz": "cannot be read",
        "d.pickle": "note 5", "e.pickle": "cannot be read", "f.pickle": "no piece of two frames",
        "g.txt": "is none of", "none.npz": "cannot be read",
        "h.pickle": "TypeError", "h.npz": "TypeError", "i.npz": r"no \(T, 88\)",
    }.items():  # fmt: skip
        with pytest.raises(SystemExit, match=message):
            train_music.read(str(tmp_path / name))


def test_music_of_matlab(tmp_path, monkeypatch):
    matlab = require("scipy.io")
    monkeypatch.syspath_prepend(SCRIPTS)
    import train_music

    parts = train_music.synthetic()
    cells = {f"{k}data": np.array([*v, None], object)[:-1] for k, v in parts.items()}
    matlab.savemat(tmp_path / "a.mat", cells)
    (tmp_path / "b.mat").write_bytes(b"no matrix" * 50)
    assert train_music.digest(train_music.read(str(tmp_path / "a.mat"))) == train_music.digest(
        parts
    )
    with pytest.raises(SystemExit, match="cannot be read"):
        train_music.read(str(tmp_path / "b.mat"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the text has 0 characters"),
        (b"\xff\xfe\x00bad" * 500, "is not UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_data_that_is_no_text(refusal, tmp_path, content, message):
    if content is not None:
        (tmp_path / "data").write_bytes(content)
    assert message in refusal("--data", tmp_path / "data")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "1000000"], "too many"),
        (["--hidden", "0"], "is not above 0"),
        (["--temperature", "nan"], "must be above 0"),
        (["--prompt", "xyz"], "--prompt holds ['x', 'y', 'z']; the model knows"),
        (["--prompt", ""], "--prompt is empty"),
        (["--clip", "0"], "ValueError: clip is 0.0, expected a number above 0"),
        (["--out", "/dev/null"], "out is no folder"),
        (["--chunk", "300"], "--chunk 300: the training part has 8550 characters"),
        (["--load", "no such folder"], "--load no such folder"),
        (["--backend", "no_such_library"], "cannot be imported"),
    ],
)
def test_bad_arguments(refusal, tmp_path, arguments, message):
    (tmp_path / "data.txt").write_text("to be or not to be " * 500, "utf-8")
    assert message in refusal("--data", tmp_path / "data.txt", *arguments)


def test_without_the_text_of_cpython(tmp_path):
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "__init__.py").touch()
    (tmp_path / "pydoc_data" / "topics.py").write_text("raise ImportError")
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(SCRIPTS)!r}]\n"
        "import train_text; train_text.main([])"
    )
    done = finished([sys.executable, "-c", code], code=1)
    assert "--data FILE" in done.stderr


def test_the_demo():
    text = run("demo_sequence.py", "--backend", "numpy", "--iterations", "200")
    losses = [float(line.split()[2]) for line in text.splitlines() if "loss" in line]
    assert losses[0] > 1 > 0.05 > losses[-1]


@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")
def test_the_cost_of_the_import(monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPTS / "benchmarks")
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS.parent))
    import import_time

    monkeypatch.setattr(import_time, "ROUNDS", 2)
    import_time.main()
    rows = re.findall(r"^(.+?) +\d+ +\d+$", capsys.readouterr().out, re.M)
    assert rows == list(import_time.PROGRAMS)


def test_the_cost_of_options(monkeypatch):
    """Every row of the table runs, on a small size and without compiling."""
    monkeypatch.setenv("GRU_ANY_NO_NUMBA", "1")
    text = run("benchmarks/options.py", "--cell", "3,2,4,5", "--rounds", "1")
    assert len(re.findall(r"^\w[\w ]+ +[\d.]+ +[\d.]+   bar [\d.]+", text, re.M)) >= 13


def test_mutation(monkeypatch):
    """Changes can be made; one is tried with GRU_ANY_THOROUGH=1. The whole takes minutes."""
    monkeypatch.syspath_prepend(SCRIPTS / "maintenance")
    from mutate import mutants

    for _, file, text, _ in islice(mutants(), 20):
        assert ast.dump(ast.parse(text)) != ast.dump(ast.parse((SCRIPTS.parent / file).read_text()))
    if THOROUGH:
        assert "1 of 1 changes noticed" in run("maintenance/mutate.py", "--only", "1")


def test_the_benchmark(tmp_path):
    """All that are installed give the same numbers, and a second run repeats nothing."""
    command = ["benchmark.py", "--cases", "3,2,4,5", "--rounds", "2", "--seconds", "0.001"]
    command += ["--json", tmp_path / "all.json"]
    text = run(*command)
    assert text.count("T=3 B=2 I=4 H=5") == 8  # the figures, and which bars are held
    before = (tmp_path / "all.json").read_text("utf-8")
    run(*command, "--contenders", "numpy")
    assert (tmp_path / "all.json").read_text("utf-8") == before


def test_looking_inside(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import look_inside

    folder, pictures = trained[0] / "out", tmp_path / "pictures"
    command = ["--load", str(folder), "--out", str(pictures), "--text"]
    with running("traced"):
        look_inside.main([*command, "Über den Wolken"])
    text = capsys.readouterr().out
    assert "half-life in characters: " in text
    assert text.count("after 50 steps") == 2 * 4 + 1
    assert "spectral radius" in text
    names = sorted(path.name for path in pictures.iterdir())
    assert names == [f"{k}.png" for k in ("fading", "gates", "memory", "saturation", "spectrum")]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in pictures.iterdir())
    with pytest.raises(SystemExit, match="the model knows"):
        look_inside.main([*command, "xyz" * 9])
    with pytest.raises(SystemExit, match=r"train_text\.py --out no_such makes one"):
        look_inside.main(["--load", "no_such"])


def test_text_is_typed_as_it_is_predicted(trained, monkeypatch):
    folder, _ = trained
    monkeypatch.setenv("GRU_ANY_NO_NUMBA", "1")  # whose first word could come between those typed
    command = ["stream_text.py", folder / "out", "--length", 30, "--delay", 0, "--prompt", "den "]
    one = run(*command, "--seed", 3)
    assert one.startswith("den ")
    assert len(one.splitlines()[0]) == 4 + 30
    assert "30 characters in " in one
    written = run(
        "train_text.py", "--load", folder / "out", "--sample", 30, "--backend", "numpy",
        "--prompt", "den ", "--seed", 3,
    )  # fmt: skip
    assert written.splitlines()[0] == one.splitlines()[0]
    assert "the model knows" in run(*command[:-1], "xyz", ok=False)
    assert "holds no model of train_text.py" in run("stream_text.py", folder, ok=False)


def test_the_bars(monkeypatch, capsys):
    """Two cells made up: what is held, what is not, and what reset before costs."""
    monkeypatch.syspath_prepend(SCRIPTS / "benchmarks")
    bars = importlib.import_module("bars")
    times = {
        "numba": [1.0, 1.0, 9.0], "numpy": [2.1, 2.0, 2.0], "torch": [1.3, 2.0, 2.0],
        "onnxruntime": [1.5, 1.0, 1.0], "jax": [1.2, 0.98, 9.0], "floor": [0.5, 0.5, 0.5],
    }  # fmt: skip
    before = {**times, "numba": [2.0, 2.0, 2.0]}
    cells = [(True, times), (False, before)]
    size = (100, 32, 64, 128)
    results = {
        str(after): {"cell": (size, "forward", after), "threads": 2, "times": t}
        for after, t in cells
    }
    bars.report(results)
    first, second, total = capsys.readouterr().out.splitlines()
    assert "held numba 1.30 of torch (bar 1.20)" in first
    assert "held numba 0.98 of the best of onnxruntime, openvino, jax (bar 1.00)" in first
    assert "held numpy 1.00 of torch (bar 1.00)" in first
    assert "NOT numba 0.50 of floor (bar 0.71)" in first
    assert second.count("NOT") == 2
    assert "held numba 1.00 of torch (bar 1.00)" in second
    assert total.startswith("5 of 8 bars held; reset before costs more than 1.25 times")
    assert "in 1 of 1 pairs (at most 2.00 times)" in total
    one = bars.bars((1, 1, 64, 64), "training", False, 1)
    jax = ("jax", 1.0, ("flax", "equinox"))
    assert one == [("numba", 1.0, ("torch",)), jax]
    arrays = [(name, 1 / 1.1, ("numba",)) for name in ("torch-arrays", "jax-arrays")]
    assert bars.bars(size, "training", False, 1)[1:] == [jax, *arrays]
