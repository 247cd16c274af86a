"""How Numba runs a block of steps: the traced equations, as compiled loops.

The operations between two matrix products become one loop over rows and units, in which no array
but inputs and results is touched. For a few rows the whole walk is compiled, products included,
since a Python call a step would cost more than the arithmetic.
"""

import hashlib
import importlib.util
import os
import platform
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..trace import Op, Product, Program
from .numpy import NumPy, backward_program, forward_program, turned

SIGNS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
HEAD = '''\
"""Written by gru_any from the traced equations; safe to delete."""
import math
import numpy as np
from numba import njit

f = np.{dtype}
flags = dict(nogil=True, error_model="numpy")  # no fastmath: the same bits whatever is stored



@njit(nogil=True, error_model="numpy", fastmath={{"reassoc", "contract"}})
def products(x, U, start, y):
    """y[k] = U[start + k] . x, four rows at a time."""
    four = len(y) - len(y) % 4
    for k in range(0, four, 4):
        a = b = c = d = f(0)
        for j in range(len(x)):
            a += x[j] * U[start + k, j]
            b += x[j] * U[start + k + 1, j]
            c += x[j] * U[start + k + 2, j]
            d += x[j] * U[start + k + 3, j]
        y[k], y[k + 1], y[k + 2], y[k + 3] = a, b, c, d
    for k in range(four, len(y)):
        a = f(0)
        for j in range(len(x)):
            a += x[j] * U[start + k, j]
        y[k] = a


@njit(nogil=True, error_model="numpy", fastmath={{"reassoc", "contract"}})
def sums(x, U, start, y):
    """y = the sum of x[k] * U[start + k], four rows at a time."""
    four = len(x) - len(x) % 4
    for j in range(len(y)):
        y[j] = f(0)
    for k in range(0, four, 4):
        a, b, c, d = x[k], x[k + 1], x[k + 2], x[k + 3]
        for j in range(len(y)):
            y[j] += (
                a * U[start + k, j] + b * U[start + k + 1, j]
                + c * U[start + k + 2, j] + d * U[start + k + 3, j]
            )
    for k in range(four, len(x)):
        a = x[k]
        for j in range(len(y)):
            y[j] += a * U[start + k, j]


'''
# float32: a rational function within 2.6e-7 of tanh, which vectorises; NaN stays NaN
TANH = {
    "float32": """
@njit(inline="always", **flags)
def tanh(x):
    y = min(max(x, f(-7.905311)), f(7.905311))
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


class Numba(NumPy):
    """Runs blocks of steps with compiled loops, in float32 and float64."""

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
        """As `Plain.forward`."""
        if a.dtype.kind == "c":
            return super().forward(step, a, h, recurrent, alive, reverse, keep)
        (K, B, _), H = a.shape, h.shape[-1]
        walk = forward_walk(step, len(recurrent) - 1, keep, a.dtype)
        path = self._states((K + 1, B, H), a.dtype, keep)
        path[K if reverse else 0] = h
        saved = [np.empty((K, B, H), a.dtype) for _ in walk.widths]
        arrays = [a, path, *map(_own, recurrent[1:]), *saved]
        walk(_forwards(K, reverse), arrays, path, recurrent[0], alive)
        return path, tuple(saved) if keep else None

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
        """As `Plain.backward`."""
        K, B, H = previous.shape
        walk = backward_walk(step, len(saved), dy is not None, taps, dh.dtype)
        parts = [self._lend((K, B, n * H), dh.dtype) for n in walk.widths]
        pair = np.empty((2, B, H), dh.dtype)
        pair[0] = dh
        arrays = [*([] if dy is None else [_own(dy)]), pair, previous, *saved, *parts]
        walk(_backwards(K, reverse), arrays, pair, U, alive)
        g = parts.pop() if taps else None
        return tuple(parts), pair[K % 2], g


def _own(v: Any) -> Any:
    """The array as the code was compiled for: contiguous, and not marked as read-only."""
    return v if v.flags.carray else np.require(v, requirements=("C", "W"))


@lru_cache(maxsize=64)
def _forwards(K: int, reverse: bool) -> tuple[Any, Any, Any]:
    """For each step walked: its number, and where the state before and after it stands."""
    t = np.arange(K)[::-1].copy() if reverse else np.arange(K)
    return t, t + reverse, t + (not reverse)


@lru_cache(maxsize=64)
def _backwards(K: int, reverse: bool) -> tuple[Any, Any, Any]:
    """For each step walked back: its number, and which of the pair is dh before and after it."""
    t, turn = np.arange(K) if reverse else np.arange(K)[::-1].copy(), np.arange(K) % 2
    return t, turn, 1 - turn


# from operations to source -----------------------------------------------------------------------


class Place(tuple[str, str, int]):
    """Where a column stands in memory: (array, its first index or "", its number in the array)."""

    def at(self, unit: str = "j") -> str:
        """The entry of row b and this unit."""
        array, first, number = self
        where = f"{number} * H + {unit}" if number else unit
        return f"{array}[{first}{', ' if first else ''}b, {where}]"

    def row(self, columns: int) -> str:
        """Row b of so many columns from this one on."""
        array, first, number = self
        where = f"{number} * H : {number + columns} * H"
        return f"{array}[{first}{', ' if first else ''}b, {where}]"


class Layout:
    """Where everything stands, and what is done in which order: products, and fused loops.

    inputs, results: column -> places; a vector (H,) stands at ("c0", None, 0).
    """

    def __init__(self, program: Program, inputs: dict[int, Place], results: Any) -> None:
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

    def fused(self, stage: list[Op]) -> list[str]:
        """The loop over rows and units of one stage."""
        loads, lines, stores = [], [], []
        made = {op.output for op in stage}
        for column in sorted(
            {i for op in stage for i in op.inputs if not isinstance(i, float)} - made
        ):
            array, first, _ = place = self.read[column]
            loads.append(f"v{column} = {place.at() if first is not None else f'{array}[j]'}")
        for op in stage:
            x = [f"f({i!r})" if isinstance(i, float) else f"v{i}" for i in op.inputs]
            value = f"tanh({x[0]})" if op.name == "tanh" else f" {SIGNS[op.name]} ".join(x)
            lines.append(f"v{op.output} = {value}")
            stores += [f"{p.at()} = v{op.output}" for p in self.written.get(op.output, [])]
        body = [f"            {line}" for line in (*loads, *lines, *stores)]
        return ["    for b in range(B):", "        for j in range(H):", *body]

    def product(self, op: Product) -> list[str]:
        """The loop of a matrix product over a few rows."""
        left, out = self.side(op), self.written[op.outputs[0]][-1]
        assert left is not None
        x, y = left.row(len(op.inputs)), out.row(len(op.outputs))
        call = "products" if op.transposed else "sums"
        return ["    for b in range(B):", f"        {call}({x}, U, {op.rows.start} * H, {y})"]

    def source(self, arrays: list[str], dtype: str) -> str:
        """A module: one function for each fused loop, and `whole`, which walks all steps."""
        names = ", ".join([*arrays, *self.buffers])
        head = ["    B, H = shape"]
        lines = [HEAD.format(dtype=dtype) + TANH[dtype]]
        whole = ["@njit(cache=CACHE, **flags)", f"def whole(ts, ins, outs, shape, U, {names}):"]
        whole += [*head, "    for n in range(len(ts)):", "        t, i, o = ts[n], ins[n], outs[n]"]
        for n, stage in enumerate(self.stages):
            if isinstance(stage, list):
                loop = self.fused(stage)
                lines += ["@njit(cache=CACHE, **flags)", f"def fused{n}(t, i, o, shape, {names}):"]
                lines += [*head, *loop, ""]
            else:
                loop = self.product(stage)
            whole += ["    " + line for line in loop]
        return "\n".join([*lines, *whole, ""])


# the walks ---------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def forward_walk(step: Any, vectors: int, keep: bool, dtype: Any) -> Any:
    """A function that walks a block of steps forward."""
    program = forward_program(step, vectors, keep)
    (a, (h,), _, *c) = program.inputs
    inputs = {column: Place(("a", "t", n)) for n, column in enumerate(a)}
    inputs[h] = Place(("path", "i", 0))
    inputs |= {column: Place((f"c{n}", None, 0)) for n, (column,) in enumerate(c)}  # type: ignore[arg-type]
    results = {program.result: [Place(("path", "o", 0))]}
    saved = [f"s{n}" for n in range(len(program.extras))]
    for name, (column,) in zip(saved, program.extras, strict=True):
        results.setdefault(column, []).append(Place((name, "t", 0)))
    arrays = ["a", "path", *(f"c{n}" for n in range(vectors)), *saved]
    return Walk(Layout(program, inputs, results), arrays, program.extras, dtype)


@lru_cache(maxsize=64)
def backward_walk(step: Any, saved: int, given: bool, taps: bool, dtype: Any) -> Any:
    """A function that walks a block of steps back."""
    program = backward_program(step, saved, given, taps)
    names = [*(["dy"] if given else []), "pair", "previous", *(f"s{n}" for n in range(saved))]
    columns = [c for ids in program.inputs for c in ids]
    inputs = {
        c: Place((name, "i" if name == "pair" else "t", 0))
        for c, name in zip(columns, names, strict=True)
    }
    results = {program.result: [Place(("pair", "o", 0))]}
    for p, extra in enumerate(program.extras):
        names.append(f"p{p}")
        for n, column in enumerate(extra):
            results.setdefault(column, []).append(Place((f"p{p}", "t", n)))
    return Walk(Layout(program, inputs, results), names, program.extras, dtype)


class Walk:
    """Walks a block of steps: all of it in compiled code, or a Python loop with BLAS' products.

    widths: of the arrays beside the state that a step gives, in columns.
    """

    def __init__(self, layout: Layout, names: list[str], extras: Any, dtype: Any) -> None:
        self.layout, self.names, self.widths = layout, names, [len(extra) for extra in extras]
        module = compiled(layout.source(names, dtype.name))
        self.whole = module.whole
        self.stages = [
            getattr(module, f"fused{n}") if isinstance(stage, list) else stage
            for n, stage in enumerate(layout.stages)
        ]

    def __call__(self, steps: Any, arrays: list[Any], state: Any, U: Any, alive: Any) -> None:
        """Fill the arrays that results go to. U (3H, H); state (., B, H) is one of the arrays."""
        B, H = shape = state.shape[1:]
        widths = self.layout.buffers.values()
        arrays = [*arrays, *(np.empty((B, n * H), state.dtype) for n in widths)]
        if alive is None and (B == 1 or B * H <= 256):  # measured: BLAS wins above
            self.whole(*steps, shape, _own(U), *arrays)
            return
        K, known = (
            len(steps[0]),
            dict(zip([*self.names, *self.layout.buffers], arrays, strict=True)),
        )
        calls = [s if callable(s) else _product(self.layout, s, known, U, K) for s in self.stages]
        for t, i, o in zip(*[s.tolist() for s in steps], strict=True):
            for call in calls:
                call(t, i, o, shape, *arrays)
            if alive is not None and alive[t] is not None:
                np.copyto(state[o], state[i], where=~alive[t])


def _product(layout: Layout, op: Product, known: dict[str, Any], U: Any, steps: int) -> Any:
    """A call like that of a fused loop, which does the product by BLAS."""
    place, H = layout.side(op), U.shape[1]
    assert place is not None
    (name, first, number) = place
    left = known[name][..., number * H : (number + len(op.inputs)) * H]
    right = U[op.rows.start * H : op.rows.stop * H]
    right = turned(right, steps) if op.transposed else right
    out = known[layout.written[op.outputs[0]][-1][0]]
    if not first:
        return lambda t, i, o, *_: np.matmul(left, right, out)
    at = {"t": 0, "i": 1, "o": 2}[first]
    return lambda *index: np.matmul(left[index[at]], right, out)


# compiled code -----------------------------------------------------------------------------------


def compiled(source: str) -> Any:
    """Import the source from a file of the cache folder, where Numba keeps its machine code too."""
    import numba

    key = f"{source}{numba.__version__}{platform.processor()}{platform.machine()}"
    name = "gru_any_" + hashlib.sha256(key.encode()).hexdigest()[:16]
    try:
        path = _folder() / f"{name}.py"
        if not path.exists():
            print("gru_any: compiling (once for each kind of GRU)", file=sys.stderr)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_text("CACHE = True\n" + source, "utf-8")
            os.replace(part, path)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # Numba looks it up
        spec.loader.exec_module(module)
        return module
    except (OSError, RuntimeError):  # no home, no space, or nothing may be written there
        return _in_memory(name, "CACHE = False\n" + source)


def _in_memory(name: str, source: str) -> Any:
    from types import ModuleType

    module = ModuleType(name)
    exec(source, vars(module))
    return module


def _folder() -> Path:
    chosen = os.environ.get("GRU_ANY_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "gru_any"
