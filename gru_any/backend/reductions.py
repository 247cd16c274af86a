"""The gradients to the recurrent weights: products of a whole block, as traced from the equations.

Each product of a concatenation is written into its place in the result.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Protocol

from ..codegen.trace import Outer, Reductions, RowSum, trace_reductions
from ..typing import Array, DType, Shape, WeightGradients


class Multiplies(Protocol):
    """A runner that writes products into arrays that are there."""

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
            f"{weights.__name__} computes with what it gets before it sums over the rows; expected "
            "sums, and products v.T @ w, of h, saved and the gradients as they are"
        )
    return program


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
    H = h.shape[-1]
    arrays = [h, *saved, *parts]
    program = program_of(weights, len(saved), tuple(part.shape[-1] // H for part in parts))
    places = {c: (k, n) for k, ids in enumerate(program.inputs) for n, c in enumerate(ids)}

    def matrix(columns: tuple[int, ...]) -> Array:
        """Columns side by side in one array, as a matrix."""
        k, first = places[columns[0]]
        v = run.as_matrix(arrays[k])
        if len(columns) == len(program.inputs[k]):
            return v
        return v[:, first * H : (first + len(columns)) * H]

    def fill(out: Array, of: Outer | RowSum) -> None:
        if isinstance(of, RowSum):
            out[...] = run.row_sum(matrix(of.columns))
        else:
            run.multiply(matrix(of.left).T, matrix(of.right), out)

    for result in program.results:
        shapes = [shape_of(terms[0].sum, H) for terms in result]
        out = empty((sum(shape[0] for shape in shapes), *shapes[0][1:]), arrays[-1].dtype)
        top = 0
        for shape, terms in zip(shapes, result, strict=True):
            part, top = out[top : top + shape[0]], top + shape[0]
            for n, (scale, of) in enumerate(terms):
                into = empty(shape, arrays[-1].dtype) if n else part
                fill(into, of)
                if scale != 1:
                    into *= scale
                if n:
                    part += into
        yield out


def shape_of(of: Outer | RowSum, H: int) -> Shape:
    """Return the shape of a sum over the rows."""
    if isinstance(of, RowSum):
        return (len(of.columns) * H,)
    return len(of.left) * H, len(of.right) * H
