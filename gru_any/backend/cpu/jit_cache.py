"""Written source as a module for Numba, which keeps machine code only of source in a file."""

import hashlib
import importlib.util
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import get_ident
from typing import Any

LIKELY = ("builtins", "llvmlite", "numba", "pickle", "_pickle", "gru_any")  # of its errors
_failures: list[str] = []  # why Numba is no longer used


class CompileError(RuntimeError):
    """Numba cannot compile here; the text says why."""


def problem() -> str:
    """Diagnose why Numba cannot be used here; "" where it can, as far as is known."""
    return _failures[0] if _failures else _import_problem()


def give_up(error: Exception) -> None:
    """Use Numba no more in this process, and say so once."""
    if not _failures:
        _failures.append(f"Numba cannot compile here ({_shown(error.__cause__ or error)})")
        warnings.warn(
            f"{_failures[0]}: calls run traced, which is slower", RuntimeWarning, stacklevel=2
        )


def rescued(error: Exception, again: Callable[[], Any], instead: Callable[[], Any]) -> Any:
    """Return what can be had after an error: instead(), if Numba may have raised it.

    Numba is then not asked again. An error of the cache folder is tried again first: what was
    compiled is in memory then.
    """
    if isinstance(error, OSError) and error.errno is not None:
        try:
            return again()
        except Exception as e:
            error = e
    if not may_be_numbas(error):
        raise error
    found = instead()  # raises where Numba was not to blame
    give_up(error)
    return found


def may_be_numbas(error: Exception) -> bool:
    """Whether Numba may have raised it, and not, say, a signal handler of the caller."""
    root = type(error).__module__.partition(".")[0]
    return root in LIKELY and not isinstance(error, (MemoryError, TimeoutError))


@cache
def trial() -> str:
    """Compile a function of one line: "" where that succeeds, else what went wrong."""
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
    name = ""
    try:
        name = f"gru_any_{_key(source)}"
        return _from_file(name, source)
    except Exception as e:  # no home, no space, a broken file: or Numba itself fails, as follows
        if not may_be_numbas(e):
            raise
        sys.modules.pop(name, None)
    try:
        return _in_memory(name, "CACHE = False\n" + source)
    except Exception as e:
        if not may_be_numbas(e):
            raise
        raise CompileError(_shown(e)) from e


def _key(source: str) -> str:
    """A name for what the source and all that it imports compile to on this machine."""
    import numba

    specs = [find_spec(f".{name}", __package__) for name in ("gemm", "barrier")]
    # the loader reads what there is: a file, one in a zip, or byte code alone
    imported = [spec.loader.get_data(spec.origin) for spec in specs]  # type: ignore[union-attr]
    told = f"{source}{numba.__version__}{platform.processor()}{platform.machine()}"
    return hashlib.sha256(b"".join([told.encode(), *imported])).hexdigest()[:16]


def _from_file(name: str, source: str) -> Any:
    path = _folder() / f"{name}.py"
    if not path.exists():
        print("gru_any: compiling (once for each kind of GRU)", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_text(
                f'"""Written by gru_any; safe to delete."""\nCACHE = True\n{source}', "utf-8"
            )
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # Numba looks it up
    spec.loader.exec_module(module)
    return module


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file of this thread's own, which takes the place of another once it is written."""
    part = path.with_suffix(f".{os.getpid()}.{get_ident()}.part")
    yield part
    os.replace(part, path)


def _in_memory(name: str, source: str) -> Any:
    from types import ModuleType

    module = ModuleType(name)
    exec(source, vars(module))
    return module


def _folder() -> Path:
    chosen = os.environ.get("GRU_ANY_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "gru_any"
