"""A policy that remembers: a recurrent actor-critic learns memory tasks of popgym by PPO.

    python scripts/train_policy.py --task RepeatPreviousEasy

Each step shows the suit of a card. In RepeatPrevious the policy has to name the suit of some steps
before, and in RepeatFirst that of the first card of the episode (Morad et al. 2023). A GRU reads
the suits, and a linear layer gives the scores of the actions and the value of the state.

N environments run side by side. A rollout is T steps of each, the episodes one after the other in a
row; `resets` tells the GRU where they begin, so a whole rollout is one call. The next rollout goes
on from the state at its end. If the script is started again with the same folder, the run resumes
where it stopped.

    mpiexec -n 2 python scripts/train_policy.py --distributed

Each rank acts in its share of the environments, and the gradients of all are summed.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import training
from environments import TASKS, Environments, joined
from ppo import Rollout, gae, log_softmax, update
from tqdm import tqdm

import gru_any
from gru_any import GRU, Adam, Chain, Linear, to_numpy
from gru_any.backend import environment
from gru_any.checkpoint import describe
from gru_any.stream import Stream
from gru_any.train import distributed, resume
from gru_any.train.history import History, Log
from gru_any.train.lock import alone_in
from gru_any.train.loop import interrupts

# what may change when a run goes on
FREE = ("out", "steps", "quiet", "backend", "device", "distributed", "comm", "first")


class Run(NamedTuple):
    """All that changes while the policy learns."""

    stream: Stream  # of the model, which acts
    optimiser: Adam
    envs: Environments  # of this rank
    ranks: distributed.Alone
    interrupted: Callable[[], str]

    def wishes(self) -> distributed.Wishes:
        """Return whether Ctrl-C was pressed, and that the time is not over."""
        return bool(self.interrupted()), False


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with training.ranks(args):
        run(args)


def run(args: argparse.Namespace) -> None:
    model, out = build(args), Path(args.out)
    ranks = distributed.ranks_of(args.comm, model.backend, args.compress)
    if ranks.size > args.envs:
        sys.exit(
            f"--envs {args.envs} cannot be shared among {ranks.size} ranks: give at least as many"
        )
    with ranks.guard(), ExitStack() as stack:
        ranks.begin(out)
        ranks.lead(lambda: stack.enter_context(alone_in(out)))
        ranks.refuse_unshared(out)
        history = train(args, model, out, ranks, stack.enter_context(interrupts()))
    steps, returns = history.column("return")
    if not returns:
        sys.exit("no episode has ended: give more --steps")
    if not args.first:
        return
    last, best = returns[-1], max(returns)
    with training.picture(out / "return.png", (7, 4)) as axis:
        axis.plot(steps, returns)
        axis.set(xlabel="step", ylabel="mean return of an episode", title=args.task)
        axis.grid(alpha=0.3)
    training.write_result(args, history, {"last": last, "highest": best})
    print(f"{steps[-1]:,} steps in {training.seconds(history):.0f} s")
    print(f"mean return of the last episodes {last:.4f}, at its highest {best:.4f}")


def build(args: argparse.Namespace) -> Chain:
    """Return the GRU, and the layer of the scores and the value: (T, N, I) -> (T, N, A + 1)."""
    envs = Environments(args.task, range(1), 0)
    seeds, home = training.seeds(args, 2), training.home(args)
    return Chain(
        GRU(envs.size, args.hidden, seed=seeds[0], **home),
        Linear(args.hidden, envs.choices + 1, seed=seeds[1], **home),
    )


# acting ------------------------------------------------------------------------------------------


def collect(run: Run, rng: Any, args: argparse.Namespace) -> Rollout:
    """Act for T steps, each action drawn with its probability."""
    stream, envs, rows = run.stream, run.envs, run.ranks.rows(args.envs)
    put, h0, found = stream.model.backend.put, to_numpy(stream.state[0]), []
    for _ in range(args.length):
        x, begins = envs.look()
        y = to_numpy(stream.step(put(x), resets=begins))  # (N, A + 1)
        logp = log_softmax(y[:, :-1])
        noise = rng.gumbel(size=(args.envs, envs.choices))[rows]  # the same however many ranks
        actions = (logp + noise).argmax(axis=1)
        chosen = np.take_along_axis(logp, actions[:, None], axis=1)[:, 0]
        found.append((x, begins, actions, chosen, y[:, -1], *envs.step(actions)))
    x, resets, actions, logp, values, rewards, done = map(np.stack, zip(*found, strict=True))
    following = to_numpy(stream.model(put(envs.look()[0][None]), stream.state)[0])[..., -1]
    advantages = gae(rewards, np.append(values, following, axis=0), done, args.gamma, args.trace)
    return Rollout(x, resets, h0, actions, logp, advantages, advantages + values)


# learning ----------------------------------------------------------------------------------------


def learn(run: Run, rollout: Rollout, rng: Any, args: argparse.Namespace) -> float:
    """Read a rollout `--epochs` times, in parts of whole rows; return the mean loss."""
    ranks, model, rows = run.ranks, run.stream.model, run.ranks.rows(args.envs)
    A = np.concatenate(ranks.every(rollout.advantages), axis=1)
    scaled = (rollout.advantages - A.mean()) / (A.std() + 1e-8)
    rollout = rollout._replace(advantages=scaled)
    weights = args.ratio_clip, args.value_weight, args.entropy_weight, args.clip
    losses = []
    for _ in range(args.epochs):
        for part in np.array_split(rng.permutation(args.envs), args.parts):
            own = part[(part >= rows.start) & (part < rows.stop)] - rows.start
            losses.append(update(
                model, run.optimiser, Rollout(*(v[:, own] for v in rollout)), *weights,
                args.length * len(part), lambda grads, loss: ranks.sum(grads, loss, run.wishes()),
            ))  # fmt: skip
    run.stream.refresh()
    return float(np.mean(losses))


# the run -----------------------------------------------------------------------------------------


def train(
    args: argparse.Namespace,
    model: Chain,
    out: Path,
    ranks: distributed.Alone,
    interrupted: Callable[[], str],
) -> History:
    """Start a run in the folder, or resume the one that is there; save the weights at the end."""
    print(model)
    rows = ranks.rows(args.envs)
    envs = Environments(args.task, range(args.envs)[rows], args.seed)
    run = Run(Stream(model), Adam(model.params, lr=args.rate), envs, ranks, interrupted)
    state = np.zeros((1, rows.stop - rows.start, args.hidden), "float32")
    run.stream.state = [model.backend.put(state)]
    settings = {name: v for name, v in vars(args).items() if name not in FREE}
    ranks.refuse_differences("the ranks have different settings", settings)
    header = {"settings": settings, "environment": environment(model.backend), "rollouts": 0,
              "records": [], "description": describe(model), "closing": None,
              "best": None}  # fmt: skip
    if found := ranks.lead(resume.restore, out):
        kept, arrays = found
        resume.refuse_changes(kept["settings"], settings)
        resume.tell_differences(kept["environment"], header["environment"])
        restore(run, kept["count"], arrays, rows)
        header |= {"rollouts": kept["rollouts"], "records": kept["records"]}
        print(f"the run in {out} goes on after rollout {header['rollouts']}")
    log = Log(out / "log.jsonl" if args.first else None, header["records"])
    history = History(log.records, "done", None)
    start = time.monotonic() - training.seconds(history)
    size, first = args.length * args.envs, header["rollouts"]
    last = -(-args.steps // size)
    hidden = args.quiet or not args.first
    bar = tqdm(total=last * size, initial=first * size, unit="step", disable=hidden)
    for number in range(first + 1, last + 1):
        rng = np.random.default_rng([args.seed, number])
        loss = learn(run, collect(run, rng, args), rng, args)
        bar.update(size)
        if number % args.log_every == 0 or number == last:
            record = {"step": number * size, "loss": loss, "seconds": time.monotonic() - start}
            if returns := [r for each in ranks.every(run.envs.finished) for r in each]:
                record["return"] = math.fsum(returns) / len(returns)
                bar.set_postfix({"return": f"{record['return']:.3f}"}, refresh=False)
                run.envs.finished.clear()
            log.write(record)
            save(run, out, {**header, "rollouts": number, "records": log.records})
        if number < last and ranks.wishes(run.wishes())[0]:
            sys.exit("interrupted; the same command goes on from the last checkpoint")
    bar.close()
    if args.first:
        gru_any.save(out / "model.safetensors", model)
    return history


def save(run: Run, out: Path, header: dict[str, Any]) -> None:
    """Write a checkpoint; random numbers follow from the seed and the rollout's number."""
    slots = run.optimiser.state
    header = {**header, "count": slots.pop("count")}
    envs, states = zip(
        *run.ranks.every((run.envs.saved(), to_numpy(run.stream.state[0]))), strict=True
    )
    groups = {"weights": run.stream.model.params, "optimiser": slots,
              "envs": joined(envs), "state": {"h": np.concatenate(states, axis=1)}}  # fmt: skip
    arrays = {f"{g}/{k}": to_numpy(v) for g, part in groups.items() for k, v in part.items()}
    run.ranks.lead(resume.store, out, header, arrays)


def restore(run: Run, count: int, arrays: dict[str, np.ndarray], rows: slice) -> None:
    """Take the arrays of a checkpoint; count: the steps of the optimiser; rows: of this rank."""
    put, groups = run.stream.model.backend.put, {}
    for name, array in arrays.items():
        group, _, key = name.partition("/")
        groups.setdefault(group, {})[key] = array[rows] if group == "envs" else array
    weights, slots = (
        {name: put(array) for name, array in groups[group].items()}
        for group in ("weights", "optimiser")
    )
    run.stream.model.load_params(weights)
    run.stream.refresh()
    run.stream.state = [put(groups["state"]["h"][:, rows])]
    run.optimiser.state = {"count": count, **slots}
    run.envs.restore(**groups["envs"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = training.parser(
        __doc__, out="out/policy", contents="checkpoints, log, weights, picture",
        seed="of weights, environments and actions", shard=False,
    )  # fmt: skip
    add, count = parser.add_argument, training.positive
    add("--task", choices=TASKS, default=TASKS[0], help="of popgym")
    add("--steps", type=count, default=1_500_000, help="of all environments together")
    add("--envs", type=count, default=64, help="N, environments side by side")
    add("--length", type=count, default=64, help="T, steps of a rollout")
    add("--hidden", type=count, default=64, help="hidden size")
    add("--rate", type=float, default=3e-3, help="learning rate of Adam")
    add("--epochs", type=count, default=4, help="readings of a rollout")
    add("--parts", type=count, default=4, help="updates of a reading")
    add("--gamma", type=float, default=0.99, help="discount")
    add("--trace", type=float, default=0.95, help="lambda of the advantages")
    add("--ratio-clip", type=float, default=0.2, help="eps of the loss")
    add("--value-weight", type=float, default=0.5, help="a of the loss")
    add("--entropy-weight", type=float, default=0.01, help="b of the loss")
    add("--log-every", type=count, default=10, help="rollouts to a record and a checkpoint")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
