"""From a schedule to CUDA's C++: the kernel of one group, and what all kernels share.

A kernel finds the arrays that hold many steps through a table in the memory of the device: for each
array its address, and how far apart steps and rows are. So a recorded sequence of launches can be
replayed over other arrays. Every argument is 8 bytes wide, a pointer or a number.
"""

from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from typing import NamedTuple

from ..typing import Step
from .schedule import (
    DEVICE,
    STATE,
    ArrayRef,
    Finished,
    Group,
    Kind,
    Kinds,
    Load,
    Place,
    Schedule,
    Store,
    backward_schedule,
    forward_schedule,
    narrowed,
)
from .trace import Op

# f: what the name of a function of float32 ends with
OPERATIONS = {
    "add": "{} + {}",
    "subtract": "{} - {}",
    "multiply": "{} * {}",
    "divide": "{} / {}",
    "tanh": "tanh{f}({})",
    "greater": "{} > {}",
    "less": "{} < {}",
    "exp": "exp{f}({})",
    "expm1": "expm1{f}({})",
    "log1p": "log1p{f}({})",
    "sqrt": "sqrt{f}({})",
    "where": "{} ? {} : {}",
}
TYPES = {"float32": "float", "float64": "double", "float16": "f16", "bfloat16": "bf16"}
TYPES["bool"] = "bool"


class Kernel(NamedTuple):
    """A kernel of a source. barrier: 0 without one, 1 with one in a block, 2 with one in the grid.

    buffers: the arrays that it takes after its numbers.
    """

    name: str
    source: str
    barrier: int = 0
    buffers: tuple[str, ...] = ()


# the sum of v over all threads of a block, which must all call it; sums: a number for each
ROW_SUM = """\
#ifndef HOST
#define SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif
__device__ inline number row_sum(number v, number* sums) {
  const int j = threadIdx.x;
  sums[j] = v;
  for (int n = blockDim.x; n > 1;) {
    const int half = (n + 1) / 2;
    __syncthreads();
    if (j + half < n) sums[j] += sums[j + half];
    n = half;
  }
  __syncthreads();
  const number sum = sums[0];
  __syncthreads();  // before another sum is begun, or what was read is written
  return sum;
}
"""
# HOST is defined where this is compiled for the CPU; see shim.py
PRELUDE = """\
typedef {number} number;  // of the arithmetic
struct f16 {{ unsigned short bits; }};
struct bf16 {{ unsigned short bits; }};

__device__ inline float get(float v) {{ return v; }}
__device__ inline double get(double v) {{ return v; }}
__device__ inline bool get(bool v) {{ return v; }}
__device__ inline float get(bf16 v) {{
  const unsigned wide = (unsigned)v.bits << 16;
  float result;
  memcpy(&result, &wide, 4);
  return result;
}}
__device__ inline void put(float& place, float v) {{ place = v; }}
__device__ inline void put(double& place, double v) {{ place = v; }}
__device__ inline void put(bf16& place, float v) {{  // to the nearest, and to even between two
  unsigned wide;
  memcpy(&wide, &v, 4);
  wide += 0x7fff + (wide >> 16 & 1);
  place.bits = v == v ? wide >> 16 : 0x7fc0;
}}
#ifndef HOST
__device__ inline float get(f16 v) {{
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(v.bits));
  return result;
}}
__device__ inline void put(f16& place, float v) {{
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(place.bits) : "f"(v));
}}
#endif
"""


def prelude(number: str) -> str:
    """Return the beginning of every source; number: the dtype of the arithmetic."""
    return PRELUDE.format(number=TYPES[number])


def constant(value: float, number: str) -> str:
    """Print a Python float in C."""
    return repr(value) + ("f" if number == "float32" else "")


def body(group: Group, entry: Callable[[Place], str], number: str) -> list[str]:
    """Print a group without means, for row b and unit j; `on`: the row does not skip the step."""
    old = old_state(group)
    return [
        *_loaded(group.loads, entry),
        *operations(group.ops, number),
        *(f"put({entry(store.place)}, {stored(store, old)});" for store in group.stores),
    ]


def _loaded(loads: Iterable[Load], entry: Callable[[Place], str]) -> list[str]:
    return [f"const number v{c} = get({entry(place)});" for c, place in loads]


def operations(ops: Iterable[Op], number: str) -> list[str]:
    """Print a line for each operation, from variables to a new one."""
    lines = []
    for op in ops:
        x = [constant(i, number) if isinstance(i, float) else f"v{i}" for i in op.inputs]
        value = OPERATIONS[op.name].format(*x, f="f" if number == "float32" else "")
        lines.append(f"const number v{op.output} = {value};")
    return lines


def old_loads(group: Group) -> list[Load]:
    """Return the group's load of the state before the step, if there is one."""
    return [load for load in group.loads if load.place.array == STATE]


def old_state(group: Group) -> str:
    """Return the variable of the state before the step; "" where the group does not load it."""
    return next((f"v{load.column}" for load in old_loads(group)), "")


def body_of_row(group: Group, entry: Callable[[Place], str], number: str) -> list[str]:
    """Print a group for row b, whose units the threads of one block share.

    Its means come first. All stores are in one loop, since a second one would read states that the
    first has replaced.
    """
    lines, each = [], "for (long long j = threadIdx.x; j < H; j += blockDim.x) {"
    for loop in group.loops(pairs=len(group.stores) * (len(group.stores) + len(group.loads))):
        if loop.means:
            lines += [f"number s{op.output} = 0;" for op in loop.means]
            sums = [f"s{op.output} += {' + '.join(f'v{c}' for c in op.inputs)};"
                    for op in loop.means]  # fmt: skip
            inner = [*_loaded(loop.loads, entry), *operations(loop.ops, number), *sums]
        else:
            loads = dict([*loop.loads, *old_loads(group)])
            inner = body(Group([Load(*v) for v in loads.items()], loop.ops, loop.stores),
                         entry, number)  # fmt: skip
        lines += [each, *(f"  {line}" for line in inner), "}"]
        for op in loop.means:
            mean = f"row_sum(s{op.output}, sums) / number({len(op.inputs)} * H)"
            lines.append(f"const number v{op.output} = {mean};")
        lines += operations(loop.rows, number)
    return lines


def stored(store: Store, old: str) -> str:
    """Print the value of a store; old: the variable of the state, which a finished row keeps."""
    value = f"v{store.column}"
    if store.finished is Finished.COMPUTED:
        return value
    return f"on ? {value} : {old if store.finished is Finished.KEPT else 'number(0)'}"


def step_kernel(name: str, group: Group, scan: "Scan") -> Kernel:
    """Print the kernel of a group for one step.

    The table has the arrays of the scan in their order, then "alive". The step is t; the state
    after it is number o of the path. With means, a block of threads has all units of a row, and in
    shared memory a number for each thread.
    """
    arrays, number = scan.schedule.arrays, scan.number
    places = [*(load.place for load in group.loads), *(store.place for store in group.stores)]
    used = {place.array for place in places}
    written = {store.place.array for store in group.stores}
    taken = [array for array in (STATE, *scan.schedule.buffers) if array in used]

    def pointer(array: ArrayRef) -> str:
        return f"{'' if array in written else 'const '}{TYPES[scan.dtype(array.name)]}*"

    head = [f"const unsigned char* const alive = (const unsigned char*)table[{3 * len(arrays)}];"]
    head.append(f"const long long alive_row = table[{3 * len(arrays) + 2}];")
    for k, array in enumerate(arrays):
        if array in used:
            index, kind = "o" if array.kind is Kind.AFTER else "t", pointer(array)
            start = f"({kind})table[{3 * k}] + {index} * table[{3 * k + 1}]"
            head.append(f"{kind} const {array.name} = {start};")
            head.append(f"const long long {array.name}_row = table[{3 * k + 2}];")

    def entry(place: Place) -> str:
        (array, n), width = place, place.array.columns
        row = f"b * {array.name}_row"
        if array.kind is Kind.ROWS:
            return f"{array.name}[{row}]"
        if array not in arrays:
            row = "b * H" if width == 1 else f"b * {width} * H"
        return f"{array.name}[{row} + {n} * H + j]" if n else f"{array.name}[{row} + j]"

    numbers = ["const long long* table", *(f"long long {n}" for n in ("t", "o", "B", "H"))]
    parameters = [*numbers, *(f"{pointer(array)} {array.name}" for array in taken)]
    if group.means:
        head += ["SHARED(memory);", "number* const sums = (number*)memory;"]
        inner = body_of_row(group, entry, number)
    else:
        inner = [
            "const long long first = blockIdx.x * (long long)blockDim.x + threadIdx.x;",
            "for (long long j = first; j < H; j += gridDim.x * (long long)blockDim.x) {",
            *(f"  {line}" for line in body(group, entry, number)),
            "}",
        ]
    lines = [
        f'extern "C" __global__ void {name}({", ".join(parameters)}) {{',
        *(f"  {line}" for line in head),
        "  for (long long b = blockIdx.y; b < B; b += gridDim.y) {",
        f"    const bool on = !alive || alive[t * table[{3 * len(arrays) + 1}] + b * alive_row];",
        *(f"    {line}" for line in inner),
        "  }",
        "}",
    ]
    buffers = tuple(array.name for array in taken)
    return Kernel(name, "\n".join(lines) + "\n", int(group.means), buffers)


def table_kernel(count: int) -> str:
    """Print the kernel that writes `count` integers, passed by value, into the table."""
    values = ", ".join(f"long long v{i}" for i in range(count))
    lines = "\n".join(f"  table[{i}] = v{i};" for i in range(count))
    return f'extern "C" __global__ void set_table(long long* table, {values}) {{\n{lines}\n}}\n'


class Scan:
    """A scan on a device.

    number: the dtype of the arithmetic; name: what the names of its kernels begin with; types: the
    dtypes of arrays, and of the weights "U", that are not of `number`.
    """

    def __init__(
        self, schedule: Schedule, number: str, name: str, types: Iterable[tuple[str, str]] = ()
    ) -> None:
        self.schedule, self.number, self.name, self.types = schedule, number, name, dict(types)

    @property
    def arrays(self) -> list[str]:
        """The arrays in the table; the mask of unfinished sequences comes after them."""
        return [array.name for array in self.schedule.arrays]

    @property
    def widths(self) -> list[int]:
        """The columns of each residual, or of each gradient, of a step."""
        return [array.columns for array in self.schedule.extras]

    @cached_property
    def narrow(self) -> "Scan":
        """The scan for weights in half precision, where operands of products are of their dtype."""
        if "U" not in self.types:
            return self
        schedule = narrowed(self.schedule)
        operands = {gemm.operand.array.name: self.types["U"] for gemm in schedule.gemms}
        return Scan(schedule, self.number, self.name, {**self.types, **operands}.items())

    def dtype(self, name: str) -> str:
        """The dtype of an array, or of U."""
        return self.types.get(name, self.number)

    @cached_property
    def kernels(self) -> dict[int, Kernel]:
        """The kernel of each stage that is a group; all are parts of one source."""
        found = {
            n: step_kernel(f"{self.name}_{n}", stage, self)
            for n, stage in enumerate(self.schedule.stages)
            if isinstance(stage, Group)
        }
        table = table_kernel(3 * len(self.arrays) + 3)
        sums = ROW_SUM if self.schedule.means else ""
        kernels = "\n".join(k.source for k in found.values())
        source = prelude(self.number) + sums + kernels + table
        return {n: kernel._replace(source=source) for n, kernel in found.items()}

    @cached_property
    def set_table(self) -> Kernel:
        """The kernel that fills the table, in the same source."""
        return Kernel("set_table", next(iter(self.kernels.values())).source)


@lru_cache(maxsize=64)
def typed(scan: Scan, types: tuple[tuple[str, str], ...]) -> Scan:
    """Return the scan over arrays of these dtypes, pairs of a name and a dtype."""
    return Scan(scan.schedule, scan.number, scan.name, types) if types else scan


@lru_cache(maxsize=64)
def forward_scan(
    step: Step,
    vectors: int,
    keep: bool,
    number: str,
    types: tuple[tuple[str, str], ...] = (),
    name: str = "forward",
    extra: Kinds = (),
) -> Scan:
    """Return a forward scan; see `forward_schedule`."""
    return Scan(forward_schedule(step, vectors, keep, DEVICE, extra), number, name, types)


@lru_cache(maxsize=64)
def backward_scan(
    step: Step,
    saved: int,
    given: bool,
    taps: bool,
    number: str,
    types: tuple[tuple[str, str], ...] = (),
    name: str = "backward",
    extra: Kinds = (),
) -> Scan:
    """Return a backward scan; see `backward_schedule`."""
    return Scan(backward_schedule(step, saved, given, taps, DEVICE, extra), number, name, types)


class AllSteps:
    """The common base of the kernels that run all steps."""

    mask = "const unsigned char* alive, long long alive_step, long long alive_row"

    def __init__(self, scan: Scan) -> None:
        self.scan, self.schedule = scan, scan.schedule

    def begin(self) -> list[str]:
        """The lines before the first step."""
        raise NotImplementedError

    def steps(self) -> list[str]:
        """The loop over the steps, and what comes after it."""
        raise NotImplementedError

    def kernel(self, name: str, threads: int, parameters: list[str]) -> str:
        """Print the kernel; after these parameters come the arrays, each with its strides."""
        written = self.schedule.written
        arrays = [
            f"{'' if n in written else 'const '}{TYPES[self.scan.dtype(n)]}* {n}, "
            f"long long {n}_step, long long {n}_row"
            for n in self.scan.arrays
        ]
        return "\n".join([
            f'extern "C" __global__ void __launch_bounds__({threads}) '
            f"{name}({', '.join([*parameters, *arrays])}) {{",
            *(f"  {line}" for line in [*self.begin(), *self.steps()]),
            "}",
            "",
        ])  # fmt: skip

    def outside(self, place: Place) -> str:
        """Return the entry of row b and this unit in an array of many steps."""
        (name, kind, _), n = place
        if kind is Kind.ROWS:
            return f"{name}[t * {name}_step + b * {name}_row]"
        step = "(t + shift)" if kind is Kind.AFTER else "t"
        return f"{name}[{step} * {name}_step + b * {name}_row + {n} * H + unit]"


def one_kind(scan: Scan) -> bool:
    """Whether all products read U, or all its transpose."""
    return len({gemm.product.transposed for gemm in scan.schedule.gemms}) == 1
