"""Checkpoints of a training run: all that decides how it goes on, in one file, written whole.

A folder holds the newest checkpoint and the one before it. Each carries a digest of its contents;
where the newest is damaged it is put aside, and the one before is taken.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import NAMES, digest
from ..checkpoint import RUN_FORMAT as FORMAT
from ..files import clear_temporaries, settle, write_atomically

ASIDE = "checkpoint.damaged.safetensors"


class DamagedError(ValueError):
    """A file is not what was written."""


def store(folder: Path, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write a checkpoint; the one that was newest is kept as the one before.

    Raises
    ------
    OSError
        It cannot be written; the earlier ones are still there.
    """
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    text = json.dumps({"format": FORMAT, **header})
    newest, before = (folder / name for name in NAMES)
    made = folder / "checkpoint.new.safetensors"
    content = save(arrays, {"gru_any.run": text, "digest": digest(text, arrays)})
    try:
        write_atomically(made, content)
    except OSError as e:
        kept = f"; the last good checkpoint is {newest}" if newest.exists() else ""
        raise OSError(e.errno, f"{e.strerror}{kept}") from e
    if newest.exists():
        os.replace(newest, before)
    os.replace(made, newest)
    settle(folder)


def restore(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Read the newest checkpoint that is whole; None where there is none at all.

    Raises
    ------
    ValueError
        There are some, and none can be used; or the newest is of a newer version.
    """
    problems = []
    clear_temporaries(folder)
    for name in NAMES:
        if (folder / name).exists():
            try:
                found = _read(folder / name)
            except DamagedError as e:
                problems.append(str(e))
                continue
            if problems:
                os.replace(folder / NAMES[0], folder / ASIDE)  # lest it take this one's place
                print(f"gru_any: {problems[0]}; going on from {folder / name}", file=sys.stderr)
            return found
    if problems:
        raise ValueError(f"no checkpoint can be used: {'; '.join(problems)}")
    return None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as e:
        raise DamagedError(f"{path} is damaged: {e}") from e
    text = metadata.get("gru_any.run", "")
    if not text and "digest" not in metadata:
        raise ValueError(f"{path} is no checkpoint of a training run")
    if metadata.get("digest") != digest(text, arrays):
        raise DamagedError(f"{path} is damaged: its contents do not fit its digest")
    header = json.loads(text)
    if header["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {header['format']}, this version reads up to {FORMAT}: "
            "update gru-any"
        )
    return header, arrays


def refuse_changes(kept: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise ValueError naming the settings that differ from the checkpoint's."""
    given = json.loads(json.dumps(given))
    changed = [
        f"{name} was {kept.get(name)!r} and is now {given.get(name)!r}"
        for name in sorted(set(kept) | set(given))
        if kept.get(name) != given.get(name)
    ]
    if changed:
        raise ValueError(
            f"this folder holds a run with other settings: {'; '.join(changed)}. Take them back, "
            "or give another folder"
        )


def tell_differences(kept: dict[str, Any], now: dict[str, Any]) -> None:
    """Say on stderr what may change numbers in the last bits since the checkpoint."""
    for name in sorted(set(kept) | set(now)):
        if kept.get(name) != now.get(name):
            print(
                f"gru_any: the run began with {name} {kept.get(name)}, now it is {now.get(name)}; "
                "the last bits may differ",
                file=sys.stderr,
            )
