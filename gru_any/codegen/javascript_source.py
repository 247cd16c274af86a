"""From a schedule to JavaScript: one step forward, in float64."""

from .schedule import ArrayRef, Gemm, Group, Kind, Place, Schedule
from .trace import Op

OPERATIONS = {
    "add": "{} + {}",
    "subtract": "{} - {}",
    "multiply": "{} * {}",
    "divide": "{} / {}",
    "tanh": "Math.tanh({})",
    "greater": "{} > {}",
    "less": "{} < {}",
    "exp": "Math.exp({})",
    "expm1": "Math.expm1({})",
    "log1p": "Math.log1p({})",
    "where": "{} ? {} : {}",
}
# what `step` is called with
ARGUMENTS = {Kind.PROJECTION: "a", Kind.BEFORE: "h", Kind.VECTOR: "c"}


def javascript(schedule: Schedule) -> str:
    """Print `step(a, h, U, c)`, which returns the new state h and the first residuals as r, z, n.

    It calls `product(U, v, first, last)`, the product of v (H,) with these rows of U.
    """
    after = next(array for array in schedule.arrays if array.kind is Kind.AFTER)
    made = [after, *schedule.extras]
    made += [array for array in schedule.buffers if array.kind is not Kind.PRODUCT]
    lines = ["const H = h.length;"]
    lines += [f"const {_name(v)} = new Float64Array({v.columns} * H);" for v in made]
    for stage in schedule.stages:
        lines += _product(stage) if isinstance(stage, Gemm) else _loop(stage)
    residuals = zip("rzn", schedule.extras, strict=False)
    results = [f"h: {_name(after)}", *(f"{letter}: {_name(v)}" for letter, v in residuals)]
    lines.append(f"return {{ {', '.join(results)} }};")
    return "\n".join(["function step(a, h, U, c) {", *(f"  {line}" for line in lines), "}"])


def _name(array: ArrayRef) -> str:
    return "next" if array.kind is Kind.AFTER else ARGUMENTS.get(array.kind, array.name)


def _entry(place: Place) -> str:
    """Return the entry of unit j."""
    index = f"{place.column} * H + j" if place.array.columns > 1 else "j"
    return f"{_name(place.array)}[{index}]"


def _loop(group: Group) -> list[str]:
    """Print a group's loop over the units."""
    return [
        "for (let j = 0; j < H; j++) {",
        *(f"  const v{column} = {_entry(place)};" for column, place in group.loads),
        *(f"  const v{op.output} = {_value(op)};" for op in group.ops),
        *(f"  {_entry(store.place)} = v{store.column};" for store in group.stores),
        "}",
    ]


def _value(op: Op) -> str:
    x = [repr(i) if isinstance(i, float) else f"v{i}" for i in op.inputs]
    return OPERATIONS[op.name].format(*x)


def _product(gemm: Gemm) -> list[str]:
    """Print the product of one column with rows of U."""
    if not gemm.product.transposed or gemm.width != 1:
        raise NotImplementedError(f"{gemm.product} is no product of the state with rows of U")
    (array, column), rows = gemm.operand, gemm.product.rows
    left = _name(array)
    if array.columns > 1:
        left = f"{left}.subarray({column} * H, {column + 1} * H)"
    return [f"const {gemm.out.name} = product(U, {left}, {rows.start} * H, {rows.stop} * H);"]
