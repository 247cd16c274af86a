"""One kernel for all steps of a block, where a thread block holds all weights in registers.

A block of 3H threads owns a few rows of the batch for all steps, so blocks are independent. Thread
j keeps row j of U (in the backward pass one column of one third) in registers and computes one
entry of the products; the state and the products' operands are in shared memory. Thread j also runs
the traced operations for one unit of one row, whose values stay in its registers. (cuDNN runs small
sizes so; the idea is from Diamos et al. 2016.)
"""

from functools import lru_cache

from .cuda_source import TYPES, AllSteps, Kernel, Scan, one_kind, operations, prelude, stored
from .schedule import STATE, ArrayRef, Gemm, Group, Kind, Place

LARGEST = {"float32": 128, "float64": 64}  # units whose weights fit a block's registers
ROWS = 3  # that a block may own: each thread has one unit of one row
# partial sums of a product in the backward pass, one for each third of U
PARTS = ArrayRef("parts", Kind.PRODUCT, 3)


def fits(scan: Scan, H: int) -> bool:
    """Whether this kernel serves a scan: U fits the registers, and there are no means over rows."""
    return LARGEST[scan.number] >= H and one_kind(scan) and not scan.schedule.means


def shared_numbers(scan: Scan, H: int, rows: int) -> int:
    """Return how many elements of shared memory a block needs."""
    return rows * H * sum(array.columns for array in _shared(scan))


def _shared(scan: Scan) -> list[ArrayRef]:
    """Return the arrays in shared memory."""
    gemms = scan.schedule.gemms
    arrays = [STATE, *(gemm.operand.array for gemm in gemms), *(gemm.out for gemm in gemms)]
    return list(dict.fromkeys(arrays if gemms[0].product.transposed else [*arrays, PARTS]))


@lru_cache(maxsize=64)
def persistent_kernel(scan: Scan, H: int, rows: int) -> Kernel:
    """Print the kernel of a scan for H units, each block with `rows` rows.

    Arguments: K, B, the first step, the distance to the next, how far its state is from it in the
    path; the mask with its distances; U, the first state, the last; each array with its distances.
    """
    return Kernel(f"{scan.name}_all", _Persistent(scan, H, rows).source(), barrier=1)


class _Persistent(AllSteps):
    def __init__(self, scan: Scan, H: int, rows: int) -> None:
        super().__init__(scan)
        self.H, self.rows, self.shared = H, rows, _shared(scan)
        self.known: set[int] = set()  # columns that a variable holds
        self.old = ""

    def source(self) -> str:
        """The whole source."""
        parameters = [
            *(f"long long {n}" for n in ("K", "B", "first", "next", "shift")),
            self.mask,
            f"const {TYPES[self.scan.dtype('U')]}* U, const number* before, number* after",
        ]
        return "\n".join([
            prelude(self.scan.number),
            PRODUCT,
            f"constexpr int H = {self.H}, ROWS = {self.rows};",
            self.kernel(f"{self.scan.name}_all", 3 * self.H, parameters),
        ])  # fmt: skip

    def begin(self) -> list[str]:
        """Find the shared memory, and load the weights and the first state."""
        lines, offset = ["SHARED(memory);"], 0
        for array in self.shared:
            lines.append(f"number* const {array.name} = (number*)memory + {offset};")
            offset += self.rows * array.columns * self.H
        transposed = self.schedule.gemms[0].product.transposed
        weight = "j * H + k" if transposed else "(third * H + k) * H + unit"
        return [
            *lines,
            "const int j = threadIdx.x, third = j / H, unit = j % H, row = third;",
            "const long long b = blockIdx.x * (long long)ROWS + row;",
            "const bool here = row < ROWS, mine = here && b < B;",
            "number w[H];",
            "#pragma unroll",
            f"for (int k = 0; k < H; ++k) w[k] = get(U[{weight}]);",
            "if (here) state[j] = mine ? before[b * H + unit] : number(0);",
            *(["__syncthreads();"] if isinstance(self.schedule.stages[0], Gemm) else []),
        ]

    def steps(self) -> list[str]:
        """All steps, and the last state."""
        lines, stages = self._inputs(), self.schedule.stages
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
        """Print loads from global memory, early, so that they overlap with a product."""
        lines = ["const bool on = !alive || (mine && alive[t * alive_step + b * alive_row]);"]
        groups = self.schedule.groups
        made = {op.output for group in groups for op in group.ops}
        for column, place in dict(load for group in groups for load in group.loads).items():
            if place.array not in self.shared and column not in made:
                self.known.add(column)
                value = f"mine ? get({self.outside(place)}) : number(0)"
                lines.append(f"const number v{column} = {value};")
        return lines

    def _entry(self, place: Place) -> str:
        (array, n), width = place, place.array.columns
        if array in self.shared:
            return f"{array.name}[(row * {width} + {n}) * H + unit]"
        return self.outside(place)

    def _group(self, group: Group) -> list[str]:
        lines = []
        for column, place in group.loads:
            if column not in self.known:
                self.known.add(column)
                lines.append(f"const number v{column} = here ? {self._entry(place)} : number(0);")
                self.old = f"v{column}" if place.array == STATE else self.old
        lines += operations(group.ops, self.scan.number)
        self.known |= {op.output for op in group.ops}
        for store in group.stores:
            array = store.place.array
            if array.kind is Kind.SPILL:
                continue  # for later groups, which find it in a variable
            who = "here" if array in self.shared else "mine"
            value = stored(store, self.old)
            lines.append(f"if ({who}) put({self._entry(store.place)}, {value});")
        return lines

    def _product(self, gemm: Gemm) -> list[str]:
        rows, left, out = gemm.product.rows, gemm.operand.array, gemm.out
        first, count = rows.start, rows.stop - rows.start
        if gemm.product.transposed:
            x, y = f"{left.name} + r * H", f"{out.name} + r * {count} * H - {first} * H"
        else:
            x = f"{left.name} + (r * {count} + third - {first}) * H"
            y = f"{PARTS.name} + r * 3 * H"
        lines = [
            f"if (third >= {first} && third < {rows.stop})",
            f"  for (int r = 0; r < ROWS; ++r) ({y})[j] = dot<H>({x}, w);",
            "__syncthreads();",
        ]
        if not gemm.product.transposed:
            thirds = range(first, rows.stop)
            sums = " + ".join(f"{PARTS.name}[(row * 3 + {g}) * H + unit]" for g in thirds)
            place = f"{out.name}[row * {out.columns} * H + unit]"
            lines.append(f"if (here) {place} {'+=' if gemm.add else '='} {sums};")
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
