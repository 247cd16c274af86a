"""From a schedule to source for NumPy: one function that runs a scan, as calls that write in place.

The rows of the batch are innermost in memory: a step sees arrays (columns H, B).
"""

from collections import Counter

from .schedule import ArrayRef, Gemm, Group, Kind, Place, Schedule
from .trace import MEAN, Op, Product

# the names of NumPy's functions
NAMES = "add subtract multiply divide greater less tanh exp expm1 log1p sqrt"
FUNCTIONS = {name: name for name in NAMES.split()}
STATES = {Kind.BEFORE: "before", Kind.AFTER: "after"}


def column(place: Place) -> str:
    """Return the name of one column (H, B) of a step."""
    name, kind, columns = place.array
    if kind in STATES:
        return STATES[kind]
    return f"{name}_{place.column}" if columns > 1 else name


def pair(array: ArrayRef, first: int) -> str:
    """Return the name of two columns side by side."""
    return f"{array.name}_{first}_{first + 1}"


def _columns(array: ArrayRef) -> list[str]:
    return [column(Place(array, i)) for i in range(array.columns)]


def _part(name: str, first: int, count: int) -> str:
    return f"{name}[{first} * H : {first + count} * H]"


def _in_register(array: ArrayRef) -> bool:
    """Whether an array is a temporary column, which any register may hold."""
    return array.columns == 1 and array.kind in (Kind.OPERAND, Kind.SPILL)


class NumPySource:
    """A scan as a call for each operation; the same one on two columns side by side is one call.

    A column without a place of its own gets a register: a buffer (H, B), or the column of a
    product whose value no operation needs again.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.setup: list[str] = []  # lines before the first step
        self.body: list[str] = []  # lines of one step
        self.functions = {"matmul", "copyto", "empty", "array"}  # of NumPy, that `source` calls
        made = {op.output for group in schedule.groups for op in group.ops}
        loads = [load for group in schedule.groups for load in group.loads]
        self.homes = {load.column: column(load.place) for load in loads if load.column not in made}
        self.registers: set[str] = set()
        self.free: list[str] = []
        self.constants: dict[float, str] = {}
        self.pairs: dict[tuple[str, str], str] = {}
        for array in schedule.arrays:
            if array.kind is Kind.PROJECTION:
                self._pair(array, 0)
        order: list[Op | Product] = []
        self.rows = set[int]()  # the columns that have one number for each row, arrays (B,)
        for stage in schedule.stages:
            order += [stage.product] if isinstance(stage, Gemm) else stage.ops
        for op in order:
            if isinstance(op, Op) and op.of_rows(self.rows):
                self.rows.add(op.output)
        self.uses = Counter(i for op in order for i in op.columns)
        self.last = {i: op for op in order for i in op.columns}
        for array in schedule.buffers:
            if not _in_register(array):
                self._allocate(array)
        for n, stage in enumerate(schedule.stages):
            if isinstance(stage, Gemm):
                self._product(n, stage)
            else:
                self._group(stage)

    def variables(self) -> list[str]:
        """Return the names in a step's entry of `over`: arrays, columns, and a pair of columns."""
        extras, forward, names = self.schedule.extras, self.schedule.forward, list[str]()
        for array in self.schedule.arrays:
            if array.kind is Kind.PROJECTION:
                names += [*_columns(array), pair(array, 0)]
            elif array.kind in STATES and forward:
                names += STATES.values()
            elif array.kind in (Kind.STEPS, Kind.ROWS, Kind.BATCH) and array not in extras:
                names.append(array.name)
        parts = [name for array in extras for name in _columns(array)]
        return [*names, *([] if forward else parts), *(array.name for array in extras), "ended"]

    def source(self) -> str:
        """Print a function `scan`.

        A forward scan(over, M, vectors, shape, dtype) fills the arrays of `over`; a backward
        scan(over, M, vectors, shape, dtype, dh) returns the last dh too. over: for each step what
        `variables` names, of which `ended` is a mask or None; M: U (3H, H); vectors: each (H, B)
        or (H, 1); shape: (H, B).
        """
        forward, carry, end = self.schedule.forward, list[str](), list[str]()
        vectors = [array.name for array in self.schedule.arrays if array.kind is Kind.VECTOR]
        start = [f"{name} = vectors[{n}]" for n, name in enumerate(vectors)]
        if not forward:
            start += ["before, after = array(dh, order='C'), empty(shape, dtype)"]
            carry, end = ["before, after = after, before"], ["return before"]
        finished = ["if ended is not None:", "    copyto(after, before, where=ended)"]
        return "\n".join([
            f"def scan(over, M, vectors, shape, dtype{'' if forward else ', dh'}):",
            *(f"    {line}" for line in [*start, "H, B = shape", *self.setup]),
            f"    for {', '.join(self.variables())} in over:",
            *(f"        {line}" for line in [*self.body, *finished, *carry]),
            *(f"    {line}" for line in end),
            "",
        ])  # fmt: skip

    def _allocate(self, array: ArrayRef) -> None:
        """Allocate a buffer; a product's columns become registers once nothing needs them."""
        self.setup.append(f"{array.name} = empty(({array.columns} * H, B), dtype)")
        for i in range(array.columns if array.columns > 1 else 0):
            self.setup.append(f"{column(Place(array, i))} = {_part(array.name, i, 1)}")
        if array.kind is Kind.PRODUCT:
            self.registers.update(_columns(array))
            for i in range(array.columns - 1):
                self._pair(array, i)
                self.setup.append(f"{pair(array, i)} = {_part(array.name, i, 2)}")

    def _group(self, group: Group) -> None:
        """Add a call for each operation, or for two."""
        targets: dict[int, list[str]] = {}
        for store in group.stores:
            if not _in_register(store.place.array):
                targets.setdefault(store.column, []).append(column(store.place))
        for i in sorted(targets.keys() - {op.output for op in group.ops}):
            self.body += [f"copyto({name}, {self.homes[i]})" for name in targets[i]]
        ops = list(group.ops)
        while ops:
            op = ops.pop(0)
            if op.output in self.rows:
                self._of_row(op, targets.get(op.output, []))
                continue
            others = [other for other in ops if not {op.output, other.output} & targets.keys()]
            twin = next((other for other in others if self._together(op, other)), None)
            if twin:
                ops.remove(twin)
            else:
                self._call(op, targets.get(op.output, []))

    def _product(self, n: int, gemm: Gemm) -> None:
        """Add a product, which is stage n, and free the registers that it was the last to read."""
        rows = gemm.product.rows
        matrix = f"M[{rows.start} * H : {rows.stop} * H]" + ".T" * (not gemm.product.transposed)
        self.setup.append(f"M{n} = {matrix}")
        self.body.append(f"matmul(M{n}, {self._operand(gemm)}, {gemm.out.name})")
        self._release(gemm.product)

    def _operand(self, gemm: Gemm) -> str:
        """Return a product's operand (width H, B); a single column may be in a register."""
        (array, first), width = gemm.operand, gemm.width
        if _in_register(array):
            return self.homes[gemm.product.inputs[0]]
        if width == 1:
            return column(gemm.operand)
        return array.name if width == array.columns else _part(array.name, first, width)

    def _pair(self, array: ArrayRef, first: int) -> None:
        names = _columns(array)
        self.pairs[names[first], names[first + 1]] = pair(array, first)

    def _call(self, op: Op, targets: list[str]) -> None:
        """Add the call of an operation, and copies of the result to further targets."""
        arguments = [self._value(i) for i in op.inputs]
        self._release(op)
        out, *copies = targets or [self._register()]
        self.homes[op.output] = out
        self._add(op.name, *arguments, out)
        self.body += [f"copyto({name}, {out})" for name in copies]

    def _of_row(self, op: Op, targets: list[str]) -> None:
        """Compute one number for each row, which has no register, and copy it to each unit."""
        arguments, out = [self._value(i) for i in op.inputs], f"r{op.output}"
        self._release(op)
        self.homes[op.output] = out
        if op.name == MEAN:
            self.functions.add("add")
            sums = " + ".join(f"add.reduce({name}, 0)" for name in arguments)
            self.body.append(f"{out} = ({sums}) / ({len(arguments)} * H)")
        else:
            self.functions.add(FUNCTIONS[op.name])
            self.body.append(f"{out} = {FUNCTIONS[op.name]}({', '.join(arguments)})")
        self.body += [f"copyto({name}, {out})" for name in targets]

    def _together(self, op: Op, other: Op) -> bool:
        """Add both in one call that overwrites an input, if possible; return whether it was."""
        if op.name != other.name:
            return False
        names: list[str] = []
        over: list[tuple[int, int, str]] = []
        for i, j in zip(op.inputs, other.inputs, strict=True):
            if isinstance(i, int) and isinstance(j, int):
                left, right = self.homes.get(i, ""), self.homes.get(j, "")
                names.append(self.pairs.get((left, right), ""))
                if left in self.registers and self.uses[i] == self.uses[j] == 1:
                    over.append((i, j, names[-1]))
            else:
                names.append(self._value(i) if isinstance(i, float) and i == j else "")
        if not all(names) or not over:
            return False
        i, j, out = over[0]
        self.homes[op.output], self.homes[other.output] = self.homes[i], self.homes[j]
        self._add(op.name, *names, out)
        return True

    def _add(self, name: str, *arguments: str) -> None:
        if name == "where":  # which has no `out`
            *given, out = arguments
            self.functions.add(name)
            self.body.append(f"copyto({out}, where({', '.join(given)}))")
            return
        self.functions.add(FUNCTIONS[name])
        self.body.append(f"{FUNCTIONS[name]}({', '.join(arguments)})")

    def _release(self, op: Op | Product) -> None:
        """Free the registers of columns that this operation is the last to read."""
        for i in sorted(set(op.columns)):
            home = self.homes.get(i, "")
            if self.last[i] is op and home in self.registers and home not in self.free:
                self.free.append(home)

    def _register(self) -> str:
        if not self.free:
            name = f"t{len(self.registers)}"
            self.registers.add(name)
            self.setup.append(f"{name} = empty(shape, dtype)")
            return name
        return self.free.pop()

    def _value(self, i: int | float) -> str:
        if isinstance(i, int):
            return self.homes[i]
        if i not in self.constants:
            self.constants[i] = f"k{len(self.constants)}"
            self.setup.append(f"{self.constants[i]} = array({i!r}, dtype)")
        return self.constants[i]
