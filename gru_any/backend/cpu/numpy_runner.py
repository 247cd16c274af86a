"""How NumPy runs a block of steps: the traced equations, as calls that write into reused buffers.

The list of operations of a step becomes the source of one function that walks a whole block. An
operation without a home of its own writes over an operand that is not needed again.
"""

import math
from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np

from ...codegen.exponential import by_exp
from ...codegen.trace import MATRIX, Op, Product, Program, trace
from ..reductions import reduced
from ..reference import Plain
from . import tuning
from .buffers import empty


class NumPy(Plain):
    """Runs blocks of steps on NumPy.

    The rows of the batch stand innermost in memory, (K, N, B), so that the columns of a step are
    contiguous: NumPy works on those twice as fast, and so does BLAS. Outside they are (K, B, N).
    """

    def _empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        K, B, N = shape
        return turned(empty((K, N, B), dtype))

    def as_contiguous(self, v: Any) -> Any:
        return v.copy()

    def affine(self, x: Any, W: Any, b: Any) -> Any:
        (K, B, I), N = x.shape, len(W)
        x = np.ascontiguousarray(x)  # NumPy calls no BLAS where strides are 0 or negative
        a = self._empty((K, B, N), x.dtype)
        if I == 1 or (b is not None and K * B > I):  # BLAS adds b at less cost, and is slow at 1
            x, W, b = _wider(x, 1), _wider(W, 0 if b is None else b), None
        np.matmul(W, turned(x), out=turned(a))
        if b is not None:
            columns = turned(a)
            columns += b[:, None]
        return a

    def as_matrix(self, v: Any) -> Any:
        if not v.flags.c_contiguous:
            v, given = empty(v.shape, v.dtype), v
            v[...] = given
        return v.reshape(math.prod(v.shape[:-1]), v.shape[-1])  # faster than np.reshape

    def product(self, left: Any, right: Any) -> Any:
        out = np.empty((len(left), right.shape[1]), left.dtype)
        self.multiply(left, right, out)
        return out

    def multiply(self, left: Any, right: Any, out: Any) -> None:
        """Fill out with left @ right; BLAS is slow where the inner size is 1."""
        if len(right) == 1:
            np.einsum("ik,kj->ij", left, right, out=out)
        else:
            np.matmul(left, right, out)

    def row_sum(self, v: Any) -> Any:
        return np.add.reduce(v, 0)

    def weight_gradients(self, weights: Any, h: Any, saved: Any, parts: Any) -> Any:
        return reduced(self, weights, h, saved, parts, np.empty)

    def output(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return Filled(np.empty(shape, dtype))

    def forward(
        self,
        step: Any,
        a: Any,
        h: Any,
        recurrent: Any,
        alive: Any,
        reverse: bool,
        keep: bool,
    ) -> tuple[Any, Any]:
        (K, B, _), H = a.shape, h.shape[-1]
        step = by_exp(step) if tuning.current.exp_elements <= B * H else step
        program = forward_program(step, len(recurrent) - 1, keep)
        walk = forward_walk(step, len(recurrent) - 1, keep)
        path = self._empty((K + 1, B, H), a.dtype)
        path[K if reverse else 0] = h
        saved = tuple(self._empty((K, B, H), a.dtype) for _ in program.extras)
        ends = (path[1:], path[:-1]) if reverse else (path[:-1], path[1:])
        pair = turned(a)[:, : 2 * H]
        over = steps_over([*columns_of(a, 3), pair, *map(turned, (*ends, *saved))], alive, reverse)
        vectors = [c[:, None] if B == 1 else c[:, None].repeat(B, axis=1) for c in recurrent[1:]]
        walk(over, recurrent[0], vectors, (H, B), a.dtype)
        return path, saved or None

    def backward(
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
        program = backward_program(step, len(saved), dy is not None, taps)
        walk = backward_walk(step, len(saved), dy is not None, taps)
        parts = [self._empty((K, B, len(e) * H), dh.dtype) for e in program.extras]
        columns = [column for part in parts for column in columns_of(part, part.shape[2] // H)]
        given = [] if dy is None else [dy]
        wide = map(turned, (*given, previous, *saved))
        over = steps_over([*wide, *columns, *map(turned, parts)], alive, not reverse)
        dh = walk(over, U, dh.T, (H, B), dh.dtype)
        g = parts.pop() if taps else None
        return tuple(parts), dh.T, g


def turned(v: Any) -> Any:
    """(K, B, N) -> (K, N, B) or back, over the same memory."""
    return v.swapaxes(1, 2)


class Filled:
    """An array that is filled block by block."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def put(self, block: slice, piece: Any) -> None:
        """Write the piece where it belongs, as the array's dtype."""
        self._array[block] = piece

    def array(self) -> Any:
        """The array."""
        return self._array


def _wider(v: Any, last: Any) -> Any:
    """(..., N) -> (..., N + 1), a last column beside it."""
    wider = empty((*v.shape[:-1], v.shape[-1] + 1), v.dtype)
    wider[..., :-1], wider[..., -1] = v, last
    return wider


def columns_of(v: Any, n: int) -> list[Any]:
    """(K, B, nH) -> n arrays (K, H, B) over the same memory."""
    H = v.shape[-1] // n
    return [turned(v)[:, i * H : (i + 1) * H] for i in range(n)]


def steps_over(arrays: list[Any], alive: Any, backwards: bool) -> Any:
    """What the walk takes at each step: an entry of each array, and which rows have ended."""
    ended = [None if mask is None else ~mask.T for mask in alive or [None] * len(arrays[-1])]
    # a list, since CPython 3.11 loses a tuple where a generator stands behind the star
    return zip(*[v[::-1] if backwards else v for v in (*arrays, ended)], strict=True)


# source ------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def forward_program(step: Any, vectors: int, keep: bool) -> Program:
    """The operations of a step on a, h, U and so many vectors."""
    program = trace(step, 3, 1, MATRIX, *[1] * vectors)
    return program if keep else program.without_extras()


@lru_cache(maxsize=64)
def backward_program(step: Any, saved: int, given: bool, taps: bool) -> Program:
    """The operations of the gradient of a step on dy (if given), dh, h, the saved arrays and U.

    With taps, g = dL/dh' is returned as the last extra.
    """

    def summed(xp: Any, *arguments: Any) -> Any:
        dy, dh, h, *kept, U = arguments if given else (None, *arguments)
        g = dh + dy if given else dh
        if taps and not given:
            g = dh * 1.0  # a result of its own, since an input is written nowhere
        new, parts = step(xp, g, h, kept, U)
        return new, (*parts, g) if taps else parts

    return trace(summed, *[1] * (given + 2 + saved), MATRIX)


@lru_cache(maxsize=64)
def forward_walk(step: Any, vectors: int, keep: bool, make: Any = None) -> Any:
    """A function that walks a block of steps forward; make: in place of `_Lines`."""
    program = forward_program(step, vectors, keep)
    (a, (h,), _, *c) = program.inputs
    homes = {column: f"a{i}" for i, column in enumerate(a)} | {h: "h"}
    homes |= {column: f"c{i}" for i, (column,) in enumerate(c)}
    saved = [f"s{i}" for i in range(len(program.extras))]
    given = {column: [name] for (column,), name in zip(program.extras, saved, strict=True)}
    given.setdefault(program.result, []).insert(0, "o")
    lines = (make or _Lines)(program, homes, given, {}, {("a0", "a1"): "a0_a1"})
    source = [
        "def walk(over, M, vectors, shape, dtype):",
        *(f"    c{i} = vectors[{i}]" for i in range(vectors)),
        *lines.prologue(),
        f"    for {', '.join(['a0, a1, a2, a0_a1, h, o', *saved, 'ended'])} in over:",
        *lines.body,
        "        if ended is not None:",
        "            copyto(o, h, where=ended)",
    ]
    return lines.compiled(source)


@lru_cache(maxsize=64)
def backward_walk(step: Any, saved: int, given_dy: bool, taps: bool, make: Any = None) -> Any:
    """A function that walks a block of steps back; make: in place of `_Lines`."""
    program = backward_program(step, saved, given_dy, taps)
    taken = [*(["dy"] if given_dy else []), "h", *(f"s{i}" for i in range(saved))]
    columns = [column for ids in program.inputs for column in ids]
    inputs = list(taken)
    inputs.insert(int(given_dy), "old")
    homes = dict(zip(columns, inputs, strict=True))
    given: dict[int, list[str]] = {program.result: ["new"]}
    wide = {}
    for p, extra in enumerate(program.extras):
        wide[extra] = f"p{p}"
        for i, column in enumerate(extra):
            taken.append(f"p{p}_{i}")
            given.setdefault(column, []).append(taken[-1])
    lines = (make or _Lines)(program, homes, given, wide, {})
    source = [
        "def walk(over, M, dh, shape, dtype):",
        "    old, new = array(dh, order='C'), empty(shape, dtype)",
        *lines.prologue(),
        f"    for {', '.join([*taken, *wide.values(), 'ended'])} in over:",
        *lines.body,
        "        if ended is not None:",
        "            copyto(new, old, where=ended)",
        "        old, new = new, old",
        "    return old",
    ]
    return lines.compiled(source)


def _compiled(source: list[str]) -> Any:
    """The function `walk` of this source."""
    names = "add subtract multiply divide tanh exp matmul copyto empty array"
    scope = {name: getattr(np, name) for name in names.split()}
    exec("\n".join(source), scope)
    quiet = np.errstate(over="ignore", under="ignore")  # exp is then inf or 0, as it should be
    return quiet(scope["walk"]) if any("exp(" in line for line in source) else scope["walk"]


class _Lines:
    """The lines of one step, and the buffers and constants that stand before the loop.

    homes: where the inputs are, column -> name; given: where results go, column -> names;
    wide: columns that stand side by side in one array -> its name; pairs: the names of two arrays
    side by side -> that of both. The same operation on both sides of a pair is one call.
    """

    def __init__(self, program: Program, homes: Any, given: Any, wide: Any, pairs: Any) -> None:
        self.homes, self.given, self.wide, self.pairs = dict(homes), given, wide, pairs
        self.body: list[str] = []
        self.buffers: list[str] = []
        self.constants: dict[float, str] = {}
        self.free: list[str] = []
        self.slots: set[str] = set()
        self.uses = Counter(i for op in program.ops for i in op.inputs)
        last = {i: n for n, op in enumerate(program.ops) for i in op.inputs}
        ops = dict(enumerate(program.ops))
        while ops:
            n = min(ops)
            op = ops.pop(n)
            dying = {i for i in op.inputs if not isinstance(i, float) and last[i] == n}
            if isinstance(op, Product):
                self._product(op, dying, len(self.buffers))
            elif twin := next((m for m, other in ops.items() if self._together(op, other)), None):
                del ops[twin]
            else:
                self._element(op, dying)
        done = {op.output for op in program.ops if isinstance(op, Op)}
        for column in sorted(set(given) - done):  # a result that is an input, or a product
            for name in given[column]:
                self.body.append(f"        copyto({name}, {self.homes[column]})")

    def compiled(self, source: list[str]) -> Any:
        """The function `walk` of this source."""
        return _compiled(source)

    def prologue(self) -> list[str]:
        """The lines before the loop."""
        values = [f"    {k} = array({v!r}, dtype)" for v, k in self.constants.items()]
        return ["    H, B = shape", *self.buffers, *values]

    def _element(self, op: Op, dying: set[int]) -> None:
        arguments = [self._value(i) for i in op.inputs]
        spare = [self.homes[i] for i in sorted(dying) if self.homes[i] in self.slots]
        self.free += [slot for slot in spare if slot not in self.free]
        names = self.given.get(op.output) or [self._slot()]
        self.homes[op.output] = names[0]
        self.body.append(f"        {op.name}({', '.join([*arguments, names[0]])})")
        self.body += [f"        copyto({name}, {names[0]})" for name in names[1:]]

    def _together(self, op: Op, other: Any) -> bool:
        """Do both operations in one call, over an input that nothing else needs, if that can be."""
        if op.name != getattr(other, "name", "") or {op.output, other.output} & set(self.given):
            return False
        names, over = [], []
        for i, j in zip(op.inputs, other.inputs, strict=True):
            pair = self.homes.get(i), self.homes.get(j)
            names.append(
                self._value(i) if isinstance(i, float) and i == j else self.pairs.get(pair)
            )
            if pair[0] in self.slots and self.uses[i] == self.uses[j] == 1:
                over.append((names[-1], pair))
        if not all(names) or not over:
            return False
        out, (self.homes[op.output], self.homes[other.output]) = over[0]
        self.body.append(f"        {op.name}({', '.join([*names, out])})")
        return True

    def _product(self, op: Product, dying: set[int], n: int) -> None:
        rows = f"M[{op.rows.start} * H : {op.rows.stop} * H]"
        rows = rows if op.transposed else f"{rows}.T"
        self.buffers.append(f"    M{n}, q{n} = {rows}, empty(({len(op.outputs)} * H, B), dtype)")
        left = self._side_by_side(op.inputs) or self._gathered(op.inputs, f"x{n}")
        self.body.append(f"        matmul(M{n}, {left}, q{n})")
        for i, column in enumerate(op.outputs):
            name = self.homes[column] = f"q{n}_{i}"
            self.buffers.append(f"    {name} = q{n}[{i} * H : {i + 1} * H]")
            self.slots.add(name)
        for i in range(1, len(op.outputs)):
            left, right = f"q{n}_{i - 1}", f"q{n}_{i}"
            self.pairs[left, right] = f"{left}_{i}"
            self.buffers.append(f"    {left}_{i} = q{n}[{i - 1} * H : {i + 1} * H]")
        self.free += [self.homes[i] for i in dying if self.homes[i] in self.slots]

    def _slot(self) -> str:
        if self.free:
            return self.free.pop()
        name = f"t{len(self.slots)}"
        self.slots.add(name)
        self.buffers.append(f"    {name} = empty(shape, dtype)")
        return name

    def _value(self, i: Any) -> str:
        if isinstance(i, float):
            return self.constants.setdefault(i, f"k{len(self.constants)}")
        return self.homes[i]

    def _side_by_side(self, columns: tuple[int, ...]) -> str:
        if len(columns) == 1:
            return self.homes[columns[0]]
        for whole, name in self.wide.items():
            for i in range(len(whole) - len(columns) + 1):
                if whole[i : i + len(columns)] == columns:
                    end = i + len(columns)
                    return name if columns == whole else f"{name}[{i} * H : {end} * H]"
        return ""

    def _gathered(self, columns: tuple[int, ...], name: str) -> str:
        self.buffers.append(f"    {name} = empty(({len(columns)} * H, B), dtype)")
        for i, column in enumerate(columns):
            part = f"{name}[{i} * H : {i + 1} * H]"
            self.body.append(f"        copyto({part}, {self.homes[column]})")
        return name
