"""Mixed precision: storage in half precision, weights in float32, a dynamic loss scale.

Half precision loses small numbers (float16 those below 6e-8). So dL/dy is multiplied by a scale
before it is stored, and the gradients are divided by it in float32 (Micikevicius et al. 2018). A
step whose gradient overflows leaves the weights alone and halves the scale; after GROWTH finite
steps in a row the scale doubles. All of it stays on the device; nothing is read back.
"""

from collections.abc import Callable

import numpy as np

from ..nn.chain import Chain
from ..typing import Array, Arrays, Loss
from .optim import Optimizer
from .shard import Sharded

START, GROWTH = 2.0**16, 2000.0


class Mixed:
    """A model with float32 weights, and its twin in half precision that computes.

    scale, good : 0-d arrays of float32, on the device
        The loss scale, and how many steps in a row had finite gradients with it.
    """

    def __init__(self, model: Chain, dtype: str) -> None:
        if dtype not in ("float16", "bfloat16") or model.dtype != "float32":
            raise ValueError(
                f"mixed is {dtype!r} and the model {model.dtype}, expected float16 or bfloat16 and "
                'float32: model.to(dtype="float32")'
            )
        self.model, self.twin = model, model.to(dtype=dtype)
        self.put(START, 0.0)

    def put(self, scale: float, good: float) -> None:
        """Set the scale and its count, and copy the model's weights to the twin."""
        put = self.model.backend.put
        self.scale, self.good = (put(np.asarray(v, "float32")) for v in (scale, good))
        self._refresh()

    def gradient(
        self,
        loss: Loss,
        y: Array,
        target: Array,
        mask: Array | None,
        pullback: Callable[[Array], tuple[Arrays, Array, list[Array]]],
    ) -> tuple[Array, dict[str, Array]]:
        """Return the loss in float32, and float32 gradients from the scaled backward pass."""
        xp = self.model.backend.xp
        value, dy = loss(xp.astype(y, xp.float32), target, mask=mask)
        grads, _, _ = pullback(xp.astype(dy * self.scale, y.dtype))
        return value, {name: xp.astype(g, xp.float32) / self.scale for name, g in grads.items()}

    def update(self, optimiser: Optimizer | Sharded, grads: Arrays, norm: Array) -> Array:
        """Update the scale, and the weights if the norm is finite; return 1.0 if so, else 0.0."""
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

    def _one(self) -> Array:
        return self.model.backend.xp.ones_like(self.scale)

    def _refresh(self) -> None:
        xp, dtype = self.model.backend.xp, self.model.backend.dtype(self.twin.dtype)
        for name, w in self.model.params.items():
            self.twin.params[name] = xp.astype(w, dtype)
