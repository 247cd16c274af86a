"""Calls on arrays of any library, run by the backend that reads the same memory.

Which runner serves a call follows from where the memory is, not from which library made the arrays:
on the host it is NumPy's, on a CUDA device CuPy's. `by_place` marks the public calls. A call runs
on the model's twin over the other backend, which reads the model's parameters in place: anew in
each call, except for immutable arrays.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial, wraps
from inspect import signature
from operator import is_
from types import CodeType
from typing import Any, Protocol, TypeVar, cast

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
    """Run a method on the backend that reads the memory where the model and its arguments are."""
    names = tuple(signature(method).parameters)[1:]

    @wraps(method)
    def call(model: Model, *args: Any, **options: Any) -> Any:
        backend = model.backend
        if backend.alone:
            return method(model, *args, **options)
        bridge = backend.bridges.get(model.dtype) or _bridge(backend, model.dtype)
        if backend.traceable:
            kind = None if bridge is None else bridge.kind  # of arrays with values
            others = [v for v in (*args, *options.values()) if type(v) is not kind]
            if others and any(map(is_traced, leaves(others))):
                return method(_traced(model), *args, **options)
        if bridge is None or not serves(bridge.inner):
            return method(model, *args, **options)
        try:
            return bridge.run(method, names, (bridge.twin(model),), args, options)
        except UnreadableError:
            return method(model, *args, **options)

    return cast(Method, call)


def leaves(tree: Pytree) -> Iterator[Any]:
    """Yield the leaves of nested tuples, lists and dicts."""
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        yield tree
        return
    for branch in tree:
        yield from leaves(branch)


def _traced(model: Model) -> Any:
    """Return the model over JAX's tracers, where its own parameters are constants."""
    twin = model.twin(of_traced(model.backend), model.dtype)
    model.follow(twin, lambda part, _: views_of(part, part.params))
    return twin


class UnreadableError(TypeError):
    """An array of the user's library cannot be read in place by another library."""


@dataclass(frozen=True)
class Bridge:
    """Conversions of arrays from the user's library to the backend that runs a call, and back."""

    home: Backend  # of the user's arrays
    dtype: str  # of the model
    inner: Backend  # which runs the call
    inner_dtype: str
    read: Callable[[Array], Array]  # the user's array -> one of the inner backend, same memory
    kind: type  # of the user's arrays
    inner_kind: type  # of the inner backend's arrays

    @cached_property
    def casts(self) -> bool:
        """Whether arrays are cast, since the inner backend lacks their dtype."""
        return self.inner_dtype != self.dtype

    @cached_property
    def keeps_views(self) -> bool:
        """Whether views of parameters are kept between calls, since the arrays are immutable."""
        return self.home.immutable and self.inner.host

    @cached_property
    def adopt_many(self) -> Any:
        """A function that converts several results to the user's library at once; None: `adopt`."""
        return self.home.adopt_many

    @cached_property
    def adopt(self) -> Callable[[Array], Array]:
        """The function that converts a result to the user's library."""
        return self._cast_back if self.casts else self.home.adopt

    def _cast_back(self, v: Array) -> Array:
        return self._stored(self.home.adopt(v))

    def twin(self, model: Model) -> Any:
        """Return the model over the inner backend, with the present parameters and settings."""
        twin = model.twins.get(self.inner.name)
        if twin is None:
            twin = model.twins[self.inner.name] = model.twin(self.inner, self.inner_dtype)
        model.follow(twin, self.views)
        return twin

    def views(self, model: Model, last: Any) -> "Views":
        """Return the parameters over the inner backend; last: the views of the call before."""
        params = model.params
        arrays = list(params.values())
        keep = self.keeps_views and not self.home.deleted(arrays)
        if keep and type(last) is Views and last.of(model, arrays):
            return last
        try:
            inner = list(map(self.read, map(self._to_inner, arrays) if self.casts else arrays))
        except FAILURES as e:
            raise self._unreadable(e) from e
        if keep:
            inner = [v if v.flags.carray else writable(v) for v in inner]
        views = Views(zip(params, inner, strict=True))
        views.model, views.arrays = model, arrays
        return views

    def run(
        self,
        function: Callable[..., Any],
        names: tuple[str, ...],
        twin: tuple[Any, ...],
        args: tuple[Any, ...],
        options: Mapping[str, Any],
    ) -> Any:
        """Call a function of the inner backend on the user's arrays; return arrays of the user's.

        names: of its positional arguments. twin: the first of them, for a method, else empty.

        Raises
        ------
        UnreadableError
            An array cannot be read where it is.
        TypeError
            An array must be of the user's library and is not.
        """
        seen: dict[int, Array] = {}
        enter, entered = self.enter, [*twin]
        for name, v in zip(names, args, strict=False):
            entered.append(enter(name, v, seen))
        entered.extend(args[len(names) :])
        if options:
            options = {name: enter(name, v, seen) for name, v in options.items()}
        with lent if self.inner.host else cuda.current(self.inner):
            results = function(*entered, **options)
            several = type(results) is tuple  # as most are
            results = results if several else (results,)
            if self.adopt_many is not None:
                self._adopt_many(results, seen)
            left = self.leave(results, seen)
            return tuple(left) if several else left[0]

    def enter(self, name: str, v: Any, seen: dict[int, Array]) -> Any:
        """Convert an argument to the inner backend; seen: id of an inner array -> the user's."""
        if v is None:
            return None
        kind: type[Any] = type(v)
        if kind is self.kind:
            at_home = v.device == self.home.device
        else:
            if name in LISTS:
                if isinstance(v, (list, tuple)):
                    return [self.enter(name, w, seen) for w in v]
                if isinstance(v, Mapping):
                    return {key: self.enter(name, w, seen) for key, w in v.items()}
            at_home = self._at_home(v)
        if not at_home:
            if name in OURS:
                self.home.check(name, v, self.dtype)
            return v
        if self.casts and self.home.xp.isdtype(v.dtype, "real floating"):
            self.home.check(name, v, self.dtype)
        try:
            inner = self.read(self._to_inner(v) if self.casts else v)
        except FAILURES as e:
            self.home.check(name, v, self.dtype)  # such as a tensor that requires grad
            raise self._unreadable(e) from e
        seen[id(inner)] = v
        return inner

    def _at_home(self, v: Any) -> bool:
        """Return whether `v` is an array of the model's library and device."""
        try:
            return hasattr(v, "dtype") and of(v) == self.home
        except TypeError:
            return False

    def _unreadable(self, e: Exception) -> UnreadableError:
        return UnreadableError(
            f"an array of {self.home.name} cannot be read where it is ({e}): pass a plain copy"
        )

    def _to_inner(self, v: Array) -> Array:
        """Cast an array of the model's dtype to the inner one."""
        if v.dtype != self.home.dtype(self.dtype):
            return v
        return self.home.xp.astype(v, self.home.dtype(self.inner_dtype))

    def leave(self, results: Iterable[Pytree], seen: Mapping[int, Array]) -> list[Any]:
        """Convert results to the user's library; a function becomes one of the user's arrays.

        seen: id of an inner array -> the user's, so that an argument comes back as it was given.
        """
        left = list[Any]()
        for v in results:
            if type(v) is self.inner_kind:
                left.append(seen[id(v)] if id(v) in seen else self.adopt(v))
            elif isinstance(v, (tuple, list)):
                left.append(type(v)(self.leave(v, seen)))
            elif isinstance(v, dict):
                left.append(dict(zip(v, self.leave(v.values(), seen), strict=True)))
            else:
                left.append(BridgedFunction(self, v) if callable(v) else v)
        return left

    def _adopt_many(self, results: Iterable[Pytree], seen: dict[int, Array]) -> None:
        """Convert all arrays among the results at once, and put them into `seen`."""
        inner = list[Array]()
        self._collect(results, seen, inner)
        if inner:
            found = self.adopt_many(inner)
            arrays = map(self._stored, found) if self.casts else found
            seen.update(zip(map(id, inner), arrays, strict=True))

    def _collect(
        self, results: Iterable[Pytree], seen: Mapping[int, Array], inner: list[Array]
    ) -> None:
        """Append the arrays among the results that are not in `seen`."""
        for v in results:
            if type(v) is self.inner_kind:
                if id(v) not in seen:
                    inner.append(v)
            elif isinstance(v, (tuple, list)):
                self._collect(v, seen, inner)
            elif isinstance(v, dict):
                self._collect(v.values(), seen, inner)

    def _stored(self, v: Array) -> Array:
        """Cast a result of the inner dtype to the model's."""
        if v.dtype != self.home.dtype(self.inner_dtype):
            return v
        return self.home.xp.astype(v, self.home.dtype(self.dtype))


class Views(dict[str, Array]):
    """The parameters of a model during a call, read in place by the inner backend."""

    model: Model
    arrays: Sequence[Array]  # the user's

    def of(self, model: Model, arrays: Sequence[Array]) -> bool:
        """Return whether these are views of the same arrays."""
        return model is self.model and all(map(is_, arrays, self.arrays))

    @property
    def version(self) -> int:
        """How often parameters of the user's model were replaced."""
        return int(self.model.params.version)

    def refuse_untied(self) -> None:
        """Raise where parameters of a Chain that are tied differ."""
        self.model.params.refuse_untied()


def views_of(model: Model, arrays: Arrays) -> Views:
    """Return arrays that take the place of a model's parameters."""
    views = Views(arrays)
    views.model = model
    return views


class BridgedFunction:
    """A function of the inner backend, such as a pullback, called on the user's arrays."""

    def __init__(self, bridge: Bridge, function: Callable[..., Any]) -> None:
        self._bridge, self._function = bridge, function

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call the function through the bridge."""
        function = self._function
        names = _call_names(cast(Any, type(function))) or _names(function)
        return self._bridge.run(function, names, (), args, options)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._function, name)
        return BridgedFunction(self._bridge, found) if callable(found) else found


def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the positional arguments of a function."""
    if isinstance(function, partial):
        return _names(function.func)[len(function.args) :]
    code: CodeType = function.__code__
    return _of_code(code)[1 if hasattr(function, "__self__") else 0 :]


@lru_cache(maxsize=64)
def _call_names(kind: Any) -> tuple[str, ...]:
    """Return the argument names of `__call__` of a class; () for functions, which differ."""
    code = getattr(getattr(kind, "__call__"), "__code__", None)  # noqa: B004, B009
    return () if code is None else _of_code(code)[1:]


def _bridge(home: Backend, dtype: str) -> Bridge | None:
    """Return the bridge for models of this backend; None where there is none."""
    if dtype not in home.bridges:
        home.bridges[dtype] = _find(home, dtype)
    found: Bridge | None = home.bridges[dtype]
    return found


def _find(home: Backend, dtype: str) -> Bridge | None:
    found, _ = neighbour(home, dtype)
    if found is None or dtype == COMPLEX:
        return None
    inner = found.backend
    inner_kind = type(inner.zeros((1,), found.dtype))
    return Bridge(home, dtype, inner, found.dtype, found.read, found.kind, inner_kind)


@lru_cache
def _of_code(code: CodeType) -> tuple[str, ...]:
    return code.co_varnames[: code.co_argcount]
