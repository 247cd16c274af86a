"""From a traced program to the stages of one step, decided once for every target.

A stage is a matrix product, or a group: the element-wise operations between two products, which a
target runs as one loop or kernel. The schedule says where each column is read from and written to.
A printer turns it into source.
"""

from collections.abc import Iterable, Sequence
from enum import Enum
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple, TypeAlias

from ..typing import Array, Namespace, Step
from .restart import restarted, restarted_backward
from .trace import MATRIX, MEAN, Op, Product, Program, trace


class Kind(Enum):
    """The role of an array in a scan over K steps, which decides the entry that a step reads."""

    VECTOR = "vector"  # (H,), the same for all steps and rows
    PROJECTION = "projection"  # (K, B, 3H), a = x W^T + b, which may be computed step by step
    STEPS = "steps"  # (K, B, columns H), an entry for each step
    ROWS = "rows"  # (K, B, 1) of bool, an entry for each step and row
    BATCH = "batch"  # (B, H), the same for all steps
    START = "start"  # likewise: the state from which a row starts anew at a cut
    BEFORE = "before"  # (., B, H), the state before the step
    AFTER = "after"  # (., B, H), the state after it
    STATE = "state"  # (B, H), the state, updated in place
    # buffers (B, columns H) that live within a step
    OPERAND = "operand"  # what a product reads, its columns side by side
    PRODUCT = "product"  # what a product writes
    SPILL = "spill"  # a column that one group makes and a later one reads


class ArrayRef(NamedTuple):
    """An array of the generated code; columns: how many of H units it has."""

    name: str
    kind: Kind
    columns: int = 1

    def __str__(self) -> str:
        """Return name and width, as in q0(2)."""
        return f"{self.name}({self.columns})" if self.columns > 1 else self.name


STATE = ArrayRef("state", Kind.STATE)  # h in a forward scan, dL/dh in a backward scan
CUT = ArrayRef("cut", Kind.ROWS)  # after which steps a row's state starts anew
EXTRA = "e"  # what the names of other further arguments of a step begin with
NARROW = ArrayRef("narrow", Kind.OPERAND)  # the state as products in half precision read it


class Place(NamedTuple):
    """One column of an array."""

    array: ArrayRef
    column: int = 0

    def __str__(self) -> str:
        """Return the array, and the number of the column, if there are several."""
        name, kind, columns = self.array
        at = f"[{kind.value}]" if kind in (Kind.BEFORE, Kind.AFTER) else ""
        return f"{name}.{self.column}" if columns > 1 else f"{name}{at}"


class Finished(Enum):
    """The value that a store writes for a row that skips the step, such as a finished one."""

    COMPUTED = "what is computed"
    KEPT = "the state before the step"
    ZERO = "zero"


class Load(NamedTuple):
    """A column and where a group reads it."""

    column: int
    place: Place


class Store(NamedTuple):
    """A column and where a group writes it."""

    column: int
    place: Place
    finished: Finished


class Loop(NamedTuple):
    """A loop over the units of a row, and the operations on means after it."""

    loads: list[Load]
    ops: list[Op]  # element by element
    stores: list[Store]
    means: Sequence[Op] = ()  # of results of `ops`, over the units
    rows: Sequence[Op] = ()  # on single numbers of the row, such as the means

    @property
    def pairs(self) -> int:
        """How many pairs of arrays must not overlap for the loop to be vectorised."""
        n = len(self.stores)
        return n * (n - 1) // 2 + n * len(self.loads)


class Group(NamedTuple):
    """Element-wise operations, between loads and stores; they may take means over a row."""

    loads: list[Load]
    ops: list[Op]
    stores: list[Store]

    @property
    def means(self) -> bool:
        """Whether it takes means over a row."""
        return any(op.name == MEAN for op in self.ops)

    def loops(self, pairs: int) -> list[Loop]:
        """Return the loops over the units of a row; pairs: the most in a loop of several stores.

        Loops that compute means come first, and store nothing. Later loops compute again what
        earlier ones did not store.
        """
        rows, depth = self._depths()
        return [*self._loops_of_means(rows, depth), *self._loops_of_stores(rows, pairs)]

    def _depths(self) -> tuple[set[int], dict[int, int]]:
        """Return the columns with one number for each row, and how many loops come before each."""
        rows, depth = set[int](), dict[int, int]()
        for op in self.ops:
            depth[op.output] = max([0, *(depth.get(c, 0) for c in op.columns)])
            if op.of_rows(rows):
                rows.add(op.output)
                depth[op.output] += op.name == MEAN
        return rows, depth

    def _loops_of_means(self, rows: set[int], depth: dict[int, int]) -> list[Loop]:
        found, known = [], {load.column: load for load in self.loads}
        for n in range(1, max([0, *depth.values()]) + 1):
            of_row = [op for op in self.ops if op.output in rows and depth[op.output] == n]
            means = [op for op in of_row if op.name == MEAN]
            loop = self._loop({c for op in means for c in op.columns}, [], rows, known)
            others = [op for op in of_row if op.name != MEAN]
            found.append(loop._replace(means=means, rows=others))
        return found

    def _loops_of_stores(self, rows: set[int], pairs: int) -> list[Loop]:
        found, known = [], {load.column: load for load in self.loads}
        place = {op.output: n for n, op in enumerate(self.ops)}
        loop = self._loop(set(), [], rows, known)
        for store in sorted(self.stores, key=lambda store: place.get(store.column, -1)):
            longer = self._loop(set(), [*loop.stores, store], rows, known)
            if loop.stores and longer.pairs > pairs:
                found.append(loop)
                known |= {v.column: Load(v.column, v.place) for v in loop.stores}
                longer = self._loop(set(), [store], rows, known)
            loop = longer
        return [*found, loop]

    def _loop(
        self, columns: set[int], stores: list[Store], rows: set[int], known: dict[int, Load]
    ) -> Loop:
        """Return the loop that makes these columns and stores."""
        needed, ops = {*columns, *(store.column for store in stores)}, []
        for op in reversed(self.ops):
            if op.output in needed - rows - known.keys():
                ops.append(op)
                needed.update(op.columns)
        return Loop([v for c, v in known.items() if c in needed], ops[::-1], stores)

    def __str__(self) -> str:
        """Return a line each for loads, operations and stores."""
        loads = ", ".join(f"v{column} = {place}" for column, place in self.loads)
        made = ", ".join(f"v{op.output}" for op in self.ops) or "nothing"
        stores = ", ".join(f"{place} = v{column}" for column, place, _ in self.stores)
        return f"group\n  load {loads}\n  compute {made}\n  store {stores}"


class Gemm(NamedTuple):
    """A product, of columns side by side from `operand` on; add: to what is in `out`."""

    product: Product
    operand: Place
    out: ArrayRef
    add: bool = False

    @property
    def width(self) -> int:
        """How many columns it reads."""
        return len(self.product.inputs)

    def __str__(self) -> str:
        """The product as an assignment."""
        (array, first), rows = self.operand, self.product.rows
        left = f"{array.name}[{first}:{first + self.width}]" if array.columns > 1 else self.operand
        matrix = f"U[{rows.start}:{rows.stop}]" + ".T" * self.product.transposed
        return f"product\n  {self.out.name} {'+=' if self.add else '='} {left} @ {matrix}"


class Schedule(NamedTuple):
    """One step of a scan: its stages in order, and its arrays.

    arrays: those that outlive a step, but not `STATE`; extras: of these, the residuals of a forward
    scan, or what a backward scan returns beside dh; buffers: those that live within a step.
    """

    forward: bool
    stages: list[Group | Gemm]
    arrays: list[ArrayRef]
    extras: list[ArrayRef]
    buffers: list[ArrayRef]

    @property
    def gemms(self) -> list[Gemm]:
        """The products."""
        return [stage for stage in self.stages if isinstance(stage, Gemm)]

    @property
    def groups(self) -> list[Group]:
        """The groups."""
        return [stage for stage in self.stages if isinstance(stage, Group)]

    @property
    def means(self) -> bool:
        """Whether a group takes means over a row."""
        return any(group.means for group in self.groups)

    @property
    def written(self) -> set[str]:
        """The names of all arrays that groups store to."""
        return {store.place.array.name for group in self.groups for store in group.stores}

    def __str__(self) -> str:
        """Return the arrays, the buffers and the stages as text."""
        arrays, buffers = (" ".join(map(str, v)) for v in (self.arrays, self.buffers))
        return "\n".join([f"arrays {arrays}", f"buffers {buffers}", *map(str, self.stages)])


class Target(NamedTuple):
    """The properties of a target that its schedules depend on.

    in_place: one array holds the state before a step and after it; rounds: arrays and operands of
    products may be stored in half precision, so that products read buffers of their own and later
    groups read none of these; adds: a product can add to what is there.
    """

    in_place: bool
    rounds: bool
    adds: bool


HOST = Target(in_place=False, rounds=False, adds=False)
DEVICE = Target(in_place=True, rounds=True, adds=True)


# the scans ---------------------------------------------------------------------------------------


# further arguments of a step; ROWS is the cut, and the last; START, if any, comes before it
Kinds: TypeAlias = tuple[Kind, ...]
READ = {Kind.START: Kind.BATCH}  # how a printer reads an argument, where not as its kind


def extra_arrays(extra: Kinds) -> list[ArrayRef]:
    """Return the further arguments of a step."""
    return [
        CUT if kind is Kind.ROWS else ArrayRef(f"{EXTRA}{n}", READ.get(kind, kind))
        for n, kind in enumerate(extra)
    ]


@lru_cache(maxsize=64)
def forward_program(step: Step, vectors: int, keep: bool, extra: Kinds = ()) -> Program:
    """Trace a step on a, h, U, so many vectors and the further ones; keep: with its residuals.

    With a cut, after which the state may start anew, h' is the last extra result.
    """
    cut = Kind.ROWS in extra
    further = [1] * (vectors + len(extra))
    step = restarted(step, Kind.START in extra) if cut else step
    program = trace(step, 3, 1, MATRIX, *further)
    extras = program.extras if keep else program.extras[len(program.extras) - cut :]
    return program if keep else program._replace(extras=extras).needed()


@lru_cache(maxsize=64)
def backward_program(step: Step, saved: int, given: bool, taps: bool, extra: Kinds = ()) -> Program:
    """Trace the gradient of a step on dy (if given), dh, h, the residuals, U and the further ones.

    After what the step returns come, with START, the gradient that reaches the state given at a
    cut; and with taps g = dL/dh'.
    """

    def summed(xp: Namespace, *arguments: Array) -> tuple[Array, tuple[Array, ...]]:
        dy, dh, h, *rest = arguments if given else (None, *arguments)
        kept, U = rest[:saved], rest[saved]
        further: Sequence[Array] = rest[saved + 1 :]
        reached: tuple[Array, ...] = ()
        if Kind.ROWS in extra:
            dh, further, reached = restarted_backward(xp, dh, further, Kind.START in extra)
        g = dh + dy if given else dh
        new, parts = step(xp, g, h, kept, U, *further)
        return new, (*parts, *reached, *((g,) if taps else ()))

    return trace(summed, *[1] * (given + 2 + saved), MATRIX, *[1] * len(extra))


def forward_schedule(
    step: Step, vectors: int, keep: bool, target: Target, extra: Kinds = ()
) -> Schedule:
    """Schedule a forward scan: a, states `path`, vectors c0..., e0... -> path, residuals s0..."""
    program = forward_program(step, vectors, keep, extra)
    (a, (h,), _, *c) = program.inputs
    before, after = _state("path", target)
    inputs = {v: Place(ArrayRef("a", Kind.PROJECTION, len(a)), n) for n, v in enumerate(a)}
    inputs |= {h: Place(before)}
    inputs |= {v: Place(ArrayRef(f"c{n}", Kind.VECTOR)) for n, (v,) in enumerate(c[:vectors])}
    further = zip(c[vectors:], extra_arrays(extra), strict=True)
    inputs |= {v: Place(array) for (v,), array in further}
    after += [Place(ArrayRef("path", Kind.AFTER))] if target.in_place else []
    return _scheduled(True, program, inputs, after, "s", target)


def backward_schedule(
    step: Step, saved: int, given: bool, taps: bool, target: Target, extra: Kinds = ()
) -> Schedule:
    """Schedule a backward scan: dy if given, dh, previous, s0..., e0... -> dh, p0... of each step.

    pair: dh before and after a step; previous: the states from which the forward steps started.
    """
    program = backward_program(step, saved, given, taps, extra)
    before, after = _state("pair", target)
    names = [*(["dy"] if given else []), "", "previous", *(f"s{n}" for n in range(saved))]
    arrays = [ArrayRef(name, Kind.STEPS) if name else before for name in names]
    arrays += extra_arrays(extra)
    columns = [column for ids in program.inputs for column in ids]
    inputs = {v: Place(array) for v, array in zip(columns, arrays, strict=True)}
    return _scheduled(False, program, inputs, after, "p", target)


def _state(name: str, target: Target) -> tuple[ArrayRef, list[Place]]:
    """Return the array from which a step reads the state, and the places to which it writes it."""
    if target.in_place:
        return STATE, [Place(STATE)]
    return ArrayRef(name, Kind.BEFORE), [Place(ArrayRef(name, Kind.AFTER))]


def _scheduled(
    forward: bool,
    program: Program,
    inputs: dict[int, Place],
    after: list[Place],
    letter: str,
    target: Target,
) -> Schedule:
    """Schedule a program; letter: what the names of its extras begin with."""
    results = {program.result: [*after]}
    extras = [ArrayRef(f"{letter}{n}", Kind.STEPS, len(v)) for n, v in enumerate(program.extras)]
    for array, columns in zip(extras, program.extras, strict=True):
        for i, column in enumerate(columns):
            results.setdefault(column, []).append(Place(array, i))
    stages, buffers = _Cut(program, inputs, results, target).done()
    # the extras in their order, even where one of them holds the result
    places = [*inputs.values(), *after, *map(Place, extras)]
    arrays = {place.array.name: place.array for place in places if place.array != STATE}
    return Schedule(forward, stages, list(arrays.values()), extras, buffers)


def narrowed(schedule: Schedule) -> Schedule:
    """Return the schedule with a second copy of the state, which products read."""
    if not any(gemm.operand.array == STATE for gemm in schedule.gemms):
        return schedule
    stages: list[Group | Gemm] = []
    for stage in schedule.stages:
        if isinstance(stage, Gemm):
            reads = stage.operand.array == STATE
            stages.append(stage._replace(operand=Place(NARROW)) if reads else stage)
            continue
        states = [store for store in stage.stores if store.place.array == STATE]
        copies = [store._replace(place=Place(NARROW)) for store in states]
        stages.append(stage._replace(stores=[*stage.stores, *copies]))
    return schedule._replace(stages=stages, buffers=[*schedule.buffers, NARROW])


# from a program to stages ------------------------------------------------------------------------


class _Run:
    """The operations between two products, and what is stored beside or after them."""

    def __init__(self, ops: Iterable[Op] = ()) -> None:
        self.ops = list(ops)
        self.made = {op.output for op in self.ops}
        self.used = {column for op in self.ops for column in op.columns}
        self.stores: list[tuple[int, Place]] = []

    @property
    def needed(self) -> set[int]:
        """The columns that come from elsewhere."""
        return (self.used | {column for column, _ in self.stores}) - self.made


class _Cut:
    """Cuts a program into runs and products, and gives each column its places.

    inputs: where the columns of the inputs are; results: the places to which columns go.
    """

    def __init__(
        self,
        program: Program,
        inputs: dict[int, Place],
        results: dict[int, list[Place]],
        target: Target,
    ) -> None:
        self.target = target
        self.old = next((c for c, place in inputs.items() if place.array == STATE), None)
        self.read = dict(inputs)
        self.written = {column: list(places) for column, places in results.items()}
        self.buffers: list[ArrayRef] = []
        self.parts: list[_Run | Gemm] = []
        ops, last = self._without_last_sum(program) if target.adds else (program.ops, None)
        for elementwise, some in groupby(ops, key=lambda op: isinstance(op, Op)):
            if elementwise:
                self.parts.append(_Run(op for op in some if isinstance(op, Op)))
                continue
            for op in some:
                if isinstance(op, Product):
                    self.parts.append(self._gemm(op, op is last))

    def done(self) -> tuple[list[Group | Gemm], list[ArrayRef]]:
        """Return the stages and the buffers."""
        for column, places in sorted(self.written.items()):
            for place in places:
                self._run_that_stores(column, place).stores.append((column, place))
        for run in self._runs():
            for column in sorted(run.needed - set(self.read)):
                self.read[column] = self._spilled(column)
        stages = [p if isinstance(p, Gemm) else self._group(p) for p in self.parts]
        return stages, self.buffers

    def _runs(self) -> list[_Run]:
        return [part for part in self.parts if isinstance(part, _Run)]

    def _buffer(self, name: str, kind: Kind, columns: int = 1) -> ArrayRef:
        self.buffers.append(ArrayRef(name, kind, columns))
        return self.buffers[-1]

    def _gemm(self, product: Product, add: bool) -> Gemm:
        """Find places for a product's operand and output."""
        n = len(self.parts)
        operand = None if add else self._side_by_side(product.inputs)
        if operand is None:
            array = self._buffer(f"x{n}", Kind.OPERAND, len(product.inputs))
            for i, column in enumerate(product.inputs):
                self.written.setdefault(column, []).append(Place(array, i))
            operand = Place(array)
        if add:
            return Gemm(product, operand, STATE, add)
        out = self._buffer(f"q{n}", Kind.PRODUCT, len(product.outputs))
        self.read |= {column: Place(out, i) for i, column in enumerate(product.outputs)}
        return Gemm(product, operand, out)

    def _side_by_side(self, columns: tuple[int, ...]) -> Place | None:
        """Return where a product can read these columns side by side; None if nowhere."""
        for array, first in self._readable(columns[0]):
            if self.target.rounds and array.columns > len(columns):
                continue  # it reads whole buffers
            wanted = [Place(array, first + i) for i in range(len(columns))]
            if all(p in self._readable(c) for p, c in zip(wanted, columns, strict=True)):
                return wanted[0]
        return None

    def _readable(self, column: int) -> list[Place]:
        """Return the places from which a product can read a column."""
        places = [*self.written.get(column, []), *filter(None, [self.read.get(column)])]
        if self.target.rounds:
            operands = [place for place in places if place.array.kind is Kind.OPERAND]
            return [*operands, *([Place(STATE)] if column == self.old else [])]
        outside = Kind.VECTOR, Kind.PROJECTION, Kind.ROWS
        return [p for p in places if p.array.kind not in outside]

    def _run_that_stores(self, column: int, place: Place) -> _Run:
        """Find the first run that can store a column; make one where there is none."""
        first, last = 0, len(self.parts)
        for n, part in enumerate(self.parts):
            if isinstance(part, _Run):
                made, old, needed = column in part.made, self.old in part.used, False
            else:
                made, old = column in part.product.outputs, part.operand.array == STATE
                needed = column in part.product.inputs and place.array == part.operand.array
                needed = part.add if place.array == STATE else needed
            if made or (old and place.array == STATE):  # which no part may find overwritten
                first = n
            if needed:
                last = min(last, n)
        for part in self.parts[first:last]:
            if isinstance(part, _Run):
                return part
        self.parts.insert(last, run := _Run())
        return run

    def _spilled(self, column: int) -> Place:
        """Return the place from which later runs read a column that a run computes."""
        if column in self.written and not self.target.rounds:
            return self.written[column][0]
        place = Place(self._buffer(f"t{column}", Kind.SPILL))
        next(run for run in self._runs() if column in run.made).stores.append((column, place))
        return place

    def _group(self, run: _Run) -> Group:
        stores = [
            Store(column, place, self._finished(place))
            for column, place in sorted(run.stores, key=lambda store: store[0])
        ]
        needed = run.needed
        if self.old is not None and any(store.finished is Finished.KEPT for store in stores):
            needed |= {self.old}
        return Group([Load(c, self.read[c]) for c in sorted(needed)], run.ops, stores)

    def _finished(self, place: Place) -> Finished:
        if place.array.kind in (Kind.STATE, Kind.AFTER):
            return Finished.KEPT
        added = [part.operand.array for part in self.parts if isinstance(part, Gemm) and part.add]
        return Finished.ZERO if place.array in added else Finished.COMPUTED

    def _without_last_sum(self, program: Program) -> tuple[list[Op | Product], Product | None]:
        """If the result is v + (the last product), let that product add to v in the state.

        Returns the operations without the sum, and that product; or all operations, and None.
        """
        *ops, last = program.ops
        before = ops[-1] if ops else None
        if not isinstance(last, Op) or not isinstance(before, Product) or last.name != "add":
            return program.ops, None
        others = [c for c in last.columns if c not in before.outputs]
        used = any(c in op.columns for op in ops for c in before.outputs)
        extras = {c for ids in program.extras for c in ids}
        made = {op.output for op in ops if isinstance(op, Op)}
        if (
            last.output != program.result
            or len(last.columns) != 2
            or others != [c for c in others if c in made]
            or len(before.outputs) > 1
            or used
            or extras & {last.output, *before.outputs}
            # a second copy of the result would lack the product, and a product of the state read v
            or len(self.written[last.output]) > 1
            or any(self.read.get(c) == Place(STATE) for c in before.inputs)
        ):
            return program.ops, None
        value = next(c for c in others if not isinstance(c, float))
        self.written.setdefault(value, []).extend(self.written.pop(last.output))
        return ops, before
