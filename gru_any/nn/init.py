"""First values of weights, drawn on the host in float64, so that one seed serves every backend."""

from __future__ import annotations  # numpy.random is loaded on first need

import math

import numpy as np


def uniform(rng: np.random.Generator, shape: tuple[int, ...], bound: float) -> np.ndarray:
    """Uniform in +-bound. PyTorch's GRU takes bound = 1 / sqrt(H)."""
    return rng.uniform(-bound, bound, shape)


def glorot_uniform(rng: np.random.Generator, shape: tuple[int, int], blocks: int = 1) -> np.ndarray:
    """Uniform in +-sqrt(6 / (fan in + fan out)) (Glorot and Bengio 2010).

    shape (blocks * out, in): `blocks` matrices on top of each other, such as 3 for the gates.
    """
    out, fan_in = shape[0] // blocks, shape[1]
    return uniform(rng, shape, math.sqrt(6 / (fan_in + out)))


def orthogonal(rng: np.random.Generator, shape: tuple[int, int], blocks: int = 1) -> np.ndarray:
    """Random orthogonal rows or columns (Saxe et al. 2014), uniform over all such matrices.

    shape (blocks * out, in): each block is orthogonal on its own, such as 3 for the gates.
    """
    out, columns = shape[0] // blocks, shape[1]
    return np.concatenate([_orthogonal(rng, out, columns) for _ in range(blocks)])


def _orthogonal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    tall = (max(rows, columns), min(rows, columns))
    q, r = np.linalg.qr(rng.standard_normal(tall))
    q = q * np.sign(np.diagonal(r))  # without this the distribution depends on the algorithm
    return q if rows >= columns else q.T
