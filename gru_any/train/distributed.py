"""What a training run asks of the processes that share it: `Alone` in one, `Ranks` on MPI.

Each rank has the whole model and the whole optimiser, reads every batch, and computes the gradient
of its share of the rows. The gradients are summed over all ranks, so that all make the same update.
"""

import math
import os
import pickle
import secrets
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypeVar, cast

import numpy as np

from ..backend import Backend, environment, to_numpy
from ..checkpoint import NAMES
from ..typing import Array, Arrays, HostArray, Shape
from .compress import Wire
from .share import rows_of
from .watch import Watch

Result = TypeVar("Result")
Communicator: TypeAlias = Any  # of mpi4py
Wishes: TypeAlias = tuple[bool, bool]  # Ctrl-C was pressed; the time is over
BUCKET = 2**20  # bytes of gradients in one message
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


class Bucket(NamedTuple):
    """A flat buffer for gradients that are sent together.

    parts : for each name, the view of the buffer with the shape of its gradient
    wire : where the buffer is packed in half precision, or None
    """

    buffer: HostArray
    parts: dict[str, HostArray]
    wire: Wire | None


class Alone:
    """The ranks of a run in one process: it is the first, and the only one.

    Attributes
    ----------
    rank, size : int
    """

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
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

    def start_sum(self, grads: Arrays) -> None:
        """Begin to sum some of the gradients that the next `sum` gets, during the backward pass."""

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
        self._names: tuple[str, ...] = ()  # of the gradients for which there are buckets
        self._buckets: list[Bucket] = []
        self._filled: set[str] = set()  # the gradients that are in the buffers
        self._requests: list[object] = []

    def _last_good(self) -> str:
        for path in self._checkpoints:  # the newest is not there for a moment while it is replaced
            if path.exists():
                return f"the last good checkpoint is {path}"
        return "there is no checkpoint"

    def begin(self, folder: Path | None) -> None:
        """Report the ranks, and where they have more threads than cores; watch over them."""
        Ranks._checkpoints = [] if folder is None else [folder / name for name in NAMES]
        self._watch.post_sentinel([str(path) for path in self._checkpoints])
        hosts = [host for host, _ in self._watch.places]
        own = (hosts[self.rank], _cores(), int(environment(self._backend)["threads"]))
        found = self.every(own)
        if not self.first:
            return
        print(
            f"gru_any: {self.size} ranks on {', '.join(dict.fromkeys(hosts))} share each batch; "
            "gradients are summed on the host, by MPI",
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
        """Return what the ranks wished in the last sum, or before it the first one's wishes."""
        if self._agreed is None:
            self._agreed = self.lead(lambda: own)
        return self._agreed

    def sum(
        self, grads: dict[str, Array], loss: Array, own: Wishes
    ) -> tuple[dict[str, Array], Array]:
        """Return the sums over all ranks of gradients and loss, and exchange the wishes.

        The gradients on the host are views of buffers that the next call overwrites.
        """
        if self._names != tuple(grads):
            self._names, self._buckets = tuple(grads), self._new_buckets(grads)
        self.start_sum({name: grads[name] for name in grads if name not in self._filled})
        numbers = np.array([float(loss), own[0], own[1] and self.first])
        self._wait(self._comm.Iallreduce(self._watch.in_place, numbers), *self._requests)
        self._add_compressed()
        self._filled, self._requests = set(), []
        self._agreed = bool(numbers[1]), bool(numbers[2])
        return self._received(grads), float(numbers[0])

    def start_sum(self, grads: Arrays) -> None:
        """Begin to sum some of the gradients that the next `sum` gets, during the backward pass.

        A bucket is sent when all its gradients are there.
        """
        for bucket in self._buckets:
            for name in set(grads) & set(bucket.parts):
                bucket.parts[name][...] = to_numpy(grads[name])
                self._filled.add(name)
            if set(grads) & set(bucket.parts) and self._filled.issuperset(bucket.parts):
                self._requests.append(self._send(bucket))

    def _send(self, bucket: Bucket) -> object:
        if bucket.wire is None:
            return self._comm.Iallreduce(self._watch.in_place, bucket.buffer)
        bucket.wire.pack()
        return self._comm.Ialltoall(bucket.wire.sent, bucket.wire.got)

    def _add_compressed(self) -> None:
        """Add the parts that this rank has got of each bucket, and exchange the sums."""
        wires = [bucket.wire for bucket in self._buckets if bucket.wire]
        sums = [wire.add() for wire in wires]
        pairs = zip(sums, wires, strict=True)
        self._wait(*(self._comm.Iallgather(part, wire.got) for part, wire in pairs))
        for wire in wires:
            wire.unpack()

    def _new_buckets(self, grads: Arrays) -> list[Bucket]:
        wide = any(to_numpy(g).dtype == np.float64 for g in grads.values())
        dtype = np.dtype("float64" if wide else "float32")
        buckets = []
        for shapes in _grouped(grads, dtype.itemsize):
            buffer = np.empty(_elements(shapes.values()), dtype)
            ends = np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1]
            flat = zip(shapes.items(), np.split(buffer, ends), strict=True)
            parts = {name: part.reshape(shape) for (name, shape), part in flat}
            wire = Wire(buffer, self.size, self._compress) if self._compress else None
            buckets.append(Bucket(buffer, parts, wire))
        return buckets

    def _received(self, grads: Arrays) -> dict[str, Array]:
        """Return the gradients that are in the buffers, in the order and dtype of those given."""
        found = {name: part for bucket in self._buckets for name, part in bucket.parts.items()}
        if self._backend.host and all(found[k].dtype == g.dtype for k, g in grads.items()):
            return {name: found[name] for name in grads}
        xp, put = self._backend.xp, self._backend.put
        return {name: xp.astype(put(found[name]), g.dtype) for name, g in grads.items()}

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


def _grouped(grads: Arrays, itemsize: int) -> list[dict[str, Shape]]:
    """Return the names and shapes of each bucket, the last parameters first."""
    groups: list[dict[str, Shape]] = [{}]
    for name in reversed(list(grads)):
        shape = tuple(grads[name].shape)
        if groups[-1] and _elements([*groups[-1].values(), shape]) * itemsize > BUCKET:
            groups.append({})
        groups[-1][name] = shape
    return groups


def _elements(shapes: Iterable[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _ranks(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
