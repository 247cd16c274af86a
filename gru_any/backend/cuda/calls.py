"""How calls are scheduled on a device: on several streams, and captured as CUDA graphs."""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from ..cpu.numpy_runner import Filled
from ..reference import Plain
from .plan import Lane
from .recording import Loan, Recording, Recordings, leaves, signature

LANES = 2  # that may run at the same time: the two directions of a layer, or two layers
STEPS = 2048  # of a recording, layers and directions counted: it has a few launches for each
IDLE = 64 * 512  # numbers of a state up to which one layer leaves most of a device idle


class Calls(Plain):
    """Schedules calls on the device of `ops`: concurrent and captured where possible.

    way: as for `CUDA`; precision: of products in float32, "full" or "tf32".
    """

    def __init__(self, xp: Any, device: Any, ops: Any, way: str, precision: str = "full") -> None:
        super().__init__(xp, device)
        self.ops, self.way = ops, way
        ops.records = way != "eager"
        self.whole_calls = way not in ("eager", "blocks")
        self.lanes, self.precision = [Lane(ops, precision) for _ in range(LANES)], precision
        self.recordings = Recordings()
        self._local = threading.local()  # lane, once, overlap

    # at the same time ----------------------------------------------------------------------------

    @property
    def lane(self) -> Lane:
        """The lane that this thread is in."""
        return self.lanes[getattr(self._local, "lane", 0)]

    @property
    def once(self) -> bool:
        """Whether this thread holds all lanes, with plans that are used only once."""
        return getattr(self._local, "once", False)

    def turn(self) -> Any:
        """Hold the lock of the lane."""
        return nullcontext() if self.once else self.lane.turn()

    @contextmanager
    def _in_lane(self, n: int, start: Any, ends: list[Any]) -> Iterator[None]:
        """Enter the stream of lane n after the event `start`, and append its end to `ends`.

        Lane 0 is the current stream.
        """
        if n == 0:
            yield
            return
        self._local.lane = n
        try:
            with self.ops.on(n):
                self.ops.wait(start)
                yield
                ends.append(self.ops.event())
        finally:
            self._local.lane = 0

    def concurrent(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Run the first call on the current stream, each other one on a stream of its own."""
        # two kernels of the whole device would wait for each other's multiprocessors
        if self.way == "whole" or len(calls) == 1:
            return super().concurrent(calls)
        start, results = self.ops.event(), []
        ends: list[Any] = []
        for n, call in enumerate(calls):
            with self._in_lane(n % LANES, start, ends):
                results.append(call())
        for end in ends:
            self.ops.wait(end)
        return results

    def pipeline(
        self, calls: Sequence[Callable[[Any], Any]], x: Any, overlap: int | None = None
    ) -> Any:
        """Run layers as a wavefront, where a single layer would leave most of the device idle."""
        alone = overlap is None or overlap > IDLE or len(calls) == 1
        if alone or self.way in ("eager", "whole"):
            return super().pipeline(calls, x)
        start, passed = self.ops.event(), [x]  # kept alive until all streams have finished
        ends: list[Any] = []
        self._local.overlap = True
        try:
            for n, call in enumerate(calls):
                with self._in_lane(n % LANES, start, ends):
                    passed.append(call(passed[-1]))
        finally:
            self._local.overlap = False
        for end in ends:
            self.ops.wait(end)
        for v in passed:
            if isinstance(v, Arriving):
                v.events.clear()
        return self._joined(passed[-1])

    def _joined(self, v: Any) -> Any:
        """Concatenate the blocks of `v`, where it is not an array yet."""
        if not isinstance(v, Arriving):
            return v
        out = self.output(v.shape, v.dtype)
        for start, piece in v.pieces.items():
            out.put(slice(start, start + piece.shape[0]), piece)
        return out.array()

    def output(self, shape: tuple[int, ...], dtype: Any) -> Any:
        if getattr(self._local, "overlap", False):
            return Arriving(self.ops, shape, dtype)
        return Filled(self.xp.empty(shape, dtype=dtype, device=self.device))

    # recorded ------------------------------------------------------------------------------------

    def unmasked_prefix(self, steps: int) -> int:
        """Return 0 where calls are captured, so that one graph serves all lengths."""
        return 0 if self.whole_calls else steps

    def run_graph(
        self, function: Any, static: Any, arrays: Any, steps: int | None = None, tape: Any = None
    ) -> tuple[Any, Any]:
        """Run the call; from the second call of a shape on, capture it and replay it."""
        loan = tape if isinstance(tape, Loan) else None
        tape = loan.recording.tape if loan else tape
        run = partial(super().run_graph, function, static, tape=tape)
        if not loan and (tape is not None or not self._recordable(arrays, steps)):
            return run(arrays)
        with self._alone():
            found = None
            if self._recordable(arrays, steps):
                key = (function, static, signature(arrays))
                recordings = loan.recording.back if loan else self.recordings
                if recordings.first(key):  # it compiles all there is to compile
                    with self._once():
                        return run(arrays)
                found = recordings.find(key, lambda: self._recorded(run, arrays))
            if found is None:
                return run(arrays)
            results = found(arrays)
            return results, None if loan else Loan(found)

    def _recordable(self, arrays: Any, steps: int | None) -> bool:
        found = [v for v in leaves(arrays) if v is not None]
        sizes = all(v.size and v.dtype.kind != "c" for v in found)
        return self.whole_calls and steps is not None and steps <= STEPS and sizes

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the locks of all lanes, since a captured call uses the workspaces of each."""
        with ExitStack() as turns:
            for lane in self.lanes:
                turns.enter_context(lane.turn())
            yield

    @contextmanager
    def _once(self) -> Iterator[None]:
        self._local.once = True
        try:
            yield
        finally:
            self._local.once = False

    def _recorded(self, run: Any, arrays: Any) -> Recording | None:
        """Capture the call; None where the device refuses, with one warning per process."""
        try:
            with self._once():
                return Recording(self.ops, run, arrays)
        except (RuntimeError, NotImplementedError, MemoryError) as e:
            self.whole_calls = False
            warnings.warn(
                "gru_any: CUDA refused to record a whole call; blocks of steps are recorded "
                f"one by one, slower ({e})",
                RuntimeWarning,
                stacklevel=2,
            )
            return None

    def recorded(self, steps: int | None) -> str:
        """Say in words whether a call of so many steps is captured as a whole, and if not, why."""
        if self.way in ("eager", "blocks"):
            return f"Calls are not recorded as a whole: GRU_ANY_CUDA is set to {self.way}."
        if not self.whole_calls:
            return "Calls are not recorded as a whole: CUDA refused to in this process."
        if steps is None or steps <= STEPS:
            limit = f"up to {STEPS} steps, all layers and directions counted"
            return f"From its second time on a shape is replayed as one recording ({limit})."
        return (
            f"Calls are not recorded as a whole: this has {steps} steps, all layers and "
            f"directions counted, which is more than {STEPS}."
        )

    def forget(self) -> None:
        """Release all plans, captured calls and their memory, once the device has finished them."""
        with self._alone():
            self.ops.synchronize()
            self.recordings = Recordings()
            for lane in self.lanes:
                lane.plans.clear()


class Arriving:
    """The blocks of an array that one stream computes; other streams wait for each block."""

    def __init__(self, ops: Any, shape: tuple[int, ...], dtype: Any) -> None:
        self.ops, self.shape, self.dtype = ops, shape, dtype
        self.pieces: dict[int, Any] = {}
        self.events: dict[int, Any] = {}

    def put(self, block: slice, piece: Any) -> None:
        """Add a block, with an event that marks its completion."""
        self.pieces[block.start] = piece
        self.events[block.start] = self.ops.event()

    def array(self) -> Any:
        """Return itself, to be read block by block."""
        return self

    def __getitem__(self, key: Any) -> Any:
        start = key[0].start
        if start in self.events:
            self.ops.wait(self.events[start])
        return self.pieces[start]
