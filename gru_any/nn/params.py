"""What layers have in common: named parameters, loading them, moving to another device."""

import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from functools import cache, cached_property
from inspect import signature
from itertools import combinations
from types import ModuleType
from typing import Any, NoReturn, Protocol, Self, TypeAlias

import numpy as np

from .. import arguments
from ..backend import (
    Backend,
    disjoint,
    is_traced,
    of,
    overlap,
    plain_name,
    select,
    to_numpy,
)
from ..errors import ShapeError
from ..typing import Array, Arrays, Device, HostArray, Rng, Shape

BackendLike: TypeAlias = str | ModuleType | Backend
HOME = ("backend", "device", "dtype", "seed")  # arguments of a layer that are no settings
MOST_NAMED = 20  # names in an error
DTYPES = ("float16", "bfloat16", "float32", "float64", "complex128")


class Params(dict[str, Array]):
    """A dict name -> array. An entry can be replaced by an array that fits, nothing else."""

    def __init__(self, backend: Backend, dtype: str, arrays: Iterable[tuple[str, Array]]) -> None:
        super().__init__(arrays)
        self.backend, self.dtype = backend, dtype  # of the arrays
        self.version = 0  # how many were replaced, which a pullback must not miss

    def __setitem__(self, name: str, array: Array) -> None:
        if name not in self:
            raise KeyError(f"{name!r} is no parameter; there are {', '.join(self)}")
        if array is not self[name]:
            if is_traced(array):
                raise TypeError(
                    f"{name} is traced by JAX, and would outlive the function that it stands in: "
                    "pass parameters as an argument, with apply(params, x)"
                )
            self.backend.check(name, array, self.dtype)
            _same_shape(name, array, tuple(self[name].shape))
        super().__setitem__(name, array)
        self.version += 1

    def __missing__(self, name: str) -> NoReturn:
        raise KeyError(f"{name!r} is no parameter; there are {', '.join(self)}")

    def update(self, *mappings: Any, **arrays: Array) -> None:
        """Replace several entries, each checked as alone."""
        for name, array in dict(*mappings, **arrays).items():
            self[name] = array

    def __ior__(self, mapping: Any) -> Any:  # type: ignore[misc]
        self.update(mapping)
        return self

    def setdefault(self, name: str, default: Array = None) -> Array:
        """Return the entry, which is there."""
        if name not in self:
            self[name] = default  # raises
        return self[name]

    def _refuse(self, *arguments: object) -> NoReturn:
        raise TypeError("parameters cannot be taken out; the layer needs them")

    pop = popitem = clear = _refuse

    def __delitem__(self, name: str) -> NoReturn:
        raise TypeError(f"{name!r} cannot be deleted; the layer needs it")

    def __reduce__(self) -> tuple[type, tuple[dict[str, Array]]]:
        return dict, (dict(self),)


class Parametrised(Protocol):
    """A layer or a Chain: something with named parameters."""

    backend: Backend
    dtype: str

    @property
    def params(self) -> MutableMapping[str, Array]:
        """The parameters by name."""


class Layer:
    """A layer is its settings and its parameters."""

    settings: dict[str, Any]  # the arguments that make it again
    _followed: tuple[str, ...]  # the names of all settings, those left out among them
    params: Params
    backend: Backend  # where the parameters are
    dtype: str  # of the parameters

    def _create(
        self,
        kind: type,
        backend: BackendLike | None,
        device: Device,
        dtype: str,
        shapes: Iterable[tuple[str, Shape]] = (),
        seed: int | None = None,
        draw: Callable[[Rng, str, Shape], HostArray] | None = None,
    ) -> None:
        """Set the settings, backend, dtype and parameters; call it last in `__init__`.

        kind: the class whose arguments are already attributes of the layer. shapes: the shape of
        each parameter, by name. draw: returns the initial value of one.
        """
        _refuse_dtype(dtype)
        self._followed = _settings(kind)
        self.settings = {name: getattr(self, name) for name in self._followed}
        self.backend = select(backend, device)
        self.dtype = dtype
        self.backend.dtype(dtype)
        arrays = vars(self).pop("_given", None)
        if arrays is not None:
            arrays = self._compared(arrays, shapes)
        elif draw is not None:
            rng = arguments.seed(seed)
            arrays = {n: self.backend.put(draw(rng, n, shape), dtype) for n, shape in shapes}
        self.params = Params(self.backend, dtype, arrays or {})

    def _leave_out(self, usual: Mapping[str, object]) -> None:
        """Leave out settings with these values, so that files are as in versions without them."""
        for name, value in usual.items():
            if self.settings[name] == value:
                del self.settings[name]

    @classmethod
    def of(cls, settings: Mapping[str, Any], params: Arrays, backend: Backend, dtype: str) -> Self:
        """Make a layer of its settings and its parameters; nothing is drawn or copied.

        Shapes are compared before anything is allocated, so the settings may come from anywhere.

        params: arrays of the backend, of this dtype; see `converted`

        Raises
        ------
        KeyError, ValueError, TypeError
            A name is missing or unused; a shape or dtype does not fit; settings are no arguments.
        """
        layer = object.__new__(cls)
        vars(layer)["_given"] = params
        begin: Callable[..., None] = cls.__init__
        begin(layer, **settings, backend=backend, dtype=dtype)
        return layer

    def _compared(self, arrays: Arrays, shapes: Iterable[tuple[str, Shape]]) -> Arrays:
        """Return the arrays in the order of `shapes`; raise where names or shapes do not fit.

        There may be endlessly many shapes, as the settings are not to be trusted yet.
        """
        known, missing = dict[str, Array](), set[str]()
        for name, shape in shapes:
            if name in arrays:
                self.backend.check(name, arrays[name], self.dtype)
                _same_shape(name, arrays[name], shape)
                known[name] = arrays[name]
            else:
                missing.add(name)
            if len(missing) > MOST_NAMED:
                break
        unused = set(arrays) - set(known)
        if missing or unused:
            raise KeyError(
                f"parameters do not fit {type(self).__name__}({self.settings}): missing "
                f"{sorted(missing)}, unused {sorted(unused)[:MOST_NAMED]}"
                + self._advice(missing, unused)
            )
        return known

    def load_params(self, mapping: Arrays) -> None:
        """Replace all parameters by copies of the arrays of `mapping`, by the names of `params`.

        The arrays may be of any library and any real floating dtype; they are converted to the
        model's. Nothing is loaded unless everything fits.

        Raises
        ------
        KeyError
            A name is missing or unused.
        ValueError, TypeError
            An array has another shape, or a dtype that is not floating.
        """
        load(self, mapping, self._advice)

    def _advice(self, missing: set[str], unused: set[str]) -> str:
        return ""

    def to(
        self,
        backend: BackendLike | None = None,
        device: Device = None,
        dtype: str | None = None,
    ) -> Self:
        """Return a new layer with these weights on another backend, device or dtype.

        `backend=None` keeps the backend (and, where `device` is None too, the device).
        """
        if backend is None:
            backend = self.backend if device is None else self.backend.name
        dtype = self.dtype if dtype is None else dtype
        home = select(backend, device)
        _refuse_dtype(dtype)
        return self.of(self.settings, converted(self.params, home, dtype), home, dtype)

    def __repr__(self) -> str:
        usual = signature(type(self)).parameters
        told = ("reset_after",)  # the variant, whichever it is
        given = {k: v for k, v in self.settings.items() if k in told or v != usual[k].default}
        listed = "".join(f"{name}={value!r}, " for name, value in given.items())
        count = sum(int(np.prod(p.shape)) for p in self.params.values())
        return (
            f"{type(self).__name__}({listed}backend={self.backend.name!r}, "
            f"dtype={self.dtype!r})  # {count:,} parameters"
        )

    def __reduce__(self) -> tuple[Callable[..., "Layer"], tuple[object, ...]]:
        host = {name: to_numpy(array) for name, array in self.params.items()}
        return _again, (type(self), self.settings, self.backend, self.dtype, host)

    def apply(self, params: Arrays, *args: object, **options: object) -> Any:
        """Call the layer with these parameters in place of its own, which it does not change.

        All that the result depends on is then an argument, as `jax.jit`, `jax.grad` and `jax.vmap`
        want it.

        Parameters
        ----------
        params : mapping of the names of `params` to arrays
            Of any library; the other arguments must be of the same. Their dtype is that of the
            call.
        *args, **options
            As in a call of the layer.

        Raises
        ------
        KeyError
            A name is missing or unused.
        ValueError, TypeError
            An array has another shape, or the arrays are of several libraries or dtypes.
        """
        layer: Any = self._with(params)
        return layer(*args, **options)

    def _with(self, params: Arrays) -> Self:
        """Return the layer over these parameters."""
        refuse_names(self, params, self._advice)
        if not params:
            return self
        arrays = {name: params[name] for name in self.params}
        backend, dtype = of(*arrays.values()), plain_name(next(iter(arrays.values())).dtype)
        _refuse_dtype(dtype)
        for name, array in arrays.items():
            backend.check(name, array, dtype)
            _same_shape(name, array, tuple(self.params[name].shape))
        return self.over(backend, dtype, arrays.items())

    def over(self, backend: Backend, dtype: str, arrays: Iterable[tuple[str, Array]]) -> Self:
        """Return this layer over other arrays, which are neither copied nor checked."""
        twin = object.__new__(type(self))
        cached = {
            name
            for name in vars(self)
            if isinstance(getattr(type(self), name, None), cached_property)
        }
        twin.__dict__ = {name: v for name, v in vars(self).items() if name not in cached}
        twin.backend, twin.dtype, twin.params = backend, dtype, Params(backend, dtype, arrays)
        return twin

    @cached_property
    def twins(self) -> dict[str, Self]:
        """Twins of this layer over the backends that run its calls; see `backend.bridge`."""
        return {}

    def twin(self, backend: Backend, dtype: str) -> Self:
        """Return this layer for another backend, without parameters."""
        return self.over(backend, dtype, ())

    def follow(self, twin: Self, views: Callable[[object, object], Any]) -> None:
        """Give a twin the settings and parameters as they are now.

        views: called with the layer and the twin's parameters, returns the twin's new parameters.
        """
        own, there = vars(self), vars(twin)
        if own["_changed"] is not there["_changed"]:
            names = ("_changed", *self._followed)
            there.update(zip(names, map(own.__getitem__, names), strict=True))
        there["params"] = views(self, there["params"])

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        vars(self)["_changed"] = object()  # tells `follow` that there is something to copy

    # the dtype of the arithmetic, and of what is stored ------------------------------------------

    @cached_property
    def arithmetic(self) -> str:
        """float32 for the half precisions, else the layer's own dtype."""
        return "float32" if self.dtype in ("float16", "bfloat16") else self.dtype

    def _to_arithmetic(self, v: Array, copy: bool = False) -> Array:
        if self.arithmetic == self.dtype and not copy:
            return v
        return self.backend.xp.astype(v, self.backend.dtype(self.arithmetic), copy=copy)

    def _to_storage(self, v: Array) -> Array:
        if self.arithmetic == self.dtype:
            return v
        return self.backend.xp.astype(v, self.backend.dtype(self.dtype), copy=False)

    def _mask(
        self, rng: Rng | None, shape: Shape, p: float, dtype: str | None = None
    ) -> Array | None:
        """Return a mask of dropout: 0 with probability p, else 1 / (1 - p); None for none."""
        if rng is None or not p:
            return None
        return self._kept(rng, shape, p, dtype or self.dtype) * (1 / (1 - p))

    def _kept(self, rng: Rng, shape: Shape, p: float, dtype: str) -> Array:
        """Return an array of 0 with probability p, else 1, drawn on the host.

        It goes to the device as a byte per element.
        """
        if self.backend.traced:
            raise TypeError(
                "rng would draw the mask once, while JAX traces the function, and every later call "
                "would drop the same: call vjp outside of jax.jit, or mask x by jax.random"
            )
        kept = self.backend.put((rng.random(shape) >= p).view(np.uint8))
        return self.backend.xp.astype(kept, self.backend.dtype(dtype))

    def _refuse_complex(self) -> None:
        if self.dtype == "complex128":
            raise TypeError("dtype complex128 serves the plain forward call alone, not vjp")


@cache
def _settings(kind: type) -> tuple[str, ...]:
    """Return the names of the arguments of a layer that are its settings."""
    return tuple(name for name in signature(kind).parameters if name not in HOME)


def _refuse_dtype(dtype: object) -> None:
    """Raise ValueError unless `dtype` is the name of a dtype that a model can have."""
    if isinstance(dtype, str) and dtype in DTYPES:
        return
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", plain_name(dtype))
    way = f': write dtype="{name}"' if name in DTYPES else ""
    raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}{way}")


def load(layer: Parametrised, mapping: Arrays, advice: Callable[[set[str], set[str]], str]) -> None:
    """Put copies of the arrays of `mapping` into `layer.params`; strict, all or nothing."""
    refuse_names(layer, mapping, advice)
    ours = layer.params
    hosts = {name: _host(name, mapping[name], layer.dtype) for name in ours}
    for name, host in hosts.items():
        shape = tuple(ours[name].shape)
        if host.ndim == 2 and host.shape == shape[::-1] != shape:
            raise ShapeError(f"{name} is {host.shape}, expected {shape}: transpose it")
        _same_shape(name, host, shape)
    new = {name: layer.backend.put(host, layer.dtype) for name, host in hosts.items()}
    for name, array in new.items():
        ours[name] = array


def refuse_names(
    layer: Parametrised, mapping: Arrays, advice: Callable[[set[str], set[str]], str]
) -> None:
    """Raise where the names of a mapping are not those of the layer's parameters."""
    check_mapping(mapping)
    missing, unused = set(layer.params) - set(mapping), set(mapping) - set(layer.params)
    if missing or unused:
        told = re.sub("  # .*", "", repr(layer))  # without the numbers of parameters
        raise KeyError(
            f"parameters do not fit {told}: missing {sorted(missing)}, unused {sorted(unused)}"
            + advice(missing, unused)
            + _prefix(missing, unused)
        )


def _prefix(missing: set[str], unused: set[str]) -> str:
    """Name the prefix that the unused names have, if without it they are the missing ones."""
    for name in unused:
        for end in missing:
            prefix = name.removesuffix(end)
            if all(prefix + other in unused for other in missing):
                return f"; take {prefix!r} off their beginning: name.removeprefix({prefix!r})"
    return ""


def check_mapping(mapping: object) -> None:
    """Raise TypeError where parameters do not come as a mapping."""
    if not isinstance(mapping, Mapping):
        raise TypeError(
            f"parameters are a {type(mapping).__name__}, expected a mapping name -> array, such as "
            "a state_dict()"
        )


def converted(arrays: Arrays, backend: Backend, dtype: str) -> dict[str, Array]:
    """Return copies of arrays of any library and floating dtype, on a backend, as this dtype.

    Raises
    ------
    ValueError, TypeError
        There is no such dtype, or an array is not floating.
    """
    _refuse_dtype(dtype)
    backend.dtype(dtype)
    return {name: backend.put(_host(name, a, dtype), dtype) for name, a in arrays.items()}


def _host(name: str, array: Array, dtype: str) -> HostArray:
    host = to_numpy(array, name)
    if host.dtype.kind not in ("fc" if dtype == "complex128" else "f"):
        raise TypeError(f"{name} has dtype {host.dtype}, expected a real floating dtype")
    return host


def _same_shape(name: str, array: Array, shape: Shape) -> None:
    if tuple(array.shape) != shape:
        raise ShapeError(f"{name} is {tuple(array.shape)}, expected {shape}")


def _again(
    cls: type[Layer],
    settings: dict[str, Any],
    backend: Backend,
    dtype: str,
    params: Arrays,
) -> Layer:
    return cls.of(settings, converted(params, backend, dtype), backend, dtype)


def refuse_shared(arrays: Arrays, what: str = "params") -> None:
    """Raise ValueError where two names hold one array: a change of one would change the other."""
    if disjoint(arrays.values()):
        return
    for (one, x), (other, y) in combinations(arrays.items(), 2):
        if overlap(x, y):
            raise ValueError(
                f"{what}: {one!r} and {other!r} share their memory. Where they are to be one "
                f"parameter, say so: Chain(..., tied={{{other!r}: {one!r}}}); else copy one"
            )


def refuse_stale(params: Params, version: int) -> None:
    """Raise where weights were replaced since `version`: a gradient would mix old and new ones."""
    if params.version != version:
        raise RuntimeError(
            "parameters were replaced between vjp and its pullback: call the pullback before the "
            "optimiser's step"
        )
