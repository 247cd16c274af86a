"""From a schedule to source for Numba: compiled functions that run a scan, or one step.

A group becomes one loop over rows and units, which touches no array but inputs and results.
"""

from collections.abc import Iterable
from enum import Enum, auto
from typing import NamedTuple

from .numba_functions import functions
from .schedule import CUT, ArrayRef, Gemm, Group, Kind, Loop, Place, Schedule
from .trace import Op

OPERATIONS = {
    "add": "{} + {}",
    "subtract": "{} - {}",
    "multiply": "{} * {}",
    "divide": "{} / {}",
    "greater": "{} > {}",
    "less": "{} < {}",
    "tanh": "tanh({})",
    "exp": "exp({})",
    "expm1": "expm1({})",
    "log1p": "log1p({})",
    "sqrt": "math.sqrt({})",
    "where": "{1} if {0} else {2}",
}
PAIRS = 128  # of arrays in a loop that LLVM checks for overlap; it vectorises no loop with more
HEAD = '''\
import math
import numpy as np
from numba import njit
from gru_any.backend.cpu.barrier import barrier_wait, inner, join_team, share_of
from gru_any.backend.cpu.gemm import UNIT_BYTES, gemm, pack_units
from gru_any.backend.cpu.handoff import entry_of, share
from gru_any.backend.cpu.stored import multiply

f = np.{dtype}
UNIT = UNIT_BYTES // f(0).itemsize
flags = dict(nogil=True, error_model="numpy")  # no fastmath: the same bits whatever is stored


@inner
def part(v, start, shape):
    """The next numbers of v, as an array of this shape, and where they end."""
    size = 1
    for n in shape:
        size *= n
    return v[start : start + size].reshape(shape), start + size


@inner
def of_units(functions, transposed, x, column, M, y, first, last, gates, H, left, right):
    """y = x[:, column : column + K] M or M^T, in some rows, and in some units of all gates."""
    if right - left == H:
        multiply(functions, transposed, x, column, M, y, first, last, 0, gates * H)
        return
    for g in range(0, gates * H, H):
        multiply(functions, transposed, x, column, M, y, first, last, g + left, g + right)


@inner
def affine(functions, transposed, x, M, b, a, H, left, right):
    """a = x M or x M^T, and b, in some units."""
    of_units(functions, transposed, x, 0, M, a, 0, len(x), 3, H, left, right)
    for r in range(len(x)):
        for g in range(0, 3 * H, H):
            for j in range(g + left, g + right):
                a[r, j] += b[j]


'''


def lines(ops: Iterable[Op]) -> list[str]:
    """Print a line for each operation, from variables to a new one."""
    found = []
    for op in ops:
        x = [f"f({i!r})" if isinstance(i, float) else f"v{i}" for i in op.inputs]
        found.append(f"v{op.output} = {OPERATIONS[op.name].format(*x)}")
    return found


class Matrices(Enum):
    """The form in which a function gets the matrix of each product."""

    PACKED = auto()  # panels
    STORED = auto()  # rows of U
    CONTIGUOUS = auto()  # the right operand itself, a contiguous copy


class Scope(NamedTuple):
    """How a printed function names what its lines share.

    rows, units: the first and the one after the last that it does; entries: the index of this
    step's entry in an array of each kind. shared: whether a team may share the units.
    """

    rows: tuple[str, str]
    units: tuple[str, str]
    entries: dict[Kind, str]
    matrices: Matrices
    shared: bool = True

    def entry(self, array: ArrayRef) -> str:
        """Return a step's entry of an array: rows (B, .), or a vector."""
        return (
            f"{array.name}[{self.entries[array.kind]}]"
            if array.kind in self.entries
            else array.name
        )


AXES = {Kind.VECTOR: "::1", Kind.BATCH: ":, ::1"}  # of arrays without an entry for each step
STEP = dict.fromkeys((Kind.PROJECTION, Kind.STEPS, Kind.ROWS), "t")
STEP |= {Kind.BEFORE: "i", Kind.AFTER: "o"}
SCAN = Scope(("first", "last"), ("left", "right"), STEP | {Kind.PROJECTION: "s"}, Matrices.PACKED)
BARRIER = "times = barrier_wait(sync, me, count, times)"
STORED = SCAN._replace(entries=STEP, matrices=Matrices.STORED)
ONCE = Scope(
    ("0", "B"), ("0", "H"), dict.fromkeys(STEP, "0") | {Kind.AFTER: "1"}, Matrices.CONTIGUOUS, False
)
PACKED_ONCE = ONCE._replace(matrices=Matrices.PACKED)


class NumbaSource:
    """The functions of a scan, each printed as a module of its own.

    arrays: what they take, the state first; results: those of them that they fill.
    """

    def __init__(self, schedule: Schedule, dtype: str) -> None:
        self.schedule, self.dtype = schedule, dtype
        self.state = next(array for array in schedule.arrays if array.kind is Kind.AFTER)
        self.arrays = [self.state, *(array for array in schedule.arrays if array != self.state)]
        self.results = [self.state, *schedule.extras]
        self.matrices = [f"M{n}" for n in range(len(schedule.gemms))]

    @property
    def _reads_one_buffer(self) -> bool:
        """Whether a step has a single product, of a buffer."""
        gemms = self.schedule.gemms
        return len(gemms) == 1 and gemms[0].operand.array in self.schedule.buffers

    def scan(self) -> str:
        """Print a module with `shared`, which runs `scan` on several threads; see `handoff.share`.

        `scan` runs all steps for the rows first to last. A sequence that has finished keeps its
        state. The members of a team (`sync`) share the units and meet at a barrier before each
        product, whose operand all of them write; and after it, where it is a step's only product
        and reads a buffer, which the next step overwrites.

        A forward scan fills `a` with x W^T + bias: step by step, if `a` has room for one step, else
        for all steps at once; not at all where x has no columns.

        fresh: whether the matrices must be packed. Each thread packs its share of the units, before
        any thread reads panels; a member of a team reads none but its own.
        """
        forward = self.schedule.forward
        matrices = [*self.matrices, "W"] if forward else self.matrices
        gates = [*(gemm.out.columns for gemm in self.schedule.gemms), 3]
        sources = [f"{name}_from" for name in matrices]
        names = [*matrices, *(array.name for array in self.arrays)]
        names += ["x", "bias"] if forward else []
        names += [*(array.name for array in self.schedule.buffers), *sources]
        (first, last), (left, right) = SCAN.rows, SCAN.units
        fill = f"pack_units(functions[4], {{}}, {{}}, {{}}, {left}, {right})"
        given = f"ts, ins, outs, ended, zeros, fresh, functions, {', '.join(names)}"
        packs = [fill.format(*of) for of in zip(sources, matrices, gates, strict=False)]
        packed = ", ".join([*matrices, *sources])
        return "\n".join([
            *self._head(),
            "@inner",
            f"def pack({first}, {last}, me, H, count, functions, {packed}):",
            f"    {left}, {right} = share_of(H, UNIT, me, count)",
            *(f"    {line}" for line in packs),
            "",
            *self._scan_begins(given),
            "    if fresh and len(sync) > 0:",
            *(f"        {line}" for line in packs),
            *self._steps(SCAN),
            "",
            "pack_entry, scan_entry = entry_of(pack), entry_of(scan)",
            "",
            "@njit(cache=CACHE, **flags)",
            f"def shared(boxes, hired, edges, sync, polls, {given}):",
            f"    H, count = {self.state.name}.shape[2], len(hired) + 1",
            "    if fresh and len(sync) == 0:",
            f"        call = pack_entry((H, count, functions, {packed}))",
            "        share(boxes, hired, edges, sync, polls, *call)",
            f"    return share(boxes, hired, edges, sync, polls, *scan_entry((sync, {given})))",
            "",
        ])  # fmt: skip

    def stored(self) -> str:
        """Print a module with `few`, a scan of few rows on one thread with unpacked matrices.

        functions: as of `stored.multiply`. It fills the results; the state before the first step is
        given in the array of states. `shared` is the same for a team, as in `scan`; it takes the
        buffers too.
        """
        given = [array for array in self.arrays if array not in self.results]
        axes = {array.name: AXES.get(array.kind, ":, :, ::1") for array in given}
        if self.schedule.forward:
            axes |= {"x": ":, :, ::1", "W": ":, ::1", "bias": "::1"}
        kinds = ["int64[::1]"] * 4 + ["boolean[:, ::1]"]
        axes |= {array.name: ":, :, ::1" for array in self.results}
        kinds += [f"{self.dtype}[:, ::1]"]
        kinds += [f"{_number(name, self.dtype)}[{of}]" for name, of in axes.items()]
        rows = [gemm.product.rows for gemm in self.schedule.gemms]
        parts = [f"U[{of.start} * H : {of.stop} * H]" for of in rows]
        given_alone = f"functions, ts, ins, outs, ended, U, {', '.join(axes)}"
        all_given = ", ".join([given_alone, *(array.name for array in self.schedule.buffers)])
        return "\n".join([
            *self._head(),
            *self._scan_begins(all_given),
            *(f"    {name} = {part}" for name, part in zip(self.matrices, parts, strict=True)),
            *self._steps(STORED),
            "",
            "scan_entry = entry_of(scan)",
            "",
            f"@njit('({', '.join(kinds)})', cache=CACHE, **flags)",
            f"def few({given_alone}):",
            f"    B, H = {self.state.name}.shape[1:]",
            *self._made(self.schedule.buffers),
            f"    scan(np.intp(0), np.intp(B), np.intp(0), np.empty(0, np.int64), {all_given})",
            "",
            "@njit(cache=CACHE, **flags)",
            f"def shared(boxes, hired, edges, sync, polls, {all_given}):",
            "    return share("
            f"boxes, hired, edges, sync, polls, *scan_entry((sync, {all_given})))",
            "",
        ])  # fmt: skip

    def step(self) -> str:
        """Print a module with `step` for few rows: x (B, I), h (B, H) -> h' (B, H) in y and new.

        functions: as of `stored.multiply`. weights: one array of W^T (I, 3H), the right operand of
        each product, bias (3H,), and the vectors.
        """
        shapes = {"W": "(x.shape[1], 3 * H)"}
        for name, gemm in zip(self.matrices, self.schedule.gemms, strict=True):
            shapes[name] = f"({gemm.width} * H, {gemm.out.columns} * H)"
        vectors = [array.name for array in self.arrays if array.kind is Kind.VECTOR]
        shapes |= {"bias": "(3 * H,)"} | dict.fromkeys(vectors, "(H,)")
        matrix = f"{self.dtype}[:, ::1]"
        return "\n".join([
            *self._head(),
            f"@njit('void(int64[::1], {', '.join([matrix] * 4)}, {self.dtype}[::1])', "
            "cache=CACHE, **flags)",
            "def step(functions, x, h, y, new, weights):",
            "    (B, H), end = h.shape, 0",
            *(f"    {name}, end = part(weights, end, {shape})" for name, shape in shapes.items()),
            *self._single(ONCE, "affine(functions, False, x, W, bias, a[0], H, 0, H)"),
        ])  # fmt: skip

    def packed_step(self) -> str:
        """Print a module with `step` for packed matrices: those of the products, then W."""
        vectors = [array.name for array in self.arrays if array.kind is Kind.VECTOR]
        given = ", ".join([*self.matrices, "W", "bias", *vectors])
        x = "gemm(functions[3], np.intp(3), x, np.intp(0), W, bias, a[0], 0, B, 0, H)"
        return "\n".join([
            *self._head(),
            "@njit(cache=CACHE, **flags)",
            f"def step(functions, x, h, y, new, {given}):",
            "    B, H = h.shape",
            "    zeros = np.zeros(3 * H, f)",
            *self._single(PACKED_ONCE, x),
        ])  # fmt: skip

    def _single(self, scope: Scope, projection: str) -> list[str]:
        """Print the body of a function `step`, after its matrices."""
        return [
            *self._made([*self.schedule.buffers, *self.results]),
            "    a = np.empty((1, B, 3 * H), f)",
            "    for b in range(B):",
            "        for j in range(H):",
            f"            {self.state.name}[0, b, j] = h[b, j]",
            f"    {projection}",
            *(f"    {line}" for line in self._stages(scope)),
            "    for b in range(B):",
            "        for j in range(H):",
            f"            y[b, j] = new[b, j] = {self.state.name}[1, b, j]",
            "",
        ]

    def _scan_begins(self, given: str) -> list[str]:
        """Print the first lines of a function `scan`, where members of a team share the units."""
        (first, last), (left, right) = SCAN.rows, SCAN.units
        return [
            "@inner",
            f"def scan({first}, {last}, me, sync, {given}):",
            "    me, count = join_team(sync, me)",
            f"    H, times = {self.state.name}.shape[2], np.intp(2)",
            "    if me >= count:",
            "        return",
            f"    {left}, {right} = share_of(H, UNIT, me, count)",
        ]

    def _head(self) -> list[str]:
        """Print the lines before a function: its imports, and the functions that it calls."""
        ops = [op for group in self.schedule.groups for op in group.ops]
        found = [HEAD.format(dtype=self.dtype) + functions(ops, self.dtype)]
        for n, stage in enumerate(self.schedule.stages):
            found += _fused(n, stage) if isinstance(stage, Group) else []
        return found

    def _made(self, arrays: Iterable[ArrayRef]) -> list[str]:
        """Print the lines that allocate buffers, and results of a single step."""
        shapes = {array: f"(B, {array.columns} * H)" for array in self.schedule.buffers}
        shapes |= {self.state: "(2, B, H)"}
        shapes |= {array: f"(1, B, {array.columns} * H)" for array in self.schedule.extras}
        return [f"    {array.name} = np.empty({shapes[array]}, f)" for array in arrays]

    def _steps(self, scope: Scope) -> list[str]:
        """Print the loop over all steps."""
        before, first = self._projection(scope) if self.schedule.forward else ([], [])
        after, old = scope.entries[Kind.AFTER], scope.entries[Kind.BEFORE]
        return [
            *(f"    {line}" for line in before),
            "    for n in range(len(ts)):",
            "        t, i, o = ts[n], ins[n], outs[n]",
            *(f"        {line}" for line in (*first, *self._stages(scope))),
            "        if len(ended):",
            f"            for b in range({', '.join(scope.rows)}):",
            "                if ended[t, b]:",
            f"                    for j in range({', '.join(scope.units)}):",
            f"                        {self.state.name}[{after}, b, j] = "
            f"{self.state.name}[{old}, b, j]",
        ]

    def _projection(self, scope: Scope) -> tuple[list[str], list[str]]:
        """Print the lines that fill `a`: those before all steps, and those before each step."""
        (first, last), units = scope.rows, ", ".join(scope.units)
        if scope.matrices is Matrices.STORED:
            flat = "x.reshape(rows, I), W, bias, a.reshape(rows, 3 * H)"
            return [
                "I, rows = x.shape[2], x.shape[0] * x.shape[1]",
                "if I and rows:",
                f"    affine(functions, True, {flat}, H, {units})",
            ], []
        fill = "gemm(functions[3], np.intp(3), {}, np.intp(0), W, bias, {}, {}, {}, " + units + ")"
        whole = "x.reshape(K * B, I)", "a.reshape(K * B, 3 * H)", f"{first} * K", f"{last} * K"
        s = scope.entries[Kind.PROJECTION]
        return [
            "K, B, I = x.shape",
            "each = len(a) < K",
            "if I and not each:",
            f"    {fill.format(*whole)}",
        ], [
            f"{s} = 0 if each else t",
            "if each:",
            f"    {fill.format('x[t]', 'a[0]', first, last)}",
        ]

    def _stages(self, scope: Scope) -> list[str]:
        """Print the lines of one step."""
        found, matrices = list[str](), iter(self.matrices)
        for n, stage in enumerate(self.schedule.stages):
            if isinstance(stage, Gemm):
                found += _product(stage, next(matrices), scope)
                if scope.shared and self._reads_one_buffer:
                    found.append(BARRIER)
            else:
                arrays = map(scope.entry, _arrays(stage))
                call = f"fused{n}({', '.join([*scope.rows, *scope.units, 'H', *arrays])})"
                # a mean reads all of a row, which no other thread may still write, or write anew
                found += [BARRIER, call, BARRIER] if stage.means and scope.shared else [call]
        return found


def _product(gemm: Gemm, matrix: str, scope: Scope) -> list[str]:
    """Print the lines of one product."""
    (array, first), out, gates = gemm.operand, gemm.out.name, gemm.out.columns
    x, (b, end), units = scope.entry(array), scope.rows, ", ".join(scope.units)
    before = [BARRIER] if scope.shared else []
    if scope.matrices is Matrices.PACKED:
        return [
            *before,
            f"gemm(functions[{gates - 1}], np.intp({gates}), {x}, {first} * H, {matrix}, "
            f"zeros, {out}, {b}, {end}, {units})",
        ]
    stored = scope.matrices is Matrices.STORED
    of = f"{x}, {first} * H, {matrix}, {out}, {b}, {end}, {gates}, H, {units}"
    transposed = stored and gemm.product.transposed
    return [*before, f"of_units(functions, {transposed}, {of})"]


def _number(name: str, dtype: str) -> str:
    """Return Numba's name of an array's dtype."""
    return "boolean" if name == CUT.name else dtype


def _parameter(array: ArrayRef) -> str:
    """Return a group's name of a step's entry of an array."""
    states = (Kind.BEFORE, Kind.AFTER)
    return f"{array.name}_{array.kind.value}" if array.kind in states else array.name


def _arrays(group: Group) -> list[ArrayRef]:
    """Return the arrays that a group reads and writes."""
    places = [*(load.place for load in group.loads), *(store.place for store in group.stores)]
    return list(dict.fromkeys(place.array for place in places))


def _fused(n: int, group: Group) -> list[str]:
    """Print the functions of a group, which is stage n."""
    loops = group.loops(PAIRS)
    means = [_means(f"means{n}_{k}", loop) for k, loop in enumerate(loops) if loop.means]
    views: list[str] = []

    def entry(place: Place) -> str:
        name = _parameter(place.array)
        if place.array.kind is Kind.ROWS:
            return f"{name}[b, 0]"
        row = "start:" if place.array.kind is Kind.VECTOR else f"b, {place.column} * H + start :"
        views.append(f"row{len(views)} = {name}[{row}]")  # its index is seen not to be negative,
        return f"row{len(views) - 1}[j]"  # so the loop vectorises

    def body(loop: Loop) -> list[str]:
        loads = [f"v{load.column} = {entry(load.place)}" for load in loop.loads]
        stores = [f"{entry(store.place)} = v{store.column}" for store in loop.stores]
        return [
            "for j in range(count):",
            *(f"    {line}" for line in (*loads, *lines(loop.ops), *stores)),
        ]

    bodies = [line for loop in loops if loop.stores for line in body(loop)]
    return [
        *(line for function, _ in means for line in function),
        "@inner",
        f"def fused{n}(first, last, left, right, H, {', '.join(map(_parameter, _arrays(group)))}):",
        "    units = right - left",
        "    for b in range(first, last):",
        *(f"        {line}" for _, call in means for line in call),
        "        start, count = left, units - units % UNIT or units",
        "        while True:",
        *(f"            {line}" for line in (*views, *bodies)),
        "            if start + count == right:",
        "                break",
        "            start, count = right - UNIT, UNIT  # some again, as a loop of few is slow",
        "",
    ]


def _means(name: str, loop: Loop) -> tuple[list[str], list[str]]:
    """Print the function of a loop that computes means, and the lines that call it and go on."""
    made = {*(op.output for op in loop.ops), *(load.column for load in loop.loads)}
    earlier = {c for op in (*loop.ops, *loop.means) for c in op.columns} - made
    given = {f"x{load.column}": _row(load.place) for load in loop.loads}
    given |= {f"v{c}": f"v{c}" for c in sorted(earlier)}
    loads = [f"v{c} = x{c}" + ("" if place.array.kind is Kind.ROWS else "[j]")
             for c, place in loop.loads]  # fmt: skip
    sums = [f"s{op.output} += {' + '.join(f'v{c}' for c in op.inputs)}" for op in loop.means]
    found = [f"s{op.output} / f({len(op.inputs)} * H)" for op in loop.means]
    function = [
        '@njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})',
        f"def {name}(H, {', '.join(given)}):",
        f"    {' = '.join(f's{op.output}' for op in loop.means)} = f(0)",
        "    for j in range(H):",
        *(f"        {line}" for line in (*loads, *lines(loop.ops), *sums)),
        f"    return {', '.join(found)},",
        "",
    ]
    names = ", ".join(f"v{op.output}" for op in loop.means)
    return function, [f"{names}, = {name}(H, {', '.join(given.values())})", *lines(loop.rows)]


def _row(place: Place) -> str:
    """Return all units of a column in row b."""
    name, first = _parameter(place.array), f"{place.column} * H"
    if place.array.kind is Kind.ROWS:
        return f"{name}[b, 0]"
    return f"{name}[:H]" if place.array.kind is Kind.VECTOR else f"{name}[b, {first} : {first} + H]"
