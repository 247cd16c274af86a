"""Files are read whole; files and folders are written whole or not at all."""

import errno
import glob
import os
import platform
import re
import shutil
import stat
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from .typing import Path as PathLike

# so that opening a pipe does not wait for a writer
READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def write_atomically(path: PathLike, content: bytes) -> None:
    """Write a file so that at any moment either the old or the new one is there, whole.

    Temporary files of killed processes that were writing the same file are removed.

    Raises
    ------
    OSError
        It cannot be written; the old file is still there.
    """
    path = Path(path)
    clear_temporaries(path.parent, path.name)
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.part")
    try:
        temporary.unlink(missing_ok=True)  # left by a process with the same number
        with open(temporary, "xb") as file:  # which follows no link that somebody put there
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        with suppress(OSError):  # a read-only file system refuses this too
            temporary.unlink()
        if isinstance(e, OSError):
            raise OSError(e.errno, f"{path} was not written ({e.strerror})") from e
        raise
    fsync_folder(path.parent)


def read_whole(path: PathLike) -> bytes:
    """Return the content of a regular file.

    Pipes and devices, which may never end, are refused. So is a file that another process cuts or
    extends meanwhile.

    Raises
    ------
    OSError
        There is no such file, it is no regular file, or it cannot be read.
    MemoryError
        It does not fit into the memory.
    """
    try:
        handle = os.open(path, READ)
    except FileNotFoundError as e:
        raise FileNotFoundError(e.errno, f"there is no file {path}") from e
    except OSError as e:
        raise OSError(e.errno, f"{path} cannot be read ({e.strerror})") from e
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise OSError(errno.EINVAL, f"{path} is {kind}, expected a regular file")
    with open(handle, "rb") as file:
        try:
            content = file.read(found.st_size + 1)
        except MemoryError as e:
            raise MemoryError(f"{path} has {found.st_size} bytes, more than the memory") from e
        after = os.fstat(handle)
    if len(content) != found.st_size or after.st_mtime_ns != found.st_mtime_ns:
        raise OSError(errno.EIO, f"{path} had {found.st_size} bytes, and changed while it was read")
    return content


def write_folder_atomically(
    folder: PathLike, files: Mapping[str, bytes], replaces: Collection[str] = ()
) -> None:
    """Write a folder so that it is never there in part.

    An existing one is replaced, if all names in it are in `files` or in `replaces`.

    Raises
    ------
    FileExistsError
        The folder holds something else, which would be lost.
    OSError
        It cannot be written; what was there before still is.
    """
    folder = Path(os.path.realpath(folder))
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if others := there - {*files, *replaces}:
        raise FileExistsError(f"{folder} holds {min(others)}, which would be lost: name another")
    clear_temporaries(folder.parent, folder.name)
    temporary, old = (
        folder.with_name(f".{folder.name}{end}.{platform.node()}.{os.getpid()}.part")
        for end in ("", ".old")
    )
    try:
        temporary.mkdir()
        for name, content in files.items():
            write_atomically(temporary / name, content)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    except BaseException as e:
        if old.exists():
            os.replace(old, folder)
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(e, OSError):
            raise OSError(e.errno, f"{folder} was not written ({e.strerror})") from e
        raise
    shutil.rmtree(old, ignore_errors=True)
    fsync_folder(folder.parent)


def clear_temporaries(folder: Path, name: str = "*") -> None:
    """Remove temporary files, of one name or of all, that dead processes of this machine left."""
    name = name if name == "*" else glob.escape(name)
    for left in folder.glob(f".{name}.*.part"):
        found = re.fullmatch(rf".*\.{re.escape(platform.node())}\.(\d+)\.part", left.name)
        if found and not _alive(int(found[1])):
            _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    """Whether a process runs on this machine; True if the system cannot say."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        pass
    return True


def fsync_folder(folder: Path) -> None:
    """Flush the entries of a folder to the disk, if the system can and the folder may be read."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # the file system cannot
            raise
    finally:
        os.close(handle)
