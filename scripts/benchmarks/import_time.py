"""Time imports and the first answer of a model in C, in new processes that take turns.

    python scripts/benchmarks/import_time.py

Medians from the start of a process to its end; the processor time says what it takes where nothing
else runs. The model is a GRU with reset after, H = I = 256.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROUNDS = 20
PROGRAMS = {
    "python alone": "",
    "import numpy": "import numpy",
    "import gru_any": "import numpy, gru_any",
    "gru_any.GRU": "import numpy, gru_any; gru_any.GRU",
    "C, first answer": "import sys, numpy; from gru_any.deploy import c; "
    "c.load(sys.argv[1]).step(numpy.ones((1, 256), 'float32'))",
}
# compiled once and kept, as for any installed package
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def seconds(code: str, library: str) -> tuple[float, float]:
    """Return the wall-clock and the processor seconds of a process."""
    start, before = time.perf_counter(), _computing()
    subprocess.run([sys.executable, "-c", code, library], check=True, env=ENVIRONMENT)
    return time.perf_counter() - start, _computing() - before


def _computing() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    from gru_any import GRU
    from gru_any.deploy import c

    with tempfile.TemporaryDirectory() as folder:
        library = os.path.join(folder, "gru.so")
        c.build(GRU(256, 256, reset_after=True, seed=0), library)
        for code in PROGRAMS.values():  # fills caches
            seconds(code, library)
        found = [[seconds(v, library) for v in PROGRAMS.values()] for _ in range(ROUNDS)]
    print(f"{'':16} elapsed, ms   processor time, ms   (medians of {ROUNDS})")
    for name, times in zip(PROGRAMS, zip(*found, strict=True), strict=True):
        elapsed, computing = (1e3 * statistics.median(t) for t in zip(*times, strict=True))
        print(f"{name:16} {elapsed:11.0f}   {computing:18.0f}")


if __name__ == "__main__":
    main()
