"""Calls inside of functions that JAX compiles for the processor, run by NumPy's compiled runner.

The memory is the host's, so the runner reads it in place. To JAX such a call is a primitive, and so
are its derivatives, forward and backward. Each is defined by a function of JAX's arrays, in which
all steps are a scan: this gives `jax.vmap`, further derivatives, and what to compile for other
devices. On the processor, the call and its backward pass run on the host.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import numpy as np
from jax.experimental.buffer_callback import buffer_callback
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ..typing import Array, Device, HostArray, Namespace, Pytree, Shape
from .contract import Movable, Runner
from .jax_scan import Scan, manual_axes

# JAX's own program is as fast for calls of so many steps, or of fewer multiplications than this,
FEW, LITTLE = 16, 1 << 22  # since to enter the host takes 0.1 ms
Types: TypeAlias = tuple[tuple[Shape, Any], ...]  # shapes and dtypes
Shaped: Any = jax.ShapeDtypeStruct


class Call(NamedTuple):
    """A call, as of `Runner.run_graph`, as a function of a flat list of arrays."""

    function: Callable[..., tuple[Pytree, object]]
    gradients: Callable[..., Pytree]
    owner: Movable
    static: tuple[Any, ...]
    tree: Any  # the structure of the arrays
    result_tree: Any  # the structure of the results
    types: Types  # of the results
    host: Runner

    def results(self, owner: Movable, arrays: Sequence[Array]) -> list[Array]:
        """Return the results."""
        given = jax.tree.unflatten(self.tree, arrays)
        return jax.tree.leaves(self.function(owner, *self.static, given)[0])

    def pullback(
        self, owner: Movable, arrays: Sequence[Array], cotangents: Sequence[Array | None]
    ) -> list[Array]:
        """Return the gradients to the real arrays, of cotangents, of which None is 0."""
        given = jax.tree.unflatten(self.tree, arrays)
        dots = jax.tree.unflatten(self.result_tree, cotangents)
        return jax.tree.leaves(self.gradients(owner, *self.static, given, dots))


@lru_cache(maxsize=256)
def _call(
    function: Callable[..., Any],
    gradients: Callable[..., Any],
    owner: Movable,
    static: tuple[Any, ...],
    tree: Any,
    types: Types,
    host: Runner,
) -> Call:
    """Return the call on arrays of these types."""
    given = jax.tree.unflatten(tree, [Shaped(*v) for v in types])
    results = jax.eval_shape(lambda arrays: function(owner, *static, arrays)[0], given)
    leaves, result_tree = jax.tree.flatten(results)
    return Call(function, gradients, owner, static, tree, result_tree, _types(leaves), host)


def _types(arrays: Iterable[Any]) -> Types:
    return tuple([(v.shape, v.dtype) for v in arrays])


def _is_real(v: Any) -> bool:
    return bool(np.issubdtype(v.dtype, np.floating))


def _of_some(
    function: Callable[..., list[Array]], arrays: Sequence[Array], chosen: Sequence[int]
) -> tuple[Callable[..., list[Array]], list[Array]]:
    """Return a function of all arrays as one of those with the chosen numbers, and these."""

    def of_some(*some: Array) -> list[Array]:
        given = dict(zip(chosen, some, strict=True))
        return function(*(given.get(n, v) for n, v in enumerate(arrays)))

    return of_some, [arrays[n] for n in chosen]


def _of_reals(
    call: Call, arrays: Sequence[Array]
) -> tuple[Callable[..., list[Array]], list[Array]]:
    """Return the results of a call as a function of its real arrays, and these."""
    chosen = [n for n, v in enumerate(arrays) if _is_real(v)]
    return _of_some(partial(_results, call=call), arrays, chosen)


def _absent_as_none(present: Sequence[bool], cotangents: Sequence[Array]) -> list[Array | None]:
    """Return the cotangents of all results, of which those present are given."""
    following = iter(cotangents)
    return [next(following) if there else None for there in present]


# the primitives as functions of JAX's arrays, and on the host -------------------------------------


def _results(*arrays: Array, call: Call) -> list[Array]:
    """Return the results of a call."""
    return call.results(call.owner, arrays)


def _results_on_host(*arrays: HostArray, call: Call) -> list[HostArray]:
    return call.results(call.owner.on(call.host), arrays)


def _tangents(*arrays: Array, call: Call) -> list[Array]:
    """Return the derivatives of the results along a direction, which follows the arrays."""
    count = call.tree.num_leaves
    function, reals = _of_reals(call, arrays[:count])
    return list(jax.jvp(function, reals, list(arrays[count:]))[1])


def _pullback(*arrays: Array, call: Call, present: tuple[bool, ...]) -> list[Array]:
    """Return the gradients to the real arrays; the present cotangents follow the arrays."""
    count = call.tree.num_leaves
    function, reals = _of_reals(call, arrays[:count])
    results, back = jax.vjp(function, *reals)
    pairs = zip(_absent_as_none(present, arrays[count:]), results, strict=True)
    return list(back([jax.numpy.zeros_like(v) if ct is None else ct for ct, v in pairs]))


def _pullback_on_host(*arrays: HostArray, call: Call, present: tuple[bool, ...]) -> list[HostArray]:
    count = call.tree.num_leaves
    cotangents = _absent_as_none(present, arrays[count:])
    return call.pullback(call.owner.on(call.host), arrays[:count], cotangents)


# what JAX needs to know of a primitive ------------------------------------------------------------


def _primitive(
    name: str,
    function: Callable[..., list[Array]],
    types: Callable[..., Types],
    on_host: Callable[..., list[HostArray]] | None = None,
) -> Any:
    """Return a primitive that a function defines.

    types: returns those of its results. on_host: the same as a function of NumPy's arrays.
    """
    new: Any = Primitive(f"gru_any_{name}")
    new.multiple_results = True

    @lru_cache(maxsize=256)
    def compiled(**params: Any) -> Callable[..., list[Array]]:
        found: Callable[..., list[Array]] = jax.jit(partial(new.bind, **params))
        return found

    def jvp(arrays: Sequence[Array], dots: Sequence[Any], **params: Any) -> Any:
        moving = [n for n, dot in enumerate(dots) if type(dot) is not ad.Zero]
        of_moving, moved = _of_some(partial(function, **params), arrays, moving)
        return jax.jvp(of_moving, moved, [dots[n] for n in moving])

    def batched(arrays: Sequence[Array], axes: Sequence[Any], **params: Any) -> Any:
        found = jax.vmap(partial(function, **params), tuple(axes))(*arrays)
        return found, [0] * len(found)

    def abstract(*arrays: Any, **params: Any) -> list[Any]:
        return [jax.core.ShapedArray(*v) for v in types(*arrays, **params)]

    def run(*arrays: Array, **params: Any) -> list[Array]:
        with jax.disable_jit(False):  # else this would be called again
            return compiled(**params)(*arrays)

    new.def_impl(run)
    new.def_abstract_eval(abstract)
    ad.primitive_jvps[new] = jvp
    batching.primitive_batchers[new] = batched
    mlir.register_lowering(new, mlir.lower_fun(function, multiple_results=True))
    if on_host is not None:
        mlir.register_lowering(new, _lowering(function, types, on_host), platform="cpu")
    return new


def _lowering(
    function: Callable[..., list[Array]],
    types: Callable[..., Types],
    on_host: Callable[..., list[HostArray]],
) -> Any:
    """Return what compiles a primitive for the processor: it runs `on_host`, unless exported."""

    def called(*arrays: Array, **params: Any) -> list[Array]:
        def run(_: object, results: Sequence[Any], *arrays: Any) -> None:
            found = on_host(*map(np.asarray, arrays), **params)
            for there, v in zip(results, found, strict=True):
                np.asarray(there)[...] = v

        shapes = [Shaped(*v) for v in types(*arrays, **params)]
        return list(buffer_callback(run, shapes)(*arrays))

    def lowered(context: Any, *arrays: Any, **params: Any) -> Any:
        module = context.module_context
        elsewhere = module.lowering_parameters.for_export or len(module.platforms) > 1
        made = function if elsewhere else called
        return mlir.lower_fun(made, multiple_results=True)(context, *arrays, **params)

    return lowered


def _types_of_results(*_: Any, call: Call) -> Types:
    return call.types


def _types_of_gradients(*arrays: Any, call: Call, present: tuple[bool, ...]) -> Types:
    return _types(filter(_is_real, arrays[: call.tree.num_leaves]))


results_p = _primitive("results", _results, _types_of_results, _results_on_host)
tangents_p = _primitive("tangents", _tangents, _types_of_results)
pullback_p = _primitive("pullback", _pullback, _types_of_gradients, _pullback_on_host)


def _jvp(arrays: Sequence[Array], dots: Sequence[Any], call: Call) -> Any:
    pairs = zip(arrays, dots, strict=True)
    zeros = cast(Any, ad.instantiate_zeros)
    direction = [zeros(dot) for v, dot in pairs if _is_real(v)]
    found = results_p.bind(*arrays, call=call)
    return found, tangents_p.bind(*arrays, *direction, call=call)


def _transpose(cotangents: Sequence[Any], *arrays: Any, call: Call) -> list[Array | None]:
    """Transpose `tangents_p`; directions that are known are the zeros of `_jvp`."""
    count = call.tree.num_leaves
    present = tuple([type(ct) is not ad.Zero for ct in cotangents])
    ours = [ct for ct, there in zip(cotangents, present, strict=True) if there]
    found = pullback_p.bind(*arrays[:count], *ours, call=call, present=present)
    return [*[None] * count, *_unknown(found, arrays[count:])]


def _transpose_again(
    directions: Sequence[Any], *arrays: Any, call: Call, present: tuple[bool, ...]
) -> list[Array | None]:
    """Transpose `pullback_p`, whose transpose is the derivative along a direction."""
    count, zeros = call.tree.num_leaves, cast(Any, ad.instantiate_zeros)
    found = tangents_p.bind(*arrays[:count], *map(zeros, directions), call=call)
    ours = [v for v, there in zip(found, present, strict=True) if there]
    return [*[None] * count, *_unknown(ours, arrays[count:])]


def _unknown(found: Sequence[Array], arrays: Sequence[Any]) -> list[Array | None]:
    """Return what was found for the arrays that are unknown, else None."""
    is_unknown = cast(Any, ad.is_undefined_primal)
    return [v if is_unknown(x) else None for v, x in zip(found, arrays, strict=True)]


ad.primitive_jvps[results_p] = _jvp
ad.primitive_transposes[tangents_p] = _transpose
ad.primitive_transposes[pullback_p] = _transpose_again


# the runner ---------------------------------------------------------------------------------------


class OnHost(Scan):
    """Runs whole calls of many steps on the host, and others as a scan that JAX compiles."""

    def __init__(self, xp: Namespace, device: Device, precision: str, host: Runner) -> None:
        super().__init__(xp, device, precision)
        self.host = host

    def run_graph(
        self,
        function: Callable[..., tuple[Pytree, object]],
        owner: Movable,
        static: tuple[Any, ...],
        arrays: Pytree,
        steps: int | None = None,
        tape: object = None,
        gradients: Callable[..., Pytree] | None = None,
    ) -> tuple[Pytree, object]:
        flat, tree = jax.tree.flatten(arrays)
        here = jax.default_backend() == "cpu" and not manual_axes()
        if gradients is None or not (here and all(map(_suits, flat)) and _pays(flat)):
            return super().run_graph(function, owner, static, arrays, steps, tape)
        key: Any = function, gradients, owner, static, tree, _types(flat), self.host
        call = _call(*key)
        return jax.tree.unflatten(call.result_tree, results_p.bind(*flat, call=call)), []


def _pays(arrays: Sequence[Array]) -> bool:
    """Return whether a call is large; its first array is x (T, B, I), its weights are matrices."""
    T, B, _ = arrays[0].shape
    return bool(T > FEW and T * B * sum([v.size for v in arrays if v.ndim == 2]) >= LITTLE)


def _suits(v: Array) -> bool:
    """Return whether the host can take an array: it is whole, and of a dtype that NumPy has."""
    spread = any(jax.typeof(v).sharding.spec)
    return bool(v.size and not spread and (not _is_real(v) or v.dtype.itemsize >= 4))
