"""A cost model of data-parallel training: the seconds of a step on so many ranks.

A step is the computation of a rank's rows, which shrinks with the number of ranks, a part that does
not, and those messages that the backward pass does not hide. A sum over N ranks is a reduce-scatter
and an all-gather, each of log2(N) rounds, in which every rank sends (N - 1) / N of the buffer
(Rabenseifner 2004; NCCL's trees have as many rounds).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Link(NamedTuple):
    """What connects ranks: seconds a round, and bytes a second of each rank in one direction."""

    latency: float
    bandwidth: float


class Cluster(NamedTuple):
    """Boxes of ranks: the link inside a box, the one between boxes, and how the ranks share cores.

    box : ranks in a box
    staging : bytes a second between device and host, if gradients go through the host
    cores : cores that the ranks of a box share
    """

    inside: Link
    between: Link | None = None
    box: int = 10**9
    staging: float = math.inf
    cores: float = math.inf


class Work(NamedTuple):
    """What a step costs on one rank.

    fixed, per_row : seconds
    size : bytes of gradients
    layers : parts in which they become ready during the backward pass, at equal distances
    overlap : the part of a message that goes on while a rank computes, 0 to 1
    """

    fixed: float
    per_row: float
    size: float
    layers: int = 1
    overlap: float = 1.0


BACKWARD = 2 / 3  # of the time that grows with the rows: two of three products


def all_reduce(size: float, ranks: int, link: Link | None) -> float:
    """Return the seconds in which all ranks get the sum of `size` bytes."""
    if ranks == 1 or link is None:
        return 0.0
    rounds = 2 * math.ceil(math.log2(ranks))
    return rounds * link.latency + 2 * (ranks - 1) / ranks * size / link.bandwidth


def all_reduce_in_boxes(size: float, ranks: int, cluster: Cluster) -> float:
    """Return the seconds of an all-reduce within each box, then between boxes, rank by rank."""
    if ranks == 1:
        return 0.0
    inside = min(ranks, cluster.box)
    seconds = all_reduce(size, inside, cluster.inside)
    seconds += all_reduce(size / inside, math.ceil(ranks / cluster.box), cluster.between)
    return seconds + 2 * size / cluster.staging


def exposed(backward: float, message: float, layers: int, overlap: float) -> float:
    """Return the seconds by which the messages of all layers outlast the backward pass."""
    end = 0.0
    for layer in range(1, layers + 1):
        end = max(end, layer / layers * backward) + message
    return overlap * (end - backward) + (1 - overlap) * layers * message


def step(work: Work, rows: int, ranks: int, cluster: Cluster) -> float:
    """Return the seconds of a step that all ranks share; the largest share counts."""
    crowd = max(1.0, min(ranks, cluster.box) / cluster.cores)
    growing = work.per_row * math.ceil(rows / ranks) * crowd
    message = all_reduce_in_boxes(work.size / work.layers, ranks, cluster)
    hidden = exposed(BACKWARD * growing, message, work.layers, work.overlap)
    return work.fixed * crowd + growing + hidden


def efficiency(work: Work, rows: int, ranks: int, cluster: Cluster) -> float:
    """Return the part of N times the speed of one rank that N ranks reach, on the same rows."""
    return step(work, rows, 1, cluster) / (ranks * step(work, rows, ranks, cluster))


def limit(work: Work, rows: int, cluster: Cluster, least: float = 0.5) -> int:
    """Return up to how many ranks, a power of two, each works at this efficiency at least."""
    ranks = 1
    while 2 * ranks <= rows and efficiency(work, rows, 2 * ranks, cluster) >= least:
        ranks *= 2
    return ranks


def gru_on_gpu(T: int, size: int, layers: int, flops: float, per_step: float) -> Work:
    """Return the work of a GRU with as many inputs as units, in float32.

    flops : operations that the device makes a second
    per_step : seconds of a step of time in one direction that no number of rows shortens
    """
    matrices = 6 * size * size  # W and U, (3H, H) each
    return Work(
        fixed=2 * T * layers * per_step,
        per_row=6 * matrices * T * layers / flops,  # a product and an addition, three times
        size=4.0 * matrices * layers,
        layers=layers,
    )


def fit_work(rows: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Return the fixed seconds and those of a row, with the least relative error."""
    return _fitted(np.array([np.ones(len(rows)), rows]), np.array(seconds))


def fit_link(sizes: Sequence[float], ranks: Sequence[int], seconds: Sequence[float]) -> Link:
    """Return the link with the least relative error over sums of so many bytes on so many ranks."""
    rounds = [2 * math.ceil(math.log2(n)) for n in ranks]
    sent = [2 * (n - 1) / n * size for n, size in zip(ranks, sizes, strict=True)]
    latency, of_byte = _fitted(np.array([rounds, sent]), np.array(seconds))
    return Link(latency, 1 / of_byte)


def _fitted(terms: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """Return two factors of the terms, not below 0."""
    scaled = (terms / seconds).T
    one, other = np.linalg.lstsq(scaled, np.ones(len(seconds)), rcond=None)[0]
    if one < 0:
        one, other = 0.0, scaled[:, 1].sum() / (scaled[:, 1] ** 2).sum()
    return float(one), float(other)
