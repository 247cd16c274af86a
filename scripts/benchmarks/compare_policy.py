"""One update of train_policy.py beside PyTorch's: updates per second.

    python scripts/benchmarks/compare_policy.py --threads 1

Both update the same policy on the same rollout: forward, loss, backward, clipping, Adam. This
library reads all episodes in one call with `resets`. `torch.nn.GRU` has no resets, so PyTorch loops
over the steps, with the state set to zero where an episode begins; the faster of `GRUCell` and of
`GRU` on sequences of one step is taken. Two processes, one for each library, take turns, and the
first turn is not counted. Both have the reset gate after the product, so they compute the same.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from compare_torch import ANSWER, Worker, turns
from contenders import threads_of
from on_torch import tensor, twin

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the scripts of the folder above

from ppo import Rollout, update

from gru_any import GRU, Adam, Chain, Linear

SIZE, CHOICES = 4, 4  # suits, which are observed and named
EPS, A, B, CLIP, RATE = 0.2, 0.5, 0.01, 1.0, 3e-3  # the defaults of train_policy.py


def policy(hidden: int, reset_after: bool = True, dtype: str = "float32") -> Chain:
    gru = GRU(SIZE, hidden, reset_after=reset_after, dtype=dtype, seed=0)
    return Chain(gru, Linear(hidden, CHOICES + 1, dtype=dtype, seed=1))


def rollout(T: int, N: int, H: int, episode: int, dtype: str = "float32") -> Rollout:
    """Return random numbers in the place of a rollout, with episodes of that mean length."""
    rng = np.random.default_rng(0)
    suits, actions = rng.integers(0, 4, (2, T, N))
    x, resets = np.eye(SIZE)[suits], rng.random((T, N)) < 1 / episode
    h0, (A, G) = rng.uniform(-1, 1, (1, N, H)), rng.standard_normal((2, T, N))
    logp = np.log(rng.uniform(0.15, 0.4, (T, N)))
    return Rollout(*(v.astype(dtype) if v.dtype.kind == "f" else v
                     for v in (x, resets, h0, actions, logp, A, G)))  # fmt: skip


# on PyTorch --------------------------------------------------------------------------------------


def loop(layers: Any, part: Rollout) -> Any:
    """Run the policy step by step: y (T, N, A + 1)."""
    import torch

    gru, linear = layers
    kept = (~part.resets[..., None]).to(part.x.dtype)
    h, found = part.h0[0], []
    for x_t, kept_t in zip(part.x, kept, strict=True):
        if isinstance(gru, torch.nn.GRUCell):
            h = gru(x_t, h * kept_t)
        else:
            h = gru(x_t[None], (h * kept_t)[None])[0][0]
        found.append(h)
    return linear(torch.stack(found))


def loss(y: Any, part: Rollout) -> Any:
    """Return the loss of `ppo.ppo_loss`, of which autograd finds the gradient."""
    import torch

    logp = torch.log_softmax(y[..., :-1], dim=-1)
    q = (logp.gather(-1, part.actions[..., None])[..., 0] - part.logp).exp()
    gain = torch.minimum(q * part.advantages, q.clamp(1 - EPS, 1 + EPS) * part.advantages)
    error, entropy = y[..., -1] - part.returns, -(logp.exp() * logp).sum(-1)
    return (-gain + A * error**2 / 2 - B * entropy).mean()


def cells(layers: Any) -> Any:
    """Return the layers with a `GRUCell` in the place of the `GRU`."""
    import torch

    gru, linear = copy.deepcopy(layers)
    cell = torch.nn.GRUCell(gru.input_size, gru.hidden_size, dtype=linear.weight.dtype)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in gru.state_dict().items()})
    return torch.nn.ModuleList([cell, linear])


def torch_update(layers: Any, part: Rollout) -> Callable[[], None]:
    """Return a function that makes an update."""
    import torch

    tensors = Rollout(*map(tensor, part))
    optimiser = torch.optim.Adam(layers.parameters(), RATE, fused=True)

    def call() -> None:
        optimiser.zero_grad()
        loss(loop(layers, tensors), tensors).backward()
        torch.nn.utils.clip_grad_norm_(layers.parameters(), CLIP)
        optimiser.step()

    return call


# side by side ------------------------------------------------------------------------------------


def work(library: str, args: argparse.Namespace) -> None:
    """Report the number of threads; then answer each number of updates with the seconds of one."""

    def seconds(call: Callable[[], Any], count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count

    model = policy(args.hidden, not args.reset_before)
    part = rollout(args.length, args.rows, args.hidden, args.episode)
    if library == "torch":
        layers = twin(model)
        calls = [torch_update(made, part) for made in (cells(layers), layers)]
        seconds(calls[0], 2), seconds(calls[1], 2)
        call = min(calls, key=lambda call: seconds(call, 5))
    else:
        optimiser = Adam(model.params, lr=RATE)

        def call() -> float:
            return update(model, optimiser, part, EPS, A, B, CLIP, part.actions.size)

    print(ANSWER + json.dumps(threads_of("torch" if library == "torch" else "numba")), flush=True)
    for line in sys.stdin:
        print(ANSWER + json.dumps(seconds(call, json.loads(line))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--length", type=int, default=64, help="T")
    add("--rows", type=int, default=16, help="environments of an update")
    add("--hidden", type=int, default=64, help="hidden size")
    add("--episode", type=int, default=51, help="mean length of an episode")
    add("--reset-before", action="store_true", help="this library's default GRU, as in the script")
    add("--rounds", type=int, default=7, help="turns of each")
    add("--updates", type=int, default=20, help="updates in a turn")
    add("--threads", type=int, help="of each; the environment's without")
    add("--worker", choices=["gru_any", "torch"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args)
        return
    libraries = ("gru_any", "torch")
    workers = [Worker(name, sys.argv[1:], args.threads, __file__) for name in libraries]
    print(f"T = {args.length}, B = {args.rows}, H = {args.hidden}, "
          f"threads: {workers[0].threads} and {workers[1].threads}")  # fmt: skip
    print(turns(workers, args.rounds, args.updates))
    for worker in workers:
        worker.process.communicate("")


if __name__ == "__main__":
    main()
