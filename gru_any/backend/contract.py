"""What a sweep over time asks of a runner, by concern. `Plain` documents each method."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from ..typing import Array, Device, DType, Namespace, Pytree, Shape, Step, WeightGradients

Result = TypeVar("Result")
Recurrent = tuple[Array, ...]  # U (3H, H), or U packed, and the vectors (H,) of a step


class StepMask(Protocol):
    """For each step of a block None, or (B, 1) of bool: False where a sequence has finished."""

    block: Array  # (K, B, 1), the masks of all steps

    def __len__(self) -> int: ...

    def __getitem__(self, t: int) -> Array | None: ...

    def __iter__(self) -> Iterator[Array | None]: ...


Alive = StepMask | None  # None: no sequence has finished


class Output(Protocol):
    """An array (T, ...) that is filled block by block."""

    def put(self, block: slice, piece: Array) -> None:
        """Store the piece of these steps."""

    def array(self) -> Array:
        """Return the whole."""


class Scans(Protocol):
    """Runs the recurrence over a block of steps."""

    def forward(
        self,
        step: Step,
        a: Array,
        h: Array,
        recurrent: Recurrent,
        alive: Alive,
        reverse: bool,
        keep: bool,
    ) -> tuple[Array, tuple[Array, ...] | None]:
        """Run one block forward."""

    def backward(
        self,
        step: Step,
        dy: Array | None,
        dh: Array,
        previous: Array,
        saved: tuple[Array, ...],
        U: Array,
        alive: Alive,
        reverse: bool,
        taps: bool,
    ) -> tuple[tuple[Array, ...], Array, Array | None]:
        """Run the backward pass of one block."""

    def single_step(
        self, step: Step, W: Array, b: Array | None, recurrent: Recurrent
    ) -> Callable[[Array, Array], tuple[Array, Array]]:
        """Return a function that runs one step."""

    def prepare_step(
        self, step: Step, W: Array, b: Array | None, recurrent: Recurrent
    ) -> Callable[[Array, Array], tuple[Array, Array]]:
        """Return one that may keep copies of the weights."""


class Products(Protocol):
    """Multiplies matrices."""

    def pack_weights(self, W: Array, U: Array, rows: int) -> tuple[Array, Array]:
        """Return W and U as products of so many rows read them."""

    def frozen_weights(
        self, step: Step, W: Array, b: Array | None, recurrent: Recurrent
    ) -> tuple[Array, Array | None, Recurrent]:
        """Return weights for calls without end."""

    def affine(self, x: Array, W: Array, b: Array | None) -> Array:
        """Return x W^T + b."""

    def as_matrix(self, v: Array) -> Array:
        """Reshape (..., N) to a matrix that this runner multiplies."""

    def weight_gradients(
        self,
        weights: WeightGradients,
        h: Array,
        saved: tuple[Array, ...],
        parts: Sequence[Array],
    ) -> Iterable[Array]:
        """Return the gradients to the recurrent weights of a block."""

    def overlap_products(self, calls: Sequence[Callable[[], Any]], work: int) -> list[Any]:
        """Call functions of products that do not need each other."""


class Memory(Protocol):
    """Makes and converts arrays."""

    def upcast(self, v: Array, dtype: DType) -> Array:
        """Return v in the dtype of the arithmetic."""

    def as_contiguous(self, v: Array) -> Array:
        """Return v without a reference to a larger array."""

    def output(self, shape: Shape, dtype: DType) -> Output:
        """Return an array to be filled block by block."""


class Movable(Protocol):
    """Runs on a runner, and can be moved to another."""

    def on(self, run: "Runner") -> "Movable":
        """Return the same on this runner."""


class Schedules(Protocol):
    """Decides which calls run at once, and which are captured and replayed."""

    def concurrent(self, calls: Sequence[Callable[["Runner"], Result]]) -> list[Result]:
        """Call functions that do not depend on one another, each with its runner."""

    def pipeline(
        self,
        calls: Sequence[Callable[["Runner", Array | None], Array | None]],
        x: Array | None,
        overlap: int | None = None,
    ) -> Array | None:
        """Call each function with its runner, on the result of the one before."""

    def unmasked_prefix(self, steps: int) -> int:
        """Return how many leading steps run without a mask."""

    def run_graph(
        self,
        function: Callable[..., tuple[Pytree, object]],
        owner: Movable,
        static: tuple[Hashable, ...],
        arrays: Pytree,
        steps: int | None = None,
        tape: object = None,
    ) -> tuple[Pytree, object]:
        """Return function(owner.on(runner), *static, arrays[, tape])."""


class Runner(Scans, Products, Memory, Schedules, Protocol):
    """How a backend runs a block of steps."""

    xp: Namespace
    device: Device

    def for_call(self, steps: int, rows: int, units: int) -> "Runner":
        """Return the runner for a call of this size."""
