"""Thresholds on the CPU, and the functions that decide by them how a size runs.

Each value says its unit, what it decides, and where it comes from:

    bench CELLS   python scripts/benchmark.py --rounds 7 --seconds 0.1 --threads 2 --cases CELLS
                  with either decision; a cell is T,B,I,H; see docs/results.md
    loop          a loop written for this question, which is not kept; see docs/results.md
    chosen        not measured

What is compiled into a kernel stands there: MR, MC and KC in `gemm.py`, the spins of a barrier in
`barrier.py`.
"""

from collections.abc import Callable
from typing import NamedTuple


class Tuning(NamedTuple):
    """The thresholds. Work is in multiply-adds; rows are rows of a product: steps times batch."""

    # threads
    thread_work: int = 1_000_000  # work of a thread, at least, about 15 us; loop
    thread_rows: int = 4  # rows of a thread, at least; chosen
    idle_yields: int = 1000  # of a worker without work, some 300 us, until it sleeps; chosen
    wake_polls: int = 100_000  # looks, some 100 us, whether the threads of a team are there; chosen

    # a team: threads that share the units of each step and meet at a barrier before each product
    team_units: int = 64  # units of a thread, at least; chosen
    team_step_work: int = (
        40_000  # of a step with few rows, at least; bench 100,1,64,64 100,1,256,256
    )
    team_work: int = 1_000_000  # of a block, at least; loop
    team_steps: int = 4  # of a block, at most, where more than few rows are shared; loop
    team_rows: int = 64  # of the batch, at most, in such a block; loop
    narrow_shared: int = (
        4_000_000  # of a frozen single step, at least, with vectors of 256 bits; loop
    )

    # products of weights as they are stored, or packed first
    few_rows: int = 8  # at most, that are multiplied one by one; loop
    packed_rows: int = 100  # more than these, and weights are packed; loop
    frozen_work: int = 500_000  # at most, for which not even weights that are packed pay; loop
    frozen_rows: int = 8  # at most, likewise; loop
    frozen_elements: int = 1_500_000  # of weights, more than which pay whatever the rows are; loop
    narrow_work: int = (
        100_000  # at most, for which panels do not pay in a single step, with 256 bits; loop
    )
    integer_elements: int = 2**17  # of int8, from which one row is rounded to integers; chosen
    copy_work: int = 8  # in the time that it takes to pack one element; loop
    stored_elements: int = 2**16  # of a matrix that stays in the cache, for any rows; loop

    # NumPy alone
    exp_elements: int = 768  # of a state, from which tanh is made of exp; loop

    # buffers
    buffer_bytes: int = 2**16  # of a buffer, at least: smaller arrays need no new page; chosen
    scratch_bytes: int = 2**20  # that a thread keeps for a frozen layer, at most; chosen
    kept_bytes: int = 2**28  # of all buffers that are kept, at most; chosen


current = Tuning()  # tests replace it


def packed(rows: int) -> bool:
    """Decide whether weights are packed for products of `rows` rows."""
    return rows > current.packed_rows


def frozen_packed(rows: int, elements: int, narrow_step: bool = False) -> bool:
    """Decide whether frozen weights are read as panels; elements: of the weights.

    narrow_step: whether it is a single step, with vectors of 256 bits.
    """
    v, work = current, rows * elements
    if narrow_step:
        return work > v.narrow_work
    return (rows > v.frozen_rows or elements > v.frozen_elements) and work > v.frozen_work


def integers(rows: int, elements: int) -> bool:
    """Decide whether products with int8 weights are computed in integers; elements: of these."""
    return rows == 1 and elements >= current.integer_elements


def in_place(rows: int, K: int, N: int) -> bool:
    """Decide whether rows are multiplied by a matrix (K, N) as it is stored."""
    return rows <= current.packed_rows or current.stored_elements >= K * N


def inputs_at_once(rows: int) -> bool:
    """Decide whether the input products of a block are one product; rows: of the batch."""
    return rows < current.few_rows


def shared(work: int) -> bool:
    """Decide whether work may pay for a second thread; asked before threads are counted."""
    return work >= 2 * current.thread_work


def step_shared(work: int, wide: bool, threads: Callable[[], int]) -> bool:
    """Decide whether a single step may use several threads; threads: counts those available."""
    v = current
    least = min(v.team_work, 2 * v.thread_work) if wide else v.narrow_shared
    return work >= least and threads() > 1


def pieces(rows: int, work: int, threads: int) -> int:
    """Decide over how many threads rows are split; below 2 they are not."""
    return min(threads, work // current.thread_work, rows // current.thread_rows)


def team(steps: int, rows: int, units: int, size: int, unpacked: bool, threads: int) -> int:
    """Decide how many threads share the units of a block; below 2 its rows may be split.

    rows: of the batch. size: elements of all matrices. unpacked: whether these must be packed
    first, each thread its part.
    """
    v, of_step = current, rows * size
    few = rows < v.few_rows and of_step >= v.team_step_work and steps * of_step >= v.team_work
    short = steps <= v.team_steps and rows <= v.team_rows
    packing = v.copy_work * size * unpacked
    if few or (short and steps * of_step + packing >= v.team_work):
        return min(threads, units // v.team_units)
    return 1


def team_in_place(steps: int, rows: int, units: int, size: int, threads: Callable[[], int]) -> int:
    """Decide the size of such a team for unpacked matrices; threads: counts those available."""
    v, of_step = current, rows * size
    if of_step < v.team_step_work or not shared(steps * of_step):
        return 1
    return min(threads(), units // v.team_units)
