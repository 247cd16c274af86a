"""One step of a GRU as a layer of its own."""

import math
from collections.abc import Callable

from .. import arguments, equations
from ..backend import by_place, runner
from ..equations import Variant
from ..errors import check_shape
from ..typing import Array, Device, Gradients, Shape
from . import options
from .init import uniform
from .params import BackendLike, Layer, refuse_stale
from .sweep import Sweep
from .weights import parameter_shapes, variant_advice, weights


class GRUCell(Layer):
    """One step of a GRU, with the conventions of `torch.nn.GRUCell`.

    Parameters
    ----------
    input_size, hidden_size : int
        I and H.
    bias, reset_after, backend, device, dtype, seed, activation, gate_activation, clip
        As in `GRU`.

    Attributes
    ----------
    params : dict
        `weight_ih` (3H, I), `weight_hh` (3H, H), `bias_ih` (3H,) and, with reset_after, `bias_hh`
        (3H,). The thirds are r, z, n.

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any import GRUCell
    >>> cell = GRUCell(3, 4, seed=0)
    >>> h = None
    >>> for frame in np.ones((5, 2, 3), dtype="float32"):
    ...     h = cell(frame, h)
    >>> h.shape
    (2, 4)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        bias: bool = True,
        reset_after: bool = False,
        backend: BackendLike | None = None,
        device: Device = None,
        dtype: str = "float32",
        seed: int | None = None,
        activation: options.Named = "tanh",
        gate_activation: options.Named = "sigmoid",
        clip: float | None = None,
    ) -> None:
        self.input_size = arguments.size("input_size", input_size)
        self.hidden_size = arguments.size("hidden_size", hidden_size)
        self.bias = arguments.flag("bias", bias)
        self.reset_after = arguments.flag("reset_after", reset_after)
        self.activation = options.activation("activation", activation)
        self.gate_activation = options.activation("gate_activation", gate_activation)
        self.clip = options.clip(clip)
        self.functions = options.activations(self.gate_activation, self.activation, self.clip)
        shapes = parameter_shapes(self.input_size, self.hidden_size, self.bias, self.reset_after)
        self._create(
            GRUCell, backend, device, dtype, shapes.items(), seed,
            lambda rng, name, shape: uniform(rng, shape, 1 / math.sqrt(self.hidden_size)),
        )  # fmt: skip
        self._leave_out(options.DEFAULTS)

    @property
    def variant(self) -> Variant:
        """The equations: a step of this cell and its gradient, as functions."""
        return equations.variant(self.reset_after, self.functions)

    def _advice(self, missing: set[str], unused: set[str]) -> str:
        return variant_advice(missing, unused)

    @by_place
    def __call__(self, x: Array, h0: Array | None = None) -> Array:
        """Return the next state (B, H) or (H,) of x (B, I) or (I,) and h0, zeros if None."""
        x3, h, shape = self._enter(x, h0)
        return self._leave(self._sweep().forward(x3, h)[1], shape)

    @by_place
    def vjp(
        self, x: Array, h0: Array | None = None
    ) -> tuple[Array, Callable[[Array], tuple[Gradients, Array, Array]]]:
        """Return the next state h, and `pullback(dh) -> grads, dx, dh0`; it may be called again."""
        self._refuse_complex()
        x3, h, shape = self._enter(x, h0)
        sweep, version = self._sweep(), self.params.version
        _, h_n, segments = sweep.forward(x3, h, keep=True)

        def pullback(dh: Array) -> tuple[Gradients, Array, Array]:
            refuse_stale(self.params, version)
            self.backend.check("dh", dh, self.dtype)
            check_shape("dh", dh, "(B, H)" if len(shape) == 2 else "(H,)", _sizes(shape))
            dx, dh0, found = sweep.backward(x3, segments, None, self._to_arithmetic(self._rows(dh)))
            grads = dict(zip(self.params, map(self._to_storage, found), strict=False))
            xp = self.backend.xp
            return grads, xp.reshape(dx, tuple(x.shape)), self._leave(dh0, shape)

        return self._leave(h_n, shape), pullback

    def _enter(self, x: Array, h0: Array | None) -> tuple[Array, Array, Shape]:
        """Return x (1, B, I), h0 (B, H) for the arithmetic, and the shape of the state."""
        self.backend.check("x", x, self.dtype)
        check_shape("x", x, "(I,)" if x.ndim == 1 else "(B, I)", {"I": self.input_size})
        shape = (*x.shape[:-1], self.hidden_size)
        rows = self._rows(x)
        if h0 is None:
            h = self.backend.zeros((rows.shape[0], self.hidden_size), self.arithmetic)
        else:
            self.backend.check("h0", h0, self.dtype)
            check_shape("h0", h0, "(H,)" if x.ndim == 1 else "(B, H)", _sizes(shape))
            h = self._to_arithmetic(self._rows(h0), copy=True)
        return self.backend.xp.expand_dims(rows, axis=0), h, shape

    def _leave(self, h: Array, shape: Shape) -> Array:
        return self._to_storage(self.backend.xp.reshape(h, shape))

    def _rows(self, v: Array) -> Array:
        return self.backend.xp.expand_dims(v, axis=0) if v.ndim == 1 else v

    def _sweep(self) -> Sweep:
        run, dtype = runner(self.backend, dtype=self.dtype), self.backend.dtype(self.arithmetic)
        own = [run.upcast(v, dtype) for v in self.params.values()]
        return Sweep(
            run,
            self.variant,
            weights(self.backend.xp, self.reset_after, *own),
            None,
            False,
            dtype,
        )


def _sizes(shape: Shape) -> dict[str, int]:
    return dict(zip(("B", "H"), shape, strict=True)) if len(shape) == 2 else {"H": shape[0]}
