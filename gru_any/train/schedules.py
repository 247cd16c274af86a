"""Learning rates as functions of the step and of the validation losses so far.

schedule = warm_up(100, cosine(4e-3, 2000))
rate = schedule(step, losses)

Each function checks its arguments when it is called, and raises ValueError or TypeError.
"""

import math
from collections.abc import Callable, Sequence

from ..arguments import number, size

Schedule = Callable[..., float]


def constant(rate: float) -> Schedule:
    """Return a constant rate."""
    rate = number("rate", rate)
    return lambda step, losses=(): rate


def cosine(rate: float, steps: int, last: float = 0.0) -> Schedule:
    """Fall from `rate` to `last` along half a cosine (Loshchilov and Hutter 2017)."""
    rate, last, steps = number("rate", rate), number("last", last), size("steps", steps)

    def schedule(step: int, losses: Sequence[float] = ()) -> float:
        done = min(step / steps, 1.0)
        return last + (rate - last) * 0.5 * (1 + math.cos(math.pi * done))

    return schedule


def stepwise(rate: float, every: int, factor: float = 0.5) -> Schedule:
    """Multiply the rate by `factor` every so many steps."""
    rate, factor, every = number("rate", rate), number("factor", factor), size("every", every)
    return lambda step, losses=(): rate * factor ** (step // every)


def plateau(rate: float, patience: int, factor: float = 0.5, last: float = 0.0) -> Schedule:
    """Multiply the rate by `factor` when the loss has had no new minimum for too long.

    That is, after more than `patience` validations.
    """
    rate, last = number("rate", rate), number("last", last)
    patience, factor = size("patience", patience, 0), number("factor", factor, below=1)

    def schedule(step: int, losses: Sequence[float] = ()) -> float:
        now, best, since = rate, math.inf, 0
        for loss in losses:
            best, since = (loss, 0) if loss < best else (best, since + 1)
            if since > patience:
                now, since = max(now * factor, last), 0
        return now

    return schedule


def warm_up(steps: int, then: Schedule) -> Schedule:
    """Rise linearly over the first steps to the rate of `then`.

    Examples
    --------
    >>> from gru_any.train.schedules import constant, warm_up
    >>> rate = warm_up(4, constant(1.0))
    >>> [rate(step) for step in range(6)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """
    steps = size("steps", steps, 0)
    if not callable(then):
        raise TypeError(f"then is {then!r}, expected a schedule: constant({then!r})")
    return lambda step, losses=(): then(step, losses) * min(1.0, (step + 1) / max(steps, 1))
