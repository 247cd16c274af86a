"""Compare training with layer normalisation to PyTorch's way to it, a loop over steps.

    OMP_NUM_THREADS=1 python scripts/benchmarks/layer_norm.py

Both compute haste's formulas with the same weights in float32, forward and backward, in one thread,
in turns. Printed are the largest difference of the outputs and the median of the ratios.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.functional import layer_norm

from gru_any import GRU

T, B, I, H = 100, 32, 128, 256
ROUNDS = 7


def loop(p: dict[str, Any], x: Any) -> Any:
    """Return the outputs (T, B, H), step by step."""
    a = layer_norm(x @ p["weight_ih_l0"].T, (3 * H,), weight=p["gain_ih_l0"]) + p["bias_ih_l0"]
    h, found = torch.zeros(B, H), []
    for t in range(T):
        q = layer_norm(h @ p["weight_hh_l0"].T, (3 * H,), weight=p["gain_hh_l0"]) + p["bias_hh_l0"]
        (a_r, a_z, a_n), (q_r, q_z, q_n) = a[t].chunk(3, 1), q.chunk(3, 1)
        r, z = torch.sigmoid(a_r + q_r), torch.sigmoid(a_z + q_z)
        h = z * h + (1 - z) * torch.tanh(a_n + r * q_n)
        found.append(h)
    return torch.stack(found)


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Print the comparison."""
    torch.set_num_threads(1)
    gru: Any = GRU(I, H, reset_after=True, layer_norm=True, seed=0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((T, B, I), dtype="float32")
    dy = rng.standard_normal((T, B, H), dtype="float32")
    params = {name: torch.tensor(v, requires_grad=True) for name, v in gru.params.items()}
    inputs = torch.tensor(x, requires_grad=True)

    def ours() -> None:
        gru.vjp(x)[1](dy)

    def theirs() -> None:
        torch.autograd.grad(loop(params, inputs), [*params.values(), inputs], torch.from_numpy(dy))

    with torch.no_grad():
        print("largest difference", np.abs(gru(x)[0] - loop(params, inputs).numpy()).max())
    ours(), theirs()
    ratio = statistics.median(seconds(theirs) / seconds(ours) for _ in range(ROUNDS))
    print(f"PyTorch's loop takes {ratio:.2f} times as long")


if __name__ == "__main__":
    main()
