"""One kernel for all steps of a block, with U spread over all multiprocessors of a device.

A block of threads owns a few units, for all rows: what gives them, of the three thirds of U, stands
in its shared memory for the whole sequence. What the products read goes through global memory, in
two copies that take turns, and all blocks meet at a barrier before each product. So all of them
must run at the same time, one on each multiprocessor. (After FlashRNN, Poeppel et al. 2025.)

Off unless asked for by GRU_ANY_CUDA=whole: no device has shown yet where it pays.
"""

from functools import lru_cache

from ...codegen.cuda_source import TYPES, Kernel, operations, prelude, stored
from ...codegen.schedule import STATE, Gemm, Group, Place
from .walk import Walk

THREADS = 256  # of a block, at most
DEEP = 32  # columns of what a product reads that are in shared memory at once
ROWS = 64  # of the batch, at most
SUMS = 16  # that a thread may hold in registers


def units(H: int, multiprocessors: int) -> int:
    """How many units a block owns."""
    return -(-H // multiprocessors)


def threads(B: int, own: int) -> int:
    """How many threads a block has: one for each sum of a product, where there are few."""
    return min(THREADS, -(-3 * B * own // 32) * 32)


def holds(walk: Walk, B: int, H: int, multiprocessors: int, shared: int) -> bool:
    """Whether the device's shared memory holds U; shared: bytes that a block may use."""
    kinds = {stage.transposed for stage in _gemms(walk)}
    own, size = units(H, multiprocessors), 8 if walk.number == "float64" else 4
    fits = shared_numbers(walk, B, H, own) * size <= shared and B * 3 * own <= THREADS * SUMS
    return fits and B <= ROWS and len(kinds) == 1


def _gemms(walk: Walk) -> list[Gemm]:
    return [stage for stage in walk.stages.stages if isinstance(stage, Gemm)]


def exchanged(walk: Walk) -> dict[str, int]:
    """What the products read, and its width in columns."""
    return {gemm.left: walk.stages.buffers.get(gemm.left, 1) for gemm in _gemms(walk)}


def _owned(walk: Walk) -> dict[str, int]:
    """What each block has of its own units, and its width in columns."""
    others = {n: w for n, w in walk.stages.buffers.items() if n not in exchanged(walk)}
    return {STATE: 1, **others}


def shared_numbers(walk: Walk, B: int, H: int, own: int) -> int:
    """How many numbers of shared memory a block needs."""
    return 3 * own * H + B * (DEEP + 1) + B * own * sum(_owned(walk).values())


@lru_cache(maxsize=64)
def whole_kernel(walk: Walk, B: int, H: int, own: int) -> Kernel:
    """The kernel of a walk for B rows and H units, of which each block owns so many.

    Arguments: K, the first step, the way to the next, how far its state is from it in the path; the
    mask with its distances; U, the first state, the last; the counter of the barrier, which is 0;
    what is exchanged, (2, B, width H) each; each array with its distances.
    """
    return Kernel(f"{walk.name}_whole", _Skeleton(walk, B, H, own).source(), barrier=2)


class _Skeleton:
    def __init__(self, walk: Walk, B: int, H: int, own: int) -> None:
        self.walk, self.B, self.H, self.own = walk, B, H, own
        self.threads = threads(B, own)
        self.owned, self.exchanged = _owned(walk), exchanged(walk)

    def source(self) -> str:
        """The whole source."""
        groups = [stage for stage in self.walk.stages.stages if isinstance(stage, Group)]
        written = {s.place.array for group in groups for s in group.stores}
        parameters = [
            *(f"long long {n}" for n in ("K", "first", "next", "shift")),
            "const unsigned char* alive, long long alive_step, long long alive_row",
            f"const {TYPES[self.walk.dtype('U')]}* U",
            "const number* before, number* after, unsigned* counter",
            *(f"number* {name}_all" for name in self.exchanged),
            *(
                f"{'' if n in written else 'const '}{TYPES[self.walk.dtype(n)]}* {n}, "
                f"long long {n}_step, long long {n}_row"
                for n in self.walk.arrays
            ),
        ]
        return "\n".join([
            prelude(self.walk.number),
            f"constexpr int B = {self.B}, H = {self.H}, OWN = {self.own};",
            f"constexpr int THREADS = {self.threads}, DEEP = {DEEP};",
            TOGETHER,
            f'extern "C" __global__ void __launch_bounds__({self.threads}) '
            f"{self.walk.name}_whole({', '.join(parameters)}) {{",
            *(f"  {line}" for line in [*self._begin(), *self._steps()]),
            "}",
            "",
        ])  # fmt: skip

    def _begin(self) -> list[str]:
        lines = ["SHARED(memory);", "number* const w = (number*)memory;"]
        offset = 3 * self.own * self.H
        lines.append(f"number* const tile = (number*)memory + {offset};")
        offset += self.B * (DEEP + 1)
        for name, width in self.owned.items():
            lines.append(f"number* const {name} = (number*)memory + {offset};")
            offset += self.B * self.own * width
        turned = _gemms(self.walk)[0].transposed
        entry = "(g * H + unit) * H + k" if turned else "(g * H + k) * H + unit"
        exchange = [f"{STATE}_all[b * H + unit] = v;"] if STATE in self.exchanged else []
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
            f"  {STATE}[i] = v;",
            *(f"  {line}" for line in exchange),
            "}",
        ]

    def _steps(self) -> list[str]:
        lines = ["const int turn = n & 1;"]
        for stage in self.walk.stages.stages:
            lines += self._product(stage) if isinstance(stage, Gemm) else self._group(stage)
        return [
            "for (long long n = 0, t = first; n < K; ++n, t += next) {",
            *(f"  {line}" for line in lines),
            "}",
            "for (int i = j; i < B * OWN; i += THREADS)",
            f"  if (start + i % OWN < H) after[i / OWN * H + start + i % OWN] = {STATE}[i];",
        ]

    def _entry(self, place: Place) -> str:
        array, n = place
        if array in self.owned:
            return f"{array}[b * {self.owned[array] * self.own} + {n} * OWN + i % OWN]"
        if array in self.exchanged:
            width = self.exchanged[array]
            return f"{array}_all[(turn * B + b) * {width} * H + {n} * H + unit]"
        step = "(t + shift)" if array == "path" else "t"
        return f"{array}[{step} * {array}_step + b * {array}_row + {n} * H + unit]"

    def _group(self, group: Group) -> list[str]:
        old = next((f"v{c}" for c, place in group.loads if place.array == STATE), "")
        lines = [f"const number v{c} = get({self._entry(place)});" for c, place in group.loads]
        lines += operations(group.ops, self.walk.number)
        for store in group.stores:
            (name, n), value = store.place, stored(store, old)
            if name in self.exchanged:
                width, turn = self.exchanged[name], "(1 - turn)" if name == STATE else "turn"
                place = f"({turn} * B + b) * {width} * H + {n} * H + unit"
                lines.append(f"{name}_all[{place}] = {value};")
            if name not in self.exchanged or name == STATE:
                lines.append(f"put({self._entry(store.place)}, {value});")
        return [
            "for (int i = j; i < B * OWN; i += THREADS) {",
            "  const int b = i / OWN, unit = start + i % OWN;",
            "  if (unit >= H) continue;",
            "  const bool on = !alive || alive[t * alive_step + b * alive_row];",
            *(f"  {line}" for line in lines),
            "}",
        ]

    def _product(self, op: Gemm) -> list[str]:
        """Each thread holds some sums: of row i % B, and of output i / B."""
        first, last = op.rows.start, op.rows.stop
        width, thirds = self.exchanged[op.left], last - first
        outputs = thirds * self.own if op.transposed else self.own
        left = f"{op.left}_all + turn * B * {width} * H"
        where = f"{op.out}[b * {self.owned[op.out] * self.own} + o] {'+=' if op.add else '='}"
        if op.transposed:  # all outputs from the same columns
            pairs = [(left, first)]
        else:  # the same outputs from the columns of each third
            pairs = [(f"{left} + {g - first} * H", g) for g in range(first, last)]
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
