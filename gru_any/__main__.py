"""`python -m gru_any`: what is installed, which devices answer, and what `auto` would choose."""

import os
import platform
import sys
from importlib import metadata

from .backend import NUMPY, BackendError, path, select
from .backend.cuda.device import WHEELS, problem
from .backend.libraries import VARIABLE
from .version import __version__

OTHERS = ("numpy", "array-api-compat", "safetensors", "numba", "torch", "jax", "array-api-strict")


def main() -> int:
    """Print the report; return 1 if the backend chosen by the environment cannot be used."""
    print(f"gru_any {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in (*OTHERS, *WHEELS):
        try:
            print(f"  {name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    print("numpy: calls run {}, because {}".format(*path(NUMPY, 1)))
    why = problem()
    print(f"cupy: {why or 'a kernel and a matrix product ran on device 0'}")
    print(f"auto: {'numpy' if why else 'cupy'}, because {why or 'a CUDA device answers'}")
    chosen = os.environ.get(VARIABLE)
    print(f"{VARIABLE}: {chosen or 'not set, so backend=None means numpy'}")
    try:
        backend = select(None)
    except BackendError as e:
        print(f"backend=None: {e}")
        return 1
    print(f"backend=None: {backend.name} on {backend.device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
