"""Hand compiled work to other threads without the interpreter, within about a microsecond.

A worker is a thread that runs `serve`, and polls its box for jobs. The caller of `share` writes
jobs into the boxes of some workers, does its own part, and then every job that no worker has begun.
So it never waits for a worker that is late, asleep, or kept off its processor.

A box is a row of int64. Fields with different writers are in different cache lines:

    TICKET   number of the latest job, whose fields follow (`ENTRY` ... `ME`)
    REGION   0, or the address of OpenMP's function that starts a parallel region, before which no
             thread polls the box
    CLAIMED  number of the latest job that was begun, by the worker or by the caller
    DONE     number of the latest job that the worker has finished; `LOST`: see `lost`
    AWAKE    1 while the worker polls the box

A job is a call function(first, last, me, *arguments) of a compiled function: `ENTRY` is the address
of code that takes the address of the tuple of arguments (`BLOCK`) and the three numbers.
"""

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped_cgutils

from ...typing import HostArray
from .barrier import (
    LINE,
    Lowering,
    compare_and_swap,
    count_members,
    fetch_add,
    inner,
    intrinsic,
    load_acquire,
    store_release,
    wait_for,
    yield_processor,
)

cgutils: Any = untyped_cgutils
numba_types: Any = types  # without annotations
Type: TypeAlias = types.Type  # of a value in compiled code
TICKET, ENTRY, BLOCK, FIRST, LAST, ME, REGION = range(7)
CLAIMED, DONE, LOST = range(LINE, LINE + 3)
AWAKE = 2 * LINE
WORDS = 3 * LINE  # of a box
LOOKS = 16  # polls of the box between two yields
WALL, OWN = 1, 3  # clocks as Linux numbers them: of the system, of the calling thread
USUAL = 200_000  # nanoseconds of a job that the system itself may use
INDEX, INDEX32 = ir.IntType(64), ir.IntType(32)
ENTRY_TYPE = ir.FunctionType(ir.VoidType(), [INDEX] * 4)
# what a region calls, with its argument, in how many threads (0: the usual number), and flags
MEMBER_TYPE = ir.FunctionType(ir.VoidType(), [INDEX])
REGION_TYPE = ir.FunctionType(ir.VoidType(), [INDEX, INDEX, INDEX32, INDEX32])


def entry_of(function: Any, kind: ir.FunctionType = ENTRY_TYPE) -> Callable[..., Any]:
    """Return an intrinsic that gives the addresses of code that calls a function, and of arguments.

    It takes the tuple of the arguments, which stay valid until its caller returns.
    """
    numbers = len(kind.args) - 1  # before the arguments

    @intrinsic
    def entry_and_block(typing: object, arguments: Any) -> Lowering:
        of = types.void(*(types.intp,) * numbers, *arguments.types)
        pair = numba_types.UniTuple(types.intp, 2)
        function.compile(of.args)
        compiled = function.get_compile_result(of)

        def generate(
            context: Any, builder: ir.IRBuilder, _: object, args: list[ir.Value]
        ) -> ir.Value:
            block = cgutils.alloca_once_value(builder, args[0])
            entry = ir.Function(builder.module, kind, builder.module.get_unique_name("entry"))
            entry.linkage = "internal"
            inside = ir.IRBuilder(entry.append_basic_block())
            values = inside.load(inside.inttoptr(entry.args[0], block.type))
            given = [*entry.args[1:], *cgutils.unpack_tuple(inside, values)]
            context.call_internal_no_propagate(inside, compiled.fndesc, of, given)
            inside.ret_void()
            context.active_code_library.add_linking_library(compiled.library)
            found = [builder.ptrtoint(v, INDEX) for v in (entry, block)]
            return context.make_tuple(builder, pair, found)

        return pair(arguments), generate

    return entry_and_block


@intrinsic
def enter(typing: object, entry: Type, block: Type, first: Type, last: Type, me: Type) -> Lowering:
    """Make the call whose addresses `entry_of` gave."""

    def generate(context: Any, builder: ir.IRBuilder, _: object, args: list[ir.Value]) -> ir.Value:
        builder.call(builder.inttoptr(args[0], ENTRY_TYPE.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(entry, block, first, last, me), generate


@intrinsic
def start_region(typing: object, region: Type, entry: Type, block: Type) -> Lowering:
    """Make the call on all threads of a parallel region of OpenMP, the caller's among them."""

    def generate(context: Any, builder: ir.IRBuilder, _: object, args: list[ir.Value]) -> ir.Value:
        function = builder.inttoptr(args[0], REGION_TYPE.as_pointer())
        builder.call(function, [*args[1:], INDEX32(0), INDEX32(0)])
        return context.get_dummy_value()

    return types.void(region, entry, block), generate


@intrinsic
def clock(typing: object, of: Type) -> Lowering:
    """Return the nanoseconds on a clock of the system; 0 where the system has no such clock."""

    def generate(context: Any, builder: ir.IRBuilder, _: object, args: list[ir.Value]) -> ir.Value:
        if sys.platform != "linux":
            return INDEX(0)
        pair = ir.ArrayType(INDEX, 2)  # seconds and nanoseconds
        place = cgutils.alloca_once(builder, pair)
        kind = ir.FunctionType(INDEX32, [INDEX32, pair.as_pointer()])
        function = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
        builder.call(function, [builder.trunc(args[0], INDEX32), place])
        seconds, rest = (builder.extract_value(builder.load(place), i) for i in (0, 1))
        return builder.add(builder.mul(seconds, INDEX(10**9)), rest)

    return types.int64(types.int64), generate


@intrinsic
def processor(typing: object) -> Lowering:
    """Return the number of the present processor; -1 where the system does not tell."""

    def generate(context: Any, builder: ir.IRBuilder, _: object, args: list[ir.Value]) -> ir.Value:
        if sys.platform != "linux":
            return INDEX(-1)
        kind = ir.FunctionType(INDEX32, [])
        function = cgutils.get_or_insert_function(builder.module, kind, "sched_getcpu")
        return builder.sext(builder.call(function, []), INDEX)

    return types.int64(), generate


@inner
def lost(wall: int, own: int) -> int:
    """Return the nanoseconds that a job waited for its processor; 0 if no more than is usual.

    wall, own: both clocks when the job began.
    """
    passed = clock(WALL) - wall
    waited = passed - (clock(OWN) - own)
    return waited if waited > max(USUAL, passed // 4) else 0


@inner
def work(box: HostArray) -> bool:
    """Run the job in a box, unless it was begun already; return whether it ran."""
    ticket = load_acquire(box, TICKET)
    if load_acquire(box, CLAIMED) == ticket or not compare_and_swap(
        box, CLAIMED, ticket - 1, ticket
    ):
        return False
    wall, own = clock(WALL), clock(OWN)
    enter(box[ENTRY], box[BLOCK], box[FIRST], box[LAST], box[ME])
    box[LOST] = lost(wall, own)
    store_release(box, DONE, ticket)
    return True


@inner
def serve(box: HostArray, yields: int) -> None:
    """Run the jobs that come into a box, until none has come for `yields` yields."""
    store_release(box, AWAKE, 1)
    idle = 0
    while idle < yields * LOOKS:
        if work(box):
            idle = 0
        else:
            idle += 1
            if idle % LOOKS == 0:
                yield_processor()
    store_release(box, AWAKE, 0)


@inner
def lead(
    boxes: HostArray,
    hired: HostArray,
    edges: HostArray,
    sync: HostArray,
    polls: int,
    entry: int,
    block: int,
) -> int:
    """Do the caller's part, then every job not begun; return the most nanoseconds lost."""
    team, wall, own = len(sync) > 0, clock(WALL), clock(OWN)
    if team:
        store_release(sync, 0, count_members(sync, len(hired) + 1, polls))
    enter(entry, block, edges[0], edges[1], 0)
    if team:
        store_release(sync, 0, -1)
    most = lost(wall, own)
    for i in range(len(hired)):
        box = boxes[hired[i]]
        ticket = box[TICKET]
        if compare_and_swap(box, CLAIMED, ticket - 1, ticket):
            if not team:
                enter(entry, block, edges[i + 1], edges[i + 2], i + 1)
            continue
        wait_for(box, DONE, ticket)
        most = max(most, box[LOST])
    return most


@inner
def member(
    boxes: HostArray,
    hired: HostArray,
    edges: HostArray,
    sync: HostArray,
    polls: int,
    entry: int,
    block: int,
    found: HostArray,
) -> None:
    """Do one thread's part in a parallel region, where the first thread leads.

    found: the number of threads so far, and the most nanoseconds lost.
    """
    me = fetch_add(found, 0, 1)
    if me == 0:
        found[1] = lead(boxes, hired, edges, sync, polls, entry, block)
    elif me <= len(hired):
        work(boxes[hired[me - 1]])


member_entry = entry_of(member, MEMBER_TYPE)


@inner
def share(
    boxes: HostArray,
    hired: HostArray,
    edges: HostArray,
    sync: HostArray,
    polls: int,
    entry: int,
    block: int,
) -> tuple[int, int]:
    """Run a call for all rows, shared by the caller and the hired workers.

    boxes: of all workers; hired: the numbers of those who may take part. edges: the first row of
    each part, the caller's first, and the row after the last. With `sync` (see `barrier.py`) they
    are a team instead, and each part is all rows. polls: how often to look who has joined a team;
    others are left out. entry, block: of the call; see `entry_of`.

    Returns the most nanoseconds that a thread lost to other processes, and the caller's processor.
    """
    team = len(sync) > 0
    for i in range(len(hired)):
        box = boxes[hired[i]]
        box[ENTRY], box[BLOCK], box[ME] = entry, block, i + 1
        box[FIRST], box[LAST] = edges[0 if team else i + 1], edges[1 if team else i + 2]
        store_release(box, TICKET, box[TICKET] + 1)
    if len(hired) == 0 or boxes[hired[0], REGION] == 0:
        return lead(boxes, hired, edges, sync, polls, entry, block), processor()
    found = np.zeros(2, np.int64)
    given = member_entry((boxes, hired, edges, sync, polls, entry, block, found))
    start_region(boxes[hired[0], REGION], *given)
    return found[1], -1
