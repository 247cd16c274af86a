"""Layer normalisation on the emulated device: means over a row, which a block of threads shares."""

import numpy as np
import pytest
from conftest import HOST, running
from cuda_tools import compiled, run_program
from test_cuda_steps import bodies, place, source
from test_normalisation import batch, flags, make
from vjp_calls import assert_same, results, short_blocks  # noqa: F401

from gru_any import equations, explain
from gru_any.backend import modes
from gru_any.backend.cuda import tuning
from gru_any.codegen import cuda_source
from gru_any.codegen.cuda_cooperative import holds
from gru_any.codegen.cuda_persistent import fits
from gru_any.codegen.cuda_source import backward_scan, forward_scan
from gru_any.codegen.schedule import Kind
from gru_any.normalisation import with_layer_norm

pytestmark = pytest.mark.usefixtures("compiler")
HALVES = ("a", "path", "dy", "previous", *(f"s{n}" for n in range(10)), "p0", "p1", "U")
LIMITS = {"float64": 1e-12, "float32": 5e-6, "float16": 1e-2}


@pytest.fixture(autouse=True)
def fresh():
    """New runners, before a test and after it."""

    def forget():
        cuda_source.forward_scan.cache_clear()
        cuda_source.backward_scan.cache_clear()
        modes._runner.cache_clear()
        modes._on_cuda.cache_clear()

    forget()
    yield
    forget()


def scans(number="float32", types=(), name=""):
    """Forward, and back with all that can be given."""
    variant = with_layer_norm(equations.variant(True))
    gains = (Kind.VECTOR,) * variant.gains
    return [
        forward_scan(variant.step, 10, True, number, types, f"{name}forward").narrow,
        backward_scan(
            variant.backward, 10, True, True, number, types, f"{name}backward", gains
        ).narrow,
    ]


@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        *((way, "float64") for way in ("eager", "blocks", "graph", "persistent", "whole")),
        ("graph", "float32"),
        ("graph", "float16"),
    ],
)
def test_a_model(way, dtype, monkeypatch):
    """Thrice, so that the call is compiled, recorded and replayed, on other flags each time."""
    monkeypatch.setattr(modes, "chosen_on_cuda", way)
    gru = make(dtype)
    there, exact = gru.to(HOST), gru.to(dtype="float64")
    for seed in range(3):
        arrays = batch(gru, seed=seed)
        with running("plain"):
            expected = results(exact, *(v.astype("float64") for v in arrays), **flags(seed))
        assert_same(results(there, *arrays, **flags(seed)), expected, LIMITS[dtype])


@pytest.mark.parametrize("H", [1, 31, 33, 300])
def test_other_widths(H, monkeypatch):
    """Fewer units than threads, one more than a warp, and several for each thread."""
    monkeypatch.setattr(modes, "chosen_on_cuda", "eager")
    gru = make(layers=1, bidirectional=False, H=H)
    arrays = batch(gru, T=3, B=2)
    with running("plain"):
        expected = results(gru, *arrays)
    assert_same(results(gru.to(HOST), *arrays), expected, 1e-10)


def test_what_is_said(monkeypatch):
    """The kernels of many steps do not serve it, and the text says so."""
    assert not any(fits(scan, 4) or holds(scan, 3, 4, 10, 48000) for scan in scans())
    for way in ("persistent", "whole"):
        monkeypatch.setattr(modes, "chosen_on_cuda", way)
        modes._on_cuda.cache_clear()
        text = explain(make(layers=1).to(HOST))
        assert "A call runs graph" in text
        assert "takes the means over rows of layer_norm" in text


@pytest.mark.parametrize("barrier", [0, 1, 2])
def test_a_missing_barrier_is_noticed(barrier, monkeypatch):
    """Each of the three in the sum over the threads of a block is needed."""
    monkeypatch.setattr(modes, "chosen_on_cuda", "eager")
    gru = make(layers=1, bidirectional=False, H=32)
    arrays = batch(gru)
    with running("plain"):
        expected = results(gru, *arrays)
    found = results(gru.to(HOST), *arrays)
    assert_same(found, expected, 1e-12)
    parts = cuda_source.ROW_SUM.split("__syncthreads();")
    assert len(parts) == 4
    joined = ["__syncthreads();"] * 3
    joined[barrier] = ";"
    text = "".join(a + b for a, b in zip(parts, [*joined, ""], strict=True))
    monkeypatch.setattr(cuda_source, "ROW_SUM", text)
    cuda_source.forward_scan.cache_clear()
    cuda_source.backward_scan.cache_clear()
    found = results(gru.to(HOST), *arrays)
    with pytest.raises(AssertionError):
        assert_same(found, expected, 1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("architecture", [80, 120])
def test_nvrtc_compiles_every_kernel(dtype, architecture, record_property):
    types = tuple((name, "float16") for name in HALVES) if dtype == "float16" else ()
    for scan in scans("float64" if dtype == "float64" else "float32", types):
        cubin, usage = compiled(source(scan), architecture)
        assert cubin.startswith(b"\x7fELF")
        assert set(usage) == {*(k.name for k in scan.kernels.values()), "set_table"}
        record_property(f"{scan.name} sm_{architecture}", usage)
        for registers, spilled in usage.values():
            assert registers * tuning.current.block_threads <= 65536  # those of a multiprocessor
            assert spilled == 0


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers(sanitizer, tmp_path):
    """Every kernel once, each array and the shared memory exactly as long as they must be."""
    B, H, threads, launches, found = 3, 5, 4, [], scans()
    head = source(found[0]).partition('extern "C"')[0]
    text = head + "\n".join(body for scan in found for body in bodies(scan))
    for scan in found:
        width = {"a": 3, **{f"p{n}": w for n, w in enumerate(scan.widths)}}
        shapes = {v.name: (2, B, width.get(v.name, 1) * H) for v in scan.schedule.arrays}
        shapes |= {v.name: (H,) for v in scan.schedule.arrays if v.kind is Kind.VECTOR}
        shapes |= {v.name: (B, v.columns * H) for v in scan.schedule.buffers}
        arrays = {name: np.ones(shape, "f4") for name, shape in shapes.items()}
        arrays["state"], alive = np.ones((B, H), "f4"), np.ones((2, B), bool)
        table = [x for n in scan.arrays for x in where(arrays[n])] + place(alive)
        for kernel in scan.kernels.values():
            for t in (0, 1):
                numbers = [table, t, t, B, H, *(arrays[n] for n in kernel.buffers)]
                shape = (1, 2, threads, 4 * threads * kernel.barrier, kernel.barrier)
                launches.append((kernel.name, shape, numbers))
    assert any(shape[4] for _, shape, _ in launches)
    run_program(tmp_path, text, launches, sanitizer)


def where(array):
    return [array, 0, 0] if array.ndim == 1 else place(array)
