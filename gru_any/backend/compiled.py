"""Written source as a module for Numba, which keeps machine code only of source in a file."""

import hashlib
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import Any


def compiled(source: str) -> Any:
    """Import the source from a file of the cache folder, where Numba keeps its machine code too."""
    import numba

    files = [Path(__file__).with_name(f"{name}.py") for name in ("tile", "barrier")]
    imported = "".join(file.read_text("utf-8") for file in files)
    key = f"{source}{imported}{numba.__version__}{platform.processor()}{platform.machine()}"
    name = "gru_any_" + hashlib.sha256(key.encode()).hexdigest()[:16]
    try:
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
    except (OSError, RuntimeError):  # no home, no space, or nothing may be written there
        return _in_memory(name, "CACHE = False\n" + source)


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
