"""A folder that one training run has to itself.

The operating system holds the lock, so it ends with the process that took it, however that ends.
"""

import errno
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

NAME = ".lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if need be, for the duration of a with block.

    Raises
    ------
    ValueError
        Another run holds it; the text names its process.
    OSError
        It cannot be made or written to.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"out is no folder: {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder) as file:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}, since {now}".encode())
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
            if os.name != "nt":  # which removes no open file
                (folder / NAME).unlink(missing_ok=True)


def _locked(folder: Path) -> BinaryIO:
    """Open the lock file of a folder, and lock it."""
    while True:
        file = open(folder / NAME, "a+b")  # noqa: SIM115
        try:
            _lock(file)
            there = os.stat(folder / NAME)
            if os.path.samestat(os.fstat(file.fileno()), there):
                return file
        except FileNotFoundError:
            pass
        except OSError as e:
            with file:
                if isinstance(e, (BlockingIOError, PermissionError)):
                    raise ValueError(_held(folder, file)) from None
                raise OSError(e.errno, f"{folder} cannot be locked ({e.strerror})") from e
        file.close()  # the holder removed it after this run had opened it: once more


def _held(folder: Path, file: BinaryIO) -> str:
    file.seek(0)
    holder = file.read().decode("utf-8", "replace") or "another process"
    return (
        f"another run writes to {folder}: {holder}. Wait until it ends, or give each run a "
        "folder of its own"
    )


if os.name == "nt":
    import msvcrt

    def _lock(file: BinaryIO) -> None:
        file.seek(1 << 30)  # behind the text, which others may then read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        file.seek(0)

else:
    import fcntl

    def _lock(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
