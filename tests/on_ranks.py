"""What test_distributed.py runs in every process of mpiexec: python on_ranks.py JOB FOLDER."""

import itertools
import json
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import safetensors.numpy

from gru_any import (
    GRU,
    SGD,
    Adam,
    AdamW,
    Chain,
    Dropout,
    Last,
    Linear,
    RMSprop,
    softmax_cross_entropy,
    squared_error,
    to_numpy,
)  # fmt: skip
from gru_any.checkpoint import NAMES
from gru_any.train import evaluate, fit, spread
from gru_any.train.data import Batch

WIDE = {"dtype": "float64"}


def chain(batch_first=False, last=False, seed=0, **more):
    """Dropout at all places, two layers, two directions where each sequence has one result."""
    home = {**WIDE, **more}
    gru = GRU(3, 5, 2, dropout=0.3, seed=seed, batch_first=batch_first, bidirectional=last, **home)
    head = [Last(**home)] if last else []
    return Chain(gru, *head, Dropout(0.4, **home), Linear(10 if last else 5, 4, seed=1, **home))


def ragged(epoch):
    """Batches of five rows, of one and of two, with lengths, a mask and resets."""
    rng = np.random.default_rng(epoch)
    for B in (5, 1, 2):
        lengths = rng.integers(0, 10, B)
        lengths[0] = 9
        mask = rng.random((9, B)) < 0.7
        x, target = rng.standard_normal((9, B, 3)), rng.integers(0, 4, (9, B))
        yield Batch(x, target, mask, lengths, resets=rng.random((9, B)) < 0.2)


def labelled(epoch):
    """One target a sequence, batch first; T is B too, so that axes could be mistaken."""
    rng = np.random.default_rng(epoch)
    for B in (5, 1):
        yield rng.standard_normal((B, 5, 3)), rng.integers(0, 4, B)


def rooted(y, target, mask=None):
    """A mean over sequences of different lengths, each with its own mean."""
    share = np.where(mask, 1.0, 0.0) / np.maximum(mask.sum(axis=0), 1) / mask.shape[1]
    error = (y - target) * share[..., None]
    return ((y - target) * error).sum(), 2 * error


def regression(epoch):
    for batch in ragged(epoch):
        yield batch._replace(target=np.ones((*batch.target.shape, 4)))


RECIPES = {
    "cut in time": lambda: (
        chain(), softmax_cross_entropy, ragged,
        {"tbptt": (3, 5), "accumulate": 2, "clip": 0.5, "average": 0.9},
    ),
    "one result": lambda: (
        chain(True, True), softmax_cross_entropy, labelled, {"clip": 1.0, "steps": 30}
    ),
    "of sequences": lambda: (
        chain(), rooted, regression, {"reduction": "sequences", "accumulate": 3, "steps": 20}
    ),
    "not on the host": lambda: (
        chain(backend="array_api_strict", device="device1"), softmax_cross_entropy, ragged,
        {"tbptt": (4, 4), "clip": 0.5, "steps": 5},
    ),
}  # fmt: skip
DEVICE = "gru_any.testing.fake_cuda.array"
MORE = {
    "on a device": lambda: (
        chain(backend=DEVICE), softmax_cross_entropy, ragged,
        {"tbptt": (4, 4), "clip": 0.5, "steps": 5},
    ),
}  # fmt: skip


def train(name, comm=None, **more):
    """A run of 100 steps or fewer; returns what it leaves."""
    model, loss, batches, given = {**RECIPES, **MORE}[name]()
    optimiser = Adam(model.params, lr=0.01)

    def valid():
        return evaluate(model, loss, list(batches(99)), comm=comm)

    given = {"steps": 100, "log_every": 10, "validate_every": 25, "bar": False, **given, **more}
    history = fit(model, loss, batches, optimiser, valid=valid, comm=comm, **given)
    numbers = [[r.get(k, 0.0) for k in ("step", "epoch", "loss", "norm", "valid")]
               for r in history.records]  # fmt: skip
    slots = {f"optimiser {k}": v for k, v in optimiser.state.items()}
    arrays = {k: to_numpy(v) for k, v in {**model.params, **slots}.items()}
    return {**arrays, "records": np.array(numbers), "best": np.array(history.best)}


def equal(comm, folder):
    """The runs of all recipes, and one that is stopped early and left in a folder."""
    compressed(comm, folder)
    for name in RECIPES:
        found = train(name, comm)
        if comm.rank == 0:
            np.savez(folder / f"{name}.npz", **found)
    for name in ("cut in time", "not on the host"):
        found = train(name, comm, shard=True)
        if comm.rank == 0:
            np.savez(folder / f"{name}, sharded.npz", **found)
    train("cut in time", comm, steps=47, out=folder / "stopped", save_every=20)


def compressed(comm, folder):
    """The sum of gradients that differ on the ranks, with one number that overflows."""
    from gru_any.backend import NUMPY
    from gru_any.train.distributed import ranks_of

    rng, found = np.random.default_rng(comm.rank), {}
    grads = {"a": rng.standard_normal((3, 5)), "b": rng.standard_normal(7) * 1e5}
    for dtype in (None, "float16", "bfloat16"):
        ranks = ranks_of(comm, NUMPY, dtype)
        for _ in range(2):
            given = {k: g.astype("float32") for k, g in grads.items()}
            ranks.start_sum({"b": given["b"]})
            sums, loss = ranks.sum(given, 1.0, (False, False))
            assert loss == comm.size
        found |= {f"{dtype} {k}": v.copy() for k, v in sums.items()}
    np.savez(folder / f"sums.{comm.rank}.npz", **found)


def resumed(comm, folder):
    """The stopped run goes on, and what else may not go on is told in the same words by all."""
    found = train("cut in time", comm, out=folder / "stopped", save_every=20)
    if comm.rank == 0:
        np.savez(folder / "resumed.npz", **found)
    sharded(comm, folder)
    told = {name: refused(attempt, comm, folder) for name, attempt in REFUSED.items()}
    (folder / f"told.{comm.rank}.json").write_text(json.dumps(told))


def on_device(comm, folder):
    """MPI that reads a device's memory, played: the emulated device is memory of the host."""
    from mpi4py import MPI

    from gru_any.testing.fake_cuda import array, memory

    sent = []

    def told(buffer):
        """The memory of an array, all writes to which the host must have waited for."""
        if isinstance(buffer, array.Array):
            stream = memory.current_stream()
            clocks = (memory.CLOCKS[who].get(stream, 0) for who in ("host", stream))
            assert len({*clocks}) == 1, "sent before it was there"
            sent.append(buffer.size)
            return buffer.host
        return buffer

    class Played(MPI.Intracomm):
        def Get_info(self):
            info = super().Get_info()
            info.Set("mpi_memory_alloc_kinds", "mpi,system,cuda:device")
            return info

        def Iallreduce(self, place, buffer):
            return super().Iallreduce(place, told(buffer))

        def Ireduce_scatter_block(self, buffer, own):
            return super().Ireduce_scatter_block(told(buffer), told(own))

        def Iallgather(self, place, found):
            return super().Iallgather(place, told(found))

    for shard in (False, True):
        sent.clear()
        found = train("on a device", Played(comm), shard=shard)
        whole = sum(v.size for k, v in found.items() if not k.startswith(("opt", "rec", "best")))
        assert sum(sent) >= 5 * whole, "gradients went another way"
        if comm.rank == 0:
            np.savez(folder / f"device{shard}.npz", **found)


class Going:
    """Whether a sum is there; it is not before the third look."""

    def __init__(self, request, result, filled):
        self.request, self.result, self.filled, self.looks = request, result, filled, 0

    def __call__(self):
        self.looks += 1
        if self.request and self.looks > 2 and self.request.Test():
            self.filled[...], self.request = self.result, None
        return self.request is None


class Nccl:
    """NCCL as MPI plays it, in the memory behind addresses. A sum goes on after it is asked for.

    fault: what rank 1 does in place of its third operation; error: what the others hear of it
    """

    NCCL_FLOAT32, NCCL_FLOAT64, NCCL_SUM = "float32", "float64", "sum"

    def __init__(self, comm, fault=None, error=lambda: None):
        self.comm, self.fault, self.error = comm.Dup(), fault, error
        self.calls, self.sent, self.aborted = 0, 0, 0

    def get_unique_id(self):
        return b"here"

    def NcclCommunicator(self, size, meeting, rank):
        assert (size, meeting, rank) == (self.comm.size, b"here", self.comm.rank)
        return self

    def allReduce(self, sent, got, count, kind, op, stream):
        assert op == self.NCCL_SUM
        self._go(self.comm.Iallreduce, (sent, count), (got, count), kind, stream)

    def reduceScatter(self, sent, got, count, kind, op, stream):
        assert op == self.NCCL_SUM
        whole = sent, count * self.comm.size
        self._go(self.comm.Ireduce_scatter_block, whole, (got, count), kind, stream)

    def allGather(self, sent, got, count, kind, stream):
        assert sent == got + self.comm.rank * count * np.dtype(kind).itemsize
        whole = got, count * self.comm.size
        self._go(self.comm.Iallgather, (sent, count), whole, kind, stream)

    def _go(self, call, sent, got, kind, stream):
        from gru_any.testing.fake_cuda import memory

        assert stream == hash(memory.current_stream()) != 0
        self.calls, self.sent = self.calls + 1, self.sent + sent[1]
        if self.fault and self.calls == 3 and self.comm.rank == 1:
            self.fault()
        places = [memory.allocation_at(address) for address, _ in (sent, got)]
        given, filled = (
            np.frombuffer(place.bytes, kind, count, address - place.address)
            for place, (address, count) in zip(places, (sent, got), strict=True)
        )
        memory.access(places[:1], places[1:])
        sums = memory.PENDING.setdefault(memory.current_stream(), [])
        result = np.empty_like(filled)
        sums.append(Going(call(given.copy(), result), result, filled))

    def check_async_error(self):
        if words := self.error():
            raise RuntimeError(words)

    def abort(self):
        self.aborted += 1
        print("NCCL gives up", file=sys.stderr)


def play(comm, device=None, nccl=None, **given):
    """Let the emulated device have NCCL, and a name of its own on each rank."""
    from gru_any.testing.fake_cuda.ops import Ops

    nccl = nccl or Nccl(comm, **given)
    Ops.nccl, Ops.device = lambda self: nccl, lambda self: device or str(comm.rank)
    return nccl


def by_nccl(comm, folder):
    """The gradients are summed in the memory of devices, while the backward pass goes on."""
    from gru_any.testing.fake_cuda.memory import count
    from gru_any.train.exchange import Exchange

    start, waits = Exchange.start, []

    def counted(self, grads):
        before = count["waits"]
        start(self, grads)
        waits.append(count["waits"] - before)

    Exchange.start = counted
    for shard in (False, True):
        nccl = play(comm)
        found = train("on a device", comm, shard=shard)
        whole = sum(v.size for k, v in found.items() if not k.startswith(("opt", "rec", "best")))
        assert nccl.sent >= 5 * whole, "gradients went another way"
        assert nccl.aborted == 1
        if comm.rank == 0:
            np.savez(folder / f"nccl{shard}.npz", **found)
    assert len(waits) > 20
    assert not any(waits), "the host waited for the device"


class Broken(Nccl):
    """NCCL that fails on rank 1, or waits for ever, and lets the others wait for ever."""

    words = "NCCL_ERROR_SYSTEM_ERROR: unhandled system error"

    def NcclCommunicator(self, size, meeting, rank):
        if rank == 1 and self.words:
            raise RuntimeError(self.words)
        threading.Event().wait()


class Hanging(Broken):
    words = ""


def without_nccl(comm, folder):
    """It cannot be used, for one reason after the other; all ranks go on without it."""
    from gru_any.testing.fake_cuda.ops import Ops

    missing = Ops.nccl

    def attempt(name, **given):
        found = train("on a device", comm, **given)
        if comm.rank == 0:
            np.savez(folder / f"{name}.npz", **found)

    play(comm, device="0000:01:00.0")
    attempt("shared")
    play(comm)
    attempt("compressed", compress="bfloat16")
    if comm.rank == 1:
        Ops.nccl = missing
    attempt("missing")
    play(comm, nccl=Broken(comm))
    attempt("broken")
    os.environ["GRU_ANY_RANK_TIMEOUT"] = "1"
    play(comm, nccl=Hanging(comm))
    attempt("hanging")


def dying(comm, folder, how, error=None):
    """Rank 1 dies or hangs in the middle of a sum."""
    gone = folder / "gone"

    def fault():
        gone.touch()
        how()

    play(comm, fault=fault, error=lambda: gone.exists() and error)
    train("on a device", comm, out=folder / "out", save_every=1)


def killed_in_a_sum(comm, folder):
    dying(comm, folder, lambda: os.kill(os.getpid(), signal.SIGKILL))


def hanging_in_a_sum(comm, folder):
    dying(comm, folder, threading.Event().wait)


def lost_in_a_sum(comm, folder):
    dying(comm, folder, threading.Event().wait, "NCCL_ERROR_REMOTE_ERROR: remote process exited")


OPTIMISERS = {
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "RMSprop": lambda params: RMSprop(params, centered=True, momentum=0.5),
    "AdamW of a part": lambda params: AdamW(
        [{"params": {k: v for k, v in params.items() if "weight" in k}, "weight_decay": 0.1},
         {"params": {"1.bias": params["1.bias"]}, "lr": 0.1}],
        amsgrad=True,
    ),
}  # fmt: skip


def sharded(comm, folder):
    """Each optimiser, mixed precision, compressed gradients: trained in both ways, with files."""
    ways = {**{name: {} for name in OPTIMISERS}, "SGD mixed": {"mixed": "float16"}}
    ways["AdamW of a part, compressed"] = {"compress": "bfloat16"}
    found = {}
    for name, given in ways.items():
        make = next(make for start, make in OPTIMISERS.items() if name.startswith(start))
        here = [folder / f"{name}{shard}" for shard in (False, True)]
        ends = [
            one_way(comm, make, steps, out, {**given, "shard": bool(shard)})
            for shard, out in enumerate(here)
            for steps in ((3, 7) if name == "RMSprop" else (7,))
        ]
        files = [dict(safetensors.numpy.load_file(out / NAMES[0])) for out in here]
        found[name] = [equal_bits(ends[-1], ends[len(ends) // 2 - 1]), equal_bits(*files)]
    (folder / f"sharded.{comm.rank}.json").write_text(json.dumps(found))


def one_way(comm, make, steps, out, given):
    """The parameters and the optimiser at the end of a run, which may be one that goes on."""
    model = Chain(GRU(1, 5, seed=0), Linear(5, 1, seed=1))
    optimiser = make(model.params)
    rng = np.random.default_rng(0)
    data = [tuple(rng.standard_normal((2, 3, 4, 1)).astype("float32")) for _ in range(3)]
    given = {**given, "steps": steps, "accumulate": 2, "average": 0.5, "bar": False, "out": out}

    def rate(step, losses):
        kept.append(sum(slot.size for slot in optimiser.slots.values()))
        return 0.1

    kept = []
    fit(model, squared_error, lambda epoch: data, optimiser, schedule=rate, comm=comm, **given)
    whole = sum(slot.size for slot in optimiser.slots.values())
    assert max(kept[1:]) <= (whole + 3) // 2 if given["shard"] else min(kept) == whole, kept
    return {**model.params, **optimiser.state}


def equal_bits(one, other):
    return set(one) == set(other) and all(np.array_equal(one[k], other[k]) for k in one)


def refused(attempt, comm, folder):
    try:
        attempt(comm, folder)
    except (ValueError, OSError) as e:
        return f"{type(e).__name__}: {e}"
    return "nothing"


def small(comm, seed=0, batches=None, loss=squared_error, after=None, **given):
    """A run of a few steps."""
    model = Chain(GRU(1, 2, seed=seed), Linear(2, 1, seed=1))
    optimiser = Adam(model.params, lr=given.pop("lr", 0.01))
    counts = itertools.count(1)

    def data(epoch):
        if after is not None and next(counts) == 5:
            after(model)
        return [(np.ones((3, 4, 1), "float32") * (1 + epoch), np.ones((3, 4, 1), "float32"))]

    given = {"steps": 12, "log_every": 2, "bar": False, "seed": 0, **given}
    fit(model, loss, batches or data, optimiser, comm=comm, **given)


def of_rank(comm, *choices):
    return choices[comm.rank == 1]


def other_data(comm, epoch, late):
    wrong = comm.rank == 1 and epoch >= late
    return [(np.ones((3, 4, 1), "float32"), np.full((3, 4, 1), 1.0 + wrong, "float32"))]


def no_mean(y, target, mask=None):
    value, dy = squared_error(y, target, mask=mask)
    return value * y.size, dy * y.size


def spoil(comm):
    def change(model):
        if comm.rank == 1:
            model.params["1.bias"][0] += 1e-6

    return change


def full_disk(comm, folder):
    from gru_any.train import resume

    def fail(path, content):
        raise OSError(28, "No space left on device")

    real, resume.write_atomically = resume.write_atomically, fail
    try:
        small(comm, out=folder / "full", save_every=4)
    finally:
        resume.write_atomically = real


def other_version(comm, folder):
    from gru_any.train import run

    real = run.environment
    run.environment = lambda backend: {**real(backend), "numpy": of_rank(comm, "2.1.0", "2.0.0")}
    try:
        small(comm)
    finally:
        run.environment = real


REFUSED = {
    "version": other_version,
    "items": lambda comm, folder: spread(str, range(of_rank(comm, 2, 3)), comm),
    "settings": lambda comm, folder: small(comm, lr=of_rank(comm, 0.1, 0.2), clip=1.0),
    "seed": lambda comm, folder: small(comm, seed=of_rank(comm, 0, 7)),
    "dropout": lambda comm, folder: small(comm, seed=0, settings={"x": of_rank(comm, 1, 2)}),
    "data": lambda comm, folder: small(comm, batches=lambda e: other_data(comm, e, 0)),
    "late data": lambda comm, folder: small(comm, batches=lambda e: other_data(comm, e, 3)),
    "weights": lambda comm, folder: small(comm, after=spoil(comm)),
    "loss": lambda comm, folder: small(comm, loss=no_mean),
    "folder": lambda comm, folder: small(comm, out=folder / of_rank(comm, "a", "b")),
    "disk": full_disk,
    "shard": lambda comm, folder: small(comm, shard=comm.rank == 1),
}


def stopped(comm, folder, fault=lambda: os.kill(os.getpid(), signal.SIGSTOP)):
    """Rank 1 hangs after some steps."""

    def batches(epoch):
        if epoch == 30 and comm.rank == 1:
            fault()
        return [(np.ones((3, 4, 1), "float32"), np.ones((3, 4, 1), "float32"))]

    small(comm, batches=batches, steps=1000, out=folder / "out", save_every=5)


def killed(comm, folder):
    """A run that may be killed, and goes on when it is started again."""
    (folder / f"pid.{comm.rank}").write_text(str(os.getpid()))
    found = train("cut in time", comm, out=folder / "out", save_every=3)
    if comm.rank == 0:
        np.savez(folder / "end.npz", **found)


def failing(comm, folder):
    stopped(comm, folder, lambda: 1 / 0)


def late(comm, rank):
    """One rank ends before the others' common work, as with an error in a program of one's own."""
    if comm.rank != rank:
        small(comm)


def late0(comm, folder):
    late(comm, 0)


def late1(comm, folder):
    late(comm, 1)


def main():
    from gru_any.backend.cuda import nccl
    from gru_any.train import distributed, watch

    distributed.PATIENCE, watch.GRACE, nccl.GRACE = 0.5, 1.0, 1.0
    job, folder = globals()[sys.argv[1]], Path(sys.argv[2])
    job(distributed.world(), folder)


if __name__ == "__main__":
    main()
