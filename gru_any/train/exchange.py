"""The sums of gradients over all ranks, in flat buffers that are sent as they fill.

Each buffer is also cut into one share a rank, of equal size up to the last ones. Where the state of
the optimiser is sharded, a rank gets the sums of its shares alone (a reduce-scatter), updates these
parts of the parameters, and gets the others' parts back (an all-gather): stage 1 of ZeRO
(Rajbhandari et al. 2020).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..backend import Backend, to_numpy
from ..typing import Array, Arrays, HostArray, Shape
from .compress import Wire
from .watch import Watch

BUCKET = 2**20  # bytes of gradients in one message


class Bucket(NamedTuple):
    """A flat buffer for gradients that are sent together.

    parts : for each name, the view of the buffer with the shape of its gradient
    shares : for each name, where this rank's share of the flat gradient is
    own : this rank's share of the buffer
    counts : how many elements of the buffer are each rank's share
    wire : where the buffer is packed in half precision, or None
    """

    buffer: HostArray
    parts: dict[str, HostArray]
    shares: dict[str, slice]
    own: HostArray
    counts: list[int]
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
    """

    def __init__(
        self, watch: Watch, backend: Backend, compress: str | None, arrays: Arrays, sharded: bool
    ) -> None:
        self.names, self.sharded = tuple(arrays), sharded
        self._watch, self._comm, self._backend = watch, watch.comm, backend
        self._buckets = self._made(arrays, compress)
        self._dtypes = {name: array.dtype for name, array in arrays.items()}
        self._filled: set[str] = set()  # the gradients that are in the buffers
        self._requests: list[object] = []

    def start(self, grads: Arrays) -> None:
        """Begin to sum some of the gradients. A bucket is sent when all its gradients are there."""
        for bucket in self._buckets:
            for name in set(grads) & set(bucket.parts):
                bucket.parts[name][...] = to_numpy(grads[name])
                self._filled.add(name)
            if set(grads) & set(bucket.parts) and self._filled.issuperset(bucket.parts):
                self._requests.append(self._send(bucket))

    def finish(self, grads: Arrays, numbers: HostArray) -> dict[str, Array]:
        """Return the sums of gradients; `numbers` become their sums too.

        Those on the host are views of buffers that the next call overwrites.
        """
        self.start({name: grads[name] for name in grads if name not in self._filled})
        self._watch.wait([self._comm.Iallreduce(self._watch.in_place, numbers), *self._requests])
        self._filled, self._requests = set(), []
        self._add_compressed()
        if not self.sharded:
            return self._placed({k: v for b in self._buckets for k, v in b.parts.items()})
        return self._placed({k: v for b in self._buckets for k, v in _cut(b).items()})

    def share(self, arrays: Arrays) -> dict[str, Array]:
        """Return this rank's shares of arrays like the gradients, flat; views, if they can be."""
        rows = {name: rows for bucket in self._buckets for name, rows in bucket.shares.items()}
        flat = self._backend.xp.reshape
        return {name: flat(array, (-1,))[rows[name]] for name, array in arrays.items()}

    def gather(self, shares: Arrays) -> dict[str, Array]:
        """Return whole arrays from all ranks' shares of them.

        Those on the host are views of buffers that the next call overwrites.
        """
        for bucket in self._buckets:
            for name in set(shares) & set(bucket.parts):
                flat = bucket.parts[name].reshape(-1)
                flat[bucket.shares[name]] = to_numpy(shares[name])
        place = self._watch.in_place
        self._watch.wait(
            [self._comm.Iallgatherv(place, (b.buffer, b.counts)) for b in self._buckets]
        )
        found = {name: part for bucket in self._buckets for name, part in bucket.parts.items()}
        return self._placed({name: found[name] for name in shares})

    def _send(self, bucket: Bucket) -> object:
        if bucket.wire is not None:
            bucket.wire.pack()
            return self._comm.Ialltoall(bucket.wire.sent, bucket.wire.got)
        if self.sharded:
            return self._comm.Ireduce_scatter(bucket.buffer, bucket.own, bucket.counts)
        return self._comm.Iallreduce(self._watch.in_place, bucket.buffer)

    def _add_compressed(self) -> None:
        """Add the parts that this rank has got of each bucket, and exchange the sums."""
        wires = [(bucket, bucket.wire) for bucket in self._buckets if bucket.wire]
        if self.sharded:
            for bucket, wire in wires:
                bucket.own[...] = wire.share()[: bucket.own.size]
            return
        sums = [wire.add() for _, wire in wires]
        pairs = zip(sums, wires, strict=True)
        self._watch.wait([self._comm.Iallgather(part, wire.got) for part, (_, wire) in pairs])
        for _, wire in wires:
            wire.unpack()

    def _made(self, arrays: Arrays, compress: str | None) -> list[Bucket]:
        wide = any(to_numpy(array).dtype == np.float64 for array in arrays.values())
        dtype, size = np.dtype("float64" if wide else "float32"), self._comm.size
        buckets = []
        for shapes in _grouped(arrays, dtype.itemsize):
            buffer = np.empty(_elements(shapes.values()), dtype)
            ends = [int(end) for end in np.cumsum([math.prod(s) for s in shapes.values()])]
            flat = zip(shapes.items(), np.split(buffer, ends[:-1]), strict=True)
            parts = {name: part.reshape(shape) for (name, shape), part in flat}
            wire = Wire(buffer, size, compress) if compress else None
            cuts = [_share_of(rank, size, buffer.size) for rank in range(size)]
            cut = cuts[self._comm.rank]
            shares = {
                name: slice(*(min(max(edge - start, 0), part.size) for edge in cut))
                for (name, part), start in zip(parts.items(), [0, *ends], strict=False)
            }
            own = np.empty(cut[1] - cut[0] if self.sharded else 0, dtype)
            counts = [stop - start for start, stop in cuts]
            buckets.append(Bucket(buffer, parts, shares, own, counts, wire))
        return buckets

    def _placed(self, found: Mapping[str, HostArray]) -> dict[str, Array]:
        """Return arrays in the order, in the place and of the dtype of the gradients."""
        names = [name for name in self.names if name in found]
        if self._backend.host and all(found[name].dtype == self._dtypes[name] for name in names):
            return {name: found[name] for name in names}
        xp, put = self._backend.xp, self._backend.put
        return {name: xp.astype(put(found[name]), self._dtypes[name]) for name in names}


def _cut(bucket: Bucket) -> dict[str, HostArray]:
    """Return the parts of this rank's share of a buffer by name, each flat."""
    sizes = [rows.stop - rows.start for rows in bucket.shares.values()]
    ends: Any = np.cumsum(sizes)[:-1]
    return dict(zip(bucket.shares, np.split(bucket.own, ends), strict=True))


def _share_of(rank: int, size: int, elements: int) -> tuple[int, int]:
    """Return where the share of a rank begins and ends in a buffer, as in a `Wire`."""
    part = -(-elements // size)
    return min(rank * part, elements), min((rank + 1) * part, elements)


def _grouped(arrays: Arrays, itemsize: int) -> list[dict[str, Shape]]:
    """Return the names and shapes of each bucket, the last parameters first."""
    groups: list[dict[str, Shape]] = [{}]
    for name in reversed(list(arrays)):
        shape = tuple(arrays[name].shape)
        if groups[-1] and _elements([*groups[-1].values(), shape]) * itemsize > BUCKET:
            groups.append({})
        groups[-1][name] = shape
    return groups


def _elements(shapes: Iterable[Shape] | Sequence[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)
