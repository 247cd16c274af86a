"""CUDA source compiled for the CPU: the source as it is, between a header and a footer.

Without barriers, the threads of a block are iterations of a loop. With barriers they are fibers or,
for the sanitizers, threads of the host. The thread sanitizer finds a missing barrier, and memory
that two threads access at once; the address sanitizer finds accesses outside of an array.
"""

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from ...backend.cpu.jit_cache import replacing

HEADER = r"""
#include <cmath>
#include <cstring>
using std::memcpy;
#define HOST
#define __global__
#define __device__ static
#define __restrict__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index { long long x = 0, y = 0; };
static thread_local Index threadIdx, blockIdx;
static Index blockDim, gridDim;

template <std::size_t... I> struct Sequence {};
template <std::size_t N, std::size_t... I> struct Count : Count<N - 1, N - 1, I...> {};
template <std::size_t... I> struct Count<0, I...> { using type = Sequence<I...>; };
template <class... A, std::size_t... I>
static void call(void (*kernel)(A...), const long long* v, Sequence<I...>) {
  kernel((A)v[I]...);
}
template <class... A> static void call(void (*kernel)(A...), const long long* v) {
  call(kernel, v, typename Count<sizeof...(A)>::type{});
}

// shape: blocks along x and y, threads of a block, bytes of its shared memory, and its barrier:
// 0 none, 1 within a block (blocks run one after the other), 2 across blocks (all run at once)
template <class F> static void run_blocks(const long long* shape, F run);
template <class F> static void grid(const long long* shape, F run) {
  const long long across = shape[0], blocks = shape[0] * shape[1], threads = shape[2];
  gridDim = {shape[0], shape[1]}, blockDim = {threads, 1};
#ifdef BARRIERS
  if (shape[4]) return run_blocks(shape, run);
#endif
  for (long long k = 0; k < blocks; ++k)
    for (long long t = 0; t < threads; ++t) {
      blockIdx = {k % across, k / across}, threadIdx = {t, 0};
      run();
    }
}
"""
BARRIERS = r"""
#define BARRIERS
#define __ldcg(place) (*(place))
#define SHARED(name) unsigned char* const name = block->memory
"""
# for the sanitizers: each thread of the device is a thread of the host
THREADS = r"""
#include <atomic>
#include <barrier>
#include <memory>
#include <thread>
#include <vector>
#define __threadfence() std::atomic_thread_fence(std::memory_order_seq_cst)
struct Block { unsigned char* memory; std::barrier<>* barrier; };
static thread_local const Block* block;
static inline void __syncthreads() { block->barrier->arrive_and_wait(); }
static inline unsigned atomicAdd(unsigned* place, unsigned v) {
  return __atomic_fetch_add(place, v, __ATOMIC_SEQ_CST);
}
static inline unsigned seen(const unsigned* place) {
  std::this_thread::yield();
  return __atomic_load_n(place, __ATOMIC_SEQ_CST);
}
"""
BLOCKS_IN_THREADS = r"""
template <class F> static void run_blocks(const long long* shape, F run) {
  const long long across = shape[0], blocks = shape[0] * shape[1], threads = shape[2];
  const long long at_once = shape[4] == 2 ? blocks : 1;
  for (long long first = 0; first < blocks; first += at_once) {
    std::vector<std::thread> all;
    std::vector<Block> group(at_once);
    std::vector<std::unique_ptr<std::barrier<>>> barriers;
    std::vector<std::unique_ptr<long double[]>> memory;  // aligned to 16 bytes
    for (auto& block_ : group) {
      barriers.push_back(std::make_unique<std::barrier<>>(threads));
      memory.push_back(std::make_unique<long double[]>(shape[3] / sizeof(long double) + 1));
      memset((void*)memory.back().get(), 0xff, shape[3]);  // not a number
      block_ = {(unsigned char*)memory.back().get(), barriers.back().get()};
    }
    for (long long k = first; k < first + at_once; ++k)
      for (long long t = 0; t < threads; ++t)
        all.emplace_back([=, block_ = &group[k - first]] {
          blockIdx = {k % across, k / across}, threadIdx = {t, 0}, block = block_;
          run();
        });
    for (auto& thread : all) thread.join();
  }
}
"""
# each thread of the device is a fiber, which runs until it has to wait; then the next one runs
FIBERS = r"""
#include <ucontext.h>
#include <vector>
#define __threadfence()
struct Block { unsigned char* memory; long long arrived, phase; };
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Index thread, group;
  Block* block;
  bool done;
};
static ucontext_t scheduler;
static Fiber* fiber;
static Block* block;
static inline void wait() { swapcontext(&fiber->context, &scheduler); }
"""
BLOCKS_IN_FIBERS = r"""
static inline void __syncthreads() {
  Block* const mine = block;
  const long long phase = mine->phase;
  if (++mine->arrived == blockDim.x) mine->arrived = 0, ++mine->phase;
  while (mine->phase == phase) wait();
}
static inline unsigned atomicAdd(unsigned* place, unsigned v) { return (*place += v) - v; }
static inline unsigned seen(const unsigned* place) { return wait(), *place; }
static void (*entry)();
static void enter() { entry(), fiber->done = true, wait(); }

template <class F> static void run_blocks(const long long* shape, F run) {
  const long long across = shape[0], blocks = shape[0] * shape[1], threads = shape[2];
  const long long at_once = shape[4] == 2 ? blocks : 1;
  static F* kernel;
  kernel = &run, entry = [] { (*kernel)(); };
  std::vector<long double> memory((shape[3] / sizeof(long double) + 1) * at_once);
  for (long long first = 0; first < blocks; first += at_once) {
    memset((void*)memory.data(), 0xff, memory.size() * sizeof(long double));  // not a number
    std::vector<Block> group(at_once);
    for (long long k = 0; k < at_once; ++k)
      group[k] = {(unsigned char*)(memory.data() + memory.size() / at_once * k), 0, 0};
    std::vector<Fiber> all(at_once * threads);
    for (size_t i = 0; i < all.size(); ++i) {
      const long long k = i / threads, t = i % threads;
      all[i].stack.resize(1 << 16), all[i].done = false, all[i].block = &group[k];
      all[i].thread = {t, 0}, all[i].group = {(first + k) % across, (first + k) / across};
      getcontext(&all[i].context);
      all[i].context.uc_stack.ss_sp = all[i].stack.data();
      all[i].context.uc_stack.ss_size = all[i].stack.size();
      makecontext(&all[i].context, enter, 0);
    }
    for (bool left = true; left;) {
      left = false;
      for (auto& next : all) {
        if (next.done) continue;
        left = true, fiber = &next, block = next.block;
        threadIdx = next.thread, blockIdx = next.group;
        swapcontext(&scheduler, &next.context);
      }
    }
  }
}
"""
# conversions that are instructions on the device
HALF = """
static inline float get(f16 v) { _Float16 x; memcpy(&x, &v, 2); return x; }
static inline void put(f16& place, float v) { const _Float16 x = v; memcpy(&place, &x, 2); }
"""
# a program that reads arrays and launches from a file, runs the kernels, and writes the arrays
# back; an argument is (0, integer), (1, index of an array) or (2, length of a table, its entries)
MAIN = r"""
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <utility>
#include <vector>
static const struct { const char* name; void (*run)(const long long*, const long long*); }
    kernels[] = {%s};
int main(int, char** names) {
  FILE* const file = fopen(names[1], "rb+");
  const auto number = [&] {
    long long v;
    if (fread(&v, 8, 1, file) != 1) exit(2);
    return v;
  };
  std::vector<std::pair<long, std::vector<unsigned char>>> arrays(number());
  for (auto& [place, bytes] : arrays) {
    bytes.resize(number());
    place = ftell(file);
    if (fread(bytes.data(), 1, bytes.size(), file) != bytes.size()) exit(2);
  }
  std::vector<std::vector<long long>> tables;
  tables.reserve(1000);
  const std::function<long long()> argument = [&]() -> long long {
    const long long kind = number(), v = number();
    if (kind == 0) return v;
    if (kind == 1) return (long long)arrays[v].second.data();
    std::vector<long long> table(v);
    for (auto& entry : table) entry = argument();
    tables.push_back(std::move(table));
    return (long long)tables.back().data();
  };
  for (long long left = number(); left; --left) {
    const auto run = kernels[number()].run;
    long long shape[5];
    for (auto& v : shape) v = number();
    std::vector<long long> arguments(number());
    for (auto& v : arguments) v = argument();
    run(shape, arguments.data());
  }
  for (auto& [place, bytes] : arrays) {
    fseek(file, place, SEEK_SET);
    fwrite(bytes.data(), 1, bytes.size(), file);
  }
  return fclose(file);
}
"""


def host_source(source: str, threads: bool = False) -> str:
    """Return the source as C++ for the host, with a function run_NAME for each kernel."""
    head, mark, rest = source.partition("#ifndef HOST")
    source = head + HALF + mark + rest if mark else source
    runs = [
        f'extern "C" void run_{name}(const long long* shape, const long long* v) '
        f"{{ grid(shape, [=] {{ call({name}, v); }}); }}"
        for name in kernels(source)
    ]
    if "__syncthreads" not in source:
        return "\n".join([HEADER, source, *runs, ""])
    before, after = (THREADS, BLOCKS_IN_THREADS) if threads else (FIBERS, BLOCKS_IN_FIBERS)
    return "\n".join([BARRIERS, HEADER, before, after, source, *runs, ""])


def kernels(source: str) -> list[str]:
    """Return the names of the kernels in a source."""
    return re.findall(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(', source)


def folder() -> Path:
    """Return the folder of this user's compiled sources, made if need be."""
    path = Path(tempfile.gettempdir()) / f"gru_any_shim_{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def build(text: str, *flags: str, suffix: str = "") -> Path:
    """Compile C++ unless that was done before, and return the file."""
    key = hashlib.sha256("\0".join([text, *flags]).encode()).hexdigest()[:20]
    target = folder() / f"{key}{suffix}"
    if not target.exists():
        with replacing(target) as part:
            command = ["g++", "-std=c++20", "-O1", "-x", "c++", "-", "-o", str(part), "-pthread"]
            done = subprocess.run([*command, *flags], input=text, text=True, capture_output=True)
            if done.returncode:
                raise RuntimeError(f"g++ failed:\n{done.stderr}")
    return target


@cache
def library(source: str) -> ctypes.PyDLL:
    """Return the kernels of a source as functions, which hold the lock of the interpreter."""
    return ctypes.PyDLL(str(build(host_source(source), "-shared", "-fPIC", suffix=".so")))


def program(source: str, *flags: str) -> Path:
    """Return a program that runs kernels of the source, for the sanitizers."""
    rows = ", ".join(f'{{"{name}", run_{name}}}' for name in kernels(source))
    return build(host_source(source, threads=True) + MAIN % rows, *flags)
