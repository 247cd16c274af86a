"""The share of a batch that one rank of a distributed run computes.

The rows of a batch are cut into consecutive parts, one a rank, of equal size up to one row. A rank
may have none. The gradient of the batch is the sum of the shares' gradients, each weighted by how
much counts in it; so is the loss.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ..backend import to_numpy
from ..nn.chain import Chain
from ..nn.gru import GRU
from ..nn.layers import Dropout, Last
from ..nn.masks import axes_of_rows
from ..typing import Array, HostArray, Loss, Rng
from .data import Batch, Piece, counted

REDUCTIONS = ("targets", "sequences")


class Share(NamedTuple):
    """The rows of a piece that one rank computes.

    rows : slice
    of : int
        B, the number of rows of the whole piece.
    weight : float
        How much of what counts in the whole piece counts in these rows, 0 to 1.
    whole : Batch
        The whole piece, on the host.
    """

    rows: slice
    of: int
    weight: float
    whole: Batch


def rows_of(rank: int, size: int, rows: int) -> slice:
    """Return the rows of a rank; the shares of all ranks differ by at most one row."""
    return slice(rank * rows // size, (rank + 1) * rows // size)


def take(
    piece: Piece, share: Callable[[int], slice], each_step: bool, reduction: str
) -> tuple[Piece, Share]:
    """Cut the rows of one rank out of a piece on the host; `counted` stays that of the whole.

    share : returns which of so many rows are this rank's
    """
    x, target, mask, lengths, batch_first, resets = whole = piece.batch
    axis = 0 if batch_first else 1
    B = x.shape[axis]
    rows = share(B)
    across = _along(rows, axis)
    per_target = across if each_step else _along(rows, 0)
    own = Batch(
        x[across],
        target[per_target],
        None if mask is None else mask[per_target],
        None if lengths is None else lengths[rows],
        batch_first,
        None if resets is None else resets[across],
    )
    counts = float(rows.stop - rows.start)
    if reduction == "targets":
        counts = counted(own.target, own.mask, 2 if each_step else 1)
    weight = counts / piece.counted if piece.counted else 0.0
    return piece._replace(batch=own), Share(rows, B, weight, whole)


def _along(rows: slice, axis: int) -> tuple[slice, ...]:
    return (slice(None),) * axis + (rows,)


UNKNOWN = -1  # axis


class SharedGenerator(np.random.Generator):
    """Draws random numbers for all rows of a piece, and returns those of a share.

    So the masks of dropout do not depend on the number of ranks, and all ranks' generators stay in
    the same state.
    """

    def __init__(self, rng: Rng, share: Share, model: Chain) -> None:
        super().__init__(rng.bit_generator)
        self._share, self._axes = share, _drawn_axes(model)

    def random(self, size: Any = None, *rest: Any, **named: Any) -> Any:
        """Return uniform numbers of this shape, in which the rows are those of the share."""
        rows, of = self._share.rows, self._share.of
        axis = next(self._axes, UNKNOWN)
        if axis is None:
            return super().random(size, *rest, **named)
        if axis == UNKNOWN or size[axis] != rows.stop - rows.start:
            raise RuntimeError(
                f"a layer draws random numbers of shape {size}, and how the ranks share them is "
                "not known: train this model without comm"
            )
        whole = (*size[:axis], of, *size[axis + 1 :])
        return super().random(whole, *rest, **named)[_along(rows, axis)]


def _drawn_axes(model: Chain) -> Iterator[int | None]:
    """Yield, for each mask that the layers draw, which axis of it holds the rows; None: no axis."""
    rows_first = model.batch_first
    for layer in model.layers:
        if isinstance(layer, Last):
            rows_first = True
        elif isinstance(layer, Dropout) and layer.p:
            yield 0 if rows_first else 1
        elif isinstance(layer, GRU):
            yield from axes_of_rows(layer)


def weighted(loss: Loss, share: Share, xp: Any) -> Loss:
    """Return the loss of a share as its part of the loss of the whole piece."""

    def part(y: Array, target: Array, mask: Array | None = None) -> tuple[Array, Array]:
        if not share.weight:
            nothing = xp.zeros_like(y)
            return xp.sum(nothing), nothing
        value, dy = loss(y, target, mask=mask)
        return value * share.weight, dy * share.weight

    return part


def misfit(model: Chain, loss: Loss, piece: Piece, share: Share, y: Array, axis: int) -> str:
    """Say why the shares' gradients would not add up to the gradient of the whole piece.

    The loss is computed once from random outputs, for the whole piece and for the share.

    Returns
    -------
    str
        Empty if they add up.
    """
    if not share.weight:
        return ""
    put, (_, target, mask, *_) = model.backend.put, share.whole
    shape = (*y.shape[:axis], share.of, *y.shape[axis + 1 :])
    dtype = "float64" if model.dtype == "float64" else "float32"
    outputs = np.random.default_rng(0).standard_normal(shape)
    cut = _along(share.rows, axis)
    _, whole = loss(put(outputs, dtype), put(target), mask=None if mask is None else put(mask))
    _, own = loss(put(outputs[cut], dtype), piece.batch.target, mask=piece.batch.mask)
    expected, found = to_numpy(whole)[cut], to_numpy(own) * share.weight
    scale = float(np.abs(expected).max(initial=0.0)) or 1.0
    if np.allclose(found, expected, rtol=0, atol=1e-4 * scale):
        return ""
    ratio = float(np.vdot(found, expected) / (np.vdot(found, found) or 1.0))
    return (
        "the loss of a batch is not the mean of its rows' losses, weighted by how many targets "
        f"count: the gradient of this rank's rows is {ratio:.4g} times what it must be. If it is a "
        'mean over sequences, say fit(..., reduction="sequences"); if it weighs classes, divide by '
        "the number of targets and not by the sum of their weights; else train without comm"
    )


def checksum(array: HostArray, start: int = 0) -> int:
    """Return the CRC-32 of an array's bytes, continued from another checksum."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, start)


def digest(batch: Batch, start: int = 0) -> int:
    """Return the CRC-32 of all arrays of a batch on the host."""
    for array in (*batch[:4], batch.resets):
        start = start if array is None else checksum(np.asarray(array), start)
    return start
