"""Matrix products by cuBLAS, through ctypes: CuPy refuses its own during a capture.

The handle and the workspace are ours: with cuBLAS' own workspace, a captured product would allocate
memory at every replay.
"""

import ctypes
import weakref
from functools import cache

from ...typing import Array, Namespace
from . import tuning
from .device import INSTALL
from .operations import Blas, Operations

KINDS = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}  # cudaDataType
FULL, TF32, DOUBLE = 68, 77, 70  # cublasComputeType
ANY_ALGORITHM = -1
TRANSPOSED = {False: 0, True: 1}
P, N = ctypes.c_void_p, ctypes.c_int
SIGNATURES: dict[str, list[type]] = {
    "cublasCreate_v2": [P],
    "cublasDestroy_v2": [P],
    "cublasSetStream_v2": [P, P],
    "cublasSetWorkspace_v2": [P, P, ctypes.c_size_t],
    "cublasGemmEx": [P, N, N, N, N, N, P, P, N, N, P, N, N, P, P, N, N, N, N],
}


@cache
def library() -> ctypes.CDLL:
    """Load the cuBLAS that CuPy uses, and declare the functions that are called here."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        lib = ctypes.CDLL(load_nvidia_dynamic_lib("cublas").abs_path)
    except (ImportError, RuntimeError, OSError) as e:
        raise RuntimeError(f"cuBLAS cannot be loaded ({e}): {INSTALL}") from e
    for name, types in SIGNATURES.items():
        getattr(lib, name).argtypes = types
    return lib


class Products:
    """Matrix products on CuPy's current stream; see `operations.Blas`.

    precision: "full" or, for float32, "tf32".
    """

    def __init__(self, cupy: Namespace, precision: str) -> None:
        self.lib, self.current = library(), cupy.cuda.get_current_stream
        self.single = TF32 if precision == "tf32" else FULL
        self.handle = ctypes.c_void_p()
        self.stream: int | None = None
        self._do("cublasCreate_v2", ctypes.byref(self.handle))
        capability = int(cupy.cuda.Device().compute_capability)
        self.workspace = cupy.empty(tuning.workspace(capability), dtype="uint8")
        end = weakref.finalize(self, self.lib.cublasDestroy_v2, self.handle)
        end.atexit = False  # the driver may be gone by then

    def __call__(
        self,
        transa: bool,
        transb: bool,
        m: int,
        n: int,
        k: int,
        a: int,
        lda: int,
        b: int,
        ldb: int,
        beta: float,
        c: int,
        ldc: int,
        dtype: str,
    ) -> None:
        """Set C (m, n) to A (m, k) B (k, n) + beta C."""
        self._bind(self.current().ptr)
        number = ctypes.c_double if dtype == "float64" else ctypes.c_float
        kind, kind_of_sums = KINDS[dtype], KINDS["float64" if dtype == "float64" else "float32"]
        compute = {"float64": DOUBLE, "float32": self.single}.get(dtype, FULL)
        one, old = number(1), number(beta)
        sizes = (TRANSPOSED[transa], TRANSPOSED[transb], m, n, k)
        left, right = (a, kind, lda), (b, kind, ldb)
        self._do("cublasGemmEx", self.handle, *sizes, ctypes.byref(one), *left, *right,
                 ctypes.byref(old), c, kind_of_sums, ldc, compute, ANY_ALGORITHM)  # fmt: skip

    def _bind(self, stream: int) -> None:
        """Switch to this stream; cuBLAS forgets the workspace at each change."""
        if stream != self.stream:
            self._do("cublasSetStream_v2", self.handle, stream)
            space = self.workspace
            self._do("cublasSetWorkspace_v2", self.handle, space.data.ptr, space.nbytes)
            self.stream = stream

    def _do(self, name: str, *arguments: object) -> None:
        status = getattr(self.lib, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with cuBLAS status {status}")


def multiply(ops: Operations, blas: Blas, left: Array, right: Array, out: Array) -> None:
    """Fill out (m, n) with left (m, k) @ right (k, n); to cuBLAS it is out^T = right^T left^T.

    out is contiguous, and float32 for half precision.
    """
    (m, k), n, dtype = left.shape, right.shape[1], str(left.dtype)
    left, l_transposed, l_apart = _as_stored(ops, left)
    right, r_transposed, r_apart = _as_stored(ops, right)
    pointers = (ops.pointer(right), r_apart, ops.pointer(left), l_apart)
    blas(r_transposed, l_transposed, n, m, k, *pointers, 0.0, ops.pointer(out), n, dtype)


def _as_stored(ops: Operations, v: Array) -> tuple[Array, bool, int]:
    """Return the matrix, whether it is column-major, and its leading dimension."""
    rows, columns = (stride // v.itemsize for stride in v.strides)
    if columns == 1 and rows >= v.shape[1]:
        return v, False, rows
    if rows == 1 and columns >= v.shape[0]:
        return v, True, columns
    return ops.copy(v), False, v.shape[1]
