"""Whole calls on a device: a function of arrays, recorded once for each shape and replayed.

A recording owns all its memory: what it is given is copied in, and its results are copied out. What
it keeps for the backward pass stays in place, so it is leased until nothing refers to that.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

PLANS = 8  # shapes of which recordings are kept
COPIES = 2  # recordings of one shape: a loop often keeps its last pullback during the next forward
PAID = 32  # calls that make up for one recording, if there are many shapes
SEEN = 1024  # shapes that are remembered


def leaves(nested: Any) -> Iterator[Any]:
    """Yield the arrays, and the Nones, in nested tuples, lists and dicts."""
    if isinstance(nested, dict):
        nested = tuple(nested.values())
    if isinstance(nested, (tuple, list)):
        for part in nested:
            yield from leaves(part)
    else:
        yield nested


def mapped(function: Callable[[Any], Any], nested: Any) -> Any:
    """Apply the function to each array of the nested structure."""
    if nested is None:
        return None
    if isinstance(nested, dict):
        return {name: mapped(function, part) for name, part in nested.items()}
    if isinstance(nested, (tuple, list)):
        parts = [mapped(function, part) for part in nested]
        return type(nested)(*parts) if hasattr(nested, "_fields") else type(nested)(parts)
    return function(nested)


def signature(arrays: Any) -> Hashable:
    """Return the shapes and dtypes, as a key."""
    return tuple(None if v is None else (tuple(v.shape), str(v.dtype)) for v in leaves(arrays))


class Recording:
    """The captured launches of a function, over arrays of its own."""

    def __init__(self, ops: Any, function: Callable[[Any], Any], arrays: Any) -> None:
        self.ops, self.lent, self.back = ops, False, Recordings()
        self.pool = ops.pool()
        with ops.memory(self.pool):
            self.given = mapped(lambda v: ops.empty(tuple(v.shape), str(v.dtype)), arrays)

        def steps() -> None:
            self.results, self.tape = function(self.given)

        self.fill(arrays)
        function(self.given)  # or a kernel might have to be compiled while launches are recorded
        with ops.memory(self.pool):
            self.graph = ops.record(steps)

    def __del__(self) -> None:
        """Free the pool's memory: a CuPy pool that is destroyed leaks what it still holds."""
        pool = self.pool
        vars(self).clear()
        pool.free_all_blocks()

    def fill(self, arrays: Any) -> None:
        """Copy the inputs into the recording's own arrays."""
        for mine, new in zip(leaves(self.given), leaves(arrays), strict=True):
            if mine is not None:
                mine[...] = new

    def __call__(self, arrays: Any) -> Any:
        """Replay it on these inputs, and return copies of the results."""
        self.fill(arrays)
        self.graph.launch()
        return mapped(self.ops.copy, self.results)


class Loan:
    """The tape of a recording, which nobody else may replay until this is released."""

    def __init__(self, recording: Recording) -> None:
        self.recording, recording.lent = recording, True

    def __del__(self) -> None:
        self.recording.lent = False


class Recordings:
    """A cache of recordings, least recently used dropped first."""

    def __init__(self) -> None:
        self.kept: OrderedDict[Hashable, list[Recording]] = OrderedDict()
        self.seen: set[Hashable] = set()
        self.made = self.calls = 0

    def first(self, key: Hashable) -> bool:
        """Whether this key is new."""
        self.calls += 1
        if key in self.seen:
            return False
        if len(self.seen) == SEEN:
            self.seen.clear()
        self.seen.add(key)
        return True

    def find(self, key: Hashable, make: Callable[[], Recording | None]) -> Recording | None:
        """Return a recording that is not leased, made if need be; None where none can be made."""
        copies = self.kept.get(key, [])
        found = next((recording for recording in copies if not recording.lent), None)
        if found is None and len(copies) < COPIES and self.made < PLANS + self.calls // PAID:
            found = make()
            self.made += 1
            copies = copies if found is None else [*copies, found]
        if found is not None:
            self.kept[key] = copies
            self.kept.move_to_end(key)
            if len(self.kept) > PLANS:
                self.kept.popitem(last=False)
        return found
