"""Data for training: sequences side by side, cut into the pieces of truncated back-propagation.

Everything here is NumPy on the host; `ahead` prepares and transfers the next piece while the
present one computes.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from .. import arguments
from ..backend import refuse_masked, to_numpy
from ..errors import ShapeError


class Batch(NamedTuple):
    """Sequences side by side, in NumPy arrays, lists or arrays of any library on the host.

    x, target : arrays (T, B, ...), or (B, T, ...) where batch_first is True
        For a model with a `Last` target is (B, ...), one for each row.
    mask : array of bool or None
        Shaped as the first two axes of x, or as the whole target: True where a target counts. None
        where all do, up to each row's length.
    lengths : B integers in 0..T or None
        Of the sequences; None where padding at the end does no harm.
    batch_first : bool or None
        None: laid out as the model takes it, (T, B, ...) where there is no model.
    """

    x: Any
    target: Any
    mask: Any = None
    lengths: Any = None
    batch_first: bool | None = None


class Piece(NamedTuple):
    """A part of a batch, for one gradient.

    first: the state begins anew; advance: after so many steps the next piece begins; counted:
    how many steps of rows count, in part where a mask leaves out a part of a target.
    """

    batch: Batch
    first: bool
    advance: int
    counted: float


def arranged(
    batch: Any, batch_first: bool | None = None, rank: int | None = None, each_step: bool = True
) -> Batch:
    """Return a batch as NumPy arrays that fit each other, laid out with or without batch_first.

    Parameters
    ----------
    batch : Batch, or a tuple or list (x, target[, mask[, lengths]])
    batch_first : bool or None
        The layout wanted; a batch that names the other one is transposed. None keeps it.
    rank : int or None
        Of x: 2 for integers (T, B), 3 for (T, B, I).
    each_step : bool
        Whether there is a target for each step; else target and mask are (B, ...).

    Raises
    ------
    ValueError, TypeError
        It is no batch, or x, target, mask and lengths do not belong together.
    """
    if not isinstance(batch, tuple | list) or not 2 <= len(batch) <= len(Batch._fields):
        raise TypeError(
            f"a batch is {type(batch).__name__}, expected a Batch or (x, target[, mask[, lengths]])"
        )
    x, target, mask, lengths, named = Batch(*batch)
    x, target = _array("x", x), _array("target", target)
    named = None if named is None else arguments.flag("batch_first", named)
    wanted = bool(named) if batch_first is None else batch_first
    turned = named is not None and named != wanted
    axes = "(B, T" if wanted != turned else "(T, B"
    if x.ndim < 2 or rank not in (None, x.ndim):
        letters = {2: f"{axes}), indices of the Embedding", 3: f"{axes}, I)"}
        raise ShapeError(f"x is {x.shape}, expected {letters.get(rank or 0, axes + ', ...)')}")
    if turned:
        x = np.swapaxes(x, 0, 1)
    B, T = x.shape[:2] if wanted else x.shape[1::-1]
    given = x.shape[1::-1] if turned else x.shape[:2]
    _check_target(target, given if each_step else (B,), axes)
    if mask is not None:
        mask = _mask(mask, target.shape, given if each_step else (B,))
    if turned and each_step:
        target = np.swapaxes(target, 0, 1)
        mask = None if mask is None else np.swapaxes(mask, 0, 1)
    if lengths is not None:
        lengths = arguments.lengths(_array("lengths", lengths), T, B)
    if lengths is not None and mask is None and each_step:
        mask = np.arange(T)[:, None] < lengths
        mask = mask.T if wanted else mask
    return Batch(x, target, mask, lengths, wanted)


def _check_target(target: np.ndarray, leading: tuple[int, ...], axes: str) -> None:
    if target.shape[: len(leading)] == leading:
        return
    if len(leading) == 1:
        raise ShapeError(f"target is {target.shape}, expected (B, ...) with {leading}, one a row")
    raise ShapeError(
        f"target is {target.shape}, expected {axes}, ...) with {leading}, the first axes of x; for "
        "one target a sequence, put a Last after the GRU"
    )


def _mask(mask: Any, target: tuple[int, ...], leading: tuple[int, ...]) -> np.ndarray:
    array = _array("mask", mask)
    if array.dtype != bool:
        raise TypeError(f"mask has dtype {array.dtype}, expected bool: mask != 0")
    if array.shape not in (leading, target):
        raise ShapeError(
            f"mask is {array.shape}, expected {leading}, the first axes of target, or {target}, "
            "its whole shape"
        )
    return array


def whole(batch: Batch) -> Piece:
    """Return the batch in one piece, for a model with one result a row."""
    rows, mask = len(batch.target), batch.mask
    count = rows if mask is None else mask.sum() / max(math.prod(mask.shape[1:]), 1)
    return Piece(batch, True, batch.x.shape[1 if batch.batch_first else 0], float(count))


def _array(name: str, value: Any) -> np.ndarray:
    """The value as a NumPy array of numbers."""
    refuse_masked(f"{name} of a batch", value)
    try:
        array = to_numpy(value)
    except (TypeError, ValueError, RuntimeError) as e:
        raise TypeError(f"{name} of a batch is no array of numbers: {e}") from e
    if array.dtype.kind in "OUSMmc":
        raise TypeError(f"{name} of a batch has dtype {array.dtype}, expected real numbers")
    return array


def in_time(part: slice, batch_first: bool | None) -> tuple[Any, ...]:
    """The index of a part of the steps."""
    return (slice(None), part, ...) if batch_first else (part, ...)


def cut(batch: Batch, tbptt: tuple[int, int] | None) -> Iterator[Piece]:
    """Cut a batch along time: every k1 steps a gradient, over the last k2 steps.

    In the terms of Williams and Peng (1990), BPTT(k2; k1). The loss counts the last k1 steps of a
    piece; those before let the gradient flow further back. tbptt None is one piece, uncut. Time is
    the first axis, or the second where the batch says batch_first.
    """
    x, target, mask, lengths, batch_first = arranged(batch)
    T = x.shape[1 if batch_first else 0]
    k1, k2 = pair(tbptt) or (max(T, 1), max(T, 1))
    for at in range(0, T, k1):
        start, stop = max(0, at + k1 - k2), min(at + k1, T)
        part = in_time(slice(start, stop), batch_first)
        counts = None if mask is None else mask[part]
        if at > start:  # these steps have had their gradient
            shape = target[part].shape[:2]
            counts = np.ones(shape, bool) if counts is None else counts.copy()
            counts[in_time(slice(at - start), batch_first)] = False
        within = None if lengths is None else np.clip(lengths - start, 0, stop - start)
        size = math.prod(target[part].shape[:2])
        count = size if counts is None else counts.sum() / max(math.prod(counts.shape[2:]), 1)
        advance = max(0, at + 2 * k1 - k2) - start
        piece = Batch(x[part], target[part], counts, within, batch_first)
        yield Piece(piece, start == 0 and at == 0, advance, float(count))


def pair(tbptt: Any) -> tuple[int, int] | None:
    """Return (k1, k2) as integers with 1 <= k1 <= k2, or None.

    Raises
    ------
    ValueError
        It is something else.
    """
    if tbptt is None:
        return None
    try:
        k1, k2 = (arguments.size("k", k) for k in tbptt)
        if k1 <= k2:
            return k1, k2
    except (TypeError, ValueError):
        pass
    raise ValueError(f"tbptt is {tbptt!r}, expected (k1, k2) with 1 <= k1 <= k2, or None")


def streams(data: Any, rows: int, batch_first: bool = False) -> Batch:
    """One long sequence (N, ...) as so many streams read side by side, each predicting its next.

    Parameters
    ----------
    data : array (N, ...)
    rows : int
        B, so many streams.
    batch_first : bool
        x and target are (B, T, ...) in place of (T, B, ...).

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

    def laid_out(v: np.ndarray) -> np.ndarray:
        v = v[: length * rows].reshape(rows, length, *v.shape[1:])
        return v if batch_first else np.swapaxes(v, 0, 1)

    return Batch(laid_out(data[:-1]), laid_out(data[1:]), batch_first=batch_first)


def buckets(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """The numbers of the sequences in groups of `rows`, each of like length, so padding is small.

    Sequences without a step are left out.
    """
    rows = arguments.size("rows", rows)
    order = [int(i) for i in np.argsort(np.asarray(lengths), kind="stable") if lengths[int(i)] > 0]
    return [order[i : i + rows] for i in range(0, len(order), rows)]


def waste(lengths: Sequence[int], groups: Iterable[Sequence[int]]) -> float:
    """The part of all padded steps that is padding, 0 to 1."""
    used = padded = 0
    for group in groups:
        used += sum(int(lengths[i]) for i in group)
        padded += len(group) * max(int(lengths[i]) for i in group)
    return 1 - used / max(padded, 1)


def side_by_side(
    sequences: Sequence[Any], dtype: Any = None, batch_first: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences (T, ...) of several lengths -> (T, B, ...) with zeros at the end, mask (T, B).

    With batch_first (B, T, ...) and (B, T). dtype None is one that holds all sequences.

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
    whole = np.result_type(*arrays)
    dtype = whole if dtype is None else np.dtype(dtype)
    if not np.can_cast(whole, dtype, "same_kind"):
        raise TypeError(f"dtype is {dtype}, which cannot hold sequences of {whole}")
    rows = len(arrays), max(len(s) for s in arrays)
    x = np.zeros((*rows, *arrays[0].shape[1:]), dtype)
    mask = np.zeros(rows, bool)
    for row, s in enumerate(arrays):
        x[row, : len(s)], mask[row, : len(s)] = s, True
    if arguments.flag("batch_first", batch_first):
        return x, mask
    return np.swapaxes(x, 0, 1), np.swapaxes(mask, 0, 1)


def ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, each made by another thread while the one before is in use.

    Where no thread can start they are made as they are asked for.
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
