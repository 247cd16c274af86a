"""Training: the loop, its data, optimisers and schedules, and runs that can be resumed.

`fit` and `evaluate` are imported on first use, since what they need would double the time that
`import gru_any` takes.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loop import evaluate, fit

__all__ = ["evaluate", "fit"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
