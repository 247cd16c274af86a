"""The runner inside of functions that JAX transforms: `jax.jit`, `jax.grad`, `jax.vmap`.

All steps are one `lax.scan` over the step of the equations, so compiling takes as long for 10,000
steps as for 10; up to 4 are unrolled. The gradient is JAX's own, of that scan.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, cast

from ..codegen.restart import restarted, restarted_backward
from ..codegen.schedule import backward_program, forward_program
from ..codegen.trace import Product, Program
from ..typing import Array, Device, Namespace, Pytree, Step
from .contract import Alive, Extra, InputProducts, Matrix, Movable, Recurrent, Result, kinds_of
from .reference import Plain

SHORT = 4  # steps up to which the loop is unrolled; more would take long to compile
MANY = 8192  # elements of a state (B, H) from which derivatives multiply the inputs step by step,
WIDE = 256  # and features of an input from which the forward pass does so, too
PRODUCT = "product"  # the name of the products with U, all that is kept for the gradient


class Operand:
    """A stand-in for U (3H, H) whose slices and transposes are made once, before the scan.

    Inside of the scan XLA would slice and transpose U again in every step. by_rows: multiplies by
    the transpose of a matrix without making it. apart: None, or what splits a product into gates.
    named: None, or what gives a product its name.
    """

    def __init__(
        self,
        U: Array,
        program: Program,
        by_rows: Callable[[Array, Array], Array] | None = None,
        apart: Namespace | None = None,
        named: Callable[[Array], Array] | None = None,
    ) -> None:
        H = U.shape[-1]
        self.shape, self.dtype = U.shape, U.dtype
        self.made: dict[tuple[int, int, bool], Callable[[Array], Array | Gates]] = {}
        for op in program.ops:
            if isinstance(op, Product):
                first, last = op.rows.start * H, op.rows.stop * H
                rows = U[first:last, :]
                key = first, last, op.transposed
                if by_rows is not None and op.transposed:
                    self.made[key] = partial(by_rows, rows)
                else:
                    right = rows.T if op.transposed else rows
                    count = (last - first) // H if apart is not None and op.transposed else 1
                    self.made[key] = partial(_times, apart, count, named, right)

    def __getitem__(self, key: slice | tuple[slice, ...]) -> "Rows":
        rows = key if isinstance(key, slice) else key[0]
        first, last, _ = rows.indices(self.shape[0])
        return Rows(self, first, last, False)

    T = property(lambda self: Rows(self, 0, self.shape[0], True))

    def __rmatmul__(self, left: Array) -> "Array | Gates":
        return left @ Rows(self, 0, self.shape[0], False)


class Rows:
    """Some rows of an `Operand`, perhaps transposed."""

    def __init__(self, of: Operand, first: int, last: int, transposed: bool) -> None:
        self.of, self.key = of, (first, last, transposed)

    def transpose(self) -> "Rows":
        """Return the same rows, transposed."""
        first, last, transposed = self.key
        return Rows(self.of, first, last, not transposed)

    T = property(transpose)

    def __rmatmul__(self, left: Array) -> "Array | Gates":
        return self.of.made[self.key](left)


class Gates:
    """A stand-in for an array (B, nH) of n gates, each held apart. It can only be sliced by gate.

    JAX pads the gradient of a slice with zeros to the size of the whole, and adds all of them up.
    """

    def __init__(self, parts: Sequence[Array]) -> None:
        self.parts, self.size = parts, parts[0].shape[-1]
        self.shape = (*parts[0].shape[:-1], len(parts) * self.size)

    def __getitem__(self, key: tuple[Any, slice]) -> Array:
        first, last, step = key[-1].indices(self.shape[-1])
        if key[0] is not Ellipsis or (last - first, first % self.size, step) != (self.size, 0, 1):
            raise TypeError(f"{key} is no gate")
        return self.parts[first // self.size]


def _times(
    xp: Namespace | None,
    gates: int,
    named: Callable[[Array], Array] | None,
    right: Array,
    left: Array,
) -> Array | Gates:
    product = left @ right if named is None else named(left @ right)
    return product if xp is None or gates == 1 else Gates(xp.split(product, gates, axis=-1))


class Inputs(NamedTuple):
    """Of which x W^T + b is made: x (T, B, I), W (N, I) and b (N,)."""

    x: Array
    W: Matrix
    b: Array | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a, (T, B, N)."""
        return (*self.x.shape[:2], self.W.shape[0])


class Scan(Plain):
    """Runs all steps as one scan that JAX compiles."""

    whole = True

    def __init__(self, xp: Namespace, device: Device, precision: str) -> None:
        import jax
        from jax.ad_checkpoint import checkpoint_name

        super().__init__(xp, device)
        self._scan: Callable[..., Any] = jax.lax.scan
        self._dot: Callable[..., Array] = jax.lax.dot_general
        self._precision: Callable[..., AbstractContextManager[None]] = jax.default_matmul_precision
        self._custom_jvp: Callable[..., Any] = jax.custom_jvp
        self._jvp: Callable[..., Any] = jax.jvp
        self._named: Callable[[Array], Array] = partial(checkpoint_name, name=PRODUCT)
        policy = jax.checkpoint_policies.save_only_these_names(PRODUCT)
        self._checkpointed: Callable[..., Any] = partial(
            jax.checkpoint, policy=policy, prevent_cse=False
        )
        self._products = "highest" if precision == "full" else "default"

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
        if axes := manual_axes():
            arrays = _varying(arrays, axes)
        return super().run_graph(function, owner, static, arrays, steps, tape)

    def product(self, left: Array, right: Matrix) -> Array:
        with self._precision(self._products):
            return super().product(left, right)

    def affine(self, x: Array, W: Matrix, b: Array | None) -> InputProducts:
        return cast(InputProducts, Inputs(x, W, b))  # `forward` decides when they are multiplied

    def _at_once(self, a: "Inputs | Array") -> Array:
        if not isinstance(a, Inputs):
            return a
        if a.shape[:2] != (1, 1):
            return super().affine(*a)
        product = self._by_rows(a.W, a.x[0, :, :])[None, :, :]
        return product if a.b is None else product + a.b

    def _by_rows(self, M: Matrix, left: Array) -> Array:
        """Return left @ M.T; of a single row the gradient to M is four times as fast this way."""
        return self._dot(M, left, (((1,), (1,)), ((), ()))).T

    def forward(
        self,
        step: Step,
        a: InputProducts,
        h: Array,
        recurrent: Recurrent,
        alive: Alive,
        reverse: bool,
        keep: bool,
        extra: Extra | None = None,
    ) -> tuple[Array, Sequence[Array] | None]:
        xp, (U, *vectors) = self.xp, recurrent
        inputs: Inputs | Array = a
        T, (B, H) = inputs.shape[0], h.shape
        program = forward_program(step, len(vectors), keep, kinds_of(extra))
        if T == 1:
            given = step, program, inputs, h, recurrent, alive, reverse, keep, extra
            return _apart_or_whole(lambda apart: self._single(apart, *given))
        cut = extra is not None and extra.cut
        run = restarted(step, extra.start) if extra is not None and cut else step

        def scan(apart: bool, inside: bool, *given: Any) -> Any:
            """Run the steps. apart: with the gates apart. inside: x is multiplied in the scan."""
            inputs, U, vectors, h, mask, arrays = given
            of = None if extra is None else extra._replace(arrays=arrays)

            def one(h: Array, at: tuple[Any, ...]) -> tuple[Array, Any]:
                a, mask, entries = at
                if right is not None:
                    b = inputs.b
                    a = _gates(xp, a @ right if b is None else a @ right + b)
                further = () if of is None else of.of_step(entries)
                v = Gates(a) if apart else xp.concat(a, axis=-1)
                new, saved = run(xp, v, h, M, *vectors, *further)
                h = new if mask is None else xp.where(mask, new, h)
                return h, (h, saved if keep else saved[len(saved) - cut :])

            # the rest of a step is computed again for the gradient: cheaper than to keep it
            one = self._checkpointed(one)
            unroll = T if T <= SHORT else 2 if inside else 1
            with self._precision(self._products):  # here, since JAX may call this later
                M = Operand(U, program, apart=xp if apart else None, named=self._named)
                right = inputs.W.T if inside else None
                steps = (
                    inputs.x if inside else _gates(xp, self._at_once(inputs)),
                    mask,
                    _entries(of),
                )
                return self._scan(one, h, steps, reverse=reverse, unroll=unroll)[1]

        mask = None if alive is None else alive.block
        arrays = inputs, U, tuple(vectors), h, mask, () if extra is None else extra.arrays
        width = inputs.x.shape[-1] if isinstance(inputs, Inputs) and B * H >= MANY else 0
        states, saved = _apart_or_whole(
            lambda apart: self._scanned(partial(scan, apart), width)(*arrays)
        )
        ends = (states, h[None, :, :]) if reverse else (h[None, :, :], states)
        return xp.concat(ends), saved or None

    def _single(
        self,
        apart: bool,
        step: Step,
        program: Program,
        inputs: Inputs | Array,
        h: Array,
        recurrent: Recurrent,
        *others: Any,
    ) -> tuple[Array, Sequence[Array] | None]:
        """Run a single step. apart: with the gates apart."""
        U, *vectors = recurrent
        with self._precision(self._products):
            by_rows = self._by_rows if h.shape[0] == 1 else None
            M = Operand(U, program, by_rows, self.xp if apart else None)
            run = partial(_step_apart, step) if apart else step
            return super().forward(run, self._at_once(inputs), h, (M, *vectors), *others)

    def _scanned(self, scan: Callable[..., Any], width: int) -> Callable[..., Any]:
        """Return the scan, which multiplies the inputs by W at once or step by step.

        At once takes less time as such, but memory for the products of all steps, which takes time
        as well. width: of the inputs where the states are large, else 0.
        """
        at_once, inside = partial(scan, False), partial(scan, True)
        if width == 0:
            return at_once
        if width >= WIDE:
            return inside
        found: Any = self._custom_jvp(at_once)
        found.defjvp(partial(self._jvp, inside))
        return cast(Callable[..., Any], found)

    def backward(
        self,
        step: Step,
        dy: Array | None,
        dh: Array,
        previous: Array,
        saved: Sequence[Array],
        U: Matrix,
        alive: Alive,
        reverse: bool,
        taps: bool,
        extra: Extra | None = None,
    ) -> tuple[tuple[Array, ...], Array, Array | None]:
        xp = self.xp
        kinds = len(saved), dy is not None, taps, kinds_of(extra)
        M = Operand(U, backward_program(step, *kinds))

        def one(dh: Array, at: tuple[Any, ...]) -> tuple[Array, Any]:
            dy, h, saved, mask, entries = at
            further: Sequence[Array] = () if extra is None else extra.of_step(entries)
            reached: tuple[Array, ...] = ()
            if extra is not None and extra.cut:
                dh, further, reached = restarted_backward(xp, dh, further, extra.start)
            g = dh if dy is None else dh + dy
            new, parts = step(xp, g, h, saved, M, *further)
            dh = new if mask is None else xp.where(mask, new, dh)
            return dh, ((*parts, *reached), g if taps else None)

        mask = None if alive is None else alive.block
        steps = dy, previous, tuple(saved), mask, _entries(extra)
        with self._precision(self._products):
            short = previous.shape[0] <= SHORT
            dh, (parts, gs) = self._scan(one, dh, steps, reverse=not reverse, unroll=short)
        return parts, dh, gs


def manual_axes() -> tuple[str, ...]:
    """Return the axes of the mesh that an enclosing `jax.shard_map` splits arrays over."""
    import jax

    return tuple(getattr(jax.sharding.get_abstract_mesh(), "manual_axes", ()))


def _varying(arrays: Pytree, axes: tuple[str, ...]) -> Pytree:
    """Let all arrays vary over these axes, as a scan wants it, whose state would otherwise not."""
    import jax

    if not hasattr(jax.lax, "pcast"):  # an older JAX, which refuses in its own words
        return arrays

    def cast_missing(v: Array) -> Array:
        seen: Any = jax.typeof(v)
        varying = seen.vma if hasattr(seen, "vma") else seen.mat.varying
        missing = tuple([axis for axis in axes if axis not in varying])
        return jax.lax.pcast(v, missing, to="varying") if missing else v

    return jax.tree.map(cast_missing, arrays)


def _apart_or_whole(run: Callable[[bool], Result]) -> Result:
    """Run with the gates apart, or whole for a step that reads all gates at once."""
    try:
        return run(True)
    except (TypeError, AttributeError):
        return run(False)


def _step_apart(step: Step, xp: Namespace, a: Array, *others: Any) -> Any:
    return step(xp, Gates(_gates(xp, a)), *others)


def _gates(xp: Namespace, a: Array) -> Sequence[Array]:
    """Return the thirds of a; inside of the scan XLA slices them more slowly."""
    return cast(Sequence[Array], xp.split(a, 3, axis=-1))


def _entries(extra: Extra | None) -> tuple[Array, ...]:
    return () if extra is None else extra.entries
