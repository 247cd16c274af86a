"""From the traced operations of a step to source for Numba.

The operations between two matrix products become one loop over rows and units, in which no array
but inputs and results is touched. The function `walk` goes through all steps of a block.
"""

from typing import Any

from ..trace import Op, Product, Program

SIGNS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
HEAD = '''\
import math
import numpy as np
from numba import njit
from gru_any.backend.barrier import meet, members, share
from gru_any.backend.tile import UNIT_BYTES, multiply

f = np.{dtype}
UNIT = UNIT_BYTES // f(0).itemsize
flags = dict(nogil=True, error_model="numpy")  # no fastmath: the same bits whatever is stored


@njit(nogil=True, error_model="numpy", fastmath={{"reassoc", "contract"}})
def dots(x, U, y, gates, left, right):
    """y = x U^T in some units of each gate, for one row, where U is not worth packing."""
    H = len(U) // gates
    for g in range(gates):
        V, w = U[g * H + left : g * H + right], y[g * H + left : g * H + right]
        four = len(V) - len(V) % 4
        for k in range(0, four, 4):
            p = q = r = s = f(0)
            for j in range(len(x)):
                p += x[j] * V[k, j]
                q += x[j] * V[k + 1, j]
                r += x[j] * V[k + 2, j]
                s += x[j] * V[k + 3, j]
            w[k], w[k + 1], w[k + 2], w[k + 3] = p, q, r, s
        for k in range(four, len(V)):
            p = f(0)
            for j in range(len(x)):
                p += x[j] * V[k, j]
            w[k] = p


@njit(nogil=True, error_model="numpy", fastmath={{"contract"}})
def sums(x, U, y, left, right):
    """y = x U in some columns, likewise."""
    w, four = y[left:right], len(U) - len(U) % 4
    w[:] = f(0)
    for k in range(0, four, 4):
        p, q, r, s = x[k], x[k + 1], x[k + 2], x[k + 3]
        c, d, e, g = U[k, left:], U[k + 1, left:], U[k + 2, left:], U[k + 3, left:]
        for j in range(len(w)):
            w[j] += p * c[j] + q * d[j] + (r * e[j] + s * g[j])
    for k in range(four, len(U)):
        for j in range(len(w)):
            w[j] += x[k] * U[k, left + j]


'''
# float32: from a rational function p / q = tanh(x / 2), whose errors that damps: within 1.8e-7, and
# 1 where it should be; it vectorises; NaN stays NaN
TANH = {
    "float32": """
@njit(nogil=True, error_model="numpy", fastmath={"contract"})
def tanh(x):
    y = min(max(f(0.5) * x, f(-4.6)), f(4.6))
    u = y * y
    v = u * u
    p = f(-8.60467152213735e-11) * v + (f(5.12229709037114e-08) * u + f(1.48572235717979e-05))
    p = (p * v + (f(6.37261928875436e-04) * u + f(4.89352455891786e-03))) * y
    q = f(1.19825839466702e-06) * u + f(1.18534705686654e-04)
    q = q * v + (f(2.26843463243900e-03) * u + f(4.89352518554385e-03))
    return (p + p) * q / (q * q + p * p) if x == x else x
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

    def product(self, op: Product, few: bool) -> list[str]:
        """The lines that do one matrix product."""
        left, out = self.side(op), self.written[op.outputs[0]][-1]
        assert left is not None
        x, y = left.argument(), out.argument()
        matrix, gates = f"M{self.products.index(op)}", len(op.outputs)
        if few:
            name, more = ("dots", f"{gates}, ") if op.transposed else ("sums", "")
            row = f"{x}[b, {left[2]} * H : {left[2] + len(op.inputs)} * H]"
            return [
                "for b in range(first, last):",
                f"    {name}({row}, {matrix}, {y}[b], {more}left, right)",
            ]
        places = f"{x}, {left[2]} * H, {matrix}, zeros, {y}, first, last, left, right"
        return [f"multiply(functions[{gates - 1}], {gates}, {places})"]

    def source(self, arrays: list[str], state: str, dtype: str, few: bool) -> str:
        """A module with `walk`, which takes the rows first to last of a block through all steps.

        state: the array of (., B, H) of which a row that has ended keeps its entry; few: so few
        steps and rows that the matrices are not worth packing. The members of `sync` share the
        units, and meet before each product, which needs what all have made. (A step with a single
        product, of a buffer, would need another meeting after it; none of ours is so.)
        """
        names = ", ".join([*self.matrices(), *arrays, *self.buffers])
        lines, walk = [HEAD.format(dtype=dtype) + TANH[dtype]], []
        for n, stage in enumerate(self.stages):
            if isinstance(stage, list):
                function, call = self.fused(n, stage)
                lines += function
                walk.append(call)
            else:
                walk += ["times = meet(sync, me, count, times)", *self.product(stage, few)]
        return "\n".join([
            *lines,
            "@njit(cache=CACHE, **flags)",
            f"def walk(ts, ins, outs, ended, zeros, first, last, me, sync, functions, {names}):",
            f"    H, count, times = {state}.shape[2], members(sync, me), 2",
            "    if me >= count:",
            "        return",
            "    left, right = share(H, UNIT, me, count)",
            "    for n in range(len(ts)):",
            "        t, i, o = ts[n], ins[n], outs[n]",
            *(f"        {line}" for line in walk),
            "        if len(ended):",
            "            for b in range(first, last):",
            "                if ended[t, b]:",
            "                    for j in range(left, right):",
            f"                        {state}[o, b, j] = {state}[i, b, j]",
            "",
        ])  # fmt: skip

    def single(self, vectors: list[str], dtype: Any) -> str:
        """A function for one step forward, the product with the input included: -> h' (B, H)."""
        rows = [f"U[{op.rows.start} * H : {op.rows.stop} * H]" for op in self.products]
        buffers = [f"np.empty((B, {n} * H), h.dtype)" for n in self.buffers.values()]
        arguments = ", ".join([*rows, "a", "path", *vectors, *buffers])
        matrix, vector = f"{dtype}[:, ::1]", f"{dtype}[::1]"
        kinds = ", ".join([matrix, matrix, vector, matrix, matrix, *(vector for _ in vectors)])
        return "\n".join([
            "",
            f"@njit('{matrix}({kinds})', cache=CACHE, **flags)",
            f"def step(x, W, b, h, {', '.join(['U', *vectors])}):",
            "    B, H = h.shape",
            "    a, path = np.empty((1, B, 3 * H), h.dtype), np.empty((2, B, H), h.dtype)",
            "    for r in range(B):",
            "        dots(x[r], W, a[0, r], 1, 0, 3 * H)",
            "        for j in range(H):",
            "            path[0, r, j] = h[r, j]",
            "        for j in range(3 * H):",
            "            a[0, r, j] += b[j]",
            "    zeros, t = np.zeros(3 * H, h.dtype), np.zeros(1, np.int64)",
            "    none, alone = np.zeros((0, 0), np.bool_), np.zeros(0, np.int64)",
            f"    walk(t, t, t + 1, none, zeros, 0, B, 0, alone, t, {arguments})",
            "    return path[1]",
            "",
        ])  # fmt: skip

    def matrices(self) -> list[str]:
        """What `walk` calls the matrix of each product."""
        return [f"M{n}" for n in range(len(self.products))]
