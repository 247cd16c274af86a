"""The folder of compiled code, which is executed: so nobody but its owner may write there.

Numba finds machine code by the path of the source, and loads it by pickle. So nothing is read from
the folder unless it belongs to this user or to root, others cannot write there, and the source in
it is what would be written now.
"""

import os
import stat
import warnings
from functools import cache
from pathlib import Path

from ...files import write_atomically

POSIX = os.name == "posix"  # on Windows a user's profile is private
OTHERS = stat.S_IWGRP | stat.S_IWOTH


class UntrustedError(OSError):
    """The folder cannot be used; the text says why."""


@cache
def warn_once(why: str) -> None:
    """Warn, once per reason, that the folder is not used."""
    warnings.warn(f"{why}: code is compiled in memory, anew in each process", RuntimeWarning, 4)


def chosen() -> Path:
    """Return the folder that GRU_ANY_CACHE names, else the default one."""
    named = os.environ.get("GRU_ANY_CACHE")
    return Path(named) if named else _usual()


def _usual() -> Path:
    return Path.home() / ".cache" / "gru_any"


def prepare(folder: Path) -> None:
    """Make the folder, for this user alone, or check the one that is there.

    Raises
    ------
    UntrustedError
        Others may write there.
    OSError
        It cannot be made.
    """
    for each in (folder, folder / "__pycache__"):
        each.mkdir(mode=0o700, parents=True, exist_ok=True)
        if POSIX:
            _check(each, folder)


def _check(each: Path, folder: Path) -> None:
    found = each.stat()
    if not _ours(found):
        raise UntrustedError(
            f"{each} belongs to another user, whose code is not run here; set GRU_ANY_CACHE to a "
            "folder of your own"
        )
    if not found.st_mode & OTHERS:
        return
    if folder != _usual() or found.st_uid != os.geteuid():
        raise UntrustedError(
            f"{each} can be written by other users, whose code is not run here; "
            f"chmod -R go-w {folder}"
        )
    each.chmod(0o700)  # as older versions made it, where the umask let them
    for file in each.glob("gru_any_*"):
        if not _trusted(file):
            file.unlink(missing_ok=True)


def _ours(found: os.stat_result) -> bool:
    return found.st_uid in (0, os.geteuid())


def _trusted(file: Path) -> bool:
    """Whether none but this user and root can have written the file."""
    found = file.lstat()
    return stat.S_ISREG(found.st_mode) and _ours(found) and not found.st_mode & OTHERS


def discard(folder: Path, name: str) -> None:
    """Remove the machine code of a source."""
    for file in (folder / "__pycache__").glob(f"{name}.*.nb[ic]"):
        file.unlink(missing_ok=True)


def store(folder: Path, name: str, source: str) -> bool:
    """Write the source of an entry, unless it is there already; return whether it was written.

    Machine code is removed if it is of another source, or may be of another user.
    """
    path, content = folder / f"{name}.py", source.encode()
    found = path.read_bytes() if path.is_file() and not path.is_symlink() else None
    private = POSIX and not folder.stat().st_mode & 0o077
    files = [] if private or not POSIX else (folder / "__pycache__").glob(f"{name}.*.nb[ic]")
    if found not in (None, content) or not all(map(_trusted, files)):
        discard(folder, name)
    if found == content:
        return False
    write_atomically(path, content)
    return True
