"""From the traced operations of a step to source for Numba.

The operations between two matrix products become one loop over rows and units, in which no array
but inputs and results is touched. The function `walk` goes through all steps of a block.
"""

from typing import Any

import numpy as np

from .trace import Op, Product, Program

SIGNS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
HEAD = '''\
import math
import numpy as np
from numba import njit
from gru_any.backend.cpu.barrier import barrier_wait, join_team, share_of
from gru_any.backend.cpu.gemm import UNIT_BYTES, gemm, pack_units

f = np.{dtype}
UNIT = UNIT_BYTES // f(0).itemsize
flags = dict(nogil=True, error_model="numpy")  # no fastmath: the same bits whatever is stored


@njit(nogil=True, error_model="numpy", fastmath={{"reassoc", "contract"}})
def gemv(x, left, U, y):
    """y = x[:, left:] U^T for few rows, where U is not worth packing: all meet four of its rows."""
    four = len(U) - len(U) % 4
    for k in range(0, four, 4):
        for b in range(len(x)):
            v = x[b, left : left + U.shape[1]]
            p = q = r = s = f(0)
            for j in range(len(v)):
                p += v[j] * U[k, j]
                q += v[j] * U[k + 1, j]
                r += v[j] * U[k + 2, j]
                s += v[j] * U[k + 3, j]
            y[b, k], y[b, k + 1], y[b, k + 2], y[b, k + 3] = p, q, r, s
    for k in range(four, len(U)):
        for b in range(len(x)):
            v = x[b, left : left + U.shape[1]]
            p = f(0)
            for j in range(len(v)):
                p += v[j] * U[k, j]
            y[b, k] = p


@njit(nogil=True, error_model="numpy", fastmath={{"contract"}})
def gemv_t(x, U, y):
    """y = x U for one row, likewise."""
    four = len(U) - len(U) % 4
    y[:] = f(0)
    for k in range(0, four, 4):
        p, q, r, s = x[k], x[k + 1], x[k + 2], x[k + 3]
        c, d, e, g = U[k], U[k + 1], U[k + 2], U[k + 3]
        for j in range(len(y)):
            y[j] += p * c[j] + q * d[j] + (r * e[j] + s * g[j])
    for k in range(four, len(U)):
        for j in range(len(y)):
            y[j] += x[k] * U[k, j]


@njit(**flags)
def part(v, start, shape):
    """The next numbers of v, as an array of this shape, and where they end."""
    size = 1
    for n in shape:
        size *= n
    return v[start : start + size].reshape(shape), start + size


@njit(**flags)
def affine(x, W, b, a):
    """a = x W^T + b, likewise."""
    gemv(x, 0, W, a)
    for r in range(len(x)):
        for j in range(len(b)):
            a[r, j] += b[j]


'''
# float32: from a rational function p / q = tanh(x / 2), whose errors tanh(x) = 2pq / (q^2 + p^2)
# damps: within 2.1e-7, and relatively within 5e-7 down to the smallest normal number; exactly 1
# where float32 rounds to that; NaN stays NaN; it vectorises
TANH = {
    "float32": """
@njit(nogil=True, error_model="numpy", fastmath={"contract"})
def tanh(x):
    y = f(0.5) * x
    u = y * y
    v = u * u
    p = f(-1.7583789182401143e-08) * v + (f(1.046749918750416e-05) * u + f(0.003036098315318411))
    p = (p * v + (f(0.1302255336823433) * u + f(0.9999998719479379))) * y
    q = f(0.00024486609330362513) * u + f(0.024222763997786688)
    q = q * v + (f(0.46355838509634517) * u + f(1.0))
    return math.copysign(f(1.0), x) if abs(x) >= f(9.01) else (p + p) * q / (q * q + p * p)
""",
    "float64": """
tanh = math.tanh
""",
}


class Place(tuple[str, str, int]):
    """Where a column stands in memory: (array, its first index or "", its number in the array)."""

    def argument(self) -> str:
        """The rows (B, .) of this step."""
        array, first, _ = self
        return f"{array}[{first}]" if first else array

    def name(self) -> str:
        """What a fused loop calls them."""
        array, first, _ = self
        return f"{array}_{first}" if first else array

    def row(self) -> str:
        """The units of row b there, from `start` on."""
        array, first, number = self
        if first is None:
            return f"{array}[start:]"
        return f"{self.name()}[b, {number} * H + start :]"


class Layout:
    """Where everything stands, and what is done in which order: products, and fused loops.

    inputs, results: column -> places; a vector (H,) stands at ("c0", None, 0).
    """

    def __init__(self, program: Program, inputs: dict[int, Place], results: Any) -> None:
        assert set(results) <= {op.output for op in program.ops if isinstance(op, Op)}
        self.read = dict(inputs)
        self.written: dict[int, list[Place]] = {k: list(v) for k, v in results.items()}
        self.buffers: dict[str, int] = {}
        self.stages: list[Product | list[Op]] = []
        for op in program.ops:
            if isinstance(op, Product):
                self.stages.append(op)
            elif self.stages and isinstance(self.stages[-1], list):
                self.stages[-1].append(op)
            else:
                self.stages.append([op])
        self.products = [stage for stage in self.stages if isinstance(stage, Product)]
        for n, stage in enumerate(self.stages):
            self._place(stage, self.stages[n + 1 :])

    def _place(self, stage: Any, later: list[Any]) -> None:
        if isinstance(stage, Product):
            self._buffer(stage.outputs)
            return
        made = {op.output for op in stage}
        for after in later:
            if isinstance(after, Product) and made & set(after.inputs) and not self.side(after):
                self._buffer(after.inputs)
        used = {i for s in later for op in (s if isinstance(s, list) else [s]) for i in op.inputs}
        for column in sorted(made):
            if column in used and column not in self.written:
                self._buffer((column,))
            if column in self.written:
                self.read.setdefault(column, self.written[column][0])

    def _buffer(self, columns: tuple[int, ...]) -> None:
        name = f"q{len(self.buffers)}"
        self.buffers[name] = len(columns)
        for number, column in enumerate(columns):
            self.written.setdefault(column, []).append(Place((name, "", number)))
            self.read.setdefault(column, self.written[column][-1])

    def side(self, product: Product) -> Place | None:
        """Where the inputs of a product stand side by side."""
        first = product.inputs[0]
        for array, index, number in [
            *self.written.get(first, []),
            self.read.get(first, ("", "", 0)),
        ]:
            wanted = [(array, index, number + i) for i in range(len(product.inputs))]
            found = [[*self.written.get(c, []), self.read.get(c)] for c in product.inputs]
            if array and all(w in f for w, f in zip(wanted, found, strict=True)):
                return Place((array, index, number))
        return None

    def fused(self, n: int, stage: list[Op]) -> tuple[list[str], str]:
        """The function of one stage, a loop over rows and units; and its call."""
        loads, lines, stores, views, rows = [], [], [], [], {}  # type: ignore[var-annotated]

        def entry(place: Place) -> str:
            rows[place.name()] = place.argument()
            view = f"x{len(views)}"  # Numba sees that its index is not negative, so it vectorises
            views.append(f"{view} = {place.row()}")
            return f"{view}[j]"

        made = {op.output for op in stage}
        used = {i for op in stage for i in op.inputs if not isinstance(i, float)}
        for column in sorted(used - made):
            loads.append(f"v{column} = {entry(self.read[column])}")
        for op in stage:
            x = [f"f({i!r})" if isinstance(i, float) else f"v{i}" for i in op.inputs]
            value = f"tanh({x[0]})" if op.name == "tanh" else f" {SIGNS[op.name]} ".join(x)
            lines.append(f"v{op.output} = {value}")
            for place in self.written.get(op.output, []):
                stores.append(f"{entry(place)} = v{op.output}")
        call = f"fused{n}(first, last, left, right, H, {', '.join(rows.values())})"
        return [
            "@njit(**flags)",
            f"def fused{n}(first, last, left, right, H, {', '.join(rows)}):",
            "    units = right - left",
            "    for b in range(first, last):",
            "        start, count = left, units - units % UNIT or units",
            "        while True:",
            *(f"            {view}" for view in views),
            "            for j in range(count):",
            *(f"                {line}" for line in (*loads, *lines, *stores)),
            "            if start + count == right:",
            "                break",
            "            start, count = right - UNIT, UNIT  # some again, as a loop of few is slow",
            "",
        ], call

    def product(self, op: Product, few: bool, turned: bool = False) -> list[str]:
        """The lines that do one matrix product; turned: few rows by the matrix as it is read."""
        left, out = self.side(op), self.written[op.outputs[0]][-1]
        assert left is not None
        x, y = left.argument(), out.argument()
        matrix, gates = f"M{self.products.index(op)}", len(op.outputs)
        if few:
            if op.transposed and not turned:
                return [f"gemv({x}, {left[2]} * H, {matrix}, {y})"]
            row = f"{x}[b, {left[2]} * H : {left[2] + len(op.inputs)} * H]"
            return ["for b in range(first, last):", f"    gemv_t({row}, {matrix}, {y}[b])"]
        places = f"{x}, {left[2]} * H, {matrix}, zeros, {y}, first, last, left, right"
        return [f"gemm(functions[{gates - 1}], np.intp({gates}), {places})"]

    def source(self, arrays: list[str], state: str, dtype: str) -> str:
        """A module with `walk`, which takes the rows first to last of a block through all steps.

        state: the array of (., B, H) of which a row that has ended keeps its entry. The members of
        `sync` share the units, and meet before each product, which needs what all have made. (A
        step with a single product, of a buffer, would need another meeting after it; none of ours
        is so.)

        Where there is `a`, it becomes x W^T + bias: if it has room for one step, before each; else
        for all in one go; and it stays as it is where x has no columns.

        fresh: each member copies first what it reads of the matrices, which no other member does.
        """
        sources = [f"{name}_from" for name in self.matrices()]
        names = ", ".join([*self.matrices(), *arrays, *self.buffers, *sources])
        gates = [len(op.outputs) for op in self.products]
        copied = list(zip(sources, self.matrices(), gates, strict=True))
        if "a" in arrays:
            names, copied = f"{names}, W_from", [*copied, ("W_from", "W", 3)]
        bits = 8 * np.dtype(dtype).itemsize
        return "\n".join([
            *self._functions(dtype),
            "@njit(cache=CACHE, **flags)",
            "def walk(ts, ins, outs, ended, zeros, first, last, me, sync, fresh, functions, "
            f"{names}):",
            f"    H, count, times = {state}.shape[2], join_team(sync, me), np.intp(2)",
            "    if me >= count:",
            "        return",
            "    left, right = share_of(H, UNIT, me, count)",
            "    if fresh:",
            *(f"        pack_units({bits}, {M}, {P}, {g}, left, right)" for M, P, g in copied),
            *self._steps("a" in arrays, state, False),
            "",
        ])  # fmt: skip

    def few(self, arrays: list[str], made: dict[str, str], dtype: str) -> str:
        """A module with `few`, which is `walk` for so few rows that no matrix is worth packing.

        In one thread; it returns the arrays that results go to: made, with their shapes, the state
        first, which begins with h.
        """
        state, given = next(iter(made)), [name for name in arrays if name not in made]
        axes = {name: ":, :, ::1" for name in given} | {"W": ":, ::1"}
        axes |= {name: "::1" for name in given if name[0] in "cb"}
        kinds = ["int64[::1]"] * 3 + ["boolean[:, ::1]"] + [f"{dtype}[:, ::1]"] * 2
        kinds += [f"{dtype}[{axes[name]}]" for name in given]
        rows = [f"U[{op.rows.start} * H : {op.rows.stop} * H]" for op in self.products]
        return "\n".join([
            *self._functions(dtype),
            f"@njit('({', '.join(kinds)})', cache=CACHE, **flags)",
            f"def few(ts, ins, outs, ended, h, U, {', '.join(given)}):",
            "    K, (B, H) = len(ts), h.shape",
            "    first, last, left, right = 0, B, 0, H",
            *(f"    {name} = {part}" for name, part in zip(self.matrices(), rows, strict=True)),
            *(f"    {name} = np.empty((B, {n} * H), f)" for name, n in self.buffers.items()),
            *(f"    {name} = np.empty({shape}, f)" for name, shape in made.items()),
            "    for b in range(B):",
            "        for j in range(H):",
            f"            {state}[ins[0], b, j] = h[b, j]",
            *self._steps("a" in arrays, state, True),
            f"    return {', '.join(made)},",
            "",
        ])  # fmt: skip

    def _functions(self, dtype: str) -> list[str]:
        """The lines before a walk."""
        loops = [
            self.fused(n, stage) for n, stage in enumerate(self.stages) if isinstance(stage, list)
        ]
        return [
            HEAD.format(dtype=dtype) + TANH[dtype],
            *(line for loop, _ in loops for line in loop),
        ]

    def _steps(self, affine: bool, state: str, few: bool) -> list[str]:
        """The lines that go through all steps."""
        before, lines = self._input(few) if affine else ([], [])
        return [
            *(f"    {line}" for line in before),
            "    for n in range(len(ts)):",
            "        t, i, o = ts[n], ins[n], outs[n]",
            *(f"        {line}" for line in (*lines, *self._stages(few))),
            "        if len(ended):",
            "            for b in range(first, last):",
            "                if ended[t, b]:",
            "                    for j in range(left, right):",
            f"                        {state}[o, b, j] = {state}[i, b, j]",
        ]

    def _stages(self, few: bool, turned: bool = False) -> list[str]:
        """The lines of one step."""
        lines = []
        for n, stage in enumerate(self.stages):
            if isinstance(stage, list):
                lines.append(self.fused(n, stage)[1])
            else:
                lines += [] if few else ["times = barrier_wait(sync, me, count, times)"]
                lines += self.product(stage, few, turned)
        return lines

    def _input(self, few: bool) -> tuple[list[str], list[str]]:
        """The lines before all steps and those before each that fill `a`."""
        if few:
            return [
                "for n in range(len(x) if x.shape[2] else 0):",
                "    affine(x[n], W, bias, a[n])",
            ], ["s = t"]
        fill = (
            "gemm(functions[2], np.intp(3), {}, np.intp(0), W, bias, {}, first{}, last{}, "
            "left, right)"
        )
        return [
            "K, B, I = x.shape",
            "each = len(a) < K",
            "if I and not each:",
            "    " + fill.format("x.reshape(K * B, I)", "a.reshape(K * B, 3 * H)", " * K", " * K"),
        ], [
            "s = 0 if each else t",
            "if each:",
            "    " + fill.format("x[t]", "a[0]", "", ""),
        ]

    def step(self, vectors: list[str], made: dict[str, str], dtype: str) -> str:
        """A module with `step` for few rows, x (B, I), h (B, H) -> new (B, H), and the same as y.

        weights: W (I, 3H), turned, the matrix of each product as it is read, bias, and the vectors.
        """
        shapes = {"W": "(x.shape[1], 3 * H)"}
        for name, op in zip(self.matrices(), self.products, strict=True):
            shapes[name] = f"({len(op.inputs)} * H, {len(op.outputs)} * H)"
        shapes |= {"bias": "(3 * H,)"} | dict.fromkeys(vectors, "(H,)")
        room = made | {name: f"(B, {n} * H)" for name, n in self.buffers.items()}
        matrix = f"{dtype}[:, ::1]"
        return "\n".join([
            *self._functions(dtype),
            f"@njit('void({', '.join([matrix] * 4)}, {dtype}[::1])', cache=CACHE, **flags)",
            "def step(x, h, y, new, weights):",
            "    K, (B, H), end = 1, h.shape, 0",
            *(f"    {name}, end = part(weights, end, {shape})" for name, shape in shapes.items()),
            *(f"    {name} = np.empty({shape}, f)" for name, shape in room.items()),
            "    a = np.empty((1, B, 3 * H), f)",
            "    for b in range(B):",
            "        for j in range(H):",
            "            path[0, b, j] = h[b, j]",
            "        gemv_t(x[b], W, a[0, b])",
            "        for j in range(3 * H):",
            "            a[0, b, j] += bias[j]",
            "    first, last, left, right, t, s, i, o = 0, B, 0, H, 0, 0, 0, 1",
            *(f"    {line}" for line in self._stages(True, True)),
            "    for b in range(B):",
            "        for j in range(H):",
            "            y[b, j] = new[b, j] = path[1, b, j]",
            "",
        ])  # fmt: skip

    def matrices(self) -> list[str]:
        """What `walk` calls the matrix of each product."""
        return [f"M{n}" for n in range(len(self.products))]
