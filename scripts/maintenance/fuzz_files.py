"""Fuzz the readers of files, guided by coverage: no crash, hang, code run, or memory without end.

    python scripts/maintenance/fuzz_files.py --seconds 180
    python scripts/maintenance/fuzz_files.py pt onnx --seconds 3600
    python scripts/maintenance/fuzz_files.py pt --input out/fuzz/pt/found/crash-...

Needs atheris (https://github.com/google/atheris): `pip install atheris`. A file may be refused by
ValueError, KeyError, TypeError or OSError; whatever else happens is a finding, and the file is kept
in out/fuzz/READER/found. Zip files are changed within their members, and files with a digest are
signed anew, or their checksums would keep every change out. HDF5, protobuf and safetensors are
compiled libraries, whose coverage the fuzzer does not see.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests/data"
REFUSED = (ValueError, KeyError, TypeError, OSError)
GROWTH = 64 * 2**20  # bytes that one call may take beside twice the file
CLEAR = Path("/proc/self/clear_refs")  # of Linux
LONGEST = 100_000  # bytes of a file
HARM = ("os.system", "os.exec", "os.posix_spawn", "subprocess.", "socket.", "pickle.", "ctypes.dl",
        "os.remove", "os.rename", "os.rmdir", "shutil.")  # fmt: skip


Mutate: TypeAlias = Callable[[bytes, int], bytes]  # the content, the most bytes -> changed


class Reader(NamedTuple):
    """How a kind of file is read, how it is changed, and files to begin with."""

    load: Callable[[Path], Any]
    ending: str
    change: str  # "raw", or a key of CHANGES
    seeds: str  # a pattern under tests/data


def readers() -> dict[str, Reader]:
    import gru_any
    from gru_any.convert import chainer, equinox, keras, mlx, onnx, torch

    sys.path.insert(0, str(ROOT / "scripts"))
    import train_series

    def series(path: Path) -> None:
        train_series.parse_ts(path.read_text("utf-8"))

    layer = partial(keras.load, layer="gru")
    return {
        "model": Reader(gru_any.load, "safetensors", "signed", ""),
        "checkpoint": Reader(gru_any.load, "safetensors", "signed", ""),
        "safetensors": Reader(torch.load, "safetensors", "header", "torch.safetensors"),
        "pt": Reader(torch.load, "pt", "zip", "torch.pt"),
        "keras": Reader(keras.load, "keras", "zip", "*.keras"),
        "h5": Reader(keras.load, "h5", "raw", "*.h5"),
        "weights": Reader(layer, "weights.h5", "raw", "*.weights.h5"),
        "npz": Reader(mlx.load, "npz", "zip", "mlx.npz"),
        "chainer": Reader(partial(chainer.load, prefix="gru/"), "npz", "zip", "chainer.npz"),
        "eqx": Reader(equinox.load, "eqx", "raw", "*.eqx"),
        "onnx": Reader(onnx.load, "onnx", "raw", "onnx/*.onnx"),
        "node": Reader(partial(onnx.load, node="/gru"), "onnx", "raw", "onnx/torch_script*.onnx"),
        "series": Reader(series, "ts", "raw", ""),
    }


def seeds(name: str, reader: Reader, folder: Path) -> Iterator[bytes]:
    """Yield files with which to begin."""
    import gru_any
    from gru_any import GRU, Chain, Embedding, Last, Linear

    if reader.seeds:
        yield from (path.read_bytes() for path in sorted(DATA.glob(reader.seeds)))
    if name == "pt":
        import torch

        for zipped in (True, False):
            buffer = io.BytesIO()
            tensors = {"a": torch.ones(3), "b": torch.ones(2, 2).bfloat16().T}
            torch.save(tensors, buffer, _use_new_zipfile_serialization=zipped)
            yield buffer.getvalue()
    if name == "series":
        yield b"@classLabel true a b\n@data\n1,2:3,4:a\n5,6:7,8:b\n"
    if name == "model":
        table = Embedding(3, 2, seed=0)
        for model in (
            GRU(2, 3, 2, bidirectional=True, reset_after=True, seed=0),
            Chain(table, GRU(2, 3, dropout=0.0), Last(), Linear(3, 2)),
            Chain(table, GRU(2, 2), Linear(2, 3), tied={"2.weight": "0.weight"}),
        ):
            gru_any.save(folder / "seed", model)
            yield (folder / "seed").read_bytes()
    if name == "checkpoint":
        import numpy as np

        from gru_any.train import fit  # a run of a few steps
        from gru_any.train.data import Batch

        batch = Batch(np.zeros((3, 2, 2), "float32"), np.zeros((3, 2, 2), "float32"))
        model = Chain(GRU(2, 2, seed=0))
        for average in (None, 0.5):
            out = folder / f"run{average}"
            fit(model, gru_any.squared_error, lambda epoch: [batch], gru_any.Adam(model.params),
                steps=2, out=out, average=average, bar=False)  # fmt: skip
            yield (out / "checkpoint.safetensors").read_bytes()


# changes -----------------------------------------------------------------------------------------

VALUES = (0, -1, 1, 2**31, 10**30, 1e308, math.nan, True, None, "", "0.weight", "a" * 1000, [], {})


def changed_json(mutate: Mutate, content: bytes, most: int, seed: int) -> bytes:
    """Change a part of what a text in JSON says, or the text."""
    if seed % 3 == 0:
        return mutate(content, most)
    rng, whole = random.Random(seed), json.loads(content)
    places = list(_places(whole))
    holder, key = rng.choice(places)
    old, new = holder[key], rng.choice([*VALUES, *(h[k] for h, k in places)])
    if isinstance(old, str) and old[:1] in ("{", "[") and rng.random() < 0.9:  # JSON in JSON
        new = changed_json(mutate, old.encode(), most, rng.getrandbits(30)).decode(
            "utf-8", "replace"
        )
    elif isinstance(holder, dict) and rng.random() < 0.2:
        holder[rng.choice([*holder, "a", "0.weight"])] = old
    holder[key] = copy.deepcopy(new)
    return json.dumps(whole).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each list or dict within a value, with each key or number of it."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys if isinstance(value, dict | list) else ():
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def changed_zip(mutate: Mutate, data: bytes, most: int, seed: int) -> bytes:
    """Change one member, and write the zip file anew."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(entry.filename, archive.read(entry)[:LONGEST]) for entry in archive.infolist()]
    chosen = seed % len(members)
    name, content = members[chosen]
    change = changed_json if name.endswith(".json") else lambda m, c, n, s: m(c, n)
    members[chosen] = (name, change(mutate, content, most, seed // 7))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if seed % 5 == 0 else 0) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def changed_header(mutate: Mutate, data: bytes, most: int, seed: int) -> bytes:
    """Change the header of a safetensors file, and its length with it."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = changed_json(mutate, data[8:end], most, seed)
    return len(header).to_bytes(8, "little") + header + data[end:]


def changed_signed(mutate: Mutate, data: bytes, most: int, seed: int) -> bytes:
    """Change the description of a model or a run, and sign it anew."""
    from gru_any import tensors

    end = 8 + int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:end]), data[end:]
    said = header["__metadata__"]
    key = "gru_any" if "gru_any" in said else "gru_any.run"
    text, signed, _ = said[key].partition(', "digest": ')
    text += "}" if signed else ""
    text = changed_json(mutate, text.encode(), most, seed).decode("utf-8", "replace")
    entries = {
        name: {**entry, "data": body[slice(*entry["data_offsets"])]}
        for name, entry in header.items()
        if name != "__metadata__"
    }
    found = tensors.digest(text, {name: tensors._array(entry) for name, entry in entries.items()})
    said[key] = text
    if key == "gru_any.run":
        said["digest"] = found
    elif seed % 5:
        said[key] = f'{text[:-1]}, "digest": "{found}"}}'
    new = json.dumps(header).encode()
    return len(new).to_bytes(8, "little") + new + body


CHANGES = {"zip": changed_zip, "header": changed_header, "signed": changed_signed}


# one reader --------------------------------------------------------------------------------------


def memory(what: str) -> int:
    """Return the bytes of memory that this process takes (VmRSS), or took at most (VmHWM)."""
    found = re.search(rf"{what}:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def watched(reader: Reader, folder: Path) -> Callable[[bytes], None]:
    """Return a function that reads one file, and raises if reading does harm."""
    path, harm = folder / f"file.{reader.ending}", []
    reading = False

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if reading and (
            event.startswith(HARM)
            or (event == "exec" and not Path(arguments[0].co_filename).is_file())  # no module
            or (event == "open" and set("wax+") & set(str(arguments[1] or "")))
        ):
            harm.append((event, *map(str, arguments)))

    sys.addaudithook(listen)

    def read(data: bytes) -> None:
        nonlocal reading
        path.write_bytes(data)
        CLEAR.write_text("5")  # the peak becomes what is taken now
        before = memory("VmRSS")
        reading = True
        with contextlib.suppress(*REFUSED):
            reader.load(path)
        reading = False
        grown = memory("VmHWM") - before
        if grown > 2 * len(data) + GROWTH:
            raise MemoryError(f"{len(data)} bytes took {grown >> 20} MiB")
        if harm:
            raise AssertionError(f"it did {harm}")

    return read


def fuzz(name: str, flags: list[str]) -> None:
    """Run the fuzzer in this process, which it ends."""
    import atheris

    with atheris.instrument_imports(include=["gru_any", "zipfile", "pickletools", "json"]):
        reader = readers()[name]
        for module in ("onnx.check", "onnx.read", "onnx.walk", "keras.read", "keras.hdf5"):
            __import__(f"gru_any.convert.{module}")
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp())
    corpus = ROOT / "out/fuzz" / name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for i, content in enumerate(seeds(name, reader, folder)):
        path = corpus / f"seed{i}.{reader.ending}"
        path.write_bytes(content)
        with contextlib.suppress(*REFUSED):
            reader.load(path)  # what is imported on first use is imported now
    read = watched(reader, folder)

    def custom(data: bytes, most: int, seed: int) -> bytes:
        if seed % 4:
            try:
                return CHANGES[reader.change](atheris.Mutate, data, most, seed // 4)[:most]
            except Exception:  # the file is no longer one of its kind
                pass
        return atheris.Mutate(data, most)

    given = {} if reader.change == "raw" else {"custom_mutator": custom}
    atheris.Setup([sys.argv[0], *flags, str(corpus)], read, **given)
    atheris.Fuzz()


# all readers -------------------------------------------------------------------------------------


def run(name: str, seconds: int) -> str:
    """Fuzz one reader in a process of its own; return a row of the table."""
    found = ROOT / "out/fuzz" / name / "found"
    found.mkdir(parents=True, exist_ok=True)
    flags = [f"-max_total_time={seconds}", "-timeout=10", f"-max_len={LONGEST}",
             "-rss_limit_mb=4096",
             f"-artifact_prefix={found}/", "-print_final_stats=1"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, __file__, name, "--flags", *flags],
        capture_output=True, text=True, check=False, env=os.environ | {"GRU_ANY_NO_NUMBA": "1"},
    )  # fmt: skip
    (found.parent / "log").write_text(done.stdout + done.stderr)
    runs = re.findall(r"number_of_executed_units:\s*(\d+)", done.stderr) or ["?"]
    coverage = re.findall(r"cov: (\d+)", done.stderr) or ["?"]
    peak = re.findall(r"peak_rss_mb:\s*(\d+)", done.stderr) or ["?"]
    findings = len(list(found.iterdir()))
    return f"| {name} | {runs[-1]} | {coverage[-1]} | {peak[-1]} | {findings} | {done.returncode} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*", help="all if none is named")
    parser.add_argument("--seconds", type=int, default=180, help="for each reader")
    parser.add_argument("--input", type=Path, help="read this file once, and show what happens")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, help="of libFuzzer, for one reader")
    given = parser.parse_args()
    if given.flags is not None:
        fuzz(given.readers[0], given.flags)
    elif given.input:
        reader = readers()[given.readers[0]]
        watched(reader, Path(tempfile.mkdtemp()))(given.input.read_bytes())
    else:
        print("| reader | files tried | branches seen | peak MiB | findings | exit |")
        print("|---|---|---|---|---|---|")
        for name in given.readers or readers():
            print(run(name, given.seconds), flush=True)


if __name__ == "__main__":
    main()
