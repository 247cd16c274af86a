"""What a training run asks of the processes that share it: `Alone` in one, `Ranks` on MPI.

Each rank has the whole model and the whole optimiser, reads every batch, and computes the gradient
of its share of the rows. The gradients are summed over all ranks, so that all make the same update.
"""

import os
import pickle
import secrets
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar, cast

import numpy as np

from ..backend import Backend, environment
from ..backend.cuda import nccl
from ..checkpoint import NAMES
from ..typing import Array, Arrays
from .exchange import Exchange
from .share import rows_of
from .watch import Watch

Result = TypeVar("Result")
Communicator: TypeAlias = Any  # of mpi4py
Wishes: TypeAlias = tuple[bool, bool]  # Ctrl-C was pressed; the time is over
PATIENCE = 10.0  # seconds in which a new file is seen on all machines
LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MV2_COMM_WORLD_SIZE",
             "SLURM_STEP_NUM_TASKS")  # fmt: skip
MISSING = 'distributed training needs mpi4py: pip install "gru-any[mpi]"'


def ranks_of(comm: Communicator | None, backend: Backend, compress: str | None = None) -> "Alone":
    """Return the ranks of a communicator; those of a run in one process if it is None.

    Raises
    ------
    TypeError
        It is no communicator of mpi4py.
    RuntimeError
        A launcher started several processes, of which each would train the same by itself.
    """
    if comm is None:
        if launched() > 1:
            raise RuntimeError(
                f"a launcher started {launched()} processes, and each would train the same: give "
                "comm=MPI.COMM_WORLD (from mpi4py; --distributed of the scripts) to share the "
                "work, or comm=MPI.COMM_SELF if each is to train something of its own"
            )
        return Alone()
    if not hasattr(comm, "Iallreduce"):
        raise TypeError(f"comm is {type(comm).__name__}, expected a communicator of mpi4py")
    world()
    return Ranks(comm, backend, compress) if comm.size > 1 else Alone()


def world() -> Communicator:
    """Return the communicator of all processes that a launcher started.

    Raises
    ------
    RuntimeError
        mpi4py is missing; or its MPI is not the launcher's, so that each process is alone.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as e:
        raise RuntimeError(f"{MISSING} ({e})") from e
    size, started = MPI.COMM_WORLD.size, launched()
    if size == 1 < started:
        library = MPI.Get_library_version().partition("\n")[0].strip("\0 ")
        raise RuntimeError(
            f"a launcher started {started} processes, but mpi4py's MPI ({library}) sees 1: use "
            "the mpiexec of that MPI, or build mpi4py for the launcher's"
        )
    return MPI.COMM_WORLD


def local_rank(comm: Communicator) -> int:
    """Return the number of this rank among those on the same machine."""
    from mpi4py import MPI

    here = comm.Split_type(MPI.COMM_TYPE_SHARED)
    rank = int(here.rank)
    here.Free()
    return rank


def launched() -> int:
    """Return how many processes an MPI launcher says that it started; 1 without a launcher."""
    counts = (os.environ.get(name, "") for name in LAUNCHERS)
    return max((int(count) for count in counts if count.isdecimal()), default=1)


class Alone:
    """The ranks of a run in one process: it is the first, and the only one.

    Attributes
    ----------
    rank, size : int
    sharded : bool
        Whether each rank updates its shares of the parameters alone.
    """

    rank, size, sharded = 0, 1, False

    @property
    def first(self) -> bool:
        """Return whether this is the rank that writes and prints."""
        return self.rank == 0

    def rows(self, of: int) -> slice:
        """Return which of the rows of a batch this rank computes."""
        return rows_of(self.rank, self.size, of)

    def lead(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Call a function on the first rank; return its result, or raise its error, on all."""
        return function(*arguments)

    def every(self, value: Result) -> list[Result]:
        """Return the values of all ranks, in order."""
        return [value]

    def wishes(self, own: Wishes) -> Wishes:
        """Return whether any rank was interrupted, and whether the first one's time is over."""
        return own

    def sum(
        self, grads: dict[str, Array], loss: Array, own: Wishes
    ) -> tuple[dict[str, Array], Array]:
        """Return the sums over all ranks of gradients and loss, and exchange the wishes."""
        return grads, loss

    def sum_whole(
        self, grads: dict[str, Array], loss: Array, own: Wishes
    ) -> tuple[dict[str, Array], Array]:
        """Return the sums of whole gradients, of which no update is made yet; see `sum`."""
        return grads, loss

    def start_sum(self, grads: Arrays) -> None:
        """Begin to sum some of the gradients that the next `sum` gets, during the backward pass."""

    def shard(self, params: Arrays) -> None:
        """From now on let each rank update its shares of these parameters alone."""

    def share(self, arrays: Arrays) -> dict[str, Array]:
        """Return this rank's shares of arrays like the parameters, each flat."""
        return dict(arrays)

    def gather(self, shares: Arrays) -> dict[str, Array]:
        """Return whole arrays; those on the host are views that the next call overwrites."""
        return dict(shares)

    def total(self, number: Array) -> Array:
        """Return the sum of a number over all ranks, if each has that of its shares."""
        return number

    def refuse_differences(self, what: str, items: Mapping[str, object]) -> None:
        """Raise ValueError on all ranks if their items differ; the text names items and ranks."""

    def refuse_unshared(self, folder: Path) -> None:
        """Raise ValueError on all ranks if one does not see this folder of the first one."""

    def begin(self, folder: Path | None) -> None:
        """Report the ranks, and remember in which folder checkpoints are written."""

    def guard(self) -> AbstractContextManager[object]:
        """End all ranks if one of them fails alone."""
        return nullcontext()


class Ranks(Alone):
    """The ranks of an MPI communicator, in processes of which any may die or hang.

    Parameters
    ----------
    comm : communicator of mpi4py
    backend : Backend
        Of the model.
    compress : "float16", "bfloat16" or None
        What gradients are sent as.
    """

    # of the run that this process is in, which may evaluate on ranks of its own; the newest first
    _checkpoints: ClassVar[list[Path]] = []

    def __init__(self, comm: Communicator, backend: Backend, compress: str | None) -> None:
        self._watch = Watch(comm, self._last_good)
        self._comm, self._backend = self._watch.comm, backend
        self.rank, self.size, self._compress = comm.rank, comm.size, compress
        self._agreed: Wishes | None = None
        self._on_device = not compress and _reads_device(comm, backend)
        self._nccl: nccl.Communicator | None = None
        self._exchange: Exchange | None = None

    def _last_good(self) -> str:
        for path in self._checkpoints:  # the newest is not there for a moment while it is replaced
            if path.exists():
                return f"the last good checkpoint is {path}"
        return "there is no checkpoint"

    def begin(self, folder: Path | None) -> None:
        """Report the ranks, and where they have more threads than cores; watch over them.

        Gradients are summed by NCCL from now on, if it can be used on all ranks.
        """
        Ranks._checkpoints = [] if folder is None else [folder / name for name in NAMES]
        self._watch.post_sentinel([str(path) for path in self._checkpoints])
        hosts = [host for host, _ in self._watch.places]
        own = (hosts[self.rank], _cores(), int(environment(self._backend)["threads"]))
        found = self.every(own)
        if (problem := self._use_nccl()) and self.first:
            warnings.warn(f"NCCL cannot sum gradients: {problem}", stacklevel=2)
        if not self.first:
            return
        where = "in device memory" if self._on_device else "on the host"
        print(
            f"gru_any: {self.size} ranks on {', '.join(dict.fromkeys(hosts))} share each batch; "
            f"gradients are summed {where}, by {'NCCL' if self._nccl else 'MPI'}",
            file=sys.stderr,
        )
        for host, cores, _ in dict.fromkeys(found):
            threads = [each for name, _, each in found if name == host]
            if sum(threads) > cores:
                warnings.warn(
                    f"{len(threads)} ranks with {sum(threads)} threads share the {cores} cores of "
                    f"{host}, so they are slower: start fewer, or set OMP_NUM_THREADS="
                    f"{max(1, cores // len(threads))}",
                    stacklevel=2,
                )

    def _use_nccl(self) -> str:
        """Let NCCL sum gradients if all ranks can; else say why not, if that was to be expected."""
        wanted = self._backend.cuda and not self._compress
        own = nccl.offer(self._backend, self.first) if wanted else None
        offers = [offer for offer in self.every(own) if offer is not None]
        if len(offers) < self.size:
            return ""
        if problem := nccl.obstacle(offers):
            return problem
        made = nccl.Communicator(self._backend, offers, self.rank, self._watch.seconds)
        while (states := set(self.every(made.state()))) in ({""}, {"", nccl.READY}):
            time.sleep(0.01)
        if states != {nccl.READY}:
            made.abort()
            return "; ".join(sorted(states - {"", nccl.READY}))
        self._nccl, self._on_device, self._watch.give_up = made, True, made.abort
        return ""

    def lead(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Call a function on the first rank; return its result, or raise its error, on all."""
        outcome: tuple[Any, Exception | None] = None, None
        if self.first:
            try:
                outcome = function(*arguments), None
            except Exception as e:
                outcome = None, e
            self._broadcast(_pickled(*outcome))
        else:
            outcome = pickle.loads(self._broadcast(b""))
        result, error = outcome
        if error is not None:
            raise error
        return cast(Result, result)

    def every(self, value: Result) -> list[Result]:
        """Return the values of all ranks, in order."""
        content = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = np.zeros(self.size, np.int64)
        self._wait(self._comm.Iallgather(np.array([len(content)], np.int64), sizes))
        found = np.empty(int(sizes.sum()), np.uint8)
        self._wait(self._comm.Iallgatherv(content, (found, sizes)))
        return [pickle.loads(part.tobytes()) for part in np.split(found, np.cumsum(sizes)[:-1])]

    def wishes(self, own: Wishes) -> Wishes:
        """Return the wishes exchanged in the last sum; before any sum, those of the first rank."""
        if self._agreed is None:
            self._agreed = self.lead(lambda: own)
        return self._agreed

    def sum(
        self, grads: dict[str, Array], loss: Array, own: Wishes
    ) -> tuple[dict[str, Array], Array]:
        """Return the sums over all ranks of gradients and loss, and exchange the wishes.

        The gradients are this rank's shares, if it has them. Those on the host are views of buffers
        that the next call overwrites.
        """
        exchange = self._exchange
        if exchange is None or exchange.names != tuple(grads):
            exchange = self._exchange = self._new(grads)
        return self._finished(exchange, grads, loss, own)

    def sum_whole(
        self, grads: dict[str, Array], loss: Array, own: Wishes
    ) -> tuple[dict[str, Array], Array]:
        """Return the sums of whole gradients, of which no update is made yet; see `sum`."""
        return self._finished(self._new(grads), grads, loss, own)

    def _new(self, grads: Arrays, sharded: bool = False) -> Exchange:
        where = self._backend, self._compress
        return Exchange(self._watch, *where, grads, sharded, self._on_device, self._nccl)

    def _finished(
        self, exchange: Exchange, grads: Arrays, loss: Array, own: Wishes
    ) -> tuple[dict[str, Array], Array]:
        numbers = np.array([float(loss), own[0], own[1] and self.first])
        sums = exchange.finish(grads, numbers)
        self._agreed = bool(numbers[1]), bool(numbers[2])
        return sums, float(numbers[0])

    def start_sum(self, grads: Arrays) -> None:
        """Begin to sum some of the gradients that the next `sum` gets, during the backward pass."""
        if self._exchange is not None:
            self._exchange.start(grads)

    def shard(self, params: Arrays) -> None:
        """From now on let each rank update its shares of these parameters alone."""
        self._exchange, self.sharded = self._new(params, sharded=True), True

    def share(self, arrays: Arrays) -> dict[str, Array]:
        """Return this rank's shares of arrays like the parameters, each flat."""
        return self._exchange.share(arrays) if self._exchange and self.sharded else dict(arrays)

    def gather(self, shares: Arrays) -> dict[str, Array]:
        """Return whole arrays; those on the host are views that the next call overwrites."""
        return self._exchange.gather(shares) if self._exchange and self.sharded else dict(shares)

    def total(self, number: Array) -> Array:
        """Return the sum of a number over all ranks, if each has that of its shares."""
        if not self.sharded:
            return number
        sums = np.array([float(number)])
        self._wait(self._comm.Iallreduce(self._watch.in_place, sums))
        return self._backend.xp.astype(self._backend.put(sums[0:1]), number.dtype)[0]

    def refuse_differences(self, what: str, items: Mapping[str, object]) -> None:
        """Raise ValueError on all ranks if their items differ; the text names items and ranks."""
        own = {name: zlib.crc32(repr(item).encode()) for name, item in items.items()}
        if len({tuple(sorted(sums.items())) for sums in self.every(own)}) == 1:
            return
        found = self.every(dict(items))
        names = list(dict.fromkeys(name for each in found for name in each))
        told = []
        for name in names:
            groups: dict[str, list[int]] = {}
            for rank, each in enumerate(found):
                groups.setdefault(repr(each.get(name)), []).append(rank)
            if len(groups) > 1:
                kinds = (f"{value} on {_ranks(ranks)}" for value, ranks in groups.items())
                told.append(f"{name} is {', '.join(kinds)}")
        raise ValueError(f"{what}: {'; '.join(told[:5])}{' ...' if told[5:] else ''}")

    def refuse_unshared(self, folder: Path) -> None:
        """Raise ValueError on all ranks if one does not see this folder of the first one."""

        def leave() -> str:
            name = f".shared.{secrets.token_hex(8)}"
            (folder / name).touch()
            return name

        token = folder / self.lead(leave)
        began = time.monotonic()
        while not (seen := token.exists()) and time.monotonic() - began < PATIENCE:
            time.sleep(0.1)
        blind = [rank for rank, there in enumerate(self.every(seen)) if not there]
        if self.first:
            token.unlink()
        if blind:
            names = ", ".join(self._watch.name(rank) for rank in blind)
            raise ValueError(
                f"out is {folder}, which is another folder for {names} than for "
                f"{self._watch.name(0)}: give an absolute path on a file system that all share"
            )

    def guard(self) -> AbstractContextManager[object]:
        """End all ranks if one of them fails alone."""
        return self._watch.guard()

    def _broadcast(self, content: bytes) -> bytes:
        size = np.array([len(content)], np.int64)
        self._wait(self._comm.Ibcast(size))
        buffer = np.frombuffer(content, np.uint8) if self.first else np.empty(size[0], np.uint8)
        self._wait(self._comm.Ibcast(buffer))
        return buffer.tobytes()

    def _wait(self, *requests: object) -> None:
        self._watch.wait(requests)


def _reads_device(comm: Communicator, backend: Backend) -> bool:
    """Whether MPI takes memory of the model's device, as MPI 4.1 lets it say."""
    if not backend.cuda:
        return False
    info = comm.Get_info()
    kinds = (info.get("mpi_memory_alloc_kinds") or "").split(",")
    info.Free()
    return any(kind.partition(":")[0] == "cuda" for kind in kinds)


def _cores() -> int:
    """Return on how many cores this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pickled(result: object, error: Exception | None) -> bytes:
    try:
        content = pickle.dumps((result, error))
        if error is not None:
            pickle.loads(content)
    except Exception:  # an error whose class cannot be made from its arguments
        content = pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
    return content


def _ranks(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
