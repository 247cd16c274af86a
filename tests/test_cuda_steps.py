"""The kernels of single steps: compiled by NVRTC, and run on the host against the equations."""

import ctypes

import numpy as np
import pytest
from conftest import THOROUGH
from cuda_tools import ARCHITECTURES, compiled, problem, run_program
from numpy.testing import assert_array_equal

from gru_any import equations
from gru_any.backend import NUMPY, select
from gru_any.backend.cuda.plan import Plan
from gru_any.backend.cuda.runner import CUDA
from gru_any.backend.reference import Plain
from gru_any.codegen.cuda_source import backward_scan, forward_scan
from gru_any.nn.sweep import StepMask
from gru_any.testing.fake_cuda import array as fake
from gru_any.testing.fake_cuda import shim
from gru_any.testing.fake_cuda.ops import Ops, gemm

pytestmark = pytest.mark.usefixtures("compiler")
VARIANTS = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
HALVES = ("a", "path", "dy", "previous", *(f"s{n}" for n in range(4)), "p0", "p1")
STORAGE = {
    "float32": (),
    "float64": (),
    "float16": tuple((name, "float16") for name in (*HALVES, "U")),  # and so are products
    "bfloat16": tuple((name, "bfloat16") for name in HALVES),
}


def scans(after, dtype, name=""):
    """Forward, forward without keeping, back; with every input and output there is."""
    variant, types = equations.variant(after), STORAGE[dtype]
    number = "float64" if dtype == "float64" else "float32"
    found = [
        forward_scan(variant.step, int(after), True, number, types, f"{name}forward"),
        forward_scan(variant.step, int(after), False, number, types, f"{name}short"),
        backward_scan(variant.backward, 4, True, True, number, types, f"{name}backward"),
        backward_scan(variant.backward, 4, False, False, number, types, f"{name}last"),
    ]
    return [scan.narrow for scan in found]


def source(scan):
    return scan.set_table.source


@VARIANTS
@pytest.mark.parametrize(
    ("dtype", "architecture"),
    [
        (d, a)
        for d in STORAGE
        for a in ARCHITECTURES
        if THOROUGH or d == "float32" or a in (80, 120)
    ],
)
def test_nvrtc_compiles_every_kernel(after, dtype, architecture, record_property):
    for scan in scans(after, dtype)[:: 1 if THOROUGH else 2]:
        cubin, usage = compiled(source(scan), architecture)
        assert cubin.startswith(b"\x7fELF")
        assert set(usage) == {*(k.name for k in scan.kernels.values()), "set_table"}
        record_property(f"{scan.name} sm_{architecture}", usage)
        for registers, spilled in usage.values():
            assert registers <= 168
            assert spilled == 0


@VARIANTS
def test_two_launches_a_step_or_four(after):
    for scan in scans(after, "float32"):
        assert len(scan.schedule.stages) == (2 if after else 4)


def test_a_broken_source_is_refused():
    with pytest.raises(AssertionError, match="identifier"):
        compiled('extern "C" __global__ void k(float* p) { *p = q; }', 80)


# one step, on the host ---------------------------------------------------------------------------


def both_ways(run, put, variant, arrays, alive, reverse):
    """Forward and back through a block -> every array that comes out of it."""
    a, h, recurrent, dy, dh = arrays
    recurrent = [put(v) for v in recurrent]
    mask = None if alive is None else StepMask(put(alive), 0)
    path, saved = run.forward(variant.step, put(a), put(h), recurrent, mask, reverse, True)
    short, _ = run.forward(variant.step, put(a), put(h), recurrent, mask, reverse, False)
    previous = path[1:, :, :] if reverse else path[:-1, :, :]
    found = [path, short, *saved]
    for given in (put(dy), None):
        parts, first, g = run.backward(
            variant.backward, given, put(dh), previous, saved, recurrent[0], mask, reverse, True
        )
        found += [*parts, first, g]
    return found


@pytest.fixture(scope="module")
def device():
    backend = select(fake.__name__)
    return CUDA(backend.xp, backend.device, Ops(), "graph")


@VARIANTS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("B", "H"), [(1, 7), (5, 33), (3, 300), (2, 1)])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_a_step_on_the_host(device, after, dtype, B, H, reverse, ragged):
    arrays, variant = problem(after, B, H, dtype), equations.variant(after)
    alive = np.random.default_rng(1).random((1, B, 1)) < 0.5 if ragged else None
    expected = both_ways(Plain(NUMPY.xp, "cpu"), np.asarray, variant, arrays, alive, reverse)
    found = both_ways(device, fake.asarray, variant, arrays, alive, reverse)
    for ours, theirs in zip(found, expected, strict=True):
        ours = ours.get()
        assert ours.dtype == theirs.dtype
        assert np.abs(ours - theirs).max() <= 8 * np.finfo(dtype).eps * np.abs(theirs).max()


def rounded(v, dtype):
    """The nearest numbers of a half type, as float64; and their bits."""
    if dtype == "float16":
        half = v.astype(np.float16)
        return half.astype(np.float64), half.view(np.uint16)
    wide = v.astype(np.float32).view(np.uint32)
    bits = ((wide + 0x7FFF + (wide >> 16 & 1)) >> 16).astype(np.uint16)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64), bits


def widened(bits, dtype):
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@VARIANTS
@pytest.mark.parametrize(("K", "limit"), [(1, 2), (9, 8)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_storage(after, dtype, K, limit):
    """Loaded and stored as half, computed in float32, against float64 on the same inputs."""
    B, H, ops = 3, 7, Ops()
    eps = 2.0**-10 if dtype == "float16" else 2.0**-7
    a, h, (U, *c), dy, dh = problem(after, B, H, np.float32, K)
    (a, a_bits), (dy, dy_bits), (h, _) = (rounded(v, dtype) for v in (a, dy, h))
    run, variant = Plain(NUMPY.xp, "cpu"), equations.variant(after)
    U = rounded(U, dtype)[0].astype(np.float32)
    wide = [v.astype(np.float64) for v in (U, *c)]
    path, saved = run.forward(variant.step, a, h, wide, None, False, True)
    forward, _, backward, _ = scans(after, dtype)

    def bits(*shape):
        return ops.empty(shape, "uint16")

    def plan(scan, order, shift, arrays, state):
        full = {name: fake.asarray(v) if isinstance(v, np.ndarray) else v
                for name, v in arrays.items()}  # fmt: skip
        made = Plan(ops, ops.blas("full"), scan, (B, H), order, shift)
        state = fake.asarray(state.astype(np.float32))
        return made(full, None, state, fake.asarray(U)).get()

    ours = {"a": a_bits, "path": bits(K + 1, B, H), **{f"s{n}": bits(K, B, H) for n in range(4)}}
    ours |= {f"c{n}": v for n, v in enumerate(c)}
    last = plan(forward, range(K), 1, ours, h)
    pairs = [(widened(ours["path"].get()[1:], dtype), path[1:]), (last, path[-1])]
    pairs += [(widened(ours[f"s{n}"].get(), dtype), v) for n, v in enumerate(saved)]
    previous, previous_bits = rounded(path[:-1], dtype)
    kept = [rounded(s, dtype) for s in saved]
    parts, first, g = run.backward(variant.backward, dy, dh.astype(np.float64), previous,
                                   [s for s, _ in kept], wide[0], None, False, True)  # fmt: skip
    names = [f"p{n}" for n in range(len(parts) + 1)]
    widths = [v.shape[2] for v in (*parts, g)]
    theirs = {"dy": dy_bits, "previous": previous_bits}
    theirs |= {f"s{n}": s for n, (_, s) in enumerate(kept)}
    theirs |= {n: bits(K, B, w) for n, w in zip(names, widths, strict=True)}
    types = {**backward.types, names[-1]: dtype}
    backward = backward_scan(variant.backward, 4, True, True, "float32", tuple(types.items()))
    backward = backward.narrow
    pairs.append((plan(backward, range(K - 1, -1, -1), 0, theirs, dh), first))
    found = [widened(theirs[n].get(), dtype) for n in names]
    pairs += zip(found, (*parts, g), strict=True)
    for ours_, theirs_ in pairs:
        assert np.abs(ours_ - theirs_).max() <= limit * eps * np.abs(theirs_).max()
    if dtype == "bfloat16":  # whose products are of float32 here, so nothing rounds a state
        assert np.abs(last - path[-1]).max() <= 2e-6 * np.abs(path[-1]).max()


CONVERSIONS = [("to16", "float", "f16"), ("to16b", "float", "bf16"), ("from16b", "bf16", "float")]


def test_conversions_of_halves():
    """Rounded to the nearest, and to even between two."""
    text = source(scans(True, "float16")[0]) + "".join(
        f'extern "C" __global__ void {name}(const {of}* x, {to}* y) '
        f"{{ put(y[threadIdx.x], get(x[threadIdx.x])); }}\n"
        for name, of, to in CONVERSIONS
    )
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    x[:5] = np.inf, -np.inf, 0, 1 + 2.0**-8, 1 + 3 * 2.0**-8  # the last two lie between
    library = shim.library(text)

    def run(name, v, out):
        shape = (ctypes.c_longlong * 5)(1, 1, len(v), 0, 0)
        getattr(library, f"run_{name}")(
            shape, (ctypes.c_longlong * 2)(v.ctypes.data, out.ctypes.data)
        )
        return out

    assert_array_equal(run("to16", x, np.zeros(1000, np.uint16)).view(np.float16), x.astype("f2"))
    half, bits = rounded(x, "bfloat16")
    assert_array_equal(run("to16b", x, np.zeros(1000, np.uint16)), bits)
    assert_array_equal(run("from16b", bits, np.zeros(1000, np.float32)), half)
    assert rounded(x, "bfloat16")[0][3] == 1
    assert rounded(x, "bfloat16")[0][4] == 1 + 2.0**-6
    nan = run("to16b", np.full(1, np.nan, "f4"), np.zeros(1, np.uint16))
    assert np.isnan(widened(nan, "bfloat16"))


SANITIZERS = ["address,undefined", *(["thread"] if THOROUGH else [])]


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers(sanitizer, tmp_path):
    """Every kernel once, each array exactly as long as it must be."""
    B, H = 3, 5
    found = [w for after in (False, True) for dtype in STORAGE if dtype != "float64"
             for w in scans(after, dtype, f"{dtype}_{after}_")]  # fmt: skip
    head = source(found[0]).partition("extern")[0]
    text = head + "\n".join(body for scan in found for body in bodies(scan))
    launches = []
    for scan in found:
        width = {"a": 3, **{f"p{n}": w for n, w in enumerate(scan.widths)}}
        shapes = {name: (2, B, width.get(name, 1) * H) for name in scan.arrays}
        shapes |= {v.name: (B, v.columns * H) for v in scan.schedule.buffers}
        arrays = {
            name: np.zeros(shape, "u2" if "16" in scan.dtype(name) else "f4")
            for name, shape in shapes.items()
        }
        arrays["state"], alive = np.zeros((B, H), "f4"), np.ones((2, B), bool)
        table = [x for n in scan.arrays for x in place(arrays[n])] + place(alive)
        for kernel in scan.kernels.values():
            for t in (0, 1):
                numbers = [table, t, t, B, H, *(arrays[n] for n in kernel.buffers)]
                launches.append((kernel.name, (1, 2, 32, 0, 0), numbers))
    run_program(tmp_path, text, launches, sanitizer)


def bodies(scan):
    text = source(scan).partition('extern "C"')
    return ['extern "C"' + part for part in text[2].split('extern "C"') if "set_table" not in part]


def place(array):
    steps, rows, *_ = (s // array.itemsize for s in array.strides)
    return [array, steps, rows]


def test_the_host_gemm_sees_a_wrong_leading_dimension():
    a = fake.asarray(np.ones((4, 6), "f4"))
    with pytest.raises(AssertionError, match="beyond its memory"):
        gemm(False, False, 6, 4, 4, *(a.host.ctypes.data, 7) * 2, 0.0, a.host.ctypes.data, 6, "f4")
