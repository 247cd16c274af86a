"""The backend of dual numbers, on top of the backend of their values and derivatives."""

from functools import cached_property, lru_cache

from ..typing import Array, DType, HostArray, Shape
from .dual import Dual, DualNamespace, value_of
from .libraries import Backend


class DualBackend(Backend):
    """The dual numbers over the arrays of a backend, which are its constants."""

    def __init__(self, constants: Backend) -> None:
        super().__init__(constants.name, DualNamespace(constants.xp), constants.device)
        object.__setattr__(self, "_constants", constants)
        self.xp.backend, self.xp.lift = self, self.lift

    @property
    def constants(self) -> Backend:
        """The backend of arrays without a derivative."""
        found: Backend = vars(self)["_constants"]
        return found

    def dtype(self, name: str) -> DType:
        return self.constants.dtype(name)

    def plain(self, array: Array, dtype: str) -> bool:
        return False  # even where the array is, parameters may be dual

    def put(self, host: HostArray, dtype: str | None = None) -> Array:
        return self.constants.put(host, dtype)

    def zeros(self, shape: Shape, dtype: str) -> Array:
        return self.lift(self.constants.zeros(shape, dtype), None)

    def check(self, name: str, array: Array, dtype: str) -> None:
        self.constants.check(name, value_of(array), dtype)
        if isinstance(array, Dual):
            self.constants.check(f"{name}_dot", array.dot, dtype)

    def integers(self, name: str, array: Array) -> Array:
        return self.constants.integers(name, array)

    def scatter_add(self, indices: Array, rows: Array, n: int) -> Array:
        add = self.constants.scatter_add
        if isinstance(rows, Dual):
            return rows._each(lambda v: add(indices, v, n))
        return add(indices, rows, n)

    def lift(self, value: Array, dot: Array | None) -> Array:
        """Return an array with its derivative; without one it is a constant."""
        if dot is None:
            if self._mixes or not hasattr(value, "shape"):
                return value
            if not self.constants.xp.isdtype(value.dtype, ("real floating", "complex floating")):
                return value
            dot = self.constants.xp.zeros_like(value)
        return Dual(value, dot, self.xp)

    @cached_property
    def _mixes(self) -> bool:
        """Whether `array + dual` works; array_api_strict refuses."""
        one = self.constants.zeros((1,), "float32")
        try:
            return isinstance(one + Dual(one, one, self.xp), Dual)
        except TypeError:
            return False


@lru_cache(maxsize=64)
def dual(backend: Backend) -> DualBackend:
    """Return the dual numbers over this backend's arrays."""
    return DualBackend(backend)
