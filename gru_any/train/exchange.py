"""The sums of gradients over all ranks, in flat buffers that are sent as they fill.

The buffers are on the host, or on the model's device where NCCL sums there or MPI reads its memory.
Each ends with zeros that make it divisible into equal shares, one a rank. Where the state of the
optimiser is sharded, a rank gets the sums of its shares alone (a reduce-scatter), updates these
parts of the parameters, and gets the others' parts back (an all-gather): stage 1 of ZeRO
(Rajbhandari et al. 2020).
"""

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..backend import NUMPY, Backend, plain_name, to_numpy
from ..backend.cuda.nccl import Communicator
from ..typing import Array, Arrays, HostArray, Shape
from .compress import Wire
from .watch import Watch

BUCKET = 2**20  # bytes of gradients in one message


class Bucket(NamedTuple):
    """A flat buffer for gradients that are sent together.

    parts : for each name, the view of the buffer with the shape of its gradient
    shares : for each name, where this rank's share of the flat gradient is
    own : this rank's share of the buffer
    wire : where the buffer is packed in half precision, or None
    """

    buffer: Array
    parts: dict[str, Array]
    shares: dict[str, slice]
    own: Array
    wire: Wire | None


class Exchange:
    """Sums gradients of fixed names, shapes and dtypes, whole or each rank its shares.

    Parameters
    ----------
    watch : Watch
    backend : Backend
        Of the model.
    compress : "float16", "bfloat16" or None
        What gradients are sent as.
    arrays : mapping
        Arrays like the gradients.
    sharded : bool
        Whether each rank gets the sums of its shares alone.
    on_device : bool
        Whether the buffers are in the memory of the device.
    nccl : Communicator, optional
        What sums there in place of MPI.
    """

    def __init__(
        self,
        watch: Watch,
        backend: Backend,
        compress: str | None,
        arrays: Arrays,
        sharded: bool = False,
        on_device: bool = False,
        nccl: Communicator | None = None,
    ) -> None:
        self.names, self.sharded, self._on_device = tuple(arrays), sharded, on_device
        self._home = backend if on_device else NUMPY  # of the buffers
        self._watch, self._comm, self._backend, self._nccl = watch, watch.comm, backend, nccl
        self._buckets = self._made(arrays, compress)
        self._dtypes = {name: array.dtype for name, array in arrays.items()}
        self._filled: set[str] = set()  # the gradients that are in the buffers
        self._requests: list[object] = []

    def start(self, grads: Arrays) -> None:
        """Begin to sum some of the gradients. A bucket is sent when all its gradients are there."""
        for bucket in self._buckets:
            for name in set(grads) & set(bucket.parts):
                bucket.parts[name][...] = self._brought(grads[name])
                self._filled.add(name)
            if set(grads) & set(bucket.parts) and self._filled.issuperset(bucket.parts):
                self._requests.append(self._send(bucket))

    def finish(self, grads: Arrays, numbers: HostArray) -> dict[str, Array]:
        """Return the sums of gradients; `numbers` become their sums too.

        They may be views of buffers that the next call overwrites.
        """
        self.start({name: grads[name] for name in grads if name not in self._filled})
        self._watch.wait([self._comm.Iallreduce(self._watch.in_place, numbers), *self._requests])
        self._filled, self._requests = set(), []
        self._add_compressed()
        if not self.sharded:
            return self._placed({k: v for b in self._buckets for k, v in b.parts.items()})
        return self._placed({k: v for b in self._buckets for k, v in _own_parts(b).items()})

    def share(self, arrays: Arrays) -> dict[str, Array]:
        """Return this rank's shares of arrays like the gradients, flat; views, if they can be."""
        rows = {name: rows for bucket in self._buckets for name, rows in bucket.shares.items()}
        flat = self._backend.xp.reshape
        return {name: flat(array, (-1,))[rows[name]] for name, array in arrays.items()}

    def gather(self, shares: Arrays) -> dict[str, Array]:
        """Return whole arrays from all ranks' shares of them.

        They may be views of buffers that the next call overwrites.
        """
        for bucket in self._buckets:
            for name in set(shares) & set(bucket.parts):
                flat = self._home.xp.reshape(bucket.parts[name], (-1,))
                flat[bucket.shares[name]] = self._brought(shares[name])
        self._watch.wait([self._gather(bucket.buffer) for bucket in self._buckets])
        found = {name: part for bucket in self._buckets for name, part in bucket.parts.items()}
        return self._placed({name: found[name] for name in shares})

    def _brought(self, array: Array) -> Array:
        """Return an array where the buffers are."""
        return array if self._on_device else to_numpy(array)

    def _wait_for_device(self) -> None:
        """Wait until what the device was asked for is in the buffers."""
        if self._on_device:
            self._backend.synchronize()

    def _send(self, bucket: Bucket) -> object:
        if self._nccl is not None:
            if self.sharded:
                return self._nccl.reduce_scatter(bucket.buffer, bucket.own)
            return self._nccl.all_reduce(bucket.buffer)
        self._wait_for_device()
        if bucket.wire is not None:
            bucket.wire.pack()
            return self._comm.Ialltoall(bucket.wire.sent, bucket.wire.got)
        if self.sharded:
            return self._comm.Ireduce_scatter_block(bucket.buffer, bucket.own)
        return self._comm.Iallreduce(self._watch.in_place, bucket.buffer)

    def _gather(self, buffer: Array) -> object:
        if self._nccl is not None:
            return self._nccl.all_gather(buffer)
        self._wait_for_device()
        return self._comm.Iallgather(self._watch.in_place, buffer)

    def _add_compressed(self) -> None:
        """Add the parts that this rank has got of each bucket, and exchange the sums."""
        wires = [(bucket, bucket.wire) for bucket in self._buckets if bucket.wire]
        if self.sharded:
            for bucket, wire in wires:
                bucket.own[...] = wire.share()
            return
        sums = [wire.add() for _, wire in wires]
        pairs = zip(sums, wires, strict=True)
        self._watch.wait([self._comm.Iallgather(part, wire.got) for part, (_, wire) in pairs])
        for _, wire in wires:
            wire.unpack()

    def _made(self, arrays: Arrays, compress: str | None) -> list[Bucket]:
        wide = any(plain_name(array.dtype) == "float64" for array in arrays.values())
        dtype, size, home = "float64" if wide else "float32", self._comm.size, self._home
        buckets = []
        for shapes in _grouped(arrays, np.dtype(dtype).itemsize):
            part = -(-_elements(shapes.values()) // size)  # equal ones, as NCCL wants them
            cut = self._comm.rank * part, (self._comm.rank + 1) * part
            buffer = home.zeros((part * size,), dtype)
            ends = [0, *np.cumsum([math.prod(shape) for shape in shapes.values()]).tolist()]
            ranges = dict(zip(shapes, pairwise(ends), strict=True))
            parts = {
                name: home.xp.reshape(buffer[start:stop], shapes[name])
                for name, (start, stop) in ranges.items()
            }
            shares = {
                name: slice(*(min(max(edge - start, 0), stop - start) for edge in cut))
                for name, (start, stop) in ranges.items()
            }
            own = home.zeros((part if self.sharded else 0,), dtype)
            wire = Wire(buffer, size, compress) if compress else None
            buckets.append(Bucket(buffer, parts, shares, own, wire))
        return buckets

    def _placed(self, found: Arrays) -> dict[str, Array]:
        """Return arrays in the order, in the place and of the dtype of the gradients."""
        names = [name for name in self.names if name in found]
        if self._home is self._backend:
            if all(found[name].dtype == self._dtypes[name] for name in names):
                return {name: found[name] for name in names}
        elif not self._on_device:
            found = {name: self._backend.put(found[name]) for name in names}
        return {name: self._backend.xp.astype(found[name], self._dtypes[name]) for name in names}


def _own_parts(bucket: Bucket) -> dict[str, Array]:
    """Return the parts of this rank's share of a buffer by name, each flat."""
    ends = [0, *np.cumsum([rows.stop - rows.start for rows in bucket.shares.values()]).tolist()]
    pairs = zip(bucket.shares, pairwise(ends), strict=True)
    return {name: bucket.own[start:stop] for name, (start, stop) in pairs}


def _grouped(arrays: Arrays, itemsize: int) -> list[dict[str, Shape]]:
    """Return the names and shapes of each bucket, the last parameters first."""
    groups: list[dict[str, Shape]] = [{}]
    for name in reversed(list(arrays)):
        shape = tuple(arrays[name].shape)
        if groups[-1] and _elements([*groups[-1].values(), shape]) * itemsize > BUCKET:
            groups.append({})
        groups[-1][name] = shape
    return groups


def _elements(shapes: Iterable[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)
