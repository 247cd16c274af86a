"""tanh made of exp, which takes NumPy half the time where the processor lacks AVX-512.

Where exp overflows, 2 / inf is 0, as it should be. The tracer folds constants: of 0.5 + 0.5
tanh(0.5 v) remains 1 - 1 / (exp(v) + 1), which has no more operations.
"""

from functools import lru_cache
from typing import Any

from ..typing import Array, Namespace, Step


@lru_cache(maxsize=64)
def by_exp(step: Step) -> Step:
    """Return the step with tanh made of exp, for tracing; in float32 within 1.8e-7."""
    return lambda xp, *arguments: step(_ByExp(xp), *arguments)


class _ByExp:
    """The tracer's namespace, with another tanh."""

    def __init__(self, xp: Namespace) -> None:
        self._xp = xp

    def __getattr__(self, name: str) -> Any:
        return getattr(self._xp, name)

    def tanh(self, v: Array) -> Array:
        """1 - 2 / (exp(2 v) + 1)."""
        return 1.0 - 2.0 / (self._xp.exp(2.0 * v) + 1.0)
