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
from gru_any.backend.tile import UNIT_BYTES, product1, product2, product3

f = np.{dtype}
UNIT = UNIT_BYTES // f(0).itemsize
flags = dict(nogil=True, error_model="numpy")  # no fastmath: the same bits whatever is stored


@njit(nogil=True, error_model="numpy", fastmath={{"reassoc", "contract"}})
def dots(x, U, y, first, last):
    """y = x U^T, for so few rows that U is not worth packing; four rows of U at a time."""
    four = len(U) - len(U) % 4
    for b in range(first, last):
        v, w = x[b], y[b]
        for k in range(0, four, 4):
            p = q = r = s = f(0)
            for j in range(len(v)):
                p += v[j] * U[k, j]
                q += v[j] * U[k + 1, j]
                r += v[j] * U[k + 2, j]
                s += v[j] * U[k + 3, j]
            w[k], w[k + 1], w[k + 2], w[k + 3] = p, q, r, s
        for k in range(four, len(U)):
            p = f(0)
            for j in range(len(v)):
                p += v[j] * U[k, j]
            w[k] = p


@njit(nogil=True, error_model="numpy", fastmath={{"contract"}})
def sums(x, U, y, first, last):
    """y = x U, likewise."""
    four = len(U) - len(U) % 4
    for b in range(first, last):
        v, w = x[b], y[b]
        w[:] = f(0)
        for k in range(0, four, 4):
            p, q, r, s = v[k], v[k + 1], v[k + 2], v[k + 3]
            for j in range(len(w)):
                w[j] += p * U[k, j] + q * U[k + 1, j] + (r * U[k + 2, j] + s * U[k + 3, j])
        for k in range(four, len(U)):
            for j in range(len(w)):
                w[j] += v[k] * U[k, j]


'''
# float32: a rational function within 2.7e-7 of tanh, which vectorises; NaN stays NaN
TANH = {
    "float32": """
@njit(nogil=True, error_model="numpy", fastmath={"contract"})
def tanh(x):
    y = min(max(x, f(-7.9988117)), f(7.9988117))
    u = y * y
    p = f(-2.76076847742355e-16) * u + f(2.00018790482477e-13)
    p = ((p * u + f(-8.60467152213735e-11)) * u + f(5.12229709037114e-08)) * u
    p = (p + f(1.48572235717979e-05)) * u + f(6.37261928875436e-04)
    p = p * u + f(4.89352455891786e-03)
    q = (f(1.19825839466702e-06) * u + f(1.18534705686654e-04)) * u + f(2.26843463243900e-03)
    return p * y / (q * u + f(4.89352518554385e-03)) if x == x else x
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
        """The units of row b there, from `left` on."""
        array, first, number = self
        if first is None:
            return f"{array}[left:]"
        return f"{self.name()}[b, {number} * H + left :]"


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
            "    for b in range(first, last):",
            *(f"        {view}" for view in views),
            "        for j in range(right - left):",
            *(f"            {line}" for line in (*loads, *lines, *stores)),
            "",
        ], call

    def product(self, op: Product, few: bool) -> str:
        """The call that does one matrix product."""
        left, out = self.side(op), self.written[op.outputs[0]][-1]
        assert left is not None
        x, y = left.argument(), out.argument()
        places = [*self.read.values(), *(p for places in self.written.values() for p in places)]
        if len(op.inputs) <= max(p[2] for p in places if p[0] == left[0]):  # a part of the array
            x += f"[:, {left[2]} * H : {left[2] + len(op.inputs)} * H]"
        matrix = f"M{self.products.index(op)}"
        if few:
            return f"{'dots' if op.transposed else 'sums'}({x}, {matrix}, {y}, first, last)"
        arguments = f"{matrix}, zeros[:, : {y}.shape[1]], {y}, first, last, left, right"
        return f"product{len(op.outputs)}({x}, {arguments})"

    def source(self, arrays: list[str], state: str, dtype: str, few: bool) -> str:
        """A module with `walk`, which takes the rows first to last of a block through all steps.

        state: the array of (., B, H) of which a row that has ended keeps its entry; few: so few
        steps and rows that the matrices are not worth packing. The members of `sync` share the
        units; each needs what all have made before a product.
        """
        names = ", ".join([*self.matrices(), *arrays, *self.buffers])
        lines, walk = [HEAD.format(dtype=dtype) + TANH[dtype]], []
        for n, stage in enumerate(self.stages):
            if isinstance(stage, list):
                function, call = self.fused(n, stage)
                lines += function
                walk.append(call)
            else:
                walk += ["times = meet(sync, me, count, times)", self.product(stage, few)]
        return "\n".join([
            *lines,
            "@njit(cache=CACHE, **flags)",
            f"def walk(ts, ins, outs, ended, zeros, first, last, me, sync, {names}):",
            f"    H, count, times = {state}.shape[2], members(sync), 1",
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

    def single(self, vectors: list[str]) -> str:
        """A function for one step forward, the product with the input included: -> h' (B, H)."""
        rows = [f"U[{op.rows.start} * H : {op.rows.stop} * H]" for op in self.products]
        buffers = [f"np.empty((B, {n} * H), h.dtype)" for n in self.buffers.values()]
        arguments = ", ".join([*rows, "a", "path", *vectors, *buffers])
        return "\n".join([
            "",
            "@njit(cache=CACHE, **flags)",
            f"def step(x, W, b, h, {', '.join(['U', *vectors])}):",
            "    B, H = h.shape",
            "    a, path = np.empty((1, B, 3 * H), h.dtype), np.empty((2, B, H), h.dtype)",
            "    dots(x, W, a[0], 0, B)",
            "    for r in range(B):",
            "        for j in range(H):",
            "            path[0, r, j] = h[r, j]",
            "        for j in range(3 * H):",
            "            a[0, r, j] += b[j]",
            "    zeros, t = np.zeros((B, 3 * H), h.dtype), np.zeros(1, np.int64)",
            "    none, alone = np.zeros((0, 0), np.bool_), np.zeros(0, np.int64)",
            f"    walk(t, t, t + 1, none, zeros, 0, B, 0, alone, {arguments})",
            "    return path[1]",
            "",
        ])  # fmt: skip

    def matrices(self) -> list[str]:
        """What `walk` calls the matrix of each product."""
        return [f"M{n}" for n in range(len(self.products))]
