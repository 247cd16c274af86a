"""Data for training: sequences side by side, cut into the pieces of truncated back-propagation.

Everything here is NumPy on the host; `ahead` prepares and transfers the next piece while the
present one computes.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from . import arguments
from .backend import refuse_masked, to_numpy
from .errors import ShapeError


class Batch(NamedTuple):
    """Sequences side by side.

    Parameters
    ----------
    x : array (T, B, ...) or (B, T, ...)
    target : array (T, B, ...) or (B, T, ...); (B, ...) for a model with a `Last`
    mask : array of bool over the leading axes of target, or None
        True where a target counts. None: all count, up to each row's length.
    lengths : B integers in 0..T, or None
        None where padding at the end does no harm.
    batch_first : bool or None
        True where x, target and mask are (B, T, ...), False where they are (T, B, ...). None: as
        the model takes x; without a model (T, B, ...).
    """

    x: Any
    target: Any
    mask: Any = None
    lengths: Any = None
    batch_first: bool | None = None


class Piece(NamedTuple):
    """A part of a batch, for one gradient.

    first: the state begins anew; advance: after so many steps the next piece begins; counted:
    how many targets count.
    """

    batch: Batch
    first: bool
    advance: int
    counted: int


def arranged(item: Any, batch_first: bool | None, rank: int | None, each_step: bool) -> Batch:
    """Return a batch on the host, checked and laid out as a model takes it.

    Parameters
    ----------
    item : Batch, or a tuple or list (x, target[, mask[, lengths]])
        Such as a data loader of PyTorch gives.
    batch_first : bool or None
        The model's layout; None where it has no GRU.
    rank : int or None
        How many axes its x has, where that is known.
    each_step : bool
        Whether it has a result, and so a target, for each step; else one for each row.

    Raises
    ------
    TypeError, ValueError
        It is no batch; axes do not fit, mask is not of bool, or lengths are not 0..T.
    """
    batch = _batch(item)
    x, target = _host("x", batch.x), _host("target", batch.target)
    mask = None if batch.mask is None else _host("mask", batch.mask)
    named = batch.batch_first
    theirs = bool(batch_first) if named is None else arguments.flag("batch_first", named)
    letters = "(B, T" if theirs else "(T, B"
    if x.ndim < 2 or rank not in (None, x.ndim):
        more = {2: ")", 3: ", I)"}.get(rank or 0, ", ...)")
        raise ShapeError(f"x is {x.shape}, expected {letters}{more}: a batch has both axes")
    T, B = x.shape[1::-1] if theirs else x.shape[:2]
    leading, letters = (x.shape[:2], letters) if each_step else ((B,), "(B")
    _check_leading("target", target, leading, letters)
    if mask is not None:
        _check_leading("mask", mask, leading, letters)
        if mask.dtype != bool:
            raise TypeError(f"mask has dtype {mask.dtype}, expected bool: mask != 0, say")
    lengths = None if batch.lengths is None else _lengths(batch.lengths, T, B)
    if lengths is not None and mask is None and each_step:
        mask = np.arange(T)[:, None] < lengths
        mask = mask.T if theirs else mask
    ours = theirs if batch_first is None else batch_first
    if ours != theirs:
        x = np.swapaxes(x, 0, 1)
    if ours != theirs and each_step:
        target = np.swapaxes(target, 0, 1)
        mask = None if mask is None else np.swapaxes(mask, 0, 1)
    return Batch(x, target, mask, lengths, ours)


def _check_leading(name: str, v: np.ndarray, leading: tuple[int, ...], letters: str) -> None:
    if v.shape[: len(leading)] != leading:
        per_row = len(leading) == 2 and v.ndim < 3 and v.shape[:1] in (leading[:1], leading[1:])
        advice = ". For one target a row, put a Last after the GRU" if per_row else ""
        raise ShapeError(
            f"{name} is {v.shape}, expected {letters}, ...) beginning with {leading}, as x{advice}"
        )


def _batch(item: Any) -> Batch:
    if isinstance(item, Batch):
        return item
    if isinstance(item, (tuple, list)) and 2 <= len(item) <= 4:
        return Batch(*item)
    raise TypeError(
        f"a batch is a {type(item).__name__}, expected a Batch, or a tuple of 2 to 4 arrays: x, "
        "target, mask and lengths"
    )


def _host(name: str, array: Any) -> np.ndarray:
    refuse_masked(name, array)
    if isinstance(array, np.ndarray):
        return array
    if not hasattr(array, "shape"):
        raise TypeError(f"{name} is a {type(array).__name__}, expected an array: numpy.asarray")
    return to_numpy(array)


def _lengths(lengths: Any, T: int, B: int) -> np.ndarray:
    n = np.asarray(lengths) if isinstance(lengths, (list, tuple)) else _host("lengths", lengths)
    if n.shape != (B,):
        raise ShapeError(f"lengths is {n.shape}, expected (B,) = ({B},), one for each row of x")
    if n.dtype.kind not in "iu" and n.size:
        raise TypeError(f"lengths has dtype {n.dtype}, expected integers")
    if n.size and (n.min() < 0 or n.max() > T):
        raise ValueError(f"lengths holds {n.min()} to {n.max()}, expected 0 to T = {T}")
    return n.astype(np.int64)


def whole(batch: Batch) -> Piece:
    """Return the batch in one piece, for a model that gives one result for each row."""
    rows = len(batch.target) if batch.mask is None else int(batch.mask.sum())
    return Piece(batch, True, batch.x.shape[1 if batch.batch_first else 0], rows)


def cut(batch: Batch, tbptt: tuple[int, int] | None) -> Iterator[Piece]:
    """Cut a batch along time: every k1 steps a gradient, over the last k2 steps.

    In the terms of Williams and Peng (1990), BPTT(k2; k1). The loss counts the last k1 steps of a
    piece; those before let the gradient flow further back. tbptt None is one piece, uncut. Time is
    axis 1 where `batch.batch_first` is True, else axis 0.

    Raises
    ------
    ValueError, TypeError
        tbptt is no pair (k1, k2) with 1 <= k1 <= k2.
    """
    axis = 1 if batch.batch_first else 0
    T = batch.x.shape[axis]
    k1, k2 = (max(T, 1), max(T, 1)) if tbptt is None else reach(tbptt)
    for at in range(0, T, k1):
        start, stop = max(0, at + k1 - k2), min(at + k1, T)
        part: Any = (*[slice(None)] * axis, slice(start, stop))
        x, target = batch.x[part], batch.target[part]
        mask = None if batch.mask is None else batch.mask[part]
        if at > start:  # these steps have had their gradient
            mask = np.ones(target.shape[:2], bool) if mask is None else mask.copy()
            mask[(*part[:axis], slice(0, at - start))] = False
        lengths = batch.lengths
        if lengths is not None:
            lengths = np.clip(np.asarray(lengths) - start, 0, stop - start)
        count = int(np.prod(target.shape[:2])) if mask is None else int(mask.sum())
        advance = max(0, at + 2 * k1 - k2) - start
        cut_out = Batch(x, target, mask, lengths, batch.batch_first)
        yield Piece(cut_out, start == 0 and at == 0, advance, count)


def reach(tbptt: Any) -> tuple[int, int]:
    """Return (k1, k2) as Python's integers.

    Raises
    ------
    ValueError
        They are not two integers with 1 <= k1 <= k2.
    """
    wrong = ValueError(f"tbptt is {tbptt!r}, expected (k1, k2) with 1 <= k1 <= k2")
    if not isinstance(tbptt, (tuple, list)) or len(tbptt) != 2:
        raise wrong
    try:
        k1, k2 = (arguments.size("tbptt", k) for k in tbptt)
    except ValueError:
        raise wrong from None
    if k1 > k2:
        raise wrong
    return k1, k2


def streams(data: np.ndarray, rows: int, batch_first: bool = False) -> Batch:
    """One long array (N, ...) as so many streams read side by side, each predicting its next.

    The batch names its layout, (T, B, ...) or with `batch_first` (B, T, ...), so that a model of
    the other one takes it too.

    Raises
    ------
    ValueError, TypeError
        The sequence is too short, or no array.

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any.data import streams
    >>> batch = streams(np.arange(9), 2)
    >>> batch.x.T.tolist(), batch.target.T.tolist()
    ([[0, 1, 2, 3], [4, 5, 6, 7]], [[1, 2, 3, 4], [5, 6, 7, 8]])
    """
    data = _host("data", data)
    length = (len(data) - 1) // arguments.size("rows", rows)
    if length < 1:
        raise ValueError(f"{rows} rows are too many for a sequence of {len(data)}")

    def parts(v: np.ndarray) -> np.ndarray:
        rows_first = v[: length * rows].reshape(rows, length, *v.shape[1:])
        return rows_first if batch_first else np.swapaxes(rows_first, 0, 1)

    return Batch(parts(data[:-1]), parts(data[1:]), batch_first=batch_first)


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
    sequences: Sequence[np.ndarray], dtype: Any = None, batch_first: bool = False
) -> tuple[Any, Any]:
    """Pad sequences (T, ...) of several lengths with zeros at the end.

    Returns x (T, B, ...) and a mask (T, B), or with `batch_first` (B, T, ...) and (B, T). dtype is
    by default one that holds the numbers of all sequences.

    Raises
    ------
    ValueError, TypeError
        There is no sequence, they differ in more than T, or dtype cannot hold their kind of
        numbers, as integers cannot hold fractions.
    """
    arrays = [_host(f"sequences[{i}]", s) for i, s in enumerate(sequences)]
    if not arrays:
        raise ValueError("sequences is empty, expected at least one")
    dtype = np.result_type(*arrays) if dtype is None else np.dtype(dtype)
    for i, s in enumerate(arrays):
        if not s.ndim or s.shape[1:] != arrays[0].shape[1:]:
            wanted = ", ".join(["T", *map(str, arrays[0].shape[1:])])
            raise ShapeError(f"sequences[{i}] is {s.shape}, expected ({wanted}) as the first")
        if not np.can_cast(s.dtype, dtype, "same_kind"):
            raise TypeError(
                f"sequences[{i}] has dtype {s.dtype}, which {dtype} cannot hold: give dtype="
                f"{np.promote_types(s.dtype, dtype).name!r}"
            )
    T, B = max(len(s) for s in arrays), len(arrays)
    leading = (B, T) if arguments.flag("batch_first", batch_first) else (T, B)
    x = np.zeros((*leading, *arrays[0].shape[1:]), dtype)
    mask = np.zeros(leading, bool)
    for row, s in enumerate(arrays):
        at = (row, slice(len(s))) if batch_first else (slice(len(s)), row)
        x[at], mask[at] = s, True
    return x, mask


def ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, each made by another thread while the one before is in use.

    Where no thread can start, they are made in this one.
    """
    with ThreadPoolExecutor(1) as pool:
        try:
            future = pool.submit(next, items, None)
        except RuntimeError:  # no thread is to be had
            yield from items
            return
        while (item := future.result()) is not None:
            future = pool.submit(next, items, None)
            yield item
