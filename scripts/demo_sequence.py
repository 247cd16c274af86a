"""The smallest thing a GRU can learn: eight random vectors in, eight numbers out.

The first of 100 hidden units learns to output the targets below, one a step, by plain gradient
descent on the squared error. All parts are visible: the forward call, the loss, the backward pass.
"""

import argparse

import numpy as np

import gru_any
from gru_any import GRU, SGD

TARGETS = [-0.5, 1, 0.3, 0.6, 0.2, -0.1, 0.3, 0.8]
INPUT, HIDDEN, RATE, ITERATIONS = 50, 100, 0.01, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--backend", default="auto", help="numpy, cupy, auto, ... (auto)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--reset-after", action="store_true", help="PyTorch's variant")
    args = parser.parse_args()

    rng = np.random.default_rng(args.seed)
    gru = GRU(INPUT, HIDDEN, reset_after=args.reset_after, seed=args.seed, backend=args.backend)
    x = gru_any.asarray(rng.random((len(TARGETS), INPUT)), like=gru)
    target = np.array(TARGETS, dtype=np.float32)
    optimiser = SGD(gru.params, lr=RATE)
    print(gru)
    for iteration in range(args.iterations + 1):
        (y, _), pullback = gru.vjp(x)
        shown = gru_any.to_numpy(y)[:, 0]
        if iteration % 100 == 0:
            loss = float(np.sum((shown - target) ** 2))
            print(f"{iteration:5d}  loss {loss:.2e}  ", " ".join(f"{v:6.3f}" for v in shown))
        dy = np.zeros(y.shape, dtype=np.float32)
        dy[:, 0] = 2 * (shown - target)  # the gradient of the sum of squares
        grads, _, _ = pullback(gru_any.asarray(dy, like=gru))
        optimiser.step(gru.params, grads)
    print("         the targets  ", " ".join(f"{v:6.3f}" for v in TARGETS))


if __name__ == "__main__":
    main()
