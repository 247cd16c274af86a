"""Calls on arrays of any library, run by the backend that reads the same memory.

Which runner serves a call follows from where the memory is, not from which library made the arrays:
on the host it is NumPy's, on a CUDA device CuPy's. `by_place` marks the public calls. The model
stands in for itself: a twin over the other backend reads its parameters in place, each time anew,
but for those that never change (`Backend.lasting`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial, wraps
from inspect import signature
from operator import is_
from types import CodeType
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from ..typing import Array, Arrays, Pytree
from .cpu.openmp import lent
from .cpu.packed import writable
from .cuda import device as cuda
from .libraries import Backend, is_traced, of, of_traced
from .modes import COMPLEX, serves
from .transfer import FAILURES, neighbour

# arguments that must be arrays of the model's library; in others, arrays of any library may come
OURS = frozenset(("x", "x_t", "h0", "start", "state", "dy", "dh_n", "dh", "dstate", "params_dot"))
OURS |= {f"{name}_dot" for name in ("x", "h0", "start", "state", "dy", "dh_n", "dstate")}
# those that may be lists of arrays, of a Chain and of two directions, or mappings, of parameters
LISTS = frozenset(("state", "dstate", "start", "dy", "params_dot"))
LISTS |= {f"{name}_dot" for name in ("state", "dstate", "start", "dy")}
Method = TypeVar("Method", bound=Callable[..., Any])


class Model(Protocol):
    """A layer or a Chain."""

    backend: Backend
    dtype: str

    @property
    def params(self) -> Any:
        """The parameters by name."""

    @property
    def twins(self) -> dict[str, Any]:
        """The twins, by the names of their backends."""

    def twin(self, backend: Backend, dtype: str) -> Any:
        """Return the same model for another backend, without parameters."""

    def follow(self, twin: Any, views: Callable[[Any, Any], Any]) -> None:
        """Give a twin the settings and parameters as they are now."""


def by_place(method: Method) -> Method:
    """Let the backend run a method that reads the memory where the model and its arguments are."""
    names = tuple(signature(method).parameters)[1:]

    @wraps(method)
    def call(model: Model, *args: Any, **options: Any) -> Any:
        backend = model.backend
        if backend.host or backend.traced:
            return method(model, *args, **options)
        bridge = _bridge(backend, model.dtype)
        if backend.traceable:
            kind = None if bridge is None else bridge.kind  # of arrays with values
            others = [v for v in (*args, *options.values()) if type(v) is not kind]
            if any(map(is_traced, leaves(others))):
                return method(_traced(model), *args, **options)
        if bridge is None or not serves(bridge.inner):
            return method(model, *args, **options)
        try:
            return bridge.run(partial(method, bridge.twin(model)), names, args, options)
        except UnreadableError:
            return method(model, *args, **options)

    return cast(Method, call)


def leaves(tree: Pytree) -> Iterator[Any]:
    """Yield what nested tuples, lists and dicts hold."""
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        yield tree
        return
    for branch in tree:
        yield from leaves(branch)


def _traced(model: Model) -> Any:
    """Return the model for arrays that stand for others; its own parameters are constants there."""
    twin = model.twin(of_traced(model.backend), model.dtype)
    model.follow(twin, lambda part, _: Views(part, part.params))
    return twin


class UnreadableError(TypeError):
    """An array of the user's library cannot be read where it is, from outside of the library."""


class Bridge(NamedTuple):
    """The way of arrays from the user's library to the backend that runs a call, and back."""

    home: Backend  # of the user's arrays
    dtype: str  # of the model
    inner: Backend  # of the call
    inner_dtype: str
    read: Callable[[Array], Array]  # an array of the user's -> the same memory for the call
    adopt: Callable[[Array], Array]  # and back
    kind: type  # of the user's arrays
    inner_kind: type  # of those of the call

    def twin(self, model: Model) -> Any:
        """Return the model over the inner backend; it follows the parameters and settings."""
        twin = model.twins.get(self.inner.name)
        if twin is None:
            twin = model.twins[self.inner.name] = model.twin(self.inner, self.inner_dtype)
        model.follow(twin, self.views)
        return twin

    def views(self, model: Model, last: Any) -> "Views":
        """Return the parameters as the inner backend reads them; last: those of the call before."""
        arrays = list(model.params.values())
        lasting = self.inner.host and self.home.lasting(arrays)
        if lasting and isinstance(last, Views) and last.of(model, arrays):
            return last
        inner = self.export(arrays)
        if lasting:
            inner = [v if v.flags.carray else writable(v) for v in inner]
        return Views(model, dict(zip(model.params, inner, strict=True)), arrays)

    def run(
        self,
        function: Callable[..., Any],
        names: tuple[str, ...],
        args: tuple[Any, ...],
        options: Mapping[str, Any],
    ) -> Any:
        """Call a function of the inner backend on the user's arrays.

        names: of its positional arguments.

        Raises
        ------
        UnreadableError
            An array cannot be read where it is.
        TypeError
            An array must be of the user's library and is not.
        """
        seen: dict[int, Array] = {}
        entered = [self.enter(name, v, seen) for name, v in zip(names, args, strict=False)]
        entered.extend(args[len(names) :])
        if options:
            options = {name: self.enter(name, v, seen) for name, v in options.items()}
        with lent if self.inner.host else cuda.current(self.inner):
            return self.leave(function(*entered, **options), seen)

    def enter(self, name: str, v: Any, seen: dict[int, Array]) -> Any:
        """Return an argument over the inner backend. seen: by their ids, whose arrays these are."""
        if v is None:
            return None
        if name in LISTS:
            if isinstance(v, (list, tuple)):
                return [self.enter(name, w, seen) for w in v]
            if isinstance(v, Mapping):
                return {key: self.enter(name, w, seen) for key, w in v.items()}
        if not self._at_home(v):
            if name in OURS:
                self.home.check(name, v, self.dtype)
            return v
        if self.inner_dtype != self.dtype and self.home.xp.isdtype(v.dtype, "real floating"):
            self.home.check(name, v, self.dtype)
        try:
            (inner,) = self.export((v,))
        except UnreadableError:
            self.home.check(name, v, self.dtype)  # such as a tensor that requires grad
            raise
        seen[id(inner)] = v
        return inner

    def _at_home(self, v: Any) -> bool:
        if type(v) is self.kind:
            array: Array = v
            return bool(array.device == self.home.device)
        try:
            return hasattr(v, "dtype") and of(v) == self.home
        except TypeError:
            return False

    def export(self, arrays: Sequence[Array]) -> list[Array]:
        """Return the inner backend's arrays over the memory of these, or of cast copies."""
        try:
            if self.inner_dtype != self.dtype:
                arrays = list(map(self._to_inner, arrays))
            return list(map(self.read, arrays))
        except FAILURES as e:
            raise UnreadableError(
                f"an array of {self.home.name} cannot be read where it is ({e}): pass a plain copy"
            ) from e

    def _to_inner(self, v: Array) -> Array:
        """Cast an array of the model's dtype to the inner one."""
        if v.dtype != self.home.dtype(self.dtype):
            return v
        return self.home.xp.astype(v, self.home.dtype(self.inner_dtype))

    def leave(self, results: Pytree, seen: dict[int, Array]) -> Any:
        """Return results as the user has arrays; a function becomes one of the user's arrays.

        seen: the user's arrays of those of the call that are known, the arguments among them.
        """
        if together := self.home.adopt_together:
            inner = list[Array]()
            self._collect(results, seen, inner)
            arrays = map(self._stored, together(inner) if inner else inner)
            seen.update(zip(map(id, inner), arrays, strict=True))
        return self._left(results, seen)

    def _collect(self, v: Pytree, seen: Mapping[int, Array], inner: list[Array]) -> None:
        """Append the arrays among results that are not known."""
        if type(v) is self.inner_kind:
            if id(v) not in seen:
                inner.append(v)
        elif isinstance(v, (tuple, list, dict)):
            for w in v.values() if isinstance(v, dict) else v:
                self._collect(w, seen, inner)

    def _left(self, v: Pytree, seen: Mapping[int, Array]) -> Any:
        """Return results with the user's arrays in their places."""
        if type(v) is not self.inner_kind:
            if v is None:
                return None
            if isinstance(v, (tuple, list)):
                return type(v)([self._left(w, seen) for w in v])
            if isinstance(v, dict):
                return {name: self._left(w, seen) for name, w in v.items()}
            if callable(v):
                return Outside(self, v)
        return seen[id(v)] if id(v) in seen else self._stored(self.adopt(v))

    def _stored(self, v: Array) -> Array:
        """Cast a result of the inner dtype to the model's."""
        if self.inner_dtype == self.dtype or v.dtype != self.home.dtype(self.inner_dtype):
            return v
        return self.home.xp.astype(v, self.home.dtype(self.dtype))


class Views(dict[str, Array]):
    """The parameters of a model at a call, as the inner backend reads them in place."""

    def __init__(self, model: Model, views: Arrays, arrays: Sequence[Array] = ()) -> None:
        super().__init__(views)
        self._model, self._arrays = model, arrays

    def of(self, model: Model, arrays: Sequence[Array]) -> bool:
        """Return whether these are views of the same arrays."""
        same = model is self._model and len(arrays) == len(self._arrays)
        return same and all(map(is_, arrays, self._arrays))

    @property
    def version(self) -> int:
        """How many of the user's parameters were replaced by now."""
        return int(self._model.params.version)

    def refuse_untied(self) -> None:
        """Raise where parameters of a Chain that are tied differ."""
        self._model.params.refuse_untied()


class Outside:
    """A function of the inner backend's arrays, such as a pullback, as one of the user's."""

    def __init__(self, bridge: Bridge, function: Callable[..., Any]) -> None:
        self._bridge, self._function = bridge, function

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call it."""
        return self._bridge.run(self._function, _names(self._function), args, options)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._function, name)
        return Outside(self._bridge, found) if callable(found) else found


def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the positional arguments of a function."""
    if isinstance(function, partial):
        return _names(function.func)[len(function.args) :]
    code = getattr(function, "__code__", None)
    if code is not None:
        return _of_code(code)[1 if hasattr(function, "__self__") else 0 :]
    return _names(function.__call__)  # type: ignore[operator]


@lru_cache(maxsize=64)
def _bridge(home: Backend, dtype: str) -> Bridge | None:
    """Return the bridge for models of this backend; None where there is none."""
    found, _ = neighbour(home, dtype)
    if found is None or dtype == COMPLEX:
        return None
    inner, read = found.backend, found.read
    kinds = found.kind, type(inner.zeros((1,), found.dtype))
    return Bridge(home, dtype, inner, found.dtype, read, home.adopt, *kinds)


@lru_cache
def _of_code(code: CodeType) -> tuple[str, ...]:
    return code.co_varnames[: code.co_argcount]
