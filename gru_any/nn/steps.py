"""Which steps of a batch run, where its states start anew, and what y holds at skipped steps.

All of it is decided on the host, from lengths, a mask and resets.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .. import arguments
from ..backend import Backend, to_numpy
from ..typing import Array, HostArray, Lengths, Namespace, Shape


class Restarts(NamedTuple):
    """Where the states of a batch are reset, and to what."""

    cuts: tuple[Array, ...] | None  # of each direction, as of `Sweep`
    fresh: Array | None  # (L*D, B, 1) of bool: rows that are reset before their first step
    start: Array | None = None  # (L*D, B, H), the state that a reset sets; None: 0
    shared: bool = False  # whether the user gave one start for all rows


def flags(name: str, value: Array, shape: Shape, letters: str) -> HostArray:
    """Check booleans of this shape, and return them as a host array.

    Raises
    ------
    TypeError, ValueError
        They are not booleans, or not of this shape.
    """
    host = np.asarray(value) if isinstance(value, (list, tuple)) else to_numpy(value, name)
    if host.shape != shape:
        way = arguments.SWAPPED if host.shape == shape[::-1] else ""
        raise ValueError(f"{name} is {host.shape}, expected {letters} = {shape}{way}")
    if host.dtype != bool:
        raise TypeError(f"{name} has dtype {host.dtype}, expected booleans, such as {name} != 0")
    return host


def running(lengths: Lengths | None, mask: HostArray | None, T: int, B: int) -> HostArray | None:
    """Return which rows run which steps, (T, B) of bool; None where none is skipped."""
    alive = mask
    if lengths is not None:
        n = arguments.lengths(to_numpy(lengths, "lengths"), T, B)
        if isinstance(lengths, (list, tuple)) and any(isinstance(v, bool) for v in lengths):
            raise TypeError(f"lengths is {lengths!r}, expected integers")
        within = np.arange(T)[:, None] < n
        alive = within if alive is None else alive & within
    return None if alive is None or alive.all() else alive


def restarts(
    resets: HostArray,
    alive: HostArray | None,
    backend: Backend,
    directions: Sequence[bool],
    layers: int,
) -> Restarts:
    """Return where the states start anew before the steps of `resets`, (T, B) of bool.

    A reset begins an episode, in both directions: the one that reads from the end starts anew
    after it has read the episode's first step. A step that does not run has no reset. directions:
    for each, whether it reads from the end.
    """
    run = np.ones_like(resets) if alive is None else alive
    rows, steps = np.nonzero(run.T)  # the steps that run, row by row
    first = np.append(True, rows[1:] != rows[:-1])[: rows.size]  # of a row
    starts = resets[steps, rows]
    inner = starts & ~first
    cut = {True: inner, False: np.append(inner[1:], False)[: rows.size]}
    found = []
    for reverse in directions:
        found.append(np.zeros((*run.shape, 1), bool))
        found[-1][steps, rows, 0] = cut[reverse]
    fresh = np.zeros((layers, len(directions), run.shape[1], 1), bool)
    for d, reverse in enumerate(directions):
        fresh[:, d, rows[starts & first], 0] = not reverse
    fresh = fresh.reshape(layers * len(directions), run.shape[1], 1)
    return Restarts(
        tuple(backend.put(v, "bool") for v in found) if inner.any() else None,
        backend.put(fresh, "bool") if fresh.any() else None,
    )


# outputs that repeat -----------------------------------------------------------------------------


def repeated(xp: Namespace, y: Array, alive: Array, reverse: bool) -> Array:
    """Fill each skipped step of y (T, B, H) with the output before it; 0 before the first.

    alive: (T, B, 1). reverse: the steps were read from the last to the first.
    """
    last, found = xp.zeros_like(y[0, :, :]), []
    for t in _order(y, reverse):
        last = xp.where(alive[t, :, :], y[t, :, :], last)
        found.append(last)
    return xp.stack(found[::-1] if reverse else found)


def gathered(xp: Namespace, dy: Array, alive: Array, reverse: bool) -> Array:
    """Return the gradient of `repeated`: each step's own dy plus those of its repetitions."""
    zero = xp.zeros_like(dy[0, :, :])
    waiting, found = zero, []
    for t in _order(dy, not reverse):
        waiting, mask = waiting + dy[t, :, :], alive[t, :, :]
        found.append(xp.where(mask, waiting, zero))
        waiting = xp.where(mask, zero, waiting)
    return xp.stack(found if reverse else found[::-1])


def _order(v: Array, reverse: bool) -> Sequence[int]:
    return range(v.shape[0] - 1, -1, -1) if reverse else range(v.shape[0])
