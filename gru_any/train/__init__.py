"""Training: the loop, its data, optimisers and schedules, and runs that can be resumed.

`fit`, `evaluate` and `spread` are imported on first use, since what they need would double the time
that `import gru_any` takes.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loop import evaluate, fit, spread

__all__ = ["evaluate", "fit", "spread"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
