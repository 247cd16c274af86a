"""Initial values of weights, drawn on the host in float64: one seed serves every backend."""

import math

import numpy as np

from ..typing import HostArray, Rng, Shape


def uniform(rng: Rng, shape: Shape, bound: float) -> HostArray:
    """Draw uniformly from +-bound. PyTorch's GRU takes bound = 1 / sqrt(H)."""
    return rng.uniform(-bound, bound, shape)


def initial(rng: Rng, name: str, shape: Shape, H: int) -> HostArray:
    """Draw a parameter of a GRU: gains of layer normalisation are 1, the others as PyTorch's."""
    return np.ones(shape) if name.startswith("gain_") else uniform(rng, shape, 1 / math.sqrt(H))


def glorot_uniform(rng: Rng, shape: tuple[int, int], blocks: int = 1) -> HostArray:
    """Draw uniformly from +-sqrt(6 / (fan in + fan out)) (Glorot and Bengio 2010).

    shape (blocks * out, in): `blocks` matrices on top of each other, such as 3 for the gates.
    """
    out, fan_in = shape[0] // blocks, shape[1]
    return uniform(rng, shape, math.sqrt(6 / (fan_in + out)))


def orthogonal(rng: Rng, shape: tuple[int, int], blocks: int = 1) -> HostArray:
    """Draw orthogonal rows or columns (Saxe et al. 2014), uniformly from all such matrices.

    shape (blocks * out, in): each block is orthogonal on its own, such as 3 for the gates.
    """
    out, columns = shape[0] // blocks, shape[1]
    return np.concatenate([_orthogonal(rng, out, columns) for _ in range(blocks)])


def _orthogonal(rng: Rng, rows: int, columns: int) -> HostArray:
    tall = (max(rows, columns), min(rows, columns))
    q: HostArray
    q, r = np.linalg.qr(rng.standard_normal(tall))
    q = q * np.sign(np.diagonal(r))  # without this the distribution depends on the algorithm
    return q if rows >= columns else q.T
