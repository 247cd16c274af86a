"""Whole calls as CUDA graphs: captured once for each shape, replayed from then on.

    call of a key = (function, stack, static arguments, shapes and dtypes)

    first time     launch by launch, which compiles every kernel
    second time    capture it, in a pool of memory that nothing else uses:

                     arguments --copy--> inputs ==[ launches ]==> results, tape

    from then on   copy the arguments in; replay the graph; copy the results out

What a forward call keeps for its backward pass, the tape, is not copied. It stays in the pool, and
the captured call is leased to the caller:

    GraphCache --key--> CapturedCall (forward): inputs, graph, results, tape
                            |      ^
                            |      +---- Lease, held by the pullback in place of the tape
                            |            while it lives, no other forward call replays this graph
                            v
                        .backward: a GraphCache, whose graphs read the tape where it lies

Another forward call of this key captures a second copy meanwhile; when both are leased, it runs
block by block. When the pullback is deleted, its lease ends, and the captured call is free again.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator

from ...typing import Array, Pytree
from . import tuning
from .operations import Operations


def leaves(nested: Pytree) -> Iterator[Array | None]:
    """Yield the arrays and the Nones in nested tuples, lists and dicts."""
    if isinstance(nested, dict):
        nested = tuple(nested.values())
    if isinstance(nested, (tuple, list)):
        for part in nested:
            yield from leaves(part)
    else:
        yield nested


def tree_map(function: Callable[[Array], Array], nested: Pytree) -> Pytree:
    """Apply the function to each array of a tree."""
    if nested is None:
        return None
    if isinstance(nested, dict):
        return {name: tree_map(function, part) for name, part in nested.items()}
    if isinstance(nested, (tuple, list)):
        parts = [tree_map(function, part) for part in nested]
        return type(nested)(*parts) if hasattr(nested, "_fields") else type(nested)(parts)
    return function(nested)


def signature(arrays: Pytree) -> Hashable:
    """Return the shapes and dtypes of a tree's arrays, as a key."""
    return tuple(None if v is None else (tuple(v.shape), str(v.dtype)) for v in leaves(arrays))


class CapturedCall:
    """A function's launches, captured over inputs and results in a pool of their own.

    leased: whether a caller may still read the tape; backward: captured calls that read it.
    """

    def __init__(
        self,
        ops: Operations,
        function: Callable[[Pytree], tuple[Pytree, object]],
        arrays: Pytree,
    ) -> None:
        self.ops, self.leased, self.backward = ops, False, GraphCache()
        self.pool = ops.pool()
        with ops.memory(self.pool):
            self.inputs = tree_map(lambda v: ops.empty(tuple(v.shape), str(v.dtype)), arrays)

        def launches() -> None:
            self.results, self.tape = function(self.inputs)

        self.fill(arrays)
        function(self.inputs)  # or a kernel might have to be compiled during the capture
        with ops.memory(self.pool):
            self.graph = ops.capture(launches)

    def __del__(self) -> None:
        """Free the pool's memory, which a CuPy pool leaks when it is destroyed."""
        pool = self.pool
        vars(self).clear()
        pool.free_all_blocks()

    def fill(self, arrays: Pytree) -> None:
        """Copy the arguments into the inputs."""
        for mine, new in zip(leaves(self.inputs), leaves(arrays), strict=True):
            if mine is not None:
                mine[...] = new

    def __call__(self, arrays: Pytree) -> Pytree:
        """Replay the call on these arguments, and return copies of the results."""
        self.fill(arrays)
        self.graph.launch()
        return tree_map(self.ops.copy, self.results)


class Lease:
    """Keeps a captured call, whose memory holds the tape, from being replayed by others."""

    def __init__(self, call: CapturedCall) -> None:
        self.call, call.leased = call, True

    def __del__(self) -> None:
        self.call.leased = False


class GraphCache:
    """The captured calls of the most recently used keys.

    refused: whether the device refused a capture; captures: the number of captures tried; calls:
    the number of calls.
    """

    def __init__(self) -> None:
        self.refused = False
        self.clear()

    def clear(self) -> None:
        """Release all of them."""
        self.kept: OrderedDict[Hashable, list[CapturedCall]] = OrderedDict()
        self.seen: set[Hashable] = set()
        self.captures = self.calls = 0

    def first(self, key: Hashable) -> bool:
        """Count a call, and return whether its key is new."""
        self.calls += 1
        if key in self.seen:
            return False
        if len(self.seen) == tuning.current.seen_shapes:
            self.seen.clear()
        self.seen.add(key)
        return True

    def find(
        self, key: Hashable, capture: Callable[[], CapturedCall | None]
    ) -> CapturedCall | None:
        """Return a captured call that is not leased, new if need be; None to run uncaptured."""
        copies = self.kept.get(key, [])
        found = next((call for call in copies if not call.leased), None)
        few = len(copies) < tuning.current.captured_copies
        if found is None and few and tuning.captures_again(self.captures, self.calls):
            found = capture()
            self.captures += 1
            copies = copies if found is None else [*copies, found]
        if found is not None:
            self.kept[key] = copies
            self.kept.move_to_end(key)
            if len(self.kept) > tuning.current.captured_shapes:
                self.kept.popitem(last=False)
        return found
