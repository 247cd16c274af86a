"""The layers around a GRU. Each has a plain call and a `vjp`."""

import math
from collections.abc import Callable
from typing import TypeAlias

from .. import arguments
from ..backend import runner
from ..backend.reductions import outer
from ..errors import ShapeError, check_shape
from ..typing import Array, Device, Gradients, HostArray, Rng, Shape
from .init import uniform
from .merge import MODES, merge_backward
from .merge import merge as merged
from .params import BackendLike, Layer, refuse_stale

DropoutPullback: TypeAlias = Callable[[Array], tuple[Gradients, Array]]  # dy -> grads, dx


class LayerPullback:
    """dy -> grads, dx of a layer with parameters."""

    def __init__(self, back: Callable[[Array, int | None], tuple[Gradients, Array]]) -> None:
        self._back = back

    def __call__(self, dy: Array) -> tuple[Gradients, Array]:
        """Return grads (a dict named like the parameters), dx; dx is None for an Embedding."""
        return self._back(dy, None)

    def per_example(self, dy: Array, axis: int = 0) -> tuple[Gradients, Array]:
        """Return what a call returns, but grads of each example, (B, ...).

        axis: the axis of dy along which the B examples lie, any but the last.

        Raises
        ------
        ValueError
            There is no such axis.
        """
        return self._back(dy, axis)


class Linear(Layer):
    """y = x W^T + b on the last axis, with the conventions of `torch.nn.Linear`.

    Parameters
    ----------
    in_features, out_features : int
        I and O.
    bias, backend, device, dtype, seed
        As in `GRU`; the initial values are uniform in +-1/sqrt(I).

    Attributes
    ----------
    params : dict
        `weight` (O, I), `bias` (O,).

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any import Linear
    >>> layer = Linear(3, 2, seed=0)
    >>> y, pullback = layer.vjp(np.ones((5, 3), dtype="float32"))
    >>> grads, dx = pullback(np.ones_like(y))
    >>> dx.shape, grads["bias"].tolist()
    ((5, 3), [5.0, 5.0])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        backend: BackendLike | None = None,
        device: Device = None,
        dtype: str = "float32",
        seed: int | None = None,
    ) -> None:
        self.in_features = arguments.size("in_features", in_features)
        self.out_features = arguments.size("out_features", out_features)
        self.bias = arguments.flag("bias", bias)
        shapes: dict[str, Shape] = {"weight": (self.out_features, self.in_features)}
        if self.bias:
            shapes["bias"] = (self.out_features,)
        self._create(
            Linear, backend, device, dtype, shapes.items(), seed,
            lambda rng, name, shape: uniform(rng, shape, 1 / math.sqrt(self.in_features)),
        )  # fmt: skip

    def __call__(self, x: Array) -> Array:
        """Return y (..., O) of x (..., I)."""
        self.backend.check("x", x, self.dtype)
        check_shape("x", x, "(..., I)", {"I": self.in_features})
        y = self._affine(self._rows(x))
        return self._to_storage(self.backend.xp.reshape(y, (*x.shape[:-1], self.out_features)))

    def _affine(self, rows: Array) -> Array:
        run = runner(self.backend, dtype=self.dtype)
        y = run.product(rows, self._to_arithmetic(self.params["weight"]).T)
        return y + self._to_arithmetic(self.params["bias"]) if self.bias else y

    def vjp(self, x: Array, rng: Rng | None = None) -> tuple[Array, LayerPullback]:
        """Return y, and `pullback(dy) -> grads, dx`, which may be called again."""
        self._refuse_complex()
        y, version = self(x), self.params.version
        shape = tuple(y.shape)

        def pullback(dy: Array, axis: int | None) -> tuple[Gradients, Array]:
            refuse_stale(self.params, version)
            self.backend.check("dy", dy, self.dtype)
            _same_shape("dy", dy, shape)
            _check_axis(dy, axis)
            run, d = runner(self.backend, dtype=self.dtype), self._rows(dy)
            if axis is not None:
                grads = self._by_example(dy, x, axis)
            else:
                grads = {"weight": run.product(d.T, self._rows(x))}
                if self.bias:
                    grads["bias"] = run.row_sum(d)
            dx = run.product(d, self._to_arithmetic(self.params["weight"]))
            dx = self.backend.xp.reshape(dx, tuple(x.shape))
            return {name: self._to_storage(g) for name, g in grads.items()}, self._to_storage(dx)

        return y, LayerPullback(pullback)

    def _by_example(self, dy: Array, x: Array, axis: int) -> Gradients:
        """Return the gradients of each example; axis: the axis of the examples in dy and x."""
        xp, (d, x) = self.backend.xp, (self._columns(v, axis) for v in (dy, x))
        grads = {"weight": outer(xp, d, x)}
        if self.bias:
            grads["bias"] = outer(xp, d, None)
        return grads

    def _columns(self, v: Array, axis: int) -> Array:
        """Return v (..., N) as (., B, N), where `axis` becomes the second axis."""
        xp, last = self.backend.xp, v.ndim - 1
        others = [n for n in range(last) if n != axis]
        v = xp.permute_dims(self._to_arithmetic(v), (*others, axis, last))
        rows = math.prod(v.shape[:-2])  # -1 would be unknown where there are no examples
        return xp.reshape(v, (rows, *v.shape[-2:]))

    def _rows(self, v: Array) -> Array:
        return runner(self.backend, dtype=self.dtype).as_matrix(self._to_arithmetic(v))


class Embedding(Layer):
    """A row of a table for each index, with the conventions of `torch.nn.Embedding`.

    Parameters
    ----------
    n, size : int
        How many rows, and how long each is.
    backend, device, dtype, seed
        As in `GRU`; the initial values are normal with variance 1.

    Attributes
    ----------
    params : dict
        `weight` (n, size).

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any import Embedding
    >>> layer = Embedding(10, 3, seed=0)
    >>> x = np.array([[7, 1], [7, 9]])
    >>> layer(x).shape, bool((layer(x)[0, 0] == layer.params["weight"][7]).all())
    ((2, 2, 3), True)
    """

    def __init__(
        self,
        n: int,
        size: int,
        *,
        backend: BackendLike | None = None,
        device: Device = None,
        dtype: str = "float32",
        seed: int | None = None,
    ) -> None:
        self.n, self.size = arguments.size("n", n), arguments.size("size", size)
        self._create(
            Embedding, backend, device, dtype, [("weight", (self.n, self.size))], seed,
            lambda rng, name, shape: rng.standard_normal(shape),
        )  # fmt: skip

    def __call__(self, x: Array) -> Array:
        """Return the rows (..., size) of x (...), integers in 0..n-1.

        An index out of range raises IndexError if the array is on the host (NumPy). On a device,
        where checking would wait for it, the row becomes NaN instead, and with it the loss.
        """
        xp, flat = self.backend.xp, self._indices(x)
        if self.backend.host:  # all are in range
            return xp.reshape(self._take(flat), (*x.shape, self.size))
        inside = (flat >= 0) & (flat < self.n)
        rows = self._take(xp.where(inside, flat, xp.zeros_like(flat)))
        rows = xp.where(xp.expand_dims(inside, axis=1), rows, xp.full_like(rows, math.nan))
        return xp.reshape(rows, (*x.shape, self.size))

    def _take(self, rows: Array) -> Array:
        return self.backend.xp.take(self.params["weight"], rows, axis=0)

    def vjp(self, x: Array, rng: Rng | None = None) -> tuple[Array, LayerPullback]:
        """Return y, and `pullback(dy) -> grads, None`, which may be called again."""
        y = self(x)
        shape = tuple(y.shape)

        def pullback(dy: Array, axis: int | None) -> tuple[Gradients, None]:
            self.backend.check("dy", dy, self.dtype)
            _same_shape("dy", dy, shape)
            _check_axis(dy, axis)
            if axis is None:
                return {"weight": self._to_storage(self._scattered(x, dy))}, None
            each = [(..., n, *[slice(None)] * (x.ndim - axis - 1)) for n in range(x.shape[axis])]
            grads = [self._scattered(x[at], dy[(*at, slice(None))]) for at in each]
            if not grads:
                return {"weight": self.backend.zeros((0, self.n, self.size), self.dtype)}, None
            return {"weight": self._to_storage(self.backend.xp.stack(grads))}, None

        return y, LayerPullback(pullback)

    def _scattered(self, x: Array, dy: Array) -> Array:
        """Sum the rows of dy (..., size) by their index in x (...); return (n, size)."""
        rows = self._to_arithmetic(self.backend.xp.reshape(dy, (math.prod(x.shape), self.size)))
        return self.backend.scatter_add(self._indices(x), rows, self.n)

    def check_range(self, x: HostArray) -> None:
        """Raise IndexError where a host array holds indices out of range."""
        if x.size and (x.min() < 0 or x.max() >= self.n):
            raise IndexError(f"x holds {x.min()} to {x.max()}, expected 0 to n - 1 = {self.n - 1}")

    def _indices(self, x: Array) -> Array:
        x = self.backend.integers("x", x)
        if self.backend.host:
            self.check_range(x)
        return self.backend.xp.reshape(x, (-1,))


class Dropout(Layer):
    """Sets elements to 0 with probability p, and divides the others by 1 - p; in `vjp` alone.

    The mask is drawn on the host from the generator given to `vjp`; without one nothing is dropped.
    """

    def __init__(
        self,
        p: float = 0.5,
        *,
        backend: BackendLike | None = None,
        device: Device = None,
        dtype: str = "float32",
    ) -> None:
        self.p = arguments.number("p", p, below=1)
        self._create(Dropout, backend, device, dtype)

    def __call__(self, x: Array) -> Array:
        """Return x."""
        self.backend.check("x", x, self.dtype)
        return x

    def vjp(self, x: Array, rng: Rng | None = None) -> tuple[Array, DropoutPullback]:
        """Return y, and `pullback(dy) -> {}, dx`, which may be called again."""
        arguments.generator("rng", rng)
        x, shape = self(x), tuple(x.shape)
        mask = self._mask(rng, shape, self.p)

        def pullback(dy: Array) -> tuple[Gradients, Array]:
            self.backend.check("dy", dy, self.dtype)
            _same_shape("dy", dy, shape)
            return {}, dy if mask is None else dy * mask

        return x if mask is None else x * mask, pullback


class Last(Layer):
    """The last states of the GRU before it in a Chain, in place of its outputs of every step.

    For one result a sequence, as Keras' `return_sequences=False`. Each row ends at its own length,
    and the reverse direction at step 0, which `y[:, -1]` gets wrong.

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any import GRU, Chain, Last, Linear
    >>> model = Chain(GRU(3, 4, bidirectional=True, seed=0), Last(), Linear(8, 2, seed=1))
    >>> y, state = model(np.ones((5, 2, 3), dtype="float32"), lengths=[5, 3])
    >>> y.shape  # (B, O)
    (2, 2)
    """

    def __init__(
        self, *, backend: BackendLike | None = None, device: Device = None, dtype: str = "float32"
    ) -> None:
        self._create(Last, backend, device, dtype)

    def __call__(self, h_n: Array, directions: int = 1, merge: str = "concat") -> Array:
        """Return the top layer's last states (B, D*H) or (D*H,) of h_n (L*D, B, H) or (L*D, H).

        directions, merge: those of the GRU, as whose outputs the states are merged; not None.

        Raises
        ------
        ValueError
            `directions` is neither 1 nor 2, or `merge` is another word.
        """
        arguments.choice("merge", merge, MODES)
        top = self._top(h_n, directions)
        return top[0] if directions == 1 else merged(self.backend.xp, merge, top)

    def _top(self, h_n: Array, directions: int) -> list[Array]:
        """Return the last states of the top layer, one array for each direction."""
        if directions not in (1, 2):
            raise ValueError(f"directions is {directions!r}, expected 1 or 2, as the GRU has")
        self.backend.check("h_n", h_n, self.dtype)
        rows = h_n.shape[0]
        if h_n.ndim not in (2, 3) or not rows or rows % directions:
            raise ShapeError(f"h_n is {tuple(h_n.shape)}, expected (L*D, B, H), D = {directions}")
        return [h_n[i, ...] for i in range(rows - directions, rows)]

    def vjp(
        self, h_n: Array, directions: int = 1, merge: str = "concat", rng: Rng | None = None
    ) -> tuple[Array, Callable[..., tuple[Gradients, Array]]]:
        """Return y, and `pullback(dy, dh_n=None) -> {}, dL/dh_n`, which includes the given dh_n."""
        y, states = self(h_n, directions, merge), tuple(h_n.shape)
        shape, parts = tuple(y.shape), self._top(h_n, directions)

        def pullback(dy: Array, dh_n: Array | None = None) -> tuple[Gradients, Array]:
            self.backend.check("dy", dy, self.dtype)
            _same_shape("dy", dy, shape)
            xp = self.backend.xp
            top = xp.stack([dy] if directions == 1 else merge_backward(merge, dy, parts))
            below = self.backend.zeros((states[0] - directions, *states[1:]), self.dtype)
            through = xp.concat([below, top])
            if dh_n is None:
                return {}, through
            self.backend.check("dh_n", dh_n, self.dtype)
            if tuple(dh_n.shape) != states:
                raise ShapeError(f"dh_n is {tuple(dh_n.shape)}, expected {states}")
            return {}, through + dh_n

        return y, pullback


def _same_shape(name: str, array: Array, shape: Shape) -> None:
    if tuple(array.shape) != tuple(shape):
        raise ValueError(f"{name} is {tuple(array.shape)}, expected {tuple(shape)}, the shape of y")


def _check_axis(dy: Array, axis: int | None) -> None:
    if axis is not None and axis not in range(dy.ndim - 1):
        raise ValueError(f"dy is {tuple(dy.shape)}, and has no axis {axis!r} before its last")
