"""The gradients to the recurrent weights: products over a whole block, traced from the equations.

Products that the equations concatenate are written into slices of one array.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

from ..codegen.trace import Outer, Reductions, RowSum, Term, trace_reductions
from ..typing import Array, DType, Namespace, Shape, WeightGradients


class Multiplies(Protocol):
    """A runner that writes products into existing arrays."""

    def as_matrix(self, v: Array) -> Array:
        """Reshape (..., N) to (rows, N)."""

    def multiply(self, left: Array, right: Array, out: Array) -> None:
        """Fill out with left @ right."""

    def row_sum(self, v: Array) -> Array:
        """Return the sum over the rows."""


@lru_cache(maxsize=64)
def program_of(weights: WeightGradients, saved: int, parts: tuple[int, ...]) -> Reductions:
    """Return the traced reductions; parts: how many columns of width H each part has."""
    program = trace_reductions(weights, 1, (1,) * saved, *parts)
    known = {column for ids in program.inputs for column in ids}
    sums = [term.sum for result in program.results for terms in result for term in terms]
    used = [c for of in sums for columns in of for c in columns]
    if not known.issuperset(used):
        raise ValueError(
            f"{weights.__name__} changes its arguments before it sums over the rows; expected "
            "sums, and products v.T @ w, of h, saved and the gradients as they are"
        )
    return program


class Columns(NamedTuple):
    """Columns side by side in one of the arrays."""

    array: int
    part: slice | None  # None: all of them


class Sum(NamedTuple):
    """A sum over the rows, and where in the result it is stored."""

    rows: slice  # of the result
    shape: Shape
    added: bool  # whether it is added to the sums there
    scale: float
    left: Columns
    right: Columns | None  # of a product; None: a sum of left alone


class Result(NamedTuple):
    """One result of the traced function."""

    shape: Shape
    sums: tuple[Sum, ...]


@lru_cache(maxsize=64)
def plan(
    weights: WeightGradients, saved: int, widths: tuple[int, ...], H: int
) -> tuple[Result, ...]:
    """Return the sums that make up each result; widths: elements of a row of each part."""
    program = program_of(weights, saved, tuple(width // H for width in widths))
    places = {c: (k, n) for k, ids in enumerate(program.inputs) for n, c in enumerate(ids)}

    def columns(ids: tuple[int, ...]) -> Columns:
        k, first = places[ids[0]]
        whole = len(ids) == len(program.inputs[k])
        return Columns(k, None if whole else slice(first * H, (first + len(ids)) * H))

    def result(terms_of_parts: Sequence[Sequence[Term]]) -> Result:
        sums, top = [], 0
        for terms in terms_of_parts:
            shape = shape_of(terms[0].sum, H)
            rows, top = slice(top, top + shape[0]), top + shape[0]
            for n, (scale, of) in enumerate(terms):
                pair = (of.columns, None) if isinstance(of, RowSum) else (of.left, of.right)
                left, right = (None if ids is None else columns(ids) for ids in pair)
                assert left is not None
                sums.append(Sum(rows, shape, n > 0, scale, left, right))
        return Result((top, *sums[0].shape[1:]), tuple(sums))

    return tuple(result(parts) for parts in program.results)


def reduced(
    run: Multiplies,
    weights: WeightGradients,
    h: Array,
    saved: Sequence[Array],
    parts: Sequence[Array],
    empty: Callable[[Shape, DType], Array],
) -> Iterator[Array]:
    """Compute the results of `weights` one after another; see `Plain.weight_gradients`.

    empty: makes the array of a result, given the dtype of its operands.
    """
    arrays = h, *saved, *parts
    dtype = arrays[-1].dtype

    def matrix(columns: Columns) -> Array:
        v = arrays[columns.array]
        v = v if v.ndim == 2 else run.as_matrix(v)
        return v if columns.part is None else v[:, columns.part]

    for result in plan(weights, len(saved), tuple([v.shape[-1] for v in parts]), h.shape[-1]):
        out = empty(result.shape, dtype)
        for rows, shape, added, scale, left, right in result.sums:
            into = empty(shape, dtype) if added else out[rows]
            if right is None:
                into[...] = run.row_sum(matrix(left))
            else:
                run.multiply(matrix(left).T, matrix(right), into)
            if scale != 1:
                into *= scale
            if added:
                out[rows] += into
        yield out


def reduced_by_row(
    xp: Namespace,
    weights: WeightGradients,
    h: Array,
    saved: Sequence[Array],
    parts: Sequence[Array],
) -> list[Array]:
    """Return the results of `weights` for each row of a batch alone, each (B, ...).

    h, and each array saved and part: (K, B, .); the sums are over the K steps.
    """
    arrays, H = (h, *saved, *parts), h.shape[-1]

    def rows(columns: Columns) -> Array:
        v = arrays[columns.array]
        return v if columns.part is None else v[:, :, columns.part]

    def summed(of: Sum) -> Array:
        found = outer(xp, rows(of.left), None if of.right is None else rows(of.right))
        return found if of.scale == 1 else of.scale * found

    results = []
    for _, sums in plan(weights, len(saved), tuple([v.shape[-1] for v in parts]), H):
        pieces: list[Array] = []
        for of in sums:
            pieces = [*pieces[:-1], pieces[-1] + summed(of)] if of.added else [*pieces, summed(of)]
        results.append(xp.concat(pieces, axis=1) if len(pieces) > 1 else pieces[0])
    return results


def outer(xp: Namespace, left: Array, right: Array | None) -> Array:
    """Return left^T right (B, N, M) of (K, B, N) and (K, B, M), or the sum of left (B, N)."""
    if right is None:
        return xp.sum(left, axis=0)
    return xp.permute_dims(left, (1, 2, 0)) @ xp.permute_dims(right, (1, 0, 2))


def shape_of(of: Outer | RowSum, H: int) -> Shape:
    """Return the shape of a sum over the rows."""
    if isinstance(of, RowSum):
        return (len(of.columns) * H,)
    return len(of.left) * H, len(of.right) * H
