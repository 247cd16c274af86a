"""Dual numbers: arrays with their derivative along a direction, as an array library of their own.

A dual number is v + v' e with e * e = 0 (Clifford 1873). What a function makes of x + x' e is
f(x) + (J x') e, so the same code that computes f computes its derivative along x', which is
forward-mode differentiation (Wengert 1964). All layers of this package run on them, backward passes
and losses included, since they are written against an array namespace. An array without a
derivative is a constant among them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import EllipsisType
from typing import Any, TypeAlias

from ..typing import Array, Namespace
from .libraries import Backend

Index: TypeAlias = int | slice | EllipsisType | None
Key: TypeAlias = Index | tuple[Index, ...]
# the derivative of y = f(v), element by element
SLOPES: dict[str, Callable[[Namespace, Array, Array], Array]] = {
    "tanh": lambda xp, y, v: 1.0 - y * y,
    "exp": lambda xp, y, v: y,
    "expm1": lambda xp, y, v: 1.0 + y,
    "log": lambda xp, y, v: 1.0 / v,
    "log1p": lambda xp, y, v: 1.0 / (1.0 + v),
    "sqrt": lambda xp, y, v: 0.5 / y,
    "abs": lambda xp, y, v: xp.sign(v),
}
# functions of an array that are linear in it
LINEAR = frozenset((
    "asarray", "astype", "broadcast_to", "expand_dims", "flip", "mean", "permute_dims", "reshape",
    "sum", "take",
))  # fmt: skip
# functions of an array whose results have no derivative
CONSTANT = frozenset(("sign", "zeros_like", "ones_like", "full_like", "argmax"))
METHODS = frozenset(("concat", "max", "maximum", "minimum", "stack", "where"))  # of the namespace


class Dual:
    """An array and its derivative, of one shape and dtype."""

    __array_ufunc__ = None  # NumPy's arrays leave their operations with it to this class

    def __init__(self, value: Array, dot: Array, space: "DualNamespace") -> None:
        self.value, self.dot, self.space = value, dot, space

    def __array_namespace__(self, api_version: str | None = None) -> "DualNamespace":
        return self.space

    shape = property(lambda self: self.value.shape)
    dtype = property(lambda self: self.value.dtype)
    ndim = property(lambda self: self.value.ndim)
    size = property(lambda self: self.value.size)
    device = property(lambda self: self.space.backend.device)
    T = property(lambda self: self._each(lambda v: v.T))

    def _each(self, function: Callable[[Array], Array]) -> "Dual":
        """Apply a linear function."""
        return Dual(function(self.value), function(self.dot), self.space)

    def _with(self, value: Array, dot: Array) -> "Dual":
        return Dual(value, dot, self.space)

    def _shifted(self, value: Array) -> "Dual":
        """Return a sum with a constant, whose value may have more axes than this number."""
        if self.dot.shape == value.shape:
            return self._with(value, self.dot)
        return self._with(value, self.space.plain.broadcast_to(self.dot, value.shape))

    def __getitem__(self, key: Key) -> "Dual":
        return self._each(lambda v: v[key])

    def __neg__(self) -> "Dual":
        return self._each(lambda v: -v)

    def __add__(self, other: Array | float) -> "Dual":
        if isinstance(other, Dual):
            return self._with(self.value + other.value, self.dot + other.dot)
        return self._shifted(self.value + other)

    __radd__ = __add__

    def __sub__(self, other: Array | float) -> "Dual":
        if isinstance(other, Dual):
            return self._with(self.value - other.value, self.dot - other.dot)
        return self._shifted(self.value - other)

    def __rsub__(self, other: Array | float) -> "Dual":
        value = other - self.value
        return self._with(value, -1.0 * self._shifted(value).dot)

    def __mul__(self, other: Array | float) -> "Dual":
        if isinstance(other, Dual):
            dot = self.dot * other.value + self.value * other.dot
            return self._with(self.value * other.value, dot)
        return self._each(lambda v: v * other)

    __rmul__ = __mul__

    def __truediv__(self, other: Array | float) -> "Dual":
        if isinstance(other, Dual):
            value = self.value / other.value
            return self._with(value, (self.dot - value * other.dot) / other.value)
        return self._each(lambda v: v / other)

    def __rtruediv__(self, other: Array | float) -> "Dual":
        value = other / self.value
        return self._with(value, -1.0 * (value * self.dot) / self.value)

    def __matmul__(self, other: Array | float) -> "Dual":
        if isinstance(other, Dual):
            dot = self.dot @ other.value + self.value @ other.dot
            return self._with(self.value @ other.value, dot)
        if not hasattr(other, "dtype"):  # a stand-in for a matrix has a product of its own
            return NotImplemented
        return self._each(lambda v: v @ other)

    def __rmatmul__(self, other: Array | float) -> "Dual":
        return self._each(lambda v: other @ v)

    def __lt__(self, other: Array | float) -> Array:
        return self.value < value_of(other)

    def __le__(self, other: Array | float) -> Array:
        return self.value <= value_of(other)

    def __gt__(self, other: Array | float) -> Array:
        return self.value > value_of(other)

    def __ge__(self, other: Array | float) -> Array:
        return self.value >= value_of(other)

    def __eq__(self, other: object) -> Any:
        return self.value == value_of(other)

    def __ne__(self, other: object) -> Any:
        return self.value != value_of(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Dual({self.value!r}, dot={self.dot!r})"


def value_of(v: Array) -> Array:
    """Return the value of a dual number, or v itself if it is a constant."""
    return v.value if isinstance(v, Dual) else v


def dot_of(xp: Namespace, v: Array) -> Array:
    """Return the derivative of a dual number; zeros for a constant."""
    return v.dot if isinstance(v, Dual) else xp.zeros_like(v)


class DualNamespace:
    """The functions of an array library `plain`, extended to dual numbers."""

    def __init__(self, plain: Namespace) -> None:
        self.plain = plain
        self.backend: Backend  # of the dual numbers
        self.lift: Callable[[Array, None], Array] = lambda v, dot: v  # see `DualBackend.lift`

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.plain, name)
        if isinstance(found, type) or not callable(found):
            return found
        return partial(self._call, name, found)

    def _call(
        self, name: str, function: Callable[..., Array], *args: Array, **options: object
    ) -> Array:
        """Call a function of an array."""
        if not any(isinstance(v, Dual) for v in (*args, *options.values())):
            return self.lift(function(*args, **options), None)
        v, *others = args
        if name in CONSTANT:
            return self.lift(function(*map(value_of, args), **options), None)
        if not isinstance(v, Dual) or name not in {*LINEAR, *SLOPES}:
            raise NotImplementedError(f"xp.{name} has no derivative here; there are {self.known}")
        if name in LINEAR:
            return v._each(lambda w: function(w, *others, **options))
        y = function(v.value)
        return v._with(y, SLOPES[name](self.plain, y, v.value) * v.dot)

    known = property(lambda self: ", ".join(sorted(LINEAR | set(SLOPES) | CONSTANT | METHODS)))

    def concat(self, arrays: Sequence[Array], *, axis: int | None = 0) -> Array:
        """Join arrays along an axis."""
        return self._joined(partial(self.plain.concat, axis=axis), arrays)

    def stack(self, arrays: Sequence[Array], *, axis: int = 0) -> Array:
        """Join arrays along a new axis."""
        return self._joined(partial(self.plain.stack, axis=axis), arrays)

    def _joined(self, join: Callable[[list[Array]], Array], arrays: Sequence[Array]) -> Array:
        value = join([value_of(v) for v in arrays])
        if not any(isinstance(v, Dual) for v in arrays):
            return value
        return Dual(value, join([dot_of(self.plain, v) for v in arrays]), self)

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        """Choose, element by element."""
        value = self.plain.where(condition, value_of(x), value_of(y))
        if not isinstance(x, Dual) and not isinstance(y, Dual):
            return value
        dots = [v.dot if isinstance(v, Dual) else self.plain.zeros_like(value) for v in (x, y)]
        return Dual(value, self.plain.where(condition, *dots), self)

    def maximum(self, x: Array, y: Array) -> Array:
        """Return the larger, element by element."""
        return self.where(value_of(x) >= value_of(y), x, y)

    def minimum(self, x: Array, y: Array) -> Array:
        """Return the smaller, element by element."""
        return self.where(value_of(x) <= value_of(y), x, y)

    def max(self, v: Array, *, axis: int, keepdims: bool = False) -> Array:
        """Return the largest along an axis; equal ones share the derivative."""
        value = self.plain.max(value_of(v), axis=axis, keepdims=True)
        if isinstance(v, Dual):
            hit = self.plain.astype(v.value == value, v.dtype)
            dot = self.plain.sum(hit * v.dot, axis=axis, keepdims=True)
            value = v._with(value, dot / self.plain.sum(hit, axis=axis, keepdims=True))
        return value if keepdims else self.sum(value, axis=axis)
