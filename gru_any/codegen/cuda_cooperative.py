"""One kernel for all steps of a block, with U spread over all multiprocessors of a device.

A thread block owns a few units, for all rows: their rows (or columns) of the three thirds of U stay
in its shared memory for the whole sequence. Operands of products are exchanged through global
memory, double-buffered, and all blocks meet at a barrier before each product. So all of them must
run at the same time, one on each multiprocessor. (After FlashRNN, Poeppel et al. 2025.)

Off unless asked for by GRU_ANY_CUDA=whole: no device has shown yet where it pays.
"""

from functools import lru_cache

from .cuda_source import (
    TYPES,
    AllSteps,
    Kernel,
    Scan,
    old_state,
    one_kind,
    operations,
    prelude,
    stored,
)
from .schedule import STATE, ArrayRef, Gemm, Group, Place

THREADS = 256  # of a block, at most
DEEP = 32  # columns of an operand in shared memory at once
ROWS = 64  # of the batch, at most
SUMS = 16  # that a thread may hold in registers


def units(H: int, multiprocessors: int) -> int:
    """Return how many units a block owns."""
    return -(-H // multiprocessors)


def threads(B: int, own: int) -> int:
    """Return the threads of a block: one for each sum of a product, at most `THREADS`."""
    return min(THREADS, -(-3 * B * own // 32) * 32)


def holds(scan: Scan, B: int, H: int, multiprocessors: int, shared: int) -> bool:
    """Whether the kernel fits the device; shared: bytes of shared memory of a block."""
    own, size = units(H, multiprocessors), 8 if scan.number == "float64" else 4
    fits = shared_numbers(scan, B, H, own) * size <= shared and B * 3 * own <= THREADS * SUMS
    return fits and B <= ROWS and one_kind(scan) and not scan.schedule.means


def exchanged(scan: Scan) -> list[ArrayRef]:
    """Return the operands of the products."""
    return list(dict.fromkeys(gemm.operand.array for gemm in scan.schedule.gemms))


def _owned(scan: Scan) -> list[ArrayRef]:
    """Return the arrays that a block keeps for its own units alone."""
    others = [array for array in scan.schedule.buffers if array not in exchanged(scan)]
    return [STATE, *others]


def shared_numbers(scan: Scan, B: int, H: int, own: int) -> int:
    """Return how many elements of shared memory a block needs."""
    columns = sum(array.columns for array in _owned(scan))
    return 3 * own * H + B * (DEEP + 1) + B * own * columns


@lru_cache(maxsize=64)
def cooperative_kernel(scan: Scan, B: int, H: int, own: int) -> Kernel:
    """Print the kernel of a scan for B rows and H units, of which each block owns `own`.

    Arguments: K, the first step, the distance to the next, how far its state is from it in the
    path; the mask with its distances; U, the first state, the last; the counter of the barrier,
    which is 0; what is exchanged, (2, B, columns H) each; each array with its distances.
    """
    return Kernel(f"{scan.name}_whole", _Cooperative(scan, B, H, own).source(), barrier=2)


class _Cooperative(AllSteps):
    def __init__(self, scan: Scan, B: int, H: int, own: int) -> None:
        super().__init__(scan)
        self.B, self.H, self.own = B, H, own
        self.threads = threads(B, own)
        self.owned, self.exchanged = _owned(scan), exchanged(scan)

    def source(self) -> str:
        """The whole source."""
        parameters = [
            *(f"long long {n}" for n in ("K", "first", "next", "shift")),
            self.mask,
            f"const {TYPES[self.scan.dtype('U')]}* U",
            "const number* before, number* after, unsigned* counter",
            *(f"number* {array.name}_all" for array in self.exchanged),
        ]
        return "\n".join([
            prelude(self.scan.number),
            f"constexpr int B = {self.B}, H = {self.H}, OWN = {self.own};",
            f"constexpr int THREADS = {self.threads}, DEEP = {DEEP};",
            TOGETHER,
            self.kernel(f"{self.scan.name}_whole", self.threads, parameters),
        ])  # fmt: skip

    def begin(self) -> list[str]:
        """Find the shared memory, and load the weights and the first state."""
        lines = ["SHARED(memory);", "number* const w = (number*)memory;"]
        offset = 3 * self.own * self.H
        lines.append(f"number* const tile = (number*)memory + {offset};")
        offset += self.B * (DEEP + 1)
        for array in self.owned:
            lines.append(f"number* const {array.name} = (number*)memory + {offset};")
            offset += self.B * self.own * array.columns
        transposed = self.schedule.gemms[0].product.transposed
        entry = "(g * H + unit) * H + k" if transposed else "(g * H + k) * H + unit"
        exchange = [f"{STATE.name}_all[b * H + unit] = v;"] if STATE in self.exchanged else []
        return [
            *lines,
            "const int j = threadIdx.x, start = blockIdx.x * OWN;",
            "unsigned target = 0;",
            "for (int i = j; i < 3 * OWN * H; i += THREADS) {",
            "  const int g = i / (OWN * H), unit = start + i / H % OWN, k = i % H;",
            f"  w[i] = unit < H ? get(U[{entry}]) : number(0);",
            "}",
            "for (int i = j; i < B * OWN; i += THREADS) {",
            "  const int b = i / OWN, unit = start + i % OWN;",
            "  if (unit >= H) continue;",
            "  const number v = before[b * H + unit];",
            f"  {STATE.name}[i] = v;",
            *(f"  {line}" for line in exchange),
            "}",
        ]

    def steps(self) -> list[str]:
        """All steps, and the last state."""
        lines = ["const int turn = n & 1;"]
        for stage in self.schedule.stages:
            lines += self._product(stage) if isinstance(stage, Gemm) else self._group(stage)
        return [
            "for (long long n = 0, t = first; n < K; ++n, t += next) {",
            *(f"  {line}" for line in lines),
            "}",
            "for (int i = j; i < B * OWN; i += THREADS)",
            f"  if (start + i % OWN < H) after[i / OWN * H + start + i % OWN] = {STATE.name}[i];",
        ]

    def _entry(self, place: Place) -> str:
        (array, n), width = place, place.array.columns
        if array in self.owned:
            return f"{array.name}[b * {width * self.own} + {n} * OWN + i % OWN]"
        if array in self.exchanged:
            return f"{array.name}_all[(turn * B + b) * {width} * H + {n} * H + unit]"
        return self.outside(place)

    def _group(self, group: Group) -> list[str]:
        lines = [f"const number v{c} = get({self._entry(place)});" for c, place in group.loads]
        lines += operations(group.ops, self.scan.number)
        for store in group.stores:
            (array, n), value = store.place, stored(store, old_state(group))
            if array in self.exchanged:
                turn = "(1 - turn)" if array == STATE else "turn"
                place = f"({turn} * B + b) * {array.columns} * H + {n} * H + unit"
                lines.append(f"{array.name}_all[{place}] = {value};")
            if array not in self.exchanged or array == STATE:
                lines.append(f"put({self._entry(store.place)}, {value});")
        return [
            "for (int i = j; i < B * OWN; i += THREADS) {",
            "  const int b = i / OWN, unit = start + i % OWN;",
            "  if (unit >= H) continue;",
            "  const bool on = !alive || alive[t * alive_step + b * alive_row];",
            *(f"  {line}" for line in lines),
            "}",
        ]

    def _product(self, gemm: Gemm) -> list[str]:
        """Print a product, in which a thread holds the sums of rows i % B and outputs i / B."""
        array, rows, out = gemm.operand.array, gemm.product.rows, gemm.out
        outputs, width = self.own * out.columns, array.columns
        left = f"{array.name}_all + turn * B * {width} * H"
        where = f"{out.name}[b * {outputs} + o] {'+=' if gemm.add else '='}"
        if gemm.product.transposed:  # all outputs from the same columns
            pairs = [(left, rows.start)]
        else:  # the same outputs from the columns of each third
            thirds = range(rows.start, rows.stop)
            pairs = [(f"{left} + {g - rows.start} * H", g) for g in thirds]
        sums = [
            f"multiply<{outputs}>({columns}, {width} * H, w + {g} * OWN * H, tile, sums, j);"
            for columns, g in pairs
        ]
        count = -(-self.B * outputs // self.threads)
        return [
            "meet(counter, target += gridDim.x);",
            "{",
            f"  number sums[{count}] = {{}};",
            *(f"  {line}" for line in sums),
            "  #pragma unroll",
            f"  for (int d = 0; d < {count}; ++d) {{",
            "    const int i = j + d * THREADS, b = i % B, o = i / B;",
            f"    if (o < {outputs}) {where} sums[d];",
            "  }",
            "}",
            "__syncthreads();",
        ]


TOGETHER = """\
#ifndef HOST
#define SHARED(name) extern __shared__ __align__(16) unsigned char name[]
__device__ inline unsigned seen(const unsigned* place) { return *(volatile const unsigned*)place; }
#endif

// all threads of all blocks; target: how many blocks came here since the kernel began
__device__ inline void meet(unsigned* counter, unsigned target) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(counter, 1u);
    while ((int)(seen(counter) - target) < 0) {}
    __threadfence();
  }
  __syncthreads();
}

// sums += left (B, H) w^T (H, OUTPUTS); past the cache of a multiprocessor, which others do not see
template <int OUTPUTS>
__device__ inline void multiply(const number* left, int apart, const number* w, number* tile,
                                number* sums, int j) {
  for (int start = 0; start < H; start += DEEP) {
    for (int i = j; i < B * DEEP; i += THREADS) {
      const int b = i / DEEP, k = i % DEEP;
      tile[b * (DEEP + 1) + k] = start + k < H ? __ldcg(left + b * apart + start + k) : number(0);
    }
    __syncthreads();
    const int count = H - start < DEEP ? H - start : DEEP;
#pragma unroll
    for (int d = 0; d < (B * OUTPUTS + THREADS - 1) / THREADS; ++d) {
      const int i = j + d * THREADS, b = i % B, o = i / B;
      if (o < OUTPUTS)
        for (int k = 0; k < count; ++k) sums[d] += tile[b * (DEEP + 1) + k] * w[o * H + start + k];
    }
    __syncthreads();
  }
}
"""
