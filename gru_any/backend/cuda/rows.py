"""Products of many rows that CuPy's own operator would do otherwise.

In TF32, which it would do in full float32, and of halves into float32, which it would round.
"""

from typing import Any


class Rows:
    """A matrix, or its transpose or some of its columns, whose products go through `product`."""

    def __init__(self, array: Any, product: Any) -> None:
        self.array, self.product, self.shape = array, product, array.shape

    @property
    def T(self) -> "Rows":  # noqa: N802, the name of the standard
        """The transpose."""
        return Rows(self.array.T, self.product)

    def __getitem__(self, key: Any) -> "Rows":
        return Rows(self.array[key], self.product)

    def __matmul__(self, M: Any) -> Any:
        return self.product(self.array, M.array if isinstance(M, Rows) else M)

    def sum(
        self, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False
    ) -> Any:
        """Sum over an axis. The namespace's `sum` calls it, CuPy's with positional arguments."""
        dtype = "float32" if self.array.itemsize == 2 else dtype
        return self.array.sum(axis=axis, dtype=dtype, keepdims=keepdims)


def multiply(ops: Any, blas: Any, left: Any, right: Any) -> Any:
    """Left (m, k) @ right (k, n), row by row: for cuBLAS, C^T = right^T left^T.

    In float32 for halves.
    """
    (m, k), n, dtype = left.shape, right.shape[1], str(left.dtype)
    out = ops.empty((m, n), "float32" if left.itemsize == 2 else dtype)
    left, l_turned, l_apart = _as_stored(ops, left)
    right, r_turned, r_apart = _as_stored(ops, right)
    pointers = (ops.pointer(right), r_apart, ops.pointer(left), l_apart)
    blas(r_turned, l_turned, n, m, k, *pointers, 0.0, ops.pointer(out), n, dtype)
    return out


def _as_stored(ops: Any, v: Any) -> tuple[Any, bool, int]:
    """The matrix, whether it is stored column by column, and how far apart rows (columns) are."""
    rows, columns = (stride // v.itemsize for stride in v.strides)
    if columns == 1 and rows >= v.shape[1]:
        return v, False, rows
    if rows == 1 and columns >= v.shape[0]:
        return v, True, columns
    return ops.copy(v), False, v.shape[1]
