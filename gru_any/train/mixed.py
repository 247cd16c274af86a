"""Mixed precision: storage in half precision, weights in float32, a loss scale that sets itself.

Half precision loses small numbers (float16 those below 6e-8). So dL/dy is multiplied by a scale
before it is stored, and the gradients are divided by it in float32 (Micikevicius et al. 2018). A
step whose gradient overflows changes nothing but the scale, which it halves; after GROWTH good ones
in a row the scale doubles. Scale and verdict live on the device, and nothing is read back.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .optim import Optimizer

START, GROWTH = 2.0**16, 2000.0


class Mixed:
    """A model with float32 weights, and its twin in half precision that does the work.

    scale, good : arrays without axes, of float32, on the device
        The loss scale, and how many good steps it has had.
    """

    def __init__(self, model: Any, dtype: str) -> None:
        if dtype not in ("float16", "bfloat16") or model.dtype != "float32":
            raise ValueError(
                f"mixed is {dtype!r} and the model {model.dtype}, expected float16 or bfloat16 and "
                'float32: model.to(dtype="float32")'
            )
        self.model, self.twin = model, model.to(dtype=dtype)
        self.put(START, 0.0)

    def put(self, scale: float, good: float) -> None:
        """Set the scale and its count, and give the twin the model's weights."""
        self.scale, self.good = (self.model.backend.put(np.float32(v)) for v in (scale, good))
        self._refresh()

    def gradient(
        self, loss: Callable[..., Any], y: Any, target: Any, mask: Any, pullback: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Return the loss in float32, and float32 gradients from the scaled backward pass."""
        xp = self.model.backend.xp
        value, dy = loss(xp.astype(y, xp.float32), target, mask=mask)
        grads, _, _ = pullback(xp.astype(dy * self.scale, y.dtype))
        return value, {name: xp.astype(g, xp.float32) / self.scale for name, g in grads.items()}

    def update(self, optimiser: Optimizer, grads: Any, norm: Any) -> Any:
        """Change the weights where the norm is finite, and the scale -> 1.0 where they were."""
        xp = self.model.backend.xp
        finite = xp.asarray(xp.isfinite(norm))  # NumPy would make it a scalar
        optimiser.step(self.model.params, grads, finite)
        good = (self.good + 1) * xp.astype(finite, xp.float32)
        grown = good >= GROWTH
        factor = xp.where(grown, 2 * self._one(), self._one())
        self.scale = self.scale * xp.where(finite, factor, self._one() / 2)
        self.good = xp.where(grown, 0 * good, good)
        self._refresh()
        return xp.astype(finite, xp.float32)

    def _one(self) -> Any:
        return self.model.backend.xp.ones_like(self.scale)

    def _refresh(self) -> None:
        xp, dtype = self.model.backend.xp, self.model.backend.dtype(self.twin.dtype)
        for name, w in self.model.params.items():
            self.twin.params[name] = xp.astype(w, dtype)
