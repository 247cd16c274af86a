"""How a few steps of a batch run on several threads: products by BLAS, the rest compiled.

Weights are used as they stand, since packing them for one step costs as much as a product. BLAS
also keeps its threads awake, where waking ours would take as long as a whole step. The operations
between two products become one compiled loop.
"""

from functools import cache, partial
from typing import Any

import numpy as np

from ...codegen.numba_source import HEAD, SIGNS, TANH
from ...codegen.trace import Op, Product, Program
from .jit_cache import compiled, rescued
from .numpy_runner import (
    NumPy,
    backward_program,
    backward_walk,
    columns_of,
    forward_program,
    forward_walk,
    steps_over,
    turned,
)
from .packed import PackedMatrix

NAMES = {name: getattr(np, name) for name in ("matmul", "copyto", "empty", "array")}


class Brief(NumPy):
    """Runs blocks of a few steps as NumPy does, with compiled loops between two products."""

    def affine(self, x: Any, W: Any, b: Any) -> Any:
        W = _matrix(W)
        a = self._empty((*x.shape[:2], len(W)), x.dtype)
        columns = turned(a)
        np.matmul(W, turned(np.ascontiguousarray(x)), out=columns)
        if b is not None:
            columns += b[:, None]
        return a

    def as_matrix(self, v: Any) -> Any:
        return v[0] if v.ndim == 3 and len(v) == 1 else super().as_matrix(v)

    def forward(self, step: Any, a: Any, h: Any, recurrent: Any, *others: Any) -> tuple[Any, Any]:
        U, *vectors = recurrent
        given = step, a, h, (_matrix(U), *vectors), *others
        try:
            return self._forward(*given)
        except Exception as e:
            found: tuple[Any, Any] = rescued(
                e, lambda: self._forward(*given), lambda: super(Brief, self).forward(*given)
            )
            return found

    def _forward(
        self, step: Any, a: Any, h: Any, recurrent: Any, alive: Any, reverse: bool, keep: bool
    ) -> tuple[Any, Any]:
        (K, B, _), H, (U, *vectors) = a.shape, h.shape[-1], recurrent
        program = forward_program(step, len(vectors), keep)
        walk = forward_walk(step, len(vectors), keep, lines_in(a.dtype))
        path = self._empty((K + 1, B, H), a.dtype)
        path[K if reverse else 0] = h
        saved = tuple(self._empty((K, B, H), a.dtype) for _ in program.extras)
        ends = (path[1:], path[:-1]) if reverse else (path[:-1], path[1:])
        over = steps_over(
            [*columns_of(a, 3), turned(a)[:, : 2 * H], *map(turned, (*ends, *saved))],
            alive,
            reverse,
        )
        walk(over, U, [c[:, None].repeat(B, axis=1) for c in vectors], (H, B), a.dtype)
        return path, saved or None

    def backward(
        self, step: Any, dy: Any, dh: Any, previous: Any, saved: Any, U: Any, *others: Any
    ) -> tuple[Any, Any, Any]:
        given = step, dy, dh, previous, saved, _matrix(U), *others
        try:
            return self._backward(*given)
        except Exception as e:
            found: tuple[Any, Any, Any] = rescued(
                e, lambda: self._backward(*given), lambda: super(Brief, self).backward(*given)
            )
            return found

    def _backward(
        self,
        step: Any,
        dy: Any,
        dh: Any,
        previous: Any,
        saved: Any,
        U: Any,
        alive: Any,
        reverse: bool,
        taps: bool,
    ) -> tuple[Any, Any, Any]:
        K, B, H = previous.shape
        kinds = step, len(saved), dy is not None, taps
        walk = backward_walk(*kinds, lines_in(dh.dtype))
        widths = [len(extra) for extra in backward_program(*kinds).extras]
        parts = [self._empty((K, B, n * H), dh.dtype) for n in widths]
        given = [] if dy is None else [np.ascontiguousarray(turned(dy))]
        given += [np.ascontiguousarray(turned(v)) for v in (previous, *saved)]
        columns = [c for part, n in zip(parts, widths, strict=True) for c in columns_of(part, n)]
        over = steps_over([*given, *columns, *map(turned, parts)], alive, not reverse)
        dh = walk(over, U, dh.T, (H, B), dh.dtype)
        g = parts.pop() if taps else None
        return tuple(parts), dh.T, g


def _matrix(M: Any) -> Any:
    return M.matrix if isinstance(M, PackedMatrix) else M


@cache
def lines_in(dtype: Any) -> Any:
    """What makes the lines of a walk over arrays of this dtype."""
    return partial(_Lines, dtype=dtype.name)


class _Lines:
    """The lines of one step: products by NumPy, and calls of compiled loops.

    homes: column -> name of its array (H, B); given: column -> names of the arrays it goes to;
    wide: columns that stand side by side in one array -> its name.
    """

    def __init__(
        self, program: Program, homes: Any, given: Any, wide: Any, pairs: Any, dtype: str
    ) -> None:
        self.homes, self.given, self.wide, self.dtype = dict(homes), given, wide, dtype
        self.before, self.body = ["    H, B = shape"], list[str]()
        self.loops: list[str] = []
        ops = list(program.ops)
        stage: list[Op] = []
        for n, op in enumerate(ops):
            if isinstance(op, Product):
                self._product(op)
                continue
            stage.append(op)
            if n + 1 == len(ops) or isinstance(ops[n + 1], Product):
                self._loop(stage, {i for later in ops[n + 1 :] for i in later.inputs})
                stage = []

    def _product(self, op: Product) -> None:
        n = len(self.body)
        rows = f"M[{op.rows.start} * H : {op.rows.stop} * H]" + ".T" * (not op.transposed)
        self.before.append(f"    M{n}, q{n} = {rows}, empty(({len(op.outputs)} * H, B), dtype)")
        for i, column in enumerate(op.outputs):
            self.homes[column] = f"q{n}_{i}"
            self.before.append(f"    q{n}_{i} = q{n}[{i} * H : {i + 1} * H]")
        self.body.append(f"        matmul(M{n}, {self._side_by_side(op.inputs)}, q{n})")

    def _side_by_side(self, columns: tuple[int, ...]) -> str:
        if len(columns) == 1:
            return str(self.homes[columns[0]])
        for whole, name in self.wide.items():
            for i in range(len(whole) - len(columns) + 1):
                if whole[i : i + len(columns)] == columns:
                    return f"{name}[{i} * H : {i + len(columns)} * H]"
        name = f"x{len(self.body)}"
        self.before.append(f"    {name} = empty(({len(columns)} * H, B), dtype)")
        for i, column in enumerate(columns):
            self.body.append(f"        copyto({name}[{i} * H : {i + 1} * H], {self.homes[column]})")
        return name

    def _loop(self, stage: list[Op], later: set[Any]) -> None:
        """Add the compiled loop of these operations, and its call."""
        made = {op.output for op in stage}
        read = sorted({i for op in stage for i in op.inputs if not isinstance(i, float)} - made)
        names, stores = [self.homes[column] for column in read], []
        for column in sorted(made & (later | set(self.given))):
            targets = self.given.get(column, [])
            if not targets:
                targets = [f"t{column}"]
                self.before.append(f"    t{column} = empty(shape, dtype)")
            self.homes[column] = targets[0]
            for name in targets:
                stores.append(f"y{len(names)}[j] = v{column}")
                names.append(name)
        count, n = len(names), len(self.loops)
        values = []
        for op in stage:
            x = [f"f({i!r})" if isinstance(i, float) else f"v{i}" for i in op.inputs]
            value = f"tanh({x[0]})" if op.name == "tanh" else f" {SIGNS[op.name]} ".join(x)
            values.append(f"v{op.output} = {value}")
        kinds = ", ".join([f"{self.dtype}[:, ::1]"] * count)
        self.loops += [
            f"@njit('void({kinds})', cache=CACHE, **flags)",
            f"def loop{n}({', '.join(f'x{i}' for i in range(count))}):",
            "    for i in range(len(x0)):",  # a loop over a flat view is not vectorised
            *(f"        y{i} = x{i}[i]" for i in range(count)),
            "        for j in range(x0.shape[1]):",
            *(f"            v{column} = y{i}[j]" for i, column in enumerate(read)),
            *(f"            {line}" for line in (*values, *stores)),
            "",
            "",
        ]
        self.body.append(f"        loop{n}({', '.join(names)})")

    def prologue(self) -> list[str]:
        """The lines before the loop over the steps."""
        return self.before

    def compiled(self, source: list[str]) -> Any:
        """Compile the loops, and return the function `walk` of the source, which calls them."""
        text = HEAD.format(dtype=self.dtype) + TANH[self.dtype]
        module = compiled("\n".join([text, *self.loops]))
        loops = {name: v for name, v in vars(module).items() if name.startswith("loop")}
        scope = NAMES | loops
        exec("\n".join(source), scope)
        return scope["walk"]
