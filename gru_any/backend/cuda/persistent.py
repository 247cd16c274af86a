"""One kernel for all steps of a block, where a block of threads holds all weights in registers.

A block of 3H threads owns a few rows of the batch for all steps, so nothing is asked of other
blocks. Thread j keeps row j of U (in the backward pass one column of one third) in registers and
sees to one entry of the products; the state and what a product reads stand in shared memory. For
the traced operations, thread j also sees to one unit of one row, whose values stay in its
registers. (That is how cuDNN runs small sizes; Diamos et al. 2016 is the source of the idea.)
"""

from functools import lru_cache

from ...codegen.cuda_source import TYPES, Kernel, operations, prelude, stored
from ...codegen.schedule import STATE, Gemm, Group, Place
from .walk import Walk

LARGEST = {"float32": 128, "float64": 64}  # units whose weights fit a block's registers
ROWS = 3  # that a block may own: each thread has one unit of one row
PARTS = "parts"  # partial sums of a product in the backward pass, one for each third of U


def fits(walk: Walk, H: int) -> bool:
    """Whether the block's registers hold U, and its products are all of one kind."""
    kinds = {stage.transposed for stage in walk.stages.stages if isinstance(stage, Gemm)}
    return LARGEST[walk.number] >= H and len(kinds) == 1


def shared_numbers(walk: Walk, H: int, rows: int) -> int:
    """How many numbers of shared memory a block needs."""
    return rows * H * sum(_widths(walk).values())


def _widths(walk: Walk) -> dict[str, int]:
    """What stands in shared memory, and its width in columns."""
    gemms = [stage for stage in walk.stages.stages if isinstance(stage, Gemm)]
    needed = {STATE: 1, **{g.left: walk.stages.buffers.get(g.left, 1) for g in gemms}}
    needed |= {g.out: walk.stages.buffers.get(g.out, 1) for g in gemms}
    return needed if gemms[0].transposed else {**needed, PARTS: 3}


@lru_cache(maxsize=64)
def persistent_kernel(walk: Walk, H: int, rows: int) -> Kernel:
    """The kernel of a walk for H units, each block with so many rows.

    Arguments: K, B, the first step, the way to the next, how far its state is from it in the path;
    the mask with its distances; U, the first state, the last; each array with its distances.
    """
    return Kernel(f"{walk.name}_all", _Skeleton(walk, H, rows).source(), barrier=1)


class _Skeleton:
    def __init__(self, walk: Walk, H: int, rows: int) -> None:
        self.walk, self.H, self.rows = walk, H, rows
        self.widths = _widths(walk)
        self.known: set[int] = set()  # columns that a variable holds
        self.old = ""

    def source(self) -> str:
        """The whole source."""
        arrays = [
            f"{'' if n in self._written() else 'const '}{TYPES[self.walk.dtype(n)]}* {n}, "
            f"long long {n}_step, long long {n}_row"
            for n in self.walk.arrays
        ]
        parameters = [
            *(f"long long {n}" for n in ("K", "B", "first", "next", "shift")),
            "const unsigned char* alive, long long alive_step, long long alive_row",
            f"const {TYPES[self.walk.dtype('U')]}* U, const number* before, number* after",
            *arrays,
        ]
        return "\n".join([
            prelude(self.walk.number),
            PRODUCT,
            f"constexpr int H = {self.H}, ROWS = {self.rows};",
            f'extern "C" __global__ void __launch_bounds__({3 * self.H}) '
            f"{self.walk.name}_all({', '.join(parameters)}) {{",
            *(f"  {line}" for line in [*self._begin(), *self._steps()]),
            "}",
            "",
        ])  # fmt: skip

    def _written(self) -> set[str]:
        return {s.place.array for g in self._groups() for s in g.stores}

    def _groups(self) -> list[Group]:
        return [stage for stage in self.walk.stages.stages if isinstance(stage, Group)]

    def _begin(self) -> list[str]:
        lines, offset = ["SHARED(memory);"], 0
        for name, width in self.widths.items():
            lines.append(f"number* const {name} = (number*)memory + {offset};")
            offset += self.rows * width * self.H
        gemms = [stage for stage in self.walk.stages.stages if isinstance(stage, Gemm)]
        weight = "j * H + k" if gemms[0].transposed else "(third * H + k) * H + unit"
        return [
            *lines,
            "const int j = threadIdx.x, third = j / H, unit = j % H, row = third;",
            "const long long b = blockIdx.x * (long long)ROWS + row;",
            "const bool here = row < ROWS, mine = here && b < B;",
            "number w[H];",
            "#pragma unroll",
            f"for (int k = 0; k < H; ++k) w[k] = get(U[{weight}]);",
            "if (here) state[j] = mine ? before[b * H + unit] : number(0);",
            *(["__syncthreads();"] if isinstance(self.walk.stages.stages[0], Gemm) else []),
        ]

    def _steps(self) -> list[str]:
        lines, stages = self._inputs(), self.walk.stages.stages
        for n, stage in enumerate(stages):
            if isinstance(stage, Gemm):
                lines += self._product(stage)
                if isinstance(stages[(n + 1) % len(stages)], Gemm):
                    lines.append("__syncthreads();")
            else:
                lines += [*self._group(stage), "__syncthreads();"]
        return [
            "for (long long n = 0, t = first; n < K; ++n, t += next) {",
            *(f"  {line}" for line in lines),
            "}",
            "if (mine) after[b * H + unit] = state[j];",
        ]

    def _inputs(self) -> list[str]:
        """Ask for everything from outside early, so that it comes while a product is computed."""
        lines = ["const bool on = !alive || (mine && alive[t * alive_step + b * alive_row]);"]
        made = {op.output for group in self._groups() for op in group.ops}
        for column, place in dict(p for group in self._groups() for p in group.loads).items():
            if place.array not in self.widths and column not in made:
                self.known.add(column)
                value = f"mine ? get({self._entry(place)}) : number(0)"
                lines.append(f"const number v{column} = {value};")
        return lines

    def _entry(self, place: Place) -> str:
        array, n = place
        if array in self.widths:
            width = self.widths[array]
            return f"{array}[(row * {width} + {n}) * H + unit]"
        step = "(t + shift)" if array == "path" else "t"
        return f"{array}[{step} * {array}_step + b * {array}_row + {n} * H + unit]"

    def _group(self, group: Group) -> list[str]:
        lines = []
        for column, place in group.loads:
            if column not in self.known:
                self.known.add(column)
                lines.append(f"const number v{column} = here ? {self._entry(place)} : number(0);")
                self.old = f"v{column}" if place.array == STATE else self.old
        lines += operations(group.ops, self.walk.number)
        self.known |= {op.output for op in group.ops}
        for store in group.stores:
            name = store.place.array
            if name in self.walk.stages.buffers and name not in self.widths:
                continue  # for later groups, which find it in a variable
            who = "here" if name in self.widths else "mine"
            value = stored(store, self.old)
            lines.append(f"if ({who}) put({self._entry(store.place)}, {value});")
        return lines

    def _product(self, op: Gemm) -> list[str]:
        first, last = op.rows.start, op.rows.stop
        if op.transposed:
            left, out = f"{op.left} + r * H", f"{op.out} + r * {last - first} * H - {first} * H"
        else:
            width = last - first
            left, out = f"{op.left} + (r * {width} + third - {first}) * H", f"{PARTS} + r * 3 * H"
        lines = [
            f"if (third >= {first} && third < {last})",
            f"  for (int r = 0; r < ROWS; ++r) ({out})[j] = dot<H>({left}, w);",
            "__syncthreads();",
        ]
        if not op.transposed:
            sums = " + ".join(f"{PARTS}[(row * 3 + {g}) * H + unit]" for g in range(first, last))
            width = self.widths[op.out]
            place = f"{op.out}[row * {width} * H + unit]"
            lines.append(f"if (here) {place} {'+=' if op.add else '='} {sums};")
        return lines


PRODUCT = """\
#ifndef HOST
#define SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif
struct alignas(16) Four { number a, b, c, d; };

// the sum of x[k] w[k]; x in shared memory, four numbers at a time where they are aligned
template <int N> __device__ inline number dot(const number* x, const number* w) {
  number a = 0, b = 0, c = 0, d = 0;
  if (N % 4 == 0) {
#pragma unroll
    for (int k = 0; k < N; k += 4) {
      const Four v = *(const Four*)(x + k);
      a += v.a * w[k], b += v.b * w[k + 1], c += v.c * w[k + 2], d += v.d * w[k + 3];
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) a += x[k] * w[k];
  }
  return (a + b) + (c + d);
}
"""
