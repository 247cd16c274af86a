"""From a schedule to C99: one step of one row, in float32, with weights in float32 or int8.

A product is a loop over the inputs, four at a time, that adds to all outputs: sums of independent
numbers, which a compiler turns into vector instructions without changing their order. So a matrix
stands transposed, (inputs, outputs). One in int8 has a scale for each output.
"""

from .rational import LIMIT, P, Q
from .schedule import ArrayRef, Gemm, Group, Kind, Place, Schedule, Target
from .trace import Op

OPERATIONS = {
    "add": "{} + {}",
    "subtract": "{} - {}",
    "multiply": "{} * {}",
    "divide": "{} / {}",
    "tanh": "tanh_of({})",
    "greater": "{} > {}",
    "less": "{} < {}",
    "exp": "expf({})",
    "expm1": "expm1f({})",
    "log1p": "log1pf({})",
    "where": "{} ? {} : {}",
}
IN_PLACE = Target(in_place=True, rounds=False, adds=False)

TANH = f"""\
/* a rational function: within 2.1e-7 of tanh; NaN stays NaN */
static inline float tanh_of(float x)
{{
    const float y = 0.5f * x, u = y * y, v = u * u;
    const float e = {P[4]}f * v + ({P[3]}f * u + {P[2]}f);
    const float p = (e * v + ({P[1]}f * u + {P[0]}f)) * y;
    const float d = {Q[3]}f * u + {Q[2]}f;
    const float q = d * v + ({Q[1]}f * u + {Q[0]}f);
    const float t = (p + p) * q / (q * q + p * p);
    return fabsf(x) >= {LIMIT}f ? copysignf(1.0f, x) : t;
}}
"""
GEMV = """\
/* y = x w + b; x (K), w (K, N) row by row, b (N) or NULL */
static void gemv(size_t K, size_t N, const float *restrict x, const float *restrict w,
                 const float *restrict b, float *restrict y)
{
    for (size_t j = 0; j < N; j++)
        y[j] = b ? b[j] : 0.0f;
    for (; K >= 4; K -= 4, x += 4, w += 4 * N) {
        const float p = x[0], q = x[1], r = x[2], s = x[3];
        for (size_t j = 0; j < N; j++)
            y[j] += (p * w[j] + q * w[N + j]) + (r * w[2 * N + j] + s * w[3 * N + j]);
    }
    for (; K; K--, x++, w += N)
        for (size_t j = 0; j < N; j++)
            y[j] += x[0] * w[j];
}
"""
GEMV_INT8 = """\
/* y = scale * (x w) + b; x (K), w (K, N) row by row, scale (N), b (N) or NULL */
static void gemv(size_t K, size_t N, const float *restrict x, const int8_t *restrict w,
                 const float *restrict scale, const float *restrict b, float *restrict y)
{
    for (size_t j = 0; j < N; j++)
        y[j] = 0.0f;
    for (; K >= 4; K -= 4, x += 4, w += 4 * N) {
        const float p = x[0], q = x[1], r = x[2], s = x[3];
        for (size_t j = 0; j < N; j++)
            y[j] += (p * (float)w[j] + q * (float)w[N + j])
                  + (r * (float)w[2 * N + j] + s * (float)w[3 * N + j]);
    }
    for (; K; K--, x++, w += N)
        for (size_t j = 0; j < N; j++)
            y[j] += x[0] * (float)w[j];
    for (size_t j = 0; j < N; j++)
        y[j] = scale[j] * y[j] + (b ? b[j] : 0.0f);
}
"""


def helpers(int8: bool) -> str:
    """Print the functions that the printed steps call."""
    return "\n".join([TANH, GEMV_INT8 if int8 else GEMV])


def product(sizes: tuple[str, str], x: str, matrix: str, bias: str, y: str, int8: bool) -> str:
    """Print y = x matrix + bias; sizes: K and N, the lengths of x and y."""
    weights = [matrix, f"{matrix}_scale"] if int8 else [matrix]
    return f"gemv({', '.join([*sizes, x, *weights, bias or 'NULL', y])});"


class CSource:
    """The step of one layer as a C function, `step_NAME`: its user's own end with `_step`.

    Its weights are members of a struct whose names begin with `name`: `W` and `b` for the inputs
    (no `b` without a bias), `U0`... for the products, and the schedule's vectors.
    """

    def __init__(self, schedule: Schedule, name: str, int8: bool) -> None:
        if not all(gemm.product.transposed for gemm in schedule.gemms):
            raise NotImplementedError("the step has a product of the state with columns of U")
        self.schedule, self.name, self.int8 = schedule, name, int8
        a = next(array for array in schedule.arrays if array.kind is Kind.PROJECTION)
        self.buffers = [a, *schedule.buffers]

    @property
    def columns(self) -> int:
        """The width of all buffers together, in units of H."""
        return sum(array.columns for array in self.buffers)

    def function(self, I: int, H: int, bias: bool) -> str:
        """Print the function, which takes x (I), changes h (H), and works in `work`."""
        lines = [f"enum {{ I = {I}, H = {H} }};"]
        start = 0
        for array in self.buffers:
            place = f"work + {start} * H" if start else "work"
            lines.append(f"float *restrict const {array.name} = {place};")
            start += array.columns
        b = self._member("b") if bias else ""
        lines.append(product(("I", "3 * H"), "x", self._member("W"), b, "a", self.int8))
        gemms = 0
        for stage in self.schedule.stages:
            if isinstance(stage, Gemm):
                lines.append(self._gemm(stage, gemms))
                gemms += 1
            else:
                lines += self._loop(stage)
        head = f"static void step_{self.name}("
        return "\n".join([
            f"{head}const WEIGHTS *weights, const float *restrict x,",
            f"{' ' * len(head)}float *restrict h, float *restrict work)",
            "{",
            *(f"    {line}" for line in lines),
            "}",
            "",
        ])  # fmt: skip

    def _member(self, name: str) -> str:
        return f"weights->{self.name}_{name}"

    def _array(self, array: ArrayRef) -> str:
        if array.kind is Kind.VECTOR:
            return self._member(array.name)
        return "h" if array.kind is Kind.STATE else array.name

    def _entry(self, place: Place) -> str:
        """Return the entry of unit j."""
        return f"{self._array(place.array)}[{_offset(place.column)}j]"

    def _gemm(self, gemm: Gemm, n: int) -> str:
        (array, first), out = gemm.operand, gemm.out
        x = self._array(array) + (f" + {first} * H" if first else "")
        sizes = "H", f"{out.columns} * H" if out.columns > 1 else "H"
        return product(sizes, x, self._member(f"U{n}"), "", out.name, self.int8)

    def _loop(self, group: Group) -> list[str]:
        """Print a group's loop over the units; the state is in place, so `path` is left out."""
        stores = [store for store in group.stores if store.place.array.kind is not Kind.AFTER]
        return [
            "for (size_t j = 0; j < H; j++) {",
            *(
                f"    const float v{column} = {self._entry(place)};"
                for column, place in group.loads
            ),
            *(f"    const float v{op.output} = {_value(op)};" for op in group.ops),
            *(f"    {self._entry(store.place)} = v{store.column};" for store in stores),
            "}",
        ]


def _offset(column: int) -> str:
    return {0: "", 1: "H + "}.get(column, f"{column} * H + ")


def _value(op: Op) -> str:
    x = [f"{i!r}f" if isinstance(i, float) else f"v{i}" for i in op.inputs]
    if op.name not in OPERATIONS:
        raise NotImplementedError(f"{op.name} of the step has no counterpart in C yet")
    return OPERATIONS[op.name].format(*x)
