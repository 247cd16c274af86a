"""Thresholds on CUDA, and the functions that decide by them how a size runs.

None of them was measured: this code has not run on a device. `python scripts/gpu_check.py` measures
both decisions of `idle` and of the largest sizes of the persistent kernel.

What is compiled into a kernel stands there: LARGEST and ROWS in `codegen/cuda_persistent.py`, the
shapes of blocks in `codegen/cuda_cooperative.py`.
"""

from typing import NamedTuple

MIB = 1 << 20


class Tuning(NamedTuple):
    """The thresholds, all chosen and not measured."""

    # streams
    streams: int = 2  # that may run at the same time: two directions of a layer, or two layers
    idle: int = 64 * 512  # elements of a state, at most, with which a layer leaves much idle

    # calls captured as a whole
    captured_steps: int = 2048  # layers and directions counted, at most: each has a few launches
    captured_shapes: int = 8  # whose captured calls are kept
    captured_copies: int = 2  # of a shape: a loop often keeps its last pullback
    calls_of_capture: int = 32  # that pay for another capture, where there are many shapes
    seen_shapes: int = 1024  # that are remembered

    # blocks
    plans: int = 32  # that a workspace keeps
    block_threads: int = 256  # of a thread block of an element-wise kernel, at most

    # cuBLAS
    workspace: int = 4 * MIB  # bytes; cuBLAS' default
    workspace_hopper: int = 32 * MIB  # bytes, from compute capability 9.0 on; cuBLAS' default


current = Tuning()  # tests replace it


def overlaps(elements: int) -> bool:
    """Decide whether a layer begins while the one below runs; elements: of a state."""
    return elements <= current.idle


def captures(steps: int) -> bool:
    """Decide whether a whole call is captured; steps: layers and directions counted."""
    return steps <= current.captured_steps


def captures_again(captures: int, calls: int) -> bool:
    """Decide whether the calls so far pay for one more capture."""
    return captures < current.captured_shapes + calls // current.calls_of_capture


def workspace(capability: int) -> int:
    """Decide how many bytes cuBLAS gets; capability: the device's, times ten."""
    return current.workspace_hopper if capability >= 90 else current.workspace
