"""Data for training: sequences side by side, cut into the pieces of truncated back-propagation.

Everything here is NumPy on the host; `ahead` prepares and transfers the next piece while the
present one computes.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Sequences side by side, time first.

    x (T, B, ...) and target (T, B, ...); mask (T, B) of bool, True where a target counts, or None
    where all do; lengths (B,) of the sequences, or None where padding at the end does no harm.
    """

    x: Any
    target: Any
    mask: Any = None
    lengths: Any = None


class Piece(NamedTuple):
    """A part of a batch, for one gradient.

    first: the state begins anew; advance: after so many steps the next piece begins; counted:
    how many targets count.
    """

    batch: Batch
    first: bool
    advance: int
    counted: int


def cut(batch: Batch, tbptt: tuple[int, int] | None) -> Iterator[Piece]:
    """Cut a batch along time: every k1 steps a gradient, over the last k2 steps.

    In the terms of Williams and Peng (1990), BPTT(k2; k1). The loss counts the last k1 steps of a
    piece; those before let the gradient flow further back. tbptt None is one piece, uncut.
    """
    T = len(batch.x)
    k1, k2 = (max(T, 1), max(T, 1)) if tbptt is None else tbptt
    if not 1 <= k1 <= k2:
        raise ValueError(f"tbptt is {tbptt}, expected (k1, k2) with 1 <= k1 <= k2")
    for at in range(0, T, k1):
        start, stop = max(0, at + k1 - k2), min(at + k1, T)
        part = slice(start, stop)
        x, target = batch.x[part], batch.target[part]
        mask = None if batch.mask is None else batch.mask[part]
        if at > start:  # these steps have had their gradient
            mask = np.ones(target.shape[:2], bool) if mask is None else mask.copy()
            mask[: at - start] = False
        lengths = None if batch.lengths is None else np.clip(batch.lengths - start, 0, stop - start)
        count = int(np.prod(target.shape[:2])) if mask is None else int(mask.sum())
        advance = max(0, at + 2 * k1 - k2) - start
        yield Piece(Batch(x, target, mask, lengths), start == 0 and at == 0, advance, count)


def streams(data: np.ndarray, rows: int) -> Batch:
    """One long sequence (N, ...) as so many streams read side by side, each predicting its next.

    Raises
    ------
    ValueError
        The sequence is too short.

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any.data import streams
    >>> batch = streams(np.arange(9), 2)
    >>> batch.x.T.tolist(), batch.target.T.tolist()
    ([[0, 1, 2, 3], [4, 5, 6, 7]], [[1, 2, 3, 4], [5, 6, 7, 8]])
    """
    length = (len(data) - 1) // rows
    if length < 1:
        raise ValueError(f"{rows} rows are too many for a sequence of {len(data)}")

    def side_by_side(v: np.ndarray) -> np.ndarray:
        return np.swapaxes(v[: length * rows].reshape(rows, length, *v.shape[1:]), 0, 1)

    return Batch(side_by_side(data[:-1]), side_by_side(data[1:]))


def buckets(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """The numbers of the sequences in groups of `rows`, each of like length, so padding is small.

    Sequences without a step are left out.
    """
    order = [int(i) for i in np.argsort(np.asarray(lengths), kind="stable") if lengths[int(i)] > 0]
    return [order[i : i + rows] for i in range(0, len(order), rows)]


def waste(lengths: Sequence[int], groups: Iterable[Sequence[int]]) -> float:
    """The part of all padded steps that is padding, 0 to 1."""
    used = padded = 0
    for group in groups:
        used += sum(int(lengths[i]) for i in group)
        padded += len(group) * max(int(lengths[i]) for i in group)
    return 1 - used / max(padded, 1)


def side_by_side(sequences: Sequence[np.ndarray], dtype: Any = None) -> tuple[Any, Any]:
    """Sequences (T, ...) of several lengths -> (T, B, ...) with zeros at the end, mask (T, B)."""
    T = max(len(s) for s in sequences)
    x = np.zeros((T, len(sequences), *sequences[0].shape[1:]), dtype or sequences[0].dtype)
    mask = np.zeros(x.shape[:2], bool)
    for row, s in enumerate(sequences):
        x[: len(s), row] = s
        mask[: len(s), row] = True
    return x, mask


def ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, each made by another thread while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items, None)
        while (item := future.result()) is not None:
            future = pool.submit(next, items, None)
            yield item
