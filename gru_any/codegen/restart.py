"""What a scan does around a step whose state may start anew after it.

A cut between two steps is a row of the batch whose state does not go on from one to the other:
the later step starts from 0. The step before it still has its own h', as its output.
"""

from ..typing import Array, Namespace, Step


def restarted(step: Step) -> Step:
    """Return the step with a last argument cut (B, 1): the state is 0 where it is true.

    The step's own h' comes last in what it saves.
    """

    def restarted_step(xp: Namespace, *arguments: Array) -> tuple[Array, tuple[Array, ...]]:
        *given, cut = arguments
        new, saved = step(xp, *given)
        return xp.where(cut, xp.zeros_like(new), new), (*saved, new)

    return restarted_step
