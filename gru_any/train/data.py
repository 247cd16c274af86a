"""Data for training: padded batches, cut in time for truncated backpropagation.

Everything here is NumPy on the host; `ahead` prepares and transfers the next piece while the
current one is in use.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import EllipsisType
from typing import NamedTuple, TypeVar

import numpy as np

from .. import arguments
from ..backend import refuse_masked, to_numpy
from ..errors import ShapeError
from ..typing import Array, DType, HostArray, Shape

Item = TypeVar("Item")


class Batch(NamedTuple):
    """A batch of sequences, in NumPy arrays, lists or arrays of any library on the host.

    x, target : arrays (T, B, ...), or (B, T, ...) where batch_first is True
        For a model with a `Last`, target is (B, ...), one for each sequence.
    mask : array of bool or None
        Of the shape of the first two axes of x, or of the whole target: True where a target counts.
        None if all targets within the lengths count.
    lengths : B integers in 0..T or None
        Of the sequences; None if padding at the end does no harm.
    batch_first : bool or None
        None means the layout of the model, or (T, B, ...) where there is no model.
    resets : array of bool or None
        Of the shape of the first two axes of x: True where an episode begins, so that the states of
        the GRUs are set to 0 before that step, as in a call of a GRU.
    """

    x: Array
    target: Array
    mask: Array | None = None
    lengths: Array | None = None
    batch_first: bool | None = None
    resets: Array | None = None


class Piece(NamedTuple):
    """A part of a batch, for one gradient."""

    batch: Batch
    first: bool  # whether it begins with a state of zeros
    advance: int  # the number of steps after which the next piece begins
    counted: float  # how many targets count; a target that is masked in part counts in part


def arranged(
    batch: object, batch_first: bool | None = None, rank: int | None = None, each_step: bool = True
) -> Batch:
    """Return a batch as NumPy arrays of matching shapes, in the layout wanted.

    Parameters
    ----------
    batch : Batch, or a tuple or list of its fields, of which all but x and target may be missing
    batch_first : bool or None
        The layout wanted; a batch that states the other one is transposed. None keeps its layout.
    rank : int or None
        Of x: 2 for integers (T, B), 3 for (T, B, I).
    each_step : bool
        Whether there is a target for each step; otherwise target and mask are (B, ...).

    Raises
    ------
    ValueError, TypeError
        It is not a batch, or the shapes of its arrays do not match.
    """
    if not isinstance(batch, tuple | list) or not 2 <= len(batch) <= len(Batch._fields):
        raise TypeError(
            f"a batch is {type(batch).__name__}, expected a Batch or (x, target[, mask[, "
            "lengths]]); batches are a list of these"
        )
    x, target, mask, lengths, given, resets = Batch(*batch)
    x, target = _array("x", x), _array("target", target)
    if isinstance(given, np.ndarray | list):
        raise TypeError(
            "batch_first, the fifth of a batch, is an array; resets are the sixth: give "
            "Batch(x, target, resets=resets)"
        )
    given = None if given is None else arguments.flag("batch_first", given)
    wanted = bool(given) if batch_first is None else batch_first
    transpose = given is not None and given != wanted
    axes = "(B, T" if wanted != transpose else "(T, B"
    if x.ndim < 2 or rank not in (None, x.ndim):
        letters = {2: f"{axes}), indices of the Embedding", 3: f"{axes}, I)"}
        raise ShapeError(f"x is {x.shape}, expected {letters.get(rank or 0, axes + ', ...)')}")
    leading = x.shape[:2]  # of target and mask, where there is a target for each step
    if transpose:
        x = np.swapaxes(x, 0, 1)
    B, T = x.shape[:2] if wanted else x.shape[1::-1]
    if resets is not None:
        resets = _resets(resets, leading, axes)
        resets = resets.T if transpose else resets
    leading = leading if each_step else (B,)
    _check_target(target, leading, axes)
    if mask is not None:
        mask = _mask(mask, target.shape, leading)
    if transpose and each_step:
        target = np.swapaxes(target, 0, 1)
        mask = None if mask is None else np.swapaxes(mask, 0, 1)
    if lengths is not None:
        lengths = arguments.lengths(_array("lengths", lengths), T, B)
    if lengths is not None and mask is None and each_step:
        mask = np.arange(T)[:, None] < lengths
        mask = mask.T if wanted else mask
    return Batch(x, target, mask, lengths, wanted, resets)


def _check_target(target: HostArray, leading: Shape, axes: str) -> None:
    if target.shape[: len(leading)] == leading:
        return
    if len(leading) == 1:
        raise ShapeError(f"target is {target.shape}, expected (B, ...) with {leading}, one a row")
    raise ShapeError(
        f"target is {target.shape}, expected {axes}, ...) with {leading}, the first axes of x; for "
        "one target a sequence, put a Last after the GRU"
    )


def _resets(resets: Array, leading: Shape, axes: str) -> HostArray:
    array = _flags("resets", resets)
    if array.shape != leading:
        raise ShapeError(
            f"resets is {array.shape}, expected {axes}) = {leading}, the first axes of x"
        )
    return array


def _flags(name: str, value: Array) -> HostArray:
    array = _array(name, value)
    if array.dtype != bool:
        raise TypeError(f"{name} has dtype {array.dtype}, expected bool: {name} != 0")
    return array


def _mask(mask: Array, target: Shape, leading: Shape) -> HostArray:
    array = _flags("mask", mask)
    if array.shape not in (leading, target):
        raise ShapeError(
            f"mask is {array.shape}, expected {leading}, the first axes of target, or {target}, "
            "its whole shape"
        )
    return array


def whole(batch: Batch) -> Piece:
    """Return the batch as one piece, for a model with one result for each sequence."""
    count = counted(batch.target, batch.mask, 1)
    return Piece(batch, True, batch.x.shape[1 if batch.batch_first else 0], count)


def counted(target: HostArray, mask: HostArray | None, axes: int) -> float:
    """Return how many targets count, if each is an element of the first `axes` axes."""
    if mask is None:
        return float(math.prod(target.shape[:axes]))
    return float(mask.sum() / max(math.prod(mask.shape[axes:]), 1))


def _array(name: str, value: Array) -> HostArray:
    refuse_masked(f"{name} of a batch", value)
    try:
        array = to_numpy(value)
    except (TypeError, ValueError, RuntimeError) as e:
        raise TypeError(f"{name} of a batch is no array of numbers: {e}") from e
    if array.dtype.kind in "OUSMmc":
        raise TypeError(f"{name} of a batch has dtype {array.dtype}, expected real numbers")
    return array


def in_time(part: slice, batch_first: bool | None) -> tuple[slice | EllipsisType, ...]:
    """Return the index that selects these steps of an array."""
    return (slice(None), part, ...) if batch_first else (part, ...)


def cut(batch: Batch, tbptt: tuple[int, int] | None) -> Iterator[Piece]:
    """Cut a batch in time: one gradient every k1 steps, over the last k2 steps.

    This is BPTT(k2; k1) of Williams and Peng (1990). The loss counts the last k1 steps of a piece;
    the steps before them let the gradient flow further back. With tbptt None the batch is one
    piece. Time is the first axis, or the second where the batch says batch_first.
    """
    x, target, mask, lengths, batch_first, resets = arranged(batch)
    T = x.shape[1 if batch_first else 0]
    k1, k2 = pair(tbptt) or (max(T, 1), max(T, 1))
    for at in range(0, T, k1):
        start, stop = max(0, at + k1 - k2), min(at + k1, T)
        part = in_time(slice(start, stop), batch_first)
        counts = None if mask is None else mask[part]
        if at > start:  # the targets of the steps before `at` counted in an earlier piece
            shape = target[part].shape[:2]
            counts = np.ones(shape, bool) if counts is None else counts.copy()
            counts[in_time(slice(at - start), batch_first)] = False
        within = None if lengths is None else np.clip(lengths - start, 0, stop - start)
        advance = max(0, at + 2 * k1 - k2) - start
        begins = None if resets is None else resets[part]
        piece = Batch(x[part], target[part], counts, within, batch_first, begins)
        count = counted(piece.target, counts, 2)
        yield Piece(piece, start == 0 and at == 0, advance, count)


def pair(tbptt: Iterable[object] | None) -> tuple[int, int] | None:
    """Return (k1, k2) as integers with 1 <= k1 <= k2, or None; raise ValueError for all else."""
    if tbptt is None:
        return None
    try:
        k1, k2 = (arguments.size("k", k) for k in tbptt)
        if k1 <= k2:
            return k1, k2
    except (TypeError, ValueError):
        pass
    raise ValueError(f"tbptt is {tbptt!r}, expected (k1, k2) with 1 <= k1 <= k2, or None")


def streams(data: Array, rows: int, batch_first: bool = False) -> Batch:
    """Cut one long sequence into parallel streams; the target of each step is the next element.

    Parameters
    ----------
    data : array (N, ...)
    rows : int
        B, the number of streams.
    batch_first : bool
        Whether x and target are (B, T, ...) instead of (T, B, ...).

    Raises
    ------
    ValueError
        The sequence is too short.

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any.train.data import streams
    >>> batch = streams(np.arange(9), 2)
    >>> batch.x.T.tolist(), batch.target.T.tolist()
    ([[0, 1, 2, 3], [4, 5, 6, 7]], [[1, 2, 3, 4], [5, 6, 7, 8]])
    """
    data, rows = _array("data", data), arguments.size("rows", rows)
    batch_first = arguments.flag("batch_first", batch_first)
    length = (len(data) - 1) // rows
    if length < 1:
        raise ValueError(f"{rows} rows are too many for a sequence of {len(data)}")

    def split(v: HostArray) -> HostArray:
        v = v[: length * rows].reshape(rows, length, *v.shape[1:])
        return v if batch_first else np.swapaxes(v, 0, 1)

    return Batch(split(data[:-1]), split(data[1:]), batch_first=batch_first)


def buckets(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Group the indices of sequences of similar length, `rows` at a time, to keep padding small.

    Empty sequences are left out.
    """
    rows = arguments.size("rows", rows)
    order = [int(i) for i in np.argsort(np.asarray(lengths), kind="stable") if lengths[int(i)] > 0]
    return [order[i : i + rows] for i in range(0, len(order), rows)]


def waste(lengths: Sequence[int], groups: Iterable[Sequence[int]]) -> float:
    """Return the share of padding in all steps of the padded groups, 0 to 1."""
    used = padded = 0
    for group in groups:
        used += sum(int(lengths[i]) for i in group)
        padded += len(group) * max(int(lengths[i]) for i in group)
    return 1 - used / max(padded, 1)


def side_by_side(
    sequences: Sequence[Array], dtype: DType | None = None, batch_first: bool = False
) -> tuple[HostArray, HostArray]:
    """Pad sequences (T, ...) with zeros to (T, B, ...), and return that with its mask (T, B).

    With batch_first these are (B, T, ...) and (B, T). dtype None stands for one that holds the
    numbers of all sequences.

    Raises
    ------
    ValueError, TypeError
        There are no sequences, or their steps differ in shape; or dtype cannot hold their kind of
        numbers, as integers cannot hold fractions.
    """
    arrays = [_array("sequence", s) for s in sequences]
    shapes = {s.shape[1:] if s.ndim else None for s in arrays}
    if len(shapes) != 1 or None in shapes:
        raise ShapeError(
            f"the sequences are {[s.shape for s in arrays[:9]]}, expected one or more (T, ...) "
            "that differ in T alone"
        )
    common = np.result_type(*arrays)
    dtype = common if dtype is None else np.dtype(dtype)
    if not np.can_cast(common, dtype, "same_kind"):
        raise TypeError(f"dtype is {dtype}, which cannot hold sequences of {common}")
    rows = len(arrays), max(len(s) for s in arrays)
    x = np.zeros((*rows, *arrays[0].shape[1:]), dtype)
    mask = np.zeros(rows, bool)
    for row, s in enumerate(arrays):
        x[row, : len(s)], mask[row, : len(s)] = s, True
    if arguments.flag("batch_first", batch_first):
        return x, mask
    return np.swapaxes(x, 0, 1), np.swapaxes(mask, 0, 1)


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yield the same items, each made by another thread while the one before is in use.

    If no thread can be started, each is made when it is asked for.
    """
    with ThreadPoolExecutor(1) as pool:
        try:
            future = pool.submit(next, items, None)
        except RuntimeError:  # nothing of items has been used
            future = None
        while future and (item := future.result()) is not None:
            future = pool.submit(next, items, None)
            yield item
    if future is None:
        yield from items
