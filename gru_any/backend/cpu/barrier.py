"""A barrier for compiled code: a team of threads that share one recurrence over the steps.

`sync`: (8 (1 + members),) of int64. Its first element is the size of the team (0: not known yet;
negative: the call has ended or was given up). One more element for each member counts its arrivals,
at the start and at each barrier. Each stands in a cache line of its own, so that they do not share
one. A waiting thread spins for a while, then yields its processor.
"""

import os
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LINE = 8  # elements of int64 in a cache line
SPINS = 4000  # some microseconds
YIELD = "SwitchToThread" if os.name == "nt" else "sched_yield"


@intrinsic
def get(typing, array, i):  # type: ignore[no-untyped-def]
    """Load array[i] with acquire semantics: what its writer stored before is visible."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _place(context, builder, array, args)
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(array, i), generate


@intrinsic
def put(typing, array, i, value):  # type: ignore[no-untyped-def]
    """Store array[i] = value with release semantics: after all earlier stores of this thread."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[2], _place(context, builder, array, args), "release", 8)
        return context.get_dummy_value()

    return types.void(array, i, types.int64), generate


@intrinsic
def others_first(typing):  # type: ignore[no-untyped-def]
    """Yield the processor to other threads."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, YIELD), [])
        return context.get_dummy_value()

    return types.void(), generate


def _place(context: Any, builder: Any, array: Any, args: Any) -> Any:
    data = context.make_array(array)(context, builder, args[0]).data
    return builder.gep(data, [args[1]])


@njit(nogil=True)
def wait(sync, i, least):  # type: ignore[no-untyped-def]
    """Wait until sync[i] >= least, or until the team was given up."""
    spins = 0
    while get(sync, i) < least and get(sync, 0) >= 0:
        spins += 1
        if spins > SPINS:
            others_first()


@njit(nogil=True)
def arrived(sync, most, patience):  # type: ignore[no-untyped-def]
    """Return how many members have arrived, the caller included, after at most `patience` looks."""
    there = 1
    for _ in range(patience):
        while there < most and get(sync, LINE * (there + 1)):
            there += 1
        if there == most:
            break
    return there


@njit(nogil=True)
def members(sync, me):  # type: ignore[no-untyped-def]
    """Arrive, and return the size of the team once it is known; 1 where it was given up."""
    if len(sync) == 0:
        return 1
    put(sync, LINE * (me + 1), 1)
    wait(sync, 0, 1)
    return max(1, get(sync, 0))


@njit(nogil=True)
def meet(sync, me, count, times):  # type: ignore[no-untyped-def]
    """Wait at the barrier for all members, and return the number of the next barrier."""
    if count > 1:
        put(sync, LINE * (me + 1), times)
        for other in range(count):
            wait(sync, LINE * (other + 1), times)
    return times + 1


@njit(nogil=True)
def share(H, unit, me, count):  # type: ignore[no-untyped-def]
    """Return the first and last unit of one member, in whole pieces of `unit`."""
    pieces = -(-H // unit)
    return unit * (me * pieces // count), min(H, unit * ((me + 1) * pieces // count))
