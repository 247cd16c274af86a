"""Generated source as modules, in files, since Numba caches the machine code of files alone."""

import ast
import hashlib
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import get_ident
from types import ModuleType
from typing import Any

from .code_folder import UntrustedError, chosen, discard, prepare, store, warn_once

LIKELY = ("builtins", "llvmlite", "numba", "pickle", "_pickle", "gru_any")  # modules of its errors
_failures: list[str] = []  # why Numba is no longer used


class CompileError(RuntimeError):
    """Numba cannot compile here; the text says why."""


def problem() -> str:
    """Diagnose why Numba cannot be used here; "" where it can, as far as is known."""
    return _failures[0] if _failures else _import_problem()


def give_up(error: Exception) -> None:
    """Stop using Numba in this process, with one warning."""
    if not _failures:
        _failures.append(f"Numba cannot compile here ({_shown(error.__cause__ or error)})")
        warnings.warn(
            f"{_failures[0]}: calls run traced, which is slower", RuntimeWarning, stacklevel=2
        )


def rescued(error: Exception, again: Callable[[], Any], instead: Callable[[], Any]) -> Any:
    """Recover from an error: return instead(), and give Numba up, if it may have raised the error.

    After an error of the cache folder the machine code there is removed, and again() is tried
    first. Any other error is raised.
    """
    if (foreign := hidden(error)) is not None:
        raise foreign
    if not isinstance(error, CompileError) and may_be_cached(error):
        discard_machine_code()
        try:
            return again()
        except Exception as e:
            error = e
    if not may_be_numbas(error):
        raise error
    found = instead()  # raises where Numba was not to blame
    give_up(error)
    return found


def may_be_cached(error: Exception) -> bool:
    """Whether an error may come from the cache folder, which was removed or is damaged."""
    root = type(error).__module__.partition(".")[0]
    damaged = root in ("pickle", "_pickle") or isinstance(error, (EOFError, ValueError, KeyError))
    return damaged or (isinstance(error, OSError) and error.errno is not None)


def may_be_numbas(error: Exception) -> bool:
    """Whether Numba may have raised an error, and not, say, a signal handler of the caller."""
    root = type(error).__module__.partition(".")[0]
    return root in LIKELY and not isinstance(error, (MemoryError, TimeoutError))


def hidden(error: BaseException) -> BaseException | None:
    """Return the error of a signal handler that Numba wraps in one of its own; None without one."""
    while isinstance(error, SystemError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, Exception) and (may_be_numbas(error) or may_be_cached(error)):
        return None
    return error


@cache
def trial() -> str:
    """Compile a function of one line; return "" if that succeeds, else what went wrong."""
    try:
        import numba

        wrong = numba.njit("int64(int64)")(lambda n: n + 1)(1) != 2
        return "Numba compiles wrongly here" if wrong else ""
    except Exception as e:
        return f"Numba cannot compile here ({_shown(e)})"


@cache
def _import_problem() -> str:
    try:
        if find_spec("numba") is None:
            return 'Numba is not installed: pip install "gru-any[fast]"'
        from . import barrier, gemm  # noqa: F401
    except Exception as e:  # such as a NumPy too new for it
        why = f"Numba cannot be imported ({_shown(e)})"
        _tell(why)
        return why
    return ""


def _tell(why: str) -> None:
    warnings.warn(f"{why}: calls run traced, which is slower", RuntimeWarning, stacklevel=3)


def _shown(error: BaseException) -> str:
    """The kind of an error and its first line, cut to a readable length."""
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line[:200]}"


def compiled(source: str) -> Any:
    """Import the source from a file of the cache folder, where Numba keeps its machine code too.

    Where nothing may be written or read there, it is compiled in memory.

    Raises
    ------
    CompileError
        Numba cannot compile it.
    """
    if _failures:
        raise CompileError(_failures[0])
    name = f"gru_any_{_key(source)}"
    for _ in range(2):  # with the cached machine code, then without
        try:
            return _from_file(name, source)
        except UntrustedError as e:
            warn_once(str(e))
            break
        except OSError:  # no space, nothing may be written there
            break
        except Exception as e:  # machine code that is damaged; or Numba itself fails, as follows
            if not may_be_numbas(e):
                raise
            discard_machine_code(name)
    sys.modules.pop(name, None)
    try:
        return _in_memory(name, "CACHE = False\n" + source)
    except Exception as e:
        if not may_be_numbas(e):
            raise
        raise CompileError(_shown(e)) from e


def _key(source: str) -> str:
    """Return a digest of the source, of what it imports, of Numba's version and the machine."""
    import numba

    imported = [_content(name) for name in imports_of(source)]
    described = f"{source}{numba.__version__}{platform.processor()}{platform.machine()}"
    return hashlib.sha256(b"".join([described.encode(), *imported])).hexdigest()[:16]


def imports_of(source: str) -> list[str]:
    """Return the modules of this package that a source imports; it lists indirect imports too."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.module == __package__:
            found |= {f"{__package__}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(__package__):
            found.add(str(node.module))
    return sorted(found)


@cache
def _content(name: str) -> bytes:
    """Read a module's file, which may be in a zip, or byte code alone."""
    spec = find_spec(name)
    content: bytes = spec.loader.get_data(spec.origin)  # type: ignore[union-attr]
    return content


def _from_file(name: str, source: str) -> Any:
    """Run the source itself, and not Python's cached byte code, which is not checked."""
    folder, text = chosen(), f'"""Written by gru_any; safe to delete."""\nCACHE = True\n{source}'
    prepare(folder)
    if store(folder, name, text):
        print("gru_any: compiling (once for each kind of GRU)", file=sys.stderr)
    module = sys.modules[name] = ModuleType(name)  # where Numba looks for it
    module.__file__ = str(folder / f"{name}.py")
    exec(compile(text, module.__file__, "exec"), vars(module))
    return module


def discard_machine_code(name: str = "*") -> None:
    """Remove the machine code of one source, or of all, if the folder allows it."""
    with suppress(OSError, RuntimeError):  # as where there is no home
        discard(chosen(), name if name != "*" else "gru_any_*")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path of this thread, which replaces `path` at the end."""
    part = path.with_suffix(f".{os.getpid()}.{get_ident()}.part")
    yield part
    os.replace(part, path)


def _in_memory(name: str, source: str) -> Any:
    module = ModuleType(name)
    exec(source, vars(module))
    return module
