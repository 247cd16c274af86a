"""Backward steps with a mistake in them, made from the lines of `gru_any/equations.py`.

The four mistakes of learners' derivations, all at once, and two controls; see docs/mistakes.md and
`mistakes.py`, which measures them.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from gru_any import GRU, equations
from gru_any.backend import modes as run


class Mistake(NamedTuple):
    """A wrong backward step: lines (right, wrong). U_r, U_z, U_n are the thirds of U."""

    name: str
    reset_after: bool
    lines: tuple[tuple[str, str], ...]


def mistakes(reset_after: bool, tanh: Any, reset: Any, state: Any, both: str) -> list[Mistake]:
    """Return the four, all at once, and the controls: no gradient to r, and its sign flipped.

    tanh, reset: (right, wrong); state: (right, wrong with 3, wrong with 4); both: with 3 and 4.
    """
    right, transpose, order = state
    gate, formula = reset[0].split(" = ")
    lines = {
        "1 tanh": (tanh,),
        "2 reset gate": (reset,),
        "3 transpose": ((right, transpose),),
        "4 order": ((right, order),),
        "all four": (tanh, reset, (right, both)),
        "da_r = 0": ((reset[0], f"{gate} = 0.0 * r"),),
        "da_r = -da_r": ((reset[0], f"{gate} = -{formula}"),),
    }
    return [Mistake(name, reset_after, changed) for name, changed in lines.items()]


TANH = (
    "da_n = f.candidate.backward(xp, g * (1.0 - z), n)",
    "da_n = g * (1.0 - z) * (1.0 - n) * (1.0 - n)",
)
BEFORE = mistakes(
    False,
    TANH,
    (
        "da_r = f.gate.backward(xp, ds * h, r)",
        "da_r = da_n * (h @ U_n.T + b_n) * r * (1.0 - r)",
    ),
    (
        "return g * z + ds * r + da[..., : 2 * H] @ U[: 2 * H, :], (da,)",
        "return g * z + (da_n @ U_n.T) * r + da_r @ U_r.T + da_z @ U_z.T, (da,)",
        "return g * z + (da_n * r) @ U_n + da_r @ U_r + da_z @ U_z, (da,)",
    ),
    "return g * z + (da_n * r) @ U_n.T + da_r @ U_r.T + da_z @ U_z.T, (da,)",
)
AFTER = mistakes(
    True,
    TANH,
    (
        "da_r = f.gate.backward(xp, da_n * m, r)",
        "da_r = (da_n @ U_n) * h * r * (1.0 - r)",
    ),
    (
        "return g * z + dq @ U, (da, dq)",
        "return g * z + (da_n * r) @ U_n.T + da_r @ U_r.T + da_z @ U_z.T, (da, dq)",
        "return g * z + (da_n @ U_n) * r + da_r @ U_r + da_z @ U_z, (da, dq)",
    ),
    "return g * z + (da_n @ U_n.T) * r + da_r @ U_r.T + da_z @ U_z.T, (da, dq)",
)


@contextmanager
def made(mistake: Mistake | None, gru: GRU) -> Iterator[None]:
    """Replace the equations by those with the mistake, inside the context."""
    if mistake is None:
        yield
        return
    name = "reset_after_backward" if mistake.reset_after else "reset_before_backward"
    right, way = getattr(equations, name), run.chosen
    text = inspect.getsource(right)
    for line, wrong in mistake.lines:
        assert text.count(line) == 1, f"{name} no longer holds {line}"
        text = text.replace(line, wrong)
    names = dict(vars(equations))
    exec(text, names)

    def backward(xp: Any, g: Any, h: Any, saved: Any, U: Any) -> Any:
        H, b = h.shape[-1], gru.params["bias_ih_l0"]
        names.update(U_r=U[:H, :], U_z=U[H : 2 * H, :], U_n=U[2 * H :, :], b_n=b[2 * H :])
        return names[name](xp, g, h, saved, U)

    setattr(equations, name, backward)
    run.chosen = "plain"  # one call a step, so that the names above are those of the call
    try:
        yield
    finally:
        setattr(equations, name, right)
        run.chosen = way
