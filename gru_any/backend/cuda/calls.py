"""How calls are scheduled on a device: on several streams, and captured as CUDA graphs."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from functools import partial
from typing import NamedTuple, Self

from ...typing import Array, Device, DType, Namespace, Pytree, Shape
from ..contract import Alive, Movable, Output, Result, Runner
from ..reference import Plain, running
from . import tuning
from .operations import Event, Operations
from .plan import Workspace
from .recording import CapturedCall, GraphCache, Lease, leaves, signature


class Context(NamedTuple):
    """The settings under which a runner launches.

    stream: the number of the stream, whose workspace is used.
    exclusive: whether all workspaces are held; each plan is then used only once.
    overlapped: whether another stream reads the outputs, block by block.
    """

    stream: int = 0
    exclusive: bool = False
    overlapped: bool = False


class Filled:
    """An array that is filled block by block; a kernel puts zeros where steps are skipped."""

    def __init__(self, xp: Namespace, array: Array) -> None:
        self.xp, self._array = xp, array

    def put(self, block: slice, piece: Array, alive: Alive = None) -> None:
        """Store the piece of these steps."""
        self._array[block] = running(self.xp, piece, alive)

    def array(self) -> Array:
        """Return the array."""
        return self._array


class Arriving:
    """The blocks of an array that one stream computes; other streams wait for each block."""

    def __init__(self, xp: Namespace, ops: Operations, shape: Shape, dtype: DType) -> None:
        self.xp, self.ops, self.shape, self.dtype = xp, ops, shape, dtype
        self.pieces: dict[int, Array] = {}
        self.events: dict[int, Event] = {}

    def put(self, block: slice, piece: Array, alive: Alive = None) -> None:
        """Add a block, with an event that marks its completion."""
        self.pieces[block.start] = running(self.xp, piece, alive)
        self.events[block.start] = self.ops.event()

    def array(self) -> Self:
        """Return itself, to be read block by block."""
        return self

    def __getitem__(self, key: tuple[slice, ...]) -> Array:
        start = key[0].start
        if start in self.events:
            self.ops.wait(self.events[start])
        return self.pieces[start]


class Calls(Plain):
    """Schedules calls on the device of `ops`: concurrent and captured where possible.

    way, precision: as in `CUDA`.
    """

    def __init__(
        self, xp: Namespace, device: Device, ops: Operations, way: str, precision: str = "full"
    ) -> None:
        super().__init__(xp, device)
        self.ops, self.way, self.context = ops, way, Context()
        ops.captures = way != "eager"
        self.workspaces = [Workspace(ops, precision) for _ in range(tuning.current.streams)]
        self.graphs = GraphCache()

    @property
    def whole_calls(self) -> bool:
        """Whether calls are captured as a whole."""
        return self.way not in ("eager", "blocks") and not self.graphs.refused

    # on several streams --------------------------------------------------------------------------

    def _within(self, context: Context) -> Self:
        """Return this runner with another context."""
        run = copy(self)
        run.context = context
        return run

    @property
    def workspace(self) -> Workspace:
        """The workspace of this runner's stream."""
        return self.workspaces[self.context.stream]

    def locked(self) -> AbstractContextManager[None]:
        """Hold the lock of the workspace."""
        return nullcontext() if self.context.exclusive else self.workspace.locked()

    @contextmanager
    def _on_stream(self, n: int, start: Event, ends: list[Event]) -> Iterator[Self]:
        """Enter stream n after the event `start`; yield its runner, and append its end to `ends`.

        Stream 0 is the current one.
        """
        if n == 0:
            yield self
            return
        with self.ops.on(n):
            self.ops.wait(start)
            try:
                yield self._within(self.context._replace(stream=n))
            finally:
                ends.append(self.ops.event())

    @contextmanager
    def _joined_streams(self) -> Iterator[list[Event]]:
        """Yield a list for the ends of other streams; let the current stream wait for all of them.

        After an error too: the memory that the other streams still use is freed then.
        """
        ends: list[Event] = []
        try:
            yield ends
        finally:
            for end in ends:
                self.ops.wait(end)

    def concurrent(self, calls: Sequence[Callable[[Runner], Result]]) -> list[Result]:
        """Run the first call on the current stream, each other one on a stream of its own."""
        # two kernels of the whole device would wait for each other's multiprocessors
        if self.way == "whole" or len(calls) == 1:
            return super().concurrent(calls)
        start, results = self.ops.event(), []
        with self._joined_streams() as ends:
            for n, call in enumerate(calls):
                with self._on_stream(n % len(self.workspaces), start, ends) as run:
                    results.append(call(run))
        return results

    def pipeline(
        self,
        calls: Sequence[Callable[[Runner, Array | None], Array | None]],
        x: Array | None,
        overlap: int | None = None,
    ) -> Array | None:
        """Run layers as a wavefront, where a single layer would leave most of the device idle."""
        alone = overlap is None or not tuning.overlaps(overlap) or len(calls) == 1
        if alone or self.way in ("eager", "whole"):
            return super().pipeline(calls, x)
        start, passed = self.ops.event(), [x]  # kept alive until all streams have finished
        overlapped = self._within(self.context._replace(overlapped=True))
        with self._joined_streams() as ends:
            for n, call in enumerate(calls):
                with overlapped._on_stream(n % len(self.workspaces), start, ends) as run:
                    passed.append(call(run, passed[-1]))
        for v in passed:
            if isinstance(v, Arriving):
                v.events.clear()
        return self._joined(passed[-1])

    def _joined(self, v: Array | Arriving) -> Array:
        """Concatenate the blocks of `v`, where it is not an array yet."""
        if not isinstance(v, Arriving):
            return v
        out = self.output(v.shape, v.dtype)
        for start, piece in v.pieces.items():
            out.put(slice(start, start + piece.shape[0]), piece)
        return out.array()

    def output(self, shape: Shape, dtype: DType) -> Output:
        if self.context.overlapped:
            return Arriving(self.xp, self.ops, shape, dtype)
        return Filled(self.xp, self.xp.empty(shape, dtype=dtype, device=self.device))

    # captured ------------------------------------------------------------------------------------

    def unmasked_prefix(self, steps: int) -> int:
        """Return 0 where calls are captured, so that one graph serves all lengths."""
        return 0 if self.whole_calls else steps

    def run_graph(
        self,
        function: Callable[..., tuple[Pytree, object]],
        owner: Movable,
        static: tuple[Pytree, ...],
        arrays: Pytree,
        steps: int | None = None,
        tape: object = None,
        gradients: Callable[..., Pytree] | None = None,
    ) -> tuple[Pytree, object]:
        """Run the call; from the second call with the same shapes on, as a captured graph."""
        lease = tape if isinstance(tape, Lease) else None
        tape = lease.call.tape if lease else tape

        def launch(run: Calls, arrays: Pytree) -> tuple[Pytree, object]:
            return Plain.run_graph(run, function, owner, static, arrays, tape=tape)

        capturable = self._capturable(arrays, steps)
        if not lease and (tape is not None or not capturable):
            return launch(self, arrays)
        with self._all_locked():
            if not capturable:
                return launch(self, arrays)
            apart = partial(launch, self._within(self.context._replace(exclusive=True)))
            cache = lease.call.backward if lease else self.graphs
            key = (function, owner, static, signature(arrays))
            if cache.first(key):  # this run compiles all there is to compile
                return apart(arrays)
            found = cache.find(key, lambda: self._captured(apart, arrays))
            if found is None:
                return launch(self, arrays)
            return found(arrays), None if lease else Lease(found)

    def _capturable(self, arrays: Pytree, steps: int | None) -> bool:
        found = [v for v in leaves(arrays) if v is not None]
        sizes = all(v.size and v.dtype.kind != "c" for v in found)
        return self.whole_calls and steps is not None and tuning.captures(steps) and sizes

    @contextmanager
    def _all_locked(self) -> Iterator[None]:
        """Hold the locks of all workspaces, since a captured call uses each of them."""
        with ExitStack() as locks:
            for workspace in self.workspaces:
                locks.enter_context(workspace.locked())
            yield

    def _captured(
        self, function: Callable[[Pytree], tuple[Pytree, object]], arrays: Pytree
    ) -> CapturedCall | None:
        """Capture the call; None where the device refuses, with one warning per process."""
        try:
            return CapturedCall(self.ops, function, arrays)
        except (RuntimeError, NotImplementedError, MemoryError) as e:
            self.graphs.refused = True
            warnings.warn(
                "gru_any: CUDA refused to record a whole call; blocks of steps are recorded "
                f"one by one, slower ({e})",
                RuntimeWarning,
                stacklevel=2,
            )
            return None

    def recorded(self, steps: int | None) -> str:
        """Say in words whether a call of `steps` steps is captured as a whole, and if not, why."""
        if self.way in ("eager", "blocks"):
            return f"Calls are not recorded as a whole: GRU_ANY_CUDA is set to {self.way}."
        if not self.whole_calls:
            return "Calls are not recorded as a whole: CUDA refused to in this process."
        most = tuning.current.captured_steps
        if steps is None or tuning.captures(steps):
            limit = f"up to {most} steps, all layers and directions counted"
            return f"From its second time on a shape is replayed as one recording ({limit})."
        return (
            f"Calls are not recorded as a whole: this has {steps} steps, all layers and "
            f"directions counted, which is more than {most}."
        )

    def forget(self) -> None:
        """Release all plans, captured calls and their memory, once the device has finished them."""
        with self._all_locked():
            self.ops.synchronize()
            self.graphs.clear()
            for workspace in self.workspaces:
                workspace.plans.clear()
