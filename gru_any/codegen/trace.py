"""Trace a step function of arrays: record it as a list of operations.

The function is called once with stand-ins for its arrays. Lengths along the last axis are counted
in units of H, as if H were 1: h has one column, a has three, U (3H, H) has three rows. So the
slices that a function takes come out as columns, and the list holds for every H. It knows no
library; whoever runs the list does.
"""

from collections.abc import Callable
from functools import partial
from types import EllipsisType
from typing import Any, NamedTuple, TypeAlias

from ..typing import Step, WeightGradients


class Op(NamedTuple):
    """An operation output = name(inputs); an input is the number of a column, or a Python float.

    "mean" is the mean over all units of all its columns, one number for each row.
    """

    name: str
    inputs: tuple[int | float, ...]
    output: int

    @property
    def columns(self) -> tuple[int, ...]:
        """The inputs that are columns."""
        return tuple(i for i in self.inputs if isinstance(i, int))

    def of_rows(self, rows: set[int]) -> bool:
        """Whether it gives one number for each row; rows: the columns that have one."""
        return self.name == MEAN or (bool(self.columns) and rows.issuperset(self.columns))


class Product(NamedTuple):
    """A product outputs = inputs @ M[rows], or @ M[rows].T; both sides are columns side by side."""

    inputs: tuple[int, ...]
    rows: slice
    transposed: bool
    outputs: tuple[int, ...]

    @property
    def columns(self) -> tuple[int, ...]:
        """The inputs."""
        return self.inputs


class Program(NamedTuple):
    """The operations of a step function.

    inputs: the columns of each argument (empty for the matrix); result: the column returned
    first; extras: the columns of each array returned beside it.
    """

    inputs: list[tuple[int, ...]]
    ops: list[Op | Product]
    result: int
    extras: list[tuple[int, ...]]

    def __str__(self) -> str:
        """Return a line for each operation; rows of the matrix U are counted in units of H."""
        inputs = "; ".join(_listed(columns) or "U" for columns in self.inputs)
        results = "; ".join(map(_listed, [(self.result,), *self.extras]))
        return "\n".join([f"inputs {inputs}", *map(_line, self.ops), f"return {results}"])

    def without_extras(self) -> "Program":
        """Return the program of the result alone."""
        return self._replace(extras=[]).needed()

    def needed(self) -> "Program":
        """Return the program without operations that no result needs."""
        needed, ops = {self.result, *(i for extra in self.extras for i in extra)}, []
        for op in reversed(self.ops):
            outputs = op.outputs if isinstance(op, Product) else (op.output,)
            if needed & set(outputs):
                ops.append(op)
                needed.update(op.columns)
        return self._replace(ops=ops[::-1])


class Outer(NamedTuple):
    """left^T right, summed over the rows; both sides are columns side by side."""

    left: tuple[int, ...]
    right: tuple[int, ...]


class RowSum(NamedTuple):
    """The sum over the rows of columns side by side."""

    columns: tuple[int, ...]


class Term(NamedTuple):
    """A sum over the rows, times a number."""

    scale: float
    sum: Outer | RowSum


class Reductions(NamedTuple):
    """The sums over rows that a function computes.

    inputs: the columns of each argument; results: for each result its parts, concatenated along
    axis 0, and for each part the terms that add up to it.
    """

    inputs: list[tuple[int, ...]]
    results: list[tuple[tuple[Term, ...], ...]]

    def __str__(self) -> str:
        """A line for each result."""
        inputs = "; ".join(map(_listed, self.inputs))
        lines = ["  " + " | ".join(map(_added, parts)) for parts in self.results]
        return "\n".join([f"inputs {inputs}", *lines])


MEAN = "mean"
FUNCTIONS = ["tanh", "exp", "expm1", "log1p", "sqrt"]  # of xp, of one array, element by element
INFIX = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/", "greater": ">", "less": "<"}


def _listed(columns: tuple[int, ...]) -> str:
    return ", ".join(f"v{i}" for i in columns)


def _line(op: Op | Product) -> str:
    if isinstance(op, Product):
        rows = f"U[{op.rows.start}:{op.rows.stop}]" + ".T" * op.transposed
        return f"  {_listed(op.outputs)} = ({_listed(op.inputs)}) @ {rows}"
    inputs = [f"{i:g}" if isinstance(i, float) else f"v{i}" for i in op.inputs]
    if op.name in INFIX:
        return f"  v{op.output} = {inputs[0]} {INFIX[op.name]} {inputs[1]}"
    return f"  v{op.output} = {op.name}({', '.join(inputs)})"


def _added(terms: tuple[Term, ...]) -> str:
    """Return a part of a result as text, such as 2 * (v0).T @ (v1) + sum(v2)."""
    lines = []
    for scale, of in terms:
        factor = "" if scale == 1 else f"{scale:g} * "
        if isinstance(of, RowSum):
            lines.append(f"{factor}sum({_listed(of.columns)})")
        else:
            lines.append(f"{factor}({_listed(of.left)}).T @ ({_listed(of.right)})")
    return " + ".join(lines)


MATRIX = "matrix"
Argument: TypeAlias = int | str | tuple[int, ...]


def trace(function: Step, *arguments: Argument) -> Program:
    """Trace `function(xp, *arguments)`, which returns an array and a tuple of arrays.

    An argument is the number of its columns, a tuple of such, or MATRIX for one of (3H, H).
    """
    tape = _Tape()
    stands = [tape.stand_in(argument) for argument in arguments]
    result, extras = function(tape, *stands)
    inputs = [c for s in stands for c in (s if isinstance(s, tuple) else (s,))]
    columns = [s.ids if isinstance(s, _Columns) else () for s in inputs]
    return Program(columns, tape.ops, result.ids[0], [extra.ids for extra in extras]).needed()


def trace_reductions(function: WeightGradients, *arguments: Argument) -> Reductions:
    """Trace `function(xp, *arguments)`, which returns sums over the rows of its arguments.

    Arguments are as of `trace`. Each result is a sum over axis 0, a product v.T @ w of two
    arguments, a sum of these, or a concatenation along axis 0.
    """
    tape = _Tape()
    stands = [tape.stand_in(argument) for argument in arguments]
    flat = [s for stand in stands for s in (stand if isinstance(stand, tuple) else (stand,))]
    inputs = [s.ids for s in flat if isinstance(s, _Columns)]
    return Reductions(inputs, [sums.parts for sums in function(tape, *stands)])


class _Tape:
    """The operations so far; also the namespace `xp` that the function sees."""

    def __init__(self) -> None:
        self.ops: list[Op | Product] = []
        self.count = 0
        self.known: dict[tuple[str, ...], int] = {}
        self.made: dict[int, Op] = {}
        self.rows: set[int] = set()  # the columns that have one number for each row

    def stand_in(self, argument: Argument) -> "_Matrix | _Columns | tuple[_Columns, ...]":
        if isinstance(argument, str):
            return _Matrix(slice(0, 3), False)
        if isinstance(argument, tuple):
            return tuple(_Columns(self, self.new(n)) for n in argument)
        return _Columns(self, self.new(argument))

    def new(self, n: int) -> tuple[int, ...]:
        self.count += n
        return tuple(range(self.count - n, self.count))

    def op(self, name: str, *inputs: int | float) -> int:
        """Return the column of an operation, recorded unless the same one was before."""
        key = name, *map(repr, inputs)  # 1.0 is a number, 1 a column
        if key not in self.known:
            column = self._folded(name, *inputs) if len(inputs) < 3 else None
            if column is None:
                column = self.new(1)[0]
                self.made[column] = Op(name, inputs, column)
                self.ops.append(self.made[column])
                if self.made[column].of_rows(self.rows):
                    self.rows.add(column)
            self.known[key] = column
        return self.known[key]

    def _folded(self, name: str, k: int | float, v: int | float | None = None) -> int | None:
        """Fold constants, such as k (m w) to (k m) w; return the column, or None."""
        inner = self.made.get(v) if isinstance(v, int) else None
        if inner is None or not isinstance(k, float) or not isinstance(inner.inputs[0], float):
            return None
        m, w = inner.inputs
        match name, inner.name:
            case "multiply", "multiply" if k * m == 1.0 and w in self.made:
                return int(w)
            case "multiply", "multiply" | "divide":
                return self.op(inner.name, k * m, w)
            case "multiply", "add" | "subtract":
                return self.op(inner.name, k * m, self.op("multiply", k, w))
            case "add", "add" | "subtract":
                return self.op(inner.name, k + m, w)
        return None

    def each(self, name: str, v: "_Columns") -> "_Columns":
        """Record an operation on each column."""
        return _Columns(self, tuple(self.op(name, i) for i in v.ids))

    def where(
        self, condition: "_Columns", x: "_Columns | float", y: "_Columns | float"
    ) -> "_Columns":
        """Record x where the condition, of one column, is true, else y."""
        (c,), width = condition.ids, max(len(v.ids) for v in (x, y) if isinstance(v, _Columns))
        xs, ys = (v.ids if isinstance(v, _Columns) else (float(v),) * width for v in (x, y))
        pairs = zip(xs, ys, strict=True)
        return _Columns(self, tuple(self.op("where", c, i, j) for i, j in pairs))

    def mean(self, v: "_Columns", axis: int, keepdims: bool) -> "_Columns":
        return _Columns(self, (self.op(MEAN, *v.ids),))

    def zeros_like(self, v: "_Columns") -> float:
        return 0.0

    def full_like(self, v: "_Columns", number: float) -> float:
        return number

    def sum(self, v: "_Columns", axis: int) -> "_Sums":
        return _Sums(((Term(1.0, RowSum(v.ids)),),))

    def concat(self, parts: Any, axis: int) -> Any:  # of columns or sums
        if axis == 0:
            return _Sums(tuple(part for sums in parts for part in sums.parts))
        return _Columns(self, tuple(i for part in parts for i in part.ids))

    def __getattr__(self, name: str) -> Callable[["_Columns"], "_Columns"]:
        if name in FUNCTIONS:
            return partial(self.each, name)
        known = " and ".join(["+ - * / @ > <", *FUNCTIONS, "where", MEAN])
        raise AttributeError(f"xp.{name} cannot be traced: the steps are made of {known}")


class _Matrix:
    """Rows of the recurrent weights, in units of H."""

    def __init__(self, rows: slice, transposed: bool) -> None:
        self.rows, self.transposed = rows, transposed

    @property
    def T(self) -> "_Matrix":  # noqa: N802, the name of the standard
        return _Matrix(self.rows, not self.transposed)

    def __getitem__(self, key: tuple[slice, slice]) -> "_Matrix":
        return _Matrix(slice(*key[0].indices(3)[:2]), self.transposed)


class _Transposed:
    """An array whose rows are summed over in a product."""

    def __init__(self, ids: tuple[int, ...]) -> None:
        self.ids = ids

    def __matmul__(self, other: "_Columns") -> "_Sums":
        return _Sums(((Term(1.0, Outer(self.ids, other.ids)),),))


class _Sums:
    """Sums over the rows, as the terms of each part."""

    def __init__(self, parts: tuple[tuple[Term, ...], ...]) -> None:
        self.parts = parts

    def __add__(self, other: "_Sums") -> "_Sums":
        pairs = zip(self.parts, other.parts, strict=True)
        return _Sums(tuple(mine + theirs for mine, theirs in pairs))

    def __mul__(self, factor: float) -> "_Sums":
        return _Sums(tuple(tuple(Term(factor * k, of) for k, of in part) for part in self.parts))

    __rmul__ = __mul__


class _Columns:
    """An array, as the numbers of its columns."""

    def __init__(self, tape: _Tape, ids: tuple[int, ...]) -> None:
        self.tape, self.ids = tape, ids

    @property
    def shape(self) -> tuple[None, int]:
        return None, len(self.ids)

    @property
    def T(self) -> "_Transposed":  # noqa: N802, the name of the standard
        return _Transposed(self.ids)

    def __getitem__(self, key: tuple[EllipsisType | slice, slice]) -> "_Columns":
        return _Columns(self.tape, self.ids[key[-1]])

    def __matmul__(self, matrix: _Matrix) -> "_Columns":
        if not isinstance(matrix, _Matrix):
            return NotImplemented
        height = matrix.rows.stop - matrix.rows.start
        outputs = self.tape.new(height if matrix.transposed else 1)
        self.tape.ops.append(Product(self.ids, matrix.rows, matrix.transposed, outputs))
        return _Columns(self.tape, outputs)

    def _with(self, name: str, other: "_Columns | float", swapped: bool = False) -> "_Columns":
        if not isinstance(other, (_Columns, int, float)):
            return NotImplemented  # a dual number has the operation
        mine: tuple[int | float, ...] = self.ids
        theirs: tuple[int | float, ...]
        theirs = other.ids if isinstance(other, _Columns) else (float(other),)
        n = max(len(mine), len(theirs))
        mine, theirs = (v * n if self._repeats(v) else v for v in (mine, theirs))
        pairs = zip(theirs, mine, strict=True) if swapped else zip(mine, theirs, strict=True)
        return _Columns(self.tape, tuple(self.tape.op(name, i, j) for i, j in pairs))

    def _repeats(self, v: tuple[int | float, ...]) -> bool:
        """Whether a value is the same for all columns: a number, or one per row."""
        return len(v) == 1 and (isinstance(v[0], float) or v[0] in self.tape.rows)

    def __add__(self, other: "_Columns | float") -> "_Columns":
        return self._with("add", other)

    def __radd__(self, other: "_Columns | float") -> "_Columns":
        return self._with("add", other, True)

    def __sub__(self, other: "_Columns | float") -> "_Columns":
        return self._with("subtract", other)

    def __rsub__(self, other: "_Columns | float") -> "_Columns":
        return self._with("subtract", other, True)

    def __mul__(self, other: "_Columns | float") -> "_Columns":
        return self._with("multiply", other)

    def __truediv__(self, other: "_Columns | float") -> "_Columns":
        return self._with("divide", other)

    def __rtruediv__(self, other: "_Columns | float") -> "_Columns":
        return self._with("divide", other, True)

    def __rmul__(self, other: "_Columns | float") -> "_Columns":
        return self._with("multiply", other, True)

    def __gt__(self, other: "_Columns | float") -> "_Columns":
        return self._with("greater", other)

    def __lt__(self, other: "_Columns | float") -> "_Columns":
        return self._with("less", other)
