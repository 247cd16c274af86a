"""The traced operations of a step as stages: matrix products, and groups of what lies between.

A group becomes one kernel, or one part of a kernel that goes through all steps. It says what is
loaded from where, what is done, and what is stored where.
"""

from itertools import groupby
from typing import Any, NamedTuple

from .trace import Op, Product, Program

STATE = "state"  # h in the forward pass, dL/dh in the backward pass; updated in place
NARROW = "narrow"  # the state once more, as products in half precision read it


class Place(NamedTuple):
    """Column `number` of an array whose rows are those of the batch."""

    array: str
    number: int


class Store(NamedTuple):
    """A column and its place. ended: what a row that has ended gets there in place of it."""

    column: int
    place: Place
    ended: str  # "as it is", "kept" (the state before) or "zero"


class Group(NamedTuple):
    """Element by element: load, work, store."""

    loads: list[tuple[int, Place]]
    ops: list[Op]
    stores: list[Store]


class Gemm(NamedTuple):
    """out = left U[rows], or U[rows]^T, or added to out; width: of left, in columns."""

    left: str
    width: int
    rows: slice
    transposed: bool
    out: str
    add: bool


class Stages(NamedTuple):
    """What one step does, in order. buffers: name -> columns, of what lives within a step.

    arrays: the names of all arrays that hold more than one step, and of vectors.
    """

    stages: list[Group | Gemm]
    buffers: dict[str, int]
    arrays: list[str]


def staged(program: Program, inputs: dict[int, Place], results: dict[int, list[Place]]) -> Stages:
    """Cut a program into stages.

    inputs: where its input columns are; results: where columns go. One of each is the state.
    """
    return _Cut(program, inputs, results).done()


def narrowed(stages: Stages) -> Stages:
    """The same, with a second place for the state, which products read in place of the first."""
    if not any(isinstance(part, Gemm) and part.left == STATE for part in stages.stages):
        return stages
    parts: list[Group | Gemm] = []
    for part in stages.stages:
        if isinstance(part, Gemm):
            parts.append(part._replace(left=NARROW) if part.left == STATE else part)
            continue
        states = [store for store in part.stores if store.place.array == STATE]
        copies = [store._replace(place=Place(NARROW, 0)) for store in states]
        parts.append(part._replace(stores=[*part.stores, *copies]))
    return stages._replace(stages=parts, buffers={**stages.buffers, NARROW: 1})


class _Cut:
    def __init__(
        self, program: Program, inputs: dict[int, Place], results: dict[int, list[Place]]
    ) -> None:
        self.old = next(c for c, place in inputs.items() if place.array == STATE)
        self.read = dict(inputs)
        self.written = {c: list(places) for c, places in results.items()}
        self.buffers: dict[str, int] = {}
        self.zeroed: set[str] = set()
        self.carried: dict[int, set[int]] = {}
        ops, self.sum = _without_last_sum(program, self.read, self.written)
        runs = [list(run) for _, run in groupby(ops, key=lambda op: isinstance(op, Op))]
        self.parts: list[Any] = [part for run in runs for part in self._split(run)]

    def _split(self, run: list[Any]) -> list[Any]:
        return run if isinstance(run[0], Product) else [run]

    def done(self) -> Stages:
        gemms = {id(p): self._gemm(n, p) for n, p in enumerate(self.parts) if _is_product(p)}
        self._keep_for_later()
        self._store_what_no_operation_makes()
        stages: list[Any] = []
        for part in self.parts:
            stages.append(gemms[id(part)] if _is_product(part) else self._group(part))
        places = [*self.read.values(), *(p for ps in self.written.values() for p in ps)]
        names = {place.array: None for place in places}
        return Stages(stages, self.buffers, [n for n in names if n not in (STATE, *self.buffers)])

    def _gemm(self, n: int, product: Product) -> Gemm:
        """Find a place for both sides of a product."""
        left, add = f"x{n}", product is self.sum
        if product.inputs == (self.old,):
            left = STATE
        else:
            self.buffers[left] = len(product.inputs)
            self.zeroed |= {left} if add else set()
            for i, column in enumerate(product.inputs):
                if column in self.read:
                    raise NotImplementedError("a product of an input that is not the state")
                self.written.setdefault(column, []).append(Place(left, i))
        out = STATE if add else f"q{n}"
        if not add:
            self.buffers[out] = len(product.outputs)
            self.read |= {c: Place(out, i) for i, c in enumerate(product.outputs)}
        return Gemm(left, len(product.inputs), product.rows, product.transposed, out, add)

    def _keep_for_later(self) -> None:
        """What one group makes and a later one uses needs a place, where nothing rounds it."""
        made: dict[int, Any] = {op.output: part for part in self.groups() for op in part}
        for part in self.groups():
            for column in sorted(_used(part)):
                if column in self.read or made[column] is part:
                    continue
                self.read[column] = Place(f"t{column}", 0)
                self.buffers[f"t{column}"] = 1
                self.written.setdefault(column, []).append(self.read[column])

    def _store_what_no_operation_makes(self) -> None:
        """A result that is an input goes with the first group, a product with the next group."""
        made = {op.output for part in self.groups() for op in part}
        for column in sorted(set(self.written) - made):
            before = [n for n, p in enumerate(self.parts) if _is_product(p) and column in p.outputs]
            later = self.parts[before[0] :] if before else self.parts
            group = next((part for part in later if not _is_product(part)), None)
            if group is None:
                self.parts.append(group := [])
            self.carried.setdefault(id(group), set()).add(column)

    def groups(self) -> list[Any]:
        return [part for part in self.parts if not _is_product(part)]

    def _group(self, ops: list[Op]) -> Group:
        carried = self.carried.get(id(ops), set())
        made = {op.output for op in ops} | carried
        stores = [
            Store(c, place, self._ended(c, place))
            for c in sorted(made)
            for place in self.written.get(c, [])
        ]
        needed = _used(ops) - made | carried
        if any(store.ended == "kept" for store in stores):
            needed |= {self.old}
        return Group([(c, self.read[c]) for c in sorted(needed)], ops, stores)

    def _ended(self, column: int, place: Place) -> str:
        if place.array in self.zeroed:
            return "zero"
        beside = [p.array for p in self.written[column]]
        return "kept" if STATE in beside and place.array in (STATE, "path") else "as it is"


def _without_last_sum(
    program: Program, read: dict[int, Place], written: dict[int, list[Place]]
) -> tuple[list[Any], Product | None]:
    """Where the result is v + (the last product), let the product add to v in the state."""
    *ops, last = program.ops
    before = ops[-1] if ops else None
    if not isinstance(last, Op) or not isinstance(before, Product) or last.name != "add":
        return program.ops, None
    others = [c for c in last.inputs if c not in before.outputs]
    used = sum((c in op.inputs) for op in ops for c in before.outputs)
    fits = len(others) == 1 and not isinstance(others[0], float) and others[0] not in read
    extras = {c for ids in program.extras for c in ids}
    if not fits or used or len(before.outputs) > 1 or extras & {last.output, *before.outputs}:
        return program.ops, None
    made = {op.output for op in ops if isinstance(op, Op)}
    if last.output != program.result or others[0] not in made:
        return program.ops, None
    # what goes elsewhere too would lack the product, and one of the state would read v
    if len(written[last.output]) > 1 or any(read.get(c) == (STATE, 0) for c in before.inputs):
        return program.ops, None
    written.setdefault(others[0], []).extend(written.pop(last.output))
    return ops, before


def _is_product(part: Any) -> bool:
    return isinstance(part, Product)


def _used(ops: list[Op]) -> set[int]:
    return {i for op in ops for i in op.inputs if not isinstance(i, float)}
