"""What CuPy and cuBLAS are asked for, with stand-ins that write it down."""

import ctypes
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import require
from cuda_tools import compiled

from gru_any.backend import BackendError, runner, select
from gru_any.backend.cuda import products, tuning
from gru_any.backend.cuda.ops import Ops
from gru_any.codegen.cuda_source import Kernel
from gru_any.testing.fake_cuda import array as fake
from gru_any.testing.fake_cuda.ops import gemm

# types of factors and result, and of the computation, that cublasGemmEx knows
TAKEN = [(0, 0, products.FULL), (0, 0, products.TF32), (1, 1, products.DOUBLE),
         (2, 0, products.FULL), (14, 0, products.FULL)]  # fmt: skip


class Library:
    """As cuBLAS, column by column in the host's memory."""

    def __init__(self, status=0):
        self.calls, self.status = [], status

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, arguments))
            if name == "cublasGemmEx":
                self.multiply(*arguments)
            return self.status

        return call

    def multiply(self, handle, ta, tb, m, n, k, alpha, a, at, lda, b, bt, ldb, beta, c, ct, ldc,
                 compute, algorithm):  # fmt: skip
        number = ctypes.c_double if compute == products.DOUBLE else ctypes.c_float
        one, old = (ctypes.cast(v, ctypes.POINTER(number))[0] for v in (alpha, beta))
        assert one == 1
        assert at == bt
        assert (at, ct, compute) in TAKEN
        kinds = {0: "f4", 1: "f8", 2: "f2"}
        A = matrix(a, lda, *((k, m) if ta else (m, k)), kinds[at]).astype(kinds[ct])
        B = matrix(b, ldb, *((n, k) if tb else (k, n)), kinds[bt]).astype(kinds[ct])
        C = matrix(c, ldc, m, n, kinds[ct])
        C[...] = (A.T if ta else A) @ (B.T if tb else B) + old * C


def matrix(address, ld, rows, columns, dtype):
    size = np.dtype(dtype).itemsize
    count = (columns - 1) * ld + rows
    memory = (ctypes.c_char * (count * size)).from_address(address)
    flat = np.frombuffer(memory, dtype)
    return np.lib.stride_tricks.as_strided(flat, (rows, columns), (size, ld * size))


@pytest.fixture
def stream():
    return SimpleNamespace(ptr=7)


@pytest.fixture
def cupy(stream):
    """As much of CuPy as is used, writing down what happens."""
    calls = []
    device = SimpleNamespace(compute_capability="90", attributes={"MultiProcessorCount": 132})
    empty = lambda n, dtype: SimpleNamespace(data=SimpleNamespace(ptr=99), nbytes=n)  # noqa: E731

    class Stream:
        def __init__(self, non_blocking):
            assert non_blocking  # or it would wait for the null stream

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def begin_capture(self):
            calls.append("begin")

        def end_capture(self):
            calls.append("end")
            return "graph"

    cuda = SimpleNamespace(
        get_current_stream=lambda: stream, Device=lambda: device, Stream=Stream, calls=calls
    )
    return SimpleNamespace(cuda=cuda, empty=empty, calls=calls)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("precision", ["full", "tf32"])
def test_a_product_is_what_it_should_be(cupy, monkeypatch, dtype, beta, precision):
    """h U^T into a window of a wider matrix: row by row, C^T = U h^T; of halves into float32."""
    lib = Library()
    monkeypatch.setattr(products, "library", lambda: lib)
    blas, rng = products.Products(cupy, precision), np.random.default_rng(0)
    h, U, C = (rng.standard_normal(s).astype(dtype) for s in ((4, 5), (15, 5), (4, 20)))
    C = C.astype(np.result_type(dtype, "f4"))
    expected = C.copy()
    expected[:, 2:17] = h.astype(C.dtype) @ U.astype(C.dtype).T + beta * C[:, 2:17]
    arguments = (True, False, 15, 4, 5, U.ctypes.data, 5, h.ctypes.data, 5, beta,
                 C.ctypes.data + 2 * C.itemsize, 20, dtype)  # fmt: skip
    blas(*arguments)
    assert np.allclose(C, expected, rtol=0, atol=1e-5)


def test_stream_workspace_and_precision(cupy, stream, monkeypatch):
    lib = Library()
    monkeypatch.setattr(products, "library", lambda: lib)
    one = np.ones((1, 1), "f4")
    call = (False, False, 1, 1, 1, *(one.ctypes.data, 1) * 2, 0.0, one.ctypes.data, 1, "float32")
    kept = []  # or their ends would be among the calls
    for precision, compute in (("full", products.FULL), ("tf32", products.TF32)):
        lib.calls.clear()
        kept.append(blas := products.Products(cupy, precision))
        for stream.ptr in (7, 7, 8):
            blas(*call)
        names = [name for name, _ in lib.calls]
        bound = ["cublasSetStream_v2", "cublasSetWorkspace_v2"]  # in this order
        assert names == ["cublasCreate_v2", *bound, *["cublasGemmEx"] * 2, *bound, "cublasGemmEx"]
        assert lib.calls[2][1][1:] == (99, 32 * tuning.MIB)
        assert lib.calls[3][1][-2:] == (compute, products.ANY_ALGORITHM)
    assert compute == 77
    monkeypatch.setattr(products, "library", lambda: Library(status=13))
    with pytest.raises(RuntimeError, match="cuBLAS status 13"):
        products.Products(cupy, "full")


def test_without_cublas_it_says_what_to_install(monkeypatch):
    pathfinder = require("cuda.pathfinder")

    def missing(name):
        raise RuntimeError("libcublas.so.13 not found")

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", missing)
    products.library.cache_clear()
    with pytest.raises(RuntimeError, match=r"cuBLAS cannot be loaded .*gru-any\[cuda13\]"):
        products.library()


def test_recording_ends_whatever_happens(cupy):
    assert Ops(cupy).capture(lambda: cupy.calls.append("launch")) == "graph"
    assert cupy.calls == ["begin", "launch", "end"]
    cupy.calls.clear()

    def fails():
        raise RuntimeError("cudaErrorStreamCaptureUnsupported")

    ops = Ops(cupy)
    with ops.on(1), pytest.raises(RuntimeError, match="Unsupported"):
        ops.capture(fails)
    assert cupy.calls == ["begin", "end"]
    assert not vars(ops._streams)  # a stream that was forked into may still be recorded


def test_a_recording_that_is_refused_as_it_ends(cupy, monkeypatch):
    def end_capture(self):
        raise RuntimeError("cudaErrorStreamCaptureUnjoined")

    monkeypatch.setattr(cupy.cuda.Stream, "end_capture", end_capture)
    ops = Ops(cupy)
    with ops.on(1), pytest.raises(RuntimeError, match="Unjoined"):
        ops.capture(list)
    assert not vars(ops._streams)


def test_memory_of_a_recording(cupy):
    """A pool of CuPy's, as the allocator of this thread while it is used."""

    class Pool:
        def __init__(self, allocator):
            pass

        def malloc(self, size):
            return size

    @contextmanager
    def using_allocator(allocator):
        cupy.calls.append(allocator(7))
        yield
        cupy.calls.append("end")

    cupy.cuda.MemoryPool, cupy.cuda.using_allocator = Pool, using_allocator
    ops = Ops(cupy)
    with ops.memory(ops.pool()):
        cupy.calls.append("inside")
    assert cupy.calls == [7, "inside", "end"]


@pytest.mark.parametrize("spare", [0, 5, 9])
def test_memory_of_a_recording_is_wanted_more_than_what_is_spare(cupy, spare):
    """The device has 4 bytes left, and CuPy's own pool as many spare."""
    free = [4]

    def memory(size):
        if size > free[0]:
            raise RuntimeError("cudaErrorMemoryAllocation")
        return size

    def free_all_blocks():
        free[0] += spare

    cupy.cuda.Memory, cupy.cuda.MemoryPointer = memory, lambda *arguments: arguments
    cupy.cuda.MemoryPool = lambda allocator: SimpleNamespace(malloc=allocator)
    cupy.get_default_memory_pool = lambda: SimpleNamespace(free_all_blocks=free_all_blocks)
    malloc = Ops(cupy).pool().malloc
    assert (malloc(4), free) == ((4, 0), [4])
    if spare == 9:
        assert malloc(10) == (10, 0)
    else:
        with pytest.raises(RuntimeError, match="Allocation"):
            malloc(10)


def test_a_launch(cupy):
    launched, cooperative = [], []

    class Module:
        def __init__(self, code, options, enable_cooperative_groups):
            assert options == ("--std=c++17",)
            cooperative.append(enable_cooperative_groups)

        def get_function(self, name):
            class Function:
                def __call__(self, *arguments, **options):
                    launched.append((name, arguments, options, vars(self)))

            return Function()

    cupy.RawModule = Module
    ops = Ops(cupy)
    ops.launch(Kernel("k", "source"), (3, 2), 64, [1, 2])
    ops.launch(Kernel("k", "source"), (3, 2), 64, [1, 2], shared=1 << 16)
    assert launched[0] == ("k", ((3, 2), (64,), (1, 2)), {"shared_mem": 0}, {})
    assert launched[1][3] == {"max_dynamic_shared_size_bytes": 1 << 16}
    assert ops.multiprocessors == 132
    ops.launch(Kernel("k", "one whose blocks wait for each other", barrier=2), (3, 1), 64, [])
    assert cooperative == [False, True]


def test_real_cupy_without_a_device_says_why():
    cupy = require("cupy")
    if cupy.cuda.is_available():
        assert select("cupy").name == "cupy"
        return
    with pytest.raises(BackendError, match="CUDA driver"):
        select("cupy")
    with pytest.raises(RuntimeError, match=r"cudaErrorInsufficientDriver|cudaErrorNoDevice"):
        Ops(cupy).empty((3,), "float32")
    with pytest.raises(RuntimeError, match=r"cudaErrorInsufficientDriver|cudaErrorNoDevice"):
        Ops(cupy).pool().malloc(3)


def test_nvrtc_is_there_and_names_the_line():
    with pytest.raises(AssertionError, match=r"gru\.cu"):
        compiled("no source", 80)


def test_the_mapping_is_that_of_the_host():
    """The stand-in for cuBLAS here and the emulated device multiply alike."""
    assert gemm.__code__.co_varnames[:13] == products.Products.__call__.__code__.co_varnames[1:14]


def test_sums_of_halves_are_full():
    run = runner(select(fake.__name__))
    v = fake.asarray(np.arange(6.0).reshape(2, 3))
    assert run.row_sum(v).host.tolist() == [3, 5, 7]
    halves = run.row_sum(fake.asarray(np.full((5000, 1), 1, "f2")))  # float16 cannot count so far
    assert halves.host.tolist() == [5000]
    assert halves.dtype == np.float32
