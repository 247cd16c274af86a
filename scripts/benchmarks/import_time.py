"""Time `import gru_any` beside `import numpy`, in new processes that take turns; print medians."""

import os
import statistics
import subprocess
import sys

ROUNDS = 30
TIMED = "import time; t = time.perf_counter(); import numpy{}; print(time.perf_counter() - t)"
# compiled once and kept, as for any installed package
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def seconds(more: str) -> float:
    command = [sys.executable, "-c", TIMED.format(more)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    return float(done.stdout)


def main() -> None:
    seconds(", gru_any")
    pairs = [(seconds(""), seconds(", gru_any")) for _ in range(ROUNDS)]
    numpy = statistics.median(a for a, _ in pairs)
    more = statistics.median(b - a for a, b in pairs)
    print(f"import numpy: {1e3 * numpy:.0f} ms; gru_any adds {1e3 * more:.1f} ms ({ROUNDS} pairs)")


if __name__ == "__main__":
    main()
