"""A barrier for compiled code: a team of threads that share one recurrence over the steps.

`sync`: (8 (1 + members),) of int64. Its first element is the size of the team (0: not known yet;
negative: the call has ended or was given up), and the second counts those who have come. One more
element for each member counts the barriers at which it has arrived, joining included. Each stands
in a cache line of its own, so that threads that poll different elements do not share a line. A
waiting thread spins for a while, then yields its processor.
"""

import os
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from llvmlite import ir
from numba import extending, njit, types

from ...typing import HostArray

Function = TypeVar("Function", bound=Callable[..., Any])
Lowering: TypeAlias = tuple[Any, Callable[..., ir.Value]]  # Numba's signature and what emits code

LINE = 8  # elements of int64 in a cache line
SPINS = 50_000  # some 50 us; yielding gives a busy neighbour milliseconds
YIELD = "SwitchToThread" if os.name == "nt" else "sched_yield"


def intrinsic(function: Callable[..., Lowering | None]) -> Callable[..., Any]:
    """Typed `numba.extending.intrinsic`: compiled code calls the result without `typing`.

    `function` returns None where it does not take arguments of these types.
    """
    found: Callable[..., Any] = extending.intrinsic(function)
    return found


def inner(function: Function, name: str = "") -> Function:
    """Compile a function for compiled code alone, without the wrappers by which Python calls.

    name: of one of several functions that are made by the same lines. Numba makes symbols of the
    name and a count, and code cached by two processes must not be mixed up.
    """
    function.__qualname__ = name or function.__qualname__
    unwrapped: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    compiled: Function = njit(nogil=True, error_model="numpy", **unwrapped)(function)
    return compiled


@intrinsic
def load_acquire(typing: object, array: types.Array, i: types.Type) -> Lowering:
    """Load array[i]; what its writer stored before is visible."""

    def generate(context: Any, builder: ir.IRBuilder, _: object, args: list[ir.Value]) -> ir.Value:
        pointer = _pointer(context, builder, array, args)
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(array, i), generate


@intrinsic
def store_release(typing: object, array: types.Array, i: types.Type, value: types.Type) -> Lowering:
    """Store array[i] = value, after all earlier stores of this thread."""

    def generate(context: Any, builder: ir.IRBuilder, _: object, args: list[ir.Value]) -> ir.Value:
        builder.store_atomic(args[2], _pointer(context, builder, array, args), "release", 8)
        return context.get_dummy_value()

    return types.void(array, i, types.int64), generate


@intrinsic
def fetch_add(typing: object, array: types.Array, i: types.Type, value: types.Type) -> Lowering:
    """Add to array[i]; return what was there before."""

    def generate(context: Any, builder: ir.IRBuilder, _: object, args: list[ir.Value]) -> ir.Value:
        place = _pointer(context, builder, array, args)
        return builder.atomic_rmw("add", place, args[2], "acq_rel")

    return types.int64(array, i, types.int64), generate


@intrinsic
def compare_and_swap(
    typing: object, array: types.Array, i: types.Type, old: types.Type, new: types.Type
) -> Lowering:
    """Set array[i] = new if it equals old; return whether it did."""

    def generate(context: Any, builder: ir.IRBuilder, _: object, args: list[ir.Value]) -> ir.Value:
        place = _pointer(context, builder, array, args)
        found = builder.cmpxchg(place, args[2], args[3], "acq_rel", "acquire")
        return builder.extract_value(found, 1)

    return types.boolean(array, i, old, new), generate


@intrinsic
def yield_processor(typing: object) -> Lowering:
    """Let other threads run on this processor."""

    def generate(context: Any, builder: ir.IRBuilder, _: object, args: list[ir.Value]) -> ir.Value:
        function = builder.module.globals.get(YIELD)
        if function is None:
            function = ir.Function(builder.module, ir.FunctionType(ir.IntType(32), []), YIELD)
        builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), generate


def _pointer(
    context: Any, builder: ir.IRBuilder, array: types.Array, args: list[ir.Value]
) -> ir.Value:
    data = context.make_array(array)(context, builder, args[0]).data
    return builder.gep(data, [args[1]])


@inner
def wait_for(sync: HostArray, i: int, least: int) -> None:
    """Wait until sync[i] >= least, or until the team is given up."""
    spins = 0
    while load_acquire(sync, i) < least and load_acquire(sync, 0) >= 0:
        spins += 1
        if spins > SPINS:
            yield_processor()


@inner
def count_members(sync: HostArray, most: int, polls: int) -> int:
    """Return how many members have joined, the caller included, after at most `polls` polls."""
    there = 1
    for _ in range(polls):
        while there < most and load_acquire(sync, LINE * (there + 1)):
            there += 1
        if there == most:
            break
    return there


@inner
def join_team(sync: HostArray, me: int) -> tuple[int, int]:
    """Join the team; return the member's number and the size of the team, once it is known.

    me: 0 for the thread that made the team, which is number 0. The others are numbered as they
    come. A team that was given up has the size 1.
    """
    if len(sync) == 0:
        return 0, 1
    if me:
        me = 1 + fetch_add(sync, 1, 1)
    store_release(sync, LINE * (me + 1), 1)
    wait_for(sync, 0, 1)
    team: int = load_acquire(sync, 0)
    return me, max(1, team)


@inner
def barrier_wait(sync: HostArray, me: int, team: int, number: int) -> int:
    """Wait at the barrier of this number for the whole team, and return the next number."""
    if team > 1:
        store_release(sync, LINE * (me + 1), number)
        for other in range(team):
            wait_for(sync, LINE * (other + 1), number)
    return number + 1


@inner
def share_of(H: int, unit: int, me: int, team: int) -> tuple[int, int]:
    """Return the range of units of one member, first and past the last, in multiples of `unit`."""
    pieces = -(-H // unit)
    return unit * (me * pieces // team), min(H, unit * ((me + 1) * pieces // team))
