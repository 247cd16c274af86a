"""A batch of sequences of different lengths, run in pieces of rows of similar lengths.

A GRU computes all rows up to the end of the longest. Rows that are sorted by length, as those of a
PackedSequence are, can be cut into pieces that end earlier, which leaves out most of the padding.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from ...nn.gru import GRU
from ...nn.pullback import Pullback
from ...typing import Array, Derivatives, HostArray, Rng, Shape

ROWS = 16  # of a piece, at least: with fewer, products read the weights too often
WORTH = 8  # a cut must leave out one in so many steps of the rows that it cuts
Index: TypeAlias = tuple[slice, slice]


class Piece(NamedTuple):
    """Rows of a batch, and the steps of the longest of them."""

    rows: slice
    steps: int


def pieces(lengths: HostArray, start: int = 0, stop: int | None = None) -> list[Piece]:
    """Cut rows of descending lengths where it saves most padding, as long as it is worth it."""
    stop = len(lengths) if stop is None else stop
    longest = int(lengths[start])
    cuts = np.arange(start + ROWS, stop - ROWS + 1)
    saved = (stop - cuts) * (longest - lengths[cuts])
    if not len(cuts) or saved.max() * WORTH < longest * (stop - start):
        return [Piece(slice(start, stop), longest)]
    cut = int(cuts[saved.argmax()])
    return pieces(lengths, start, cut) + pieces(lengths, cut, stop)


class InPieces:
    """A GRU on NumPy that is called with the rows of these pieces.

    y and dx hold anything at steps past the end of a piece, which a PackedSequence does not have.
    """

    def __init__(self, gru: GRU, cut: Sequence[Piece]) -> None:
        self.gru, self.pieces = gru, cut

    def __call__(self, x: Array, h0: Array | None, lengths: HostArray) -> tuple[Array, Array]:
        """Return y and h_n."""
        return self._joined(x, [self.gru(*given) for given in self._each(x, h0, lengths)])

    def vjp(
        self, x: Array, h0: Array | None, lengths: HostArray, rng: Rng | None = None
    ) -> tuple[tuple[Array, Array], "PullbackInPieces"]:
        """Return y and h_n, and their pullback."""
        found = [self.gru.vjp(*given, rng) for given in self._each(x, h0, lengths)]
        back = PullbackInPieces(self, x.shape, [pullback for _, pullback in found])
        return self._joined(x, [results for results, _ in found]), back

    def at(self, piece: Piece) -> Index:
        """Return where a piece is in x, y and their gradients."""
        steps = slice(piece.steps)
        return (piece.rows, steps) if self.gru.batch_first else (steps, piece.rows)

    def spread(self, parts: Sequence[Array], shape: Shape) -> Array:
        """Return an array of this shape that has these parts; what was left out holds anything."""
        whole = np.empty(shape, parts[0].dtype)
        for piece, part in zip(self.pieces, parts, strict=True):
            whole[self.at(piece)] = part
        return whole

    def _each(
        self, x: Array, h0: Array | None, lengths: HostArray
    ) -> Iterator[tuple[Array, Array | None, HostArray]]:
        for piece in self.pieces:
            h = None if h0 is None else h0[:, piece.rows]
            yield x[self.at(piece)], h, lengths[piece.rows]

    def _joined(self, x: Array, found: list[tuple[Array, Array]]) -> tuple[Array, Array]:
        y = self.spread([y for y, _ in found], (*x.shape[:2], self.gru.output_size))
        return y, np.concatenate([h_n for _, h_n in found], axis=1)


class PullbackInPieces:
    """The pullbacks of all pieces as one."""

    def __init__(self, of: InPieces, shape: Shape, pullbacks: Sequence[Pullback]) -> None:
        self._of, self._shape, self._pullbacks = of, shape, pullbacks

    def __call__(self, dy: Array | None, dh_n: Array | None = None) -> Derivatives:
        """Return grads, dx and dh0."""
        grads, dxs, dh0s = dict[str, Array](), [], []
        for piece, pullback in zip(self._of.pieces, self._pullbacks, strict=True):
            dy_here = None if dy is None else dy[self._of.at(piece)]
            dh_here = None if dh_n is None else dh_n[:, piece.rows]
            found, dx, dh0 = pullback(dy_here, dh_here)
            grads = {name: grads[name] + v if grads else v for name, v in found.items()}
            dxs.append(dx)
            dh0s.append(dh0)
        return grads, self._of.spread(dxs, self._shape), np.concatenate(dh0s, axis=1)
