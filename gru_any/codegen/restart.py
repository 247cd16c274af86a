"""Functions around a step after which a row's state may start anew.

A cut between two steps is a row of the batch whose state does not go on from one to the other:
the later step starts from 0, or from a given state. The step before it still has its own h', as
its output.
"""

from collections.abc import Sequence

from ..typing import Array, Namespace, Step


def restarted(step: Step, given: bool) -> Step:
    """Return the step with a last argument cut (B, 1): where it is true, the state starts anew.

    It starts from 0; with `given` from the argument before the cut, (B, H). The step's own h' comes
    last in what it saves.
    """

    def restarted_step(xp: Namespace, *arguments: Array) -> tuple[Array, tuple[Array, ...]]:
        *rest, cut = arguments
        start = rest.pop() if given else None
        new, saved = step(xp, *rest)
        start = xp.zeros_like(new) if start is None else start
        return xp.where(cut, start, new), (*saved, new)

    return restarted_step


def restarted_backward(
    xp: Namespace, dh: Array, further: Sequence[Array], given: bool
) -> tuple[Array, Sequence[Array], tuple[Array, ...]]:
    """Return dh with 0 at a cut, and the step's further arguments without those of the cut.

    The later step did not start from this step's state there. With `given`, the third result holds
    the gradient that was zeroed: it belongs to the given start.
    """
    *rest, cut = further
    zero = xp.zeros_like(dh)
    if not given:
        return xp.where(cut, zero, dh), rest, ()
    return xp.where(cut, zero, dh), rest[:-1], (xp.where(cut, dh, zero),)
