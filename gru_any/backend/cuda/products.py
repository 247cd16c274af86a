"""Matrix products by cuBLAS, through ctypes: CuPy refuses its own while launches are recorded.

The handle is ours, and so is the workspace: with one of cuBLAS' own, a recorded product would
allocate memory each time it is replayed.
"""

import ctypes
import weakref
from functools import cache
from typing import Any

from .device import INSTALL

MIB = 1 << 20
KINDS = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}  # cudaDataType
FULL, TF32, DOUBLE = 68, 77, 70  # cublasComputeType
ANY_ALGORITHM = -1
TRANSPOSED = {False: 0, True: 1}
P, N = ctypes.c_void_p, ctypes.c_int
SIGNATURES: dict[str, list[Any]] = {
    "cublasCreate_v2": [P],
    "cublasDestroy_v2": [P],
    "cublasSetStream_v2": [P, P],
    "cublasSetWorkspace_v2": [P, P, ctypes.c_size_t],
    "cublasGemmEx": [P, N, N, N, N, N, P, P, N, N, P, N, N, P, P, N, N, N, N],
}


@cache
def library() -> Any:
    """The cuBLAS that CuPy uses, with the types of what we call."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        lib = ctypes.CDLL(load_nvidia_dynamic_lib("cublas").abs_path)
    except (ImportError, RuntimeError, OSError) as e:
        raise RuntimeError(f"cuBLAS cannot be loaded ({e}): {INSTALL}") from e
    for name, types in SIGNATURES.items():
        getattr(lib, name).argtypes = types
    return lib


class Products:
    """C = A B + beta C, column by column, on the current stream of CuPy.

    precision: "full" or, for float32, "tf32". Of halves the products are float32.
    """

    def __init__(self, cupy: Any, precision: str) -> None:
        self.lib, self.current = library(), cupy.cuda.get_current_stream
        self.single = TF32 if precision == "tf32" else FULL
        self.handle = ctypes.c_void_p()
        self.stream: int | None = None
        self._do("cublasCreate_v2", ctypes.byref(self.handle))
        large = int(cupy.cuda.Device().compute_capability) >= 90
        self.workspace = cupy.empty((32 if large else 4) * MIB, dtype="uint8")
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
        """A (m, k), B (k, n), C (m, n) at these addresses, with these leading dimensions.

        dtype: of A and B; C is float32 where they are halves.
        """
        self._bind(self.current().ptr)
        number = ctypes.c_double if dtype == "float64" else ctypes.c_float
        kind, of_sums = KINDS[dtype], KINDS["float64" if dtype == "float64" else "float32"]
        compute = {"float64": DOUBLE, "float32": self.single}.get(dtype, FULL)
        one, old = number(1), number(beta)
        sizes = (TRANSPOSED[transa], TRANSPOSED[transb], m, n, k)
        left, right = (a, kind, lda), (b, kind, ldb)
        self._do("cublasGemmEx", self.handle, *sizes, ctypes.byref(one), *left, *right,
                 ctypes.byref(old), c, of_sums, ldc, compute, ANY_ALGORITHM)  # fmt: skip

    def _bind(self, stream: int) -> None:
        """Go on in this stream; cuBLAS forgets the workspace with each change."""
        if stream != self.stream:
            self._do("cublasSetStream_v2", self.handle, stream)
            space = self.workspace
            self._do("cublasSetWorkspace_v2", self.handle, space.data.ptr, space.nbytes)
            self.stream = stream

    def _do(self, name: str, *arguments: Any) -> None:
        status = getattr(self.lib, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with cuBLAS status {status}")


def multiply(ops: Any, blas: Any, left: Any, right: Any, out: Any) -> None:
    """Fill out (m, n) with left (m, k) @ right (k, n), row by row: C^T = right^T left^T to cuBLAS.

    out is contiguous, and float32 for halves.
    """
    (m, k), n, dtype = left.shape, right.shape[1], str(left.dtype)
    left, l_turned, l_apart = _as_stored(ops, left)
    right, r_turned, r_apart = _as_stored(ops, right)
    pointers = (ops.pointer(right), r_apart, ops.pointer(left), l_apart)
    blas(r_turned, l_turned, n, m, k, *pointers, 0.0, ops.pointer(out), n, dtype)


def _as_stored(ops: Any, v: Any) -> tuple[Any, bool, int]:
    """The matrix, whether it is stored column by column, and how far apart rows (columns) are."""
    rows, columns = (stride // v.itemsize for stride in v.strides)
    if columns == 1 and rows >= v.shape[1]:
        return v, False, rows
    if rows == 1 and columns >= v.shape[0]:
        return v, True, columns
    return ops.copy(v), False, v.shape[1]
