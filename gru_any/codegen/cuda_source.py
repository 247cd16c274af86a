"""From stages to CUDA's C++: the kernel of one group, and what all kernels begin with.

A kernel finds the arrays that hold many steps through a table in the memory of the device: for each
array its address, and how far apart steps and rows are. So a recorded sequence of launches can be
replayed over other arrays. Every argument is 8 bytes wide, a pointer or a number.
"""

from collections.abc import Callable
from typing import NamedTuple

from .numba_source import SIGNS
from .schedule import STATE, Group, Place, Store
from .trace import Op

TYPES = {"float32": "float", "float64": "double", "float16": "f16", "bfloat16": "bf16"}


class Kernel(NamedTuple):
    """A kernel of a source. barrier: 0 without one, 1 with one in a block, 2 with one in the grid.

    buffers: the arrays that it takes after its numbers.
    """

    name: str
    source: str
    barrier: int = 0
    buffers: tuple[str, ...] = ()


# what a compiler for the host defines before (see shim.py) is left out
PRELUDE = """\
typedef {number} number;  // of the arithmetic
struct f16 {{ unsigned short bits; }};
struct bf16 {{ unsigned short bits; }};

__device__ inline float get(float v) {{ return v; }}
__device__ inline double get(double v) {{ return v; }}
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
    """What every source begins with; number: the dtype of the arithmetic."""
    return PRELUDE.format(number=TYPES[number])


def constant(value: float, number: str) -> str:
    """A Python float in C."""
    return repr(value) + ("f" if number == "float32" else "")


def body(group: Group, entry: Callable[[Place], str], number: str) -> list[str]:
    """The lines of a group for row b and unit j; `on`: its sequence has not finished."""
    old = next((f"v{c}" for c, place in group.loads if place.array == STATE), "")
    return [
        *(f"const number v{c} = get({entry(place)});" for c, place in group.loads),
        *operations(group.ops, number),
        *(f"put({entry(store.place)}, {stored(store, old)});" for store in group.stores),
    ]


def operations(ops: list[Op], number: str) -> list[str]:
    """A line for each operation, from variables to a new one."""
    lines, function = [], "tanhf" if number == "float32" else "tanh"
    for op in ops:
        x = [constant(i, number) if isinstance(i, float) else f"v{i}" for i in op.inputs]
        value = f"{function}({x[0]})" if op.name == "tanh" else f" {SIGNS[op.name]} ".join(x)
        lines.append(f"const number v{op.output} = {value};")
    return lines


def stored(store: Store, old: str) -> str:
    """What goes to a place; old: the state before, for a row that has ended."""
    value = f"v{store.column}"
    if store.ended == "as it is":
        return value
    return f"on ? {value} : {old if store.ended == 'kept' else 'number(0)'}"


def touched(group: Group) -> dict[str, bool]:
    """The arrays of a group, and whether it writes them."""
    names = {place.array: False for _, place in group.loads}
    return names | {store.place.array: True for store in group.stores}


def step_kernel(
    name: str,
    group: Group,
    arrays: list[str],
    buffers: dict[str, int],
    types: dict[str, str],
    number: str,
) -> Kernel:
    """The kernel of a group for one step.

    arrays: those of the table, in its order, with "alive" last; types: dtypes, where not `number`.
    The step is t; the state after it is number o of the path.
    """
    used = touched(group)
    taken = [n for n in (STATE, *buffers) if n in used]
    width = {STATE: 1, **buffers}
    head = [f"const unsigned char* const alive = (const unsigned char*)table[{3 * len(arrays)}];"]
    head.append(f"const long long alive_row = table[{3 * len(arrays) + 2}];")
    for name_ in (n for n in arrays if n in used):
        k, index = 3 * arrays.index(name_), "o" if name_ == "path" else "t"
        kind = ("" if used[name_] else "const ") + TYPES[types.get(name_, number)]
        head.append(f"{kind}* const {name_} = ({kind}*)table[{k}] + {index} * table[{k + 1}];")
        head.append(f"const long long {name_}_row = table[{k + 2}];")

    def entry(place: Place) -> str:
        array, n = place
        row = f"b * {array}_row"
        if array in width:
            row = "b * H" if width[array] == 1 else f"b * {width[array]} * H"
        return f"{array}[{row} + {n} * H + j]" if n else f"{array}[{row} + j]"

    parameters = [f"{'' if used[n] else 'const '}{TYPES[types.get(n, number)]}* {n}" for n in taken]
    numbers = ["const long long* table", *(f"long long {n}" for n in ("t", "o", "B", "H"))]
    lines = [
        f'extern "C" __global__ void {name}({", ".join([*numbers, *parameters])}) {{',
        *(f"  {line}" for line in head),
        "  for (long long b = blockIdx.y; b < B; b += gridDim.y) {",
        f"    const bool on = !alive || alive[t * table[{3 * len(arrays) + 1}] + b * alive_row];",
        "    const long long first = blockIdx.x * (long long)blockDim.x + threadIdx.x;",
        "    for (long long j = first; j < H; j += gridDim.x * (long long)blockDim.x) {",
        *(f"      {line}" for line in body(group, entry, number)),
        "    }",
        "  }",
        "}",
    ]
    return Kernel(name, "\n".join(lines) + "\n", 0, tuple(taken))


def table_kernel(count: int) -> str:
    """The kernel that writes so many numbers into the table, handed over by value."""
    values = ", ".join(f"long long v{i}" for i in range(count))
    lines = "\n".join(f"  table[{i}] = v{i};" for i in range(count))
    return f'extern "C" __global__ void set_table(long long* table, {values}) {{\n{lines}\n}}\n'
