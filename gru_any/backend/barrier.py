"""Threads that wait for one another in compiled code: a few that share one walk over the steps.

`sync` (8 (1 + members),) of int64: first how many members take part (0: not known yet; below 0: the
walk is at its end or was given up), then for each member how often it has arrived, at the walk
itself and at each meeting, each number in a line of the cache of its own. Whoever waits turns round
for a while, then lets others run.
"""

import os
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LINE = 8  # numbers in a line of the cache
SPINS = 4000  # some microseconds
YIELD = "SwitchToThread" if os.name == "nt" else "sched_yield"


@intrinsic
def get(typing, array, i):  # type: ignore[no-untyped-def]
    """array[i], as another thread has left it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _place(context, builder, array, args)
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(array, i), generate


@intrinsic
def put(typing, array, i, value):  # type: ignore[no-untyped-def]
    """array[i] = value, after all that this thread has written before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[2], _place(context, builder, array, args), "release", 8)
        return context.get_dummy_value()

    return types.void(array, i, types.int64), generate


@intrinsic
def others_first(typing):  # type: ignore[no-untyped-def]
    """Let other threads run on this processor."""

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
    """Until sync[i] is at least so much, or the walk was given up."""
    spins = 0
    while get(sync, i) < least and get(sync, 0) >= 0:
        spins += 1
        if spins > SPINS:
            others_first()


@njit(nogil=True)
def arrived(sync, most, patience):  # type: ignore[no-untyped-def]
    """How many are there, the one who asks included, after looking so often at most."""
    there = 1
    for _ in range(patience):
        while there < most and get(sync, LINE * (there + 1)):
            there += 1
        if there == most:
            break
    return there


@njit(nogil=True)
def members(sync, me):  # type: ignore[no-untyped-def]
    """Arrive -> how many take part, as soon as it is known; 1 where the walk was given up."""
    if len(sync) == 0:
        return 1
    put(sync, LINE * (me + 1), 1)
    wait(sync, 0, 1)
    return max(1, get(sync, 0))


@njit(nogil=True)
def meet(sync, me, count, times):  # type: ignore[no-untyped-def]
    """Wait until all members have come here as often; how often that is."""
    if count > 1:
        put(sync, LINE * (me + 1), times)
        for other in range(count):
            wait(sync, LINE * (other + 1), times)
    return times + 1


@njit(nogil=True)
def share(H, unit, me, count):  # type: ignore[no-untyped-def]
    """The units of one member, from and to: whole pieces of so many."""
    pieces = -(-H // unit)
    return unit * (me * pieces // count), min(H, unit * ((me + 1) * pieces // count))
