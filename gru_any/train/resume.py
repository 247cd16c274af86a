"""Checkpoints of a training run: one file holds all that decides how the run goes on.

A folder holds the newest checkpoint and the one before it; each is written atomically and carries
a digest of its contents. If the newest is damaged, it is renamed, and the one before is used.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ..checkpoint import NAMES
from ..checkpoint import RUN_FORMAT as FORMAT
from ..files import clear_temporaries, fsync_folder, write_atomically
from ..tensors import DamagedError, check_digest, content_of, digest, read
from ..typing import HostArray

Header: TypeAlias = dict[str, Any]  # as JSON
ASIDE = "checkpoint.damaged.safetensors"


def store(folder: Path, header: Header, arrays: Mapping[str, HostArray]) -> None:
    """Write a checkpoint, and keep the one that was the newest as the one before.

    Raises
    ------
    OSError
        It cannot be written; the earlier ones are still there.
    """
    text = json.dumps({"format": FORMAT, **header})
    newest, before = (folder / name for name in NAMES)
    made = folder / "checkpoint.new.safetensors"
    content = content_of(arrays, {"gru_any.run": text, "digest": digest(text, arrays)})
    try:
        write_atomically(made, content)
    except OSError as e:
        good = next((name for name in (newest, before) if name.exists()), None)
        kept = f"; the last good checkpoint is {good}" if good else "; there is no earlier one"
        raise OSError(e.errno, f"{e.strerror}{kept}") from e
    if newest.exists():
        os.replace(newest, before)
    os.replace(made, newest)
    fsync_folder(folder)


def restore(folder: Path) -> tuple[Header, dict[str, HostArray]] | None:
    """Read the newest checkpoint that is not damaged; return None if there is no checkpoint.

    Raises
    ------
    ValueError
        There are checkpoints, and none can be used; or the newest is of a newer version.
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
                os.replace(folder / NAMES[0], folder / ASIDE)  # or it would become the one before
                print(f"gru_any: {problems[0]}; going on from {folder / name}", file=sys.stderr)
            return found
    if problems:
        raise ValueError(f"no checkpoint can be used: {'; '.join(problems)}")
    return None


def _read(path: Path) -> tuple[Header, dict[str, HostArray]]:
    metadata, arrays = read(path)
    text = metadata.get("gru_any.run", "")
    if not text and "digest" not in metadata:
        raise ValueError(f"{path} is no checkpoint of a training run")
    check_digest(path, metadata.get("digest"), text, arrays)
    header = json.loads(text)
    if header["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {header['format']}, this version reads up to {FORMAT}: "
            "update gru-any"
        )
    return header, arrays


def refuse_changes(kept: Mapping[str, object], given: Mapping[str, object]) -> None:
    """Raise ValueError if settings differ from the checkpoint's; the text names them."""
    given = json.loads(json.dumps({**given}))
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


def tell_differences(kept: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Report on stderr what has changed since the checkpoint and may change the last bits."""
    for name in sorted(set(kept) | set(now)):
        if kept.get(name) != now.get(name):
            print(
                f"gru_any: the run began with {name} {kept.get(name)}, now it is {now.get(name)}; "
                "the last bits may differ",
                file=sys.stderr,
            )
