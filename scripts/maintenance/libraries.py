"""What runs where: a table of the array libraries that are installed here, made by running them.

    python scripts/maintenance/libraries.py

    python scripts/maintenance/libraries.py ndonnx    one of them

Of each library: whether a GRU of two layers gives the numbers of NumPy, forward and backward; which
way a call takes; the time of a forward call, T, B, I, H = 20, 8, 32, 64, beside NumPy's, the best
of up to five; and why it is not faster.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from gru_any import GRU
from gru_any.backend import BackendError, bridged, path

LIBRARIES = ("numpy", "torch", "jax.numpy", "dpnp", "dask.array", "ndonnx", "array_api_strict")


def agrees(library: str) -> bool:
    """Whether outputs and gradients are those of NumPy, with lengths and without."""
    options: dict[str, Any] = {"num_layers": 2, "reset_after": True, "seed": 0}
    ours, theirs = GRU(3, 4, **options), GRU(3, 4, backend=library, **options)
    x = np.random.default_rng(0).standard_normal((5, 2, 3)).astype("float32")
    back = theirs.backend.to_numpy
    found = []
    for lengths in (None, [5, 3]):
        (y, h), pullback = ours.vjp(x, lengths=lengths)
        (Y, H), other = theirs.vjp(theirs.backend.put(x), lengths=lengths)
        grads, dx, _ = pullback(y)
        Grads, dX, _ = other(Y)
        found += [(Y, y), (H, h), (dX, dx), *((Grads[name], grads[name]) for name in grads)]
    return all(np.allclose(back(a), b, atol=1e-5) for a, b in found)


def best(call: Callable[[], object]) -> float:
    """The shortest of up to five, in milliseconds."""
    times = []
    while len(times) < 6 and sum(times) < 5:  # the first compiles
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def row(library: str, base: float) -> list[str]:
    """One line of the table."""
    gru = GRU(32, 64, backend=library, seed=0)
    x, home = gru.backend.put(np.ones((20, 8, 32), "float32")), gru.backend
    ms = best(lambda: home.to_numpy(gru(x)[0]))
    way, why = path(home, 64)
    told = f"{way}, in place" if bridged(home, "float32") else str(way)
    same = "yes" if agrees(library) else "**NO**"
    return [library, str(home.device), same, told, f"{ms / base:.1f}" if base else "1.0", why]


def main() -> None:
    print("| library | device | the numbers of NumPy | runs | times as long | why not faster |")
    print("|---|---|---|---|---|---|")
    gru, x = GRU(32, 64, seed=0), np.ones((20, 8, 32), "float32")
    base = best(lambda: gru(x))
    for library in sys.argv[1:] or LIBRARIES:
        try:
            cells = row(library, base)
        except BackendError as e:
            cells = [library, "", "", "", "", f"not tried here: {e}"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
