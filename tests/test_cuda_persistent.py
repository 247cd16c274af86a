"""The kernels that go through all steps: compiled by NVRTC, and run by threads under sanitizers."""

import numpy as np
import pytest
from conftest import THOROUGH, require
from cuda_tools import ARCHITECTURES, compiled, problem, run_program

from gru_any import equations
from gru_any.backend import NUMPY, select
from gru_any.backend.cuda.runner import CUDA
from gru_any.backend.reference import Plain
from gru_any.codegen import cuda_cooperative as cooperative
from gru_any.codegen.cuda_persistent import LARGEST, ROWS, fits, persistent_kernel, shared_numbers
from gru_any.codegen.cuda_source import backward_scan, forward_scan, prelude, typed
from gru_any.nn.sweep import StepMask
from gru_any.testing.fake_cuda import array as fake
from gru_any.testing.fake_cuda.memory import count
from gru_any.testing.fake_cuda.ops import Ops

pytestmark = pytest.mark.usefixtures("compiler")
SPILLED = 64  # bytes that a thread of the largest may have to keep in memory
EVERY = [False, True]
NUMBERS = (None, "float16", "bfloat16")  # how those of a half model are stored; None: as float32
STORED = ("U", "dy", "p0", "p1")  # which these are


def scans(after, number="float32", name="", half=None):
    variant, types = equations.variant(after), tuple((n, half) for n in STORED if half)
    found = [
        forward_scan(variant.step, int(after), True, number, (), f"{name}forward"),
        backward_scan(variant.backward, 4, True, False, number, (), f"{name}backward"),
    ]
    return [typed(scan, types) for scan in found]


@pytest.mark.parametrize("after", EVERY, ids=["before", "after"])
@pytest.mark.parametrize("architecture", ARCHITECTURES if THOROUGH else (80, 120))
def test_nvrtc_compiles_them(after, architecture, record_property):
    sizes = {"float32": (33, 64, 128), "float64": (64,)} if THOROUGH else {"float32": (128,)}
    for number, of_number in sizes.items():
        for H in of_number:
            for scan in scans(after, number):
                cubin, usage = compiled(persistent_kernel(scan, H, ROWS).source, architecture)
                assert cubin.startswith(b"\x7fELF")
                [(registers, spilled)] = usage.values()
                record_property(f"{scan.name} H={H} {number} sm_{architecture}", usage)
                assert registers * 3 * H <= 65536
                assert spilled <= SPILLED


@pytest.mark.parametrize("half", ["float16", "bfloat16"] if THOROUGH else ["float16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES if THOROUGH else (80,))
def test_nvrtc_compiles_those_over_halves(architecture, half, record_property):
    for after in EVERY if THOROUGH else [True]:
        for scan in scans(after, half=half):
            kernels = (
                persistent_kernel(scan, 128, ROWS),
                cooperative.cooperative_kernel(scan, 32, 1024, 8),
            )
            for kernel in kernels:
                _, usage = compiled(kernel.source, architecture)
                [(registers, spilled)] = usage.values()
                record_property(f"{kernel.name} after={after} {half} sm_{architecture}", usage)
                assert registers <= 168
                assert spilled <= SPILLED


def test_what_fits():
    (forward, _), (wide, _) = scans(True), scans(True, "float64")
    assert [fits(forward, H) for H in (1, 128, 129)] == [True, True, False]
    assert [fits(wide, H) for H in (64, 65)] == [True, False]
    assert LARGEST["float32"] * 3 <= 1024


def job(scan, kernel, B, H, K, rows, values):
    """The launch of a kernel over arrays that are exactly as long as they must be."""
    width = {"a": 3, **{f"p{n}": w for n, w in enumerate(scan.widths)}}
    arrays = {
        name: values((K + (name == "path"), B, width.get(name, 1) * H), scan.dtype(name))
        for name in scan.arrays
    }
    alive = np.ones((K, B), bool)
    alive[K // 2 :, B // 2] = False
    numbers = [K, B, 0, 1, 1, alive, B, 1]
    numbers += [values((3 * H, H), scan.dtype("U")), values((B, H)), values((B, H))]
    for name in scan.arrays:
        steps, n, _ = (s // arrays[name].itemsize for s in arrays[name].strides)
        numbers += [arrays[name], *((0, 0) if name.startswith("c") else (steps, n))]
    shape = (-(-B // rows), 1, 3 * H, 4 * shared_numbers(scan, H, rows), 1)
    return kernel.name, shape, numbers


def random():
    """Arrays of a shape and a dtype, "bfloat16" too, as its bits."""
    rng = np.random.default_rng(0)

    def values(shape, dtype="float32"):
        v = rng.uniform(-0.5, 0.5, shape).astype("f4")
        return (v.view("u4") >> 16).astype("u2") if dtype == "bfloat16" else v.astype(dtype)

    return values


def every_scan(halves):
    return [
        scan
        for half in halves
        for after in EVERY
        for scan in scans(after, name=f"{half}_{('before', 'after')[after]}_", half=half)
    ]


def jobs(H, rows=2, B=3, K=3, halves=(None,)):
    """A source with every kernel for H units, and a launch of each."""
    text, launches, values = "", [], random()
    for scan in every_scan(halves):
        kernel = persistent_kernel(scan, H, rows)
        common, mark, own = kernel.source.partition("constexpr")
        text = text or common
        text += f"namespace {scan.name} {{\n{mark}{own}}}\nusing {scan.name}::{kernel.name};\n"
        launches.append(job(scan, kernel, B, H, K, rows, values))
    assert text.startswith(prelude("float32"))
    return text, launches


BARRIERS = 14  # in all four kernels


@pytest.mark.parametrize("barrier", range(BARRIERS) if THOROUGH else [BARRIERS - 1])
def test_a_missing_barrier_is_found(barrier, tmp_path):
    text, launches = jobs(5)
    parts = text.split("__syncthreads();")
    assert len(parts) == BARRIERS + 1
    parts[barrier] += parts.pop(barrier + 1)
    broken = "__syncthreads();".join(parts)
    with pytest.raises(AssertionError, match="data race"):
        run_program(tmp_path, broken, launches, "thread")


# the whole device --------------------------------------------------------------------------------


@pytest.mark.parametrize("after", EVERY, ids=["before", "after"])
@pytest.mark.parametrize("architecture", ARCHITECTURES if THOROUGH else (80, 120))
def test_nvrtc_compiles_those_of_the_whole_device(after, architecture, record_property):
    for B, H in ((32, 1024), (1, 777)) if THOROUGH else ((32, 1024),):
        for scan in scans(after):
            kernel = cooperative.cooperative_kernel(scan, B, H, cooperative.units(H, 132))
            _, usage = compiled(kernel.source, architecture)
            [(registers, spilled)] = usage.values()
            record_property(f"{kernel.name} {B} {H} sm_{architecture}", usage)
            assert registers <= 168
            assert spilled <= SPILLED


def test_what_a_device_holds():
    forward, _ = scans(True)
    h100 = (132, 227 * 1024)
    sizes = [(1, 1024), (32, 1024), (64, 512), (65, 64), (32, 2048)]
    assert [cooperative.holds(forward, *s, *h100) for s in sizes] == [
        True,
        True,
        True,
        False,
        False,
    ]
    assert not cooperative.holds(forward, 32, 1024, 68, 64 * 1024)


def whole_jobs(B=3, H=5, own=2, K=3, halves=(None,)):
    """As `jobs`, without what every source begins with: three blocks, the last with a unit less."""
    text, launches, values = "", [], random()
    for scan in every_scan(halves):
        kernel = cooperative.cooperative_kernel(scan, B, H, own)
        start = len(prelude("float32"))
        text += f"namespace {kernel.name}_ {{\n{kernel.source[start:]}}}\n"
        text += f"using {kernel.name}_::{kernel.name};\n"
        _, _, (_, _, first, *rest) = job(scan, kernel, B, H, K, 1, values)
        shared = [values((2, B, v.columns * H)) for v in cooperative.exchanged(scan)]
        numbers = [K, first, *rest[:8], np.zeros(1, "u4"), *shared, *rest[8:]]
        size = 4 * cooperative.shared_numbers(scan, B, H, own)
        shape = (-(-H // own), 1, cooperative.threads(B, own), size, 2)
        launches.append((kernel.name, shape, numbers))
    return text, launches


@pytest.mark.skipif(not THOROUGH, reason="one more program to build; GRU_ANY_THOROUGH=1 does")
def test_blocks_that_do_not_meet_are_found(tmp_path):
    text, launches = whole_jobs()
    text = prelude("float32") + text
    broken = text.replace("while ((int)(seen(counter) - target) < 0) {}", "")
    assert broken != text
    with pytest.raises(AssertionError, match="data race"):
        run_program(tmp_path, broken, launches, "thread")


@pytest.mark.parametrize(("B", "H"), [(3, 5), (3, 8), (1, 7)] if THOROUGH else [(3, 5)])
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers(sanitizer, B, H, tmp_path):
    """No barrier is missing, and nothing outside of an array is touched."""
    text, launches = jobs(H, B=B, halves=NUMBERS)
    more, others = whole_jobs(B, H, halves=NUMBERS)
    run_program(tmp_path, text + more, launches + others, sanitizer)


# what they compute -------------------------------------------------------------------------------

LIMITS = {"float32": 2e-6, "float64": 1e-13, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# 35 units are two blocks of the whole device, the second with a unit less, each with more columns
# than it has in shared memory at once, and with 5 rows with more sums than threads
BLOCKS = [("bfloat16", "persistent", 1, 8), ("bfloat16", "whole", 5, 35),
          ("float32", "whole", 1, 35)]  # fmt: skip
if THOROUGH:
    SIZES = [("persistent", 1, 8), ("persistent", 5, 7), ("persistent", 7, 64), ("whole", 1, 7),
             ("whole", 3, 64), ("whole", 5, 35)]  # fmt: skip
    BLOCKS = [(dtype, *size) for dtype in LIMITS for size in SIZES]


def scanned(run, after, arrays, alive, reverse, kept=None):
    """Forward, and back over what that kept, or over `kept` -> path, saved..., first, parts..."""
    (a, h, dy, dh, *recurrent), variant = arrays, equations.variant(after)
    path, saved = run.forward(variant.step, a, h, recurrent, alive, reverse, True)
    states, *of_steps = kept or (path, *saved)
    previous = states[1:, :, :] if reverse else states[:-1, :, :]
    parts, first, g = run.backward(
        variant.backward, dy, dh, previous, of_steps, recurrent[0], alive, reverse, True
    )
    return path, *saved, first, *parts, g


@pytest.mark.parametrize("after", EVERY, ids=["before", "after"])
@pytest.mark.parametrize(("dtype", "way", "B", "H"), BLOCKS)
def test_all_steps_in_one_launch(dtype, way, B, H, after):
    """Against float64 on the same numbers: states as float32 are, halves rounded once."""
    if dtype == "bfloat16":
        require("ml_dtypes")  # with it, NumPy knows the name
    backend, number = select(fake.__name__), "float64" if dtype == "float64" else "float32"
    a, h, (U, *c), dy, dh = problem(after, B, H, number, K=20)
    arrays = [a, h, dy.astype(dtype), dh, U.astype(dtype), *c]
    alive = np.arange(20)[:, None, None] < np.array([13, 20, 0, 7, 1, 20, 3])[:B, None]
    device, plain = CUDA(backend.xp, backend.device, Ops(), way), Plain(NUMPY.xp, "cpu")
    there, wide = [fake.asarray(v) for v in arrays], [v.astype("f8") for v in arrays]
    for reverse in EVERY:
        before = count["launches"]
        found = scanned(device, after, there, StepMask(fake.asarray(alive)), reverse)
        assert count["launches"] == before + 2
        kept = [v.get().astype("f8") for v in found[:5]]
        expected = scanned(plain, after, wide, StepMask(alive), reverse, kept)
        for ours, theirs in zip(found, expected, strict=True):
            gap = np.abs(ours.get().astype("f8") - theirs).max() / np.abs(theirs).max()
            assert gap <= LIMITS[str(ours.dtype)]
        assert {str(v.dtype) for v in (found[0], found[5])} == {number}
