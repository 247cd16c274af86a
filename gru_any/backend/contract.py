"""The protocol of a runner, by concern, and the modes in which runners run.

Each method is documented here. `Plain` in `reference.py` is the simplest runner, and every other
one is tested against it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from ..codegen.schedule import Kind, Kinds
from ..typing import Array, Device, DType, Namespace, Pytree, Shape, Step, WeightGradients

Result = TypeVar("Result")
Matrix: TypeAlias = Any  # an array (N, K), or its packed form, which only its runner reads
InputProducts: TypeAlias = Any  # x W^T + b (K, B, 3H), or what its runner computes it from
Recurrent: TypeAlias = tuple[Matrix, *tuple[Array, ...]]  # U (3H, H), vectors (H,) of a step
OneStep: TypeAlias = Callable[[Array, Array], tuple[Array, Array]]  # x_t, h -> h', a copy of h'
OneBlock: TypeAlias = OneStep  # x (K, B, I), h (B, H) -> all h' (K, B, H), a copy of the last


class Mode(StrEnum):
    """How a backend runs the steps, from the simplest mode to the fastest, with its words."""

    PLAIN = (
        "plain",
        "the equations as they stand, one call of the library for each operation",
    )
    TRACED = (
        "traced",
        "the step's operations, written down once, as NumPy calls into reused buffers",
    )
    COMPILED = (
        "compiled",
        "the step's operations, written down once, as one Numba loop over many steps",
    )
    SCAN = (
        "scan",
        "the equations as they stand, as one scan over all steps that JAX compiles",
    )
    EAGER = (
        "eager",
        "the step's operations, written down once, as a CUDA kernel between two products",
    )
    BLOCKS = (
        "blocks",
        "those kernels and products, recorded once as a CUDA graph of a block of steps",
    )
    GRAPH = (
        "graph",
        "those kernels and products, recorded once as a CUDA graph of all layers and steps",
    )
    PERSISTENT = (
        "persistent",
        "the step's operations, written down once, as one CUDA kernel over many steps",
    )
    WHOLE = (
        "whole",
        "the same, with the weights spread over the whole device",
    )

    words: str

    def __new__(cls, name: str, words: str = "") -> "Mode":
        """Make a member that is equal to its name."""
        mode = str.__new__(cls, name)
        mode._value_, mode.words = name, words
        return mode


class StepMask(Protocol):
    """Which sequences are alive at each of K steps: None where all are, else (B, 1) of bool."""

    block: Array  # (K, B, 1), the masks of all steps

    def __len__(self) -> int: ...

    def __getitem__(self, t: int, /) -> Array | None: ...

    def __iter__(self) -> Iterator[Array | None]: ...


Alive: TypeAlias = StepMask | None  # None: all sequences are alive at all steps


WHOLE = Kind.VECTOR, Kind.BATCH, Kind.START  # of arrays without an entry for each step


class Extra(NamedTuple):
    """Further arguments of the steps of a block: arrays of these kinds, in this order.

    VECTOR : (H,)
    BATCH, STEPS : (B, H), and (K, B, H) with an entry for each step
    START : (B, H), the state after a cut; without it, 0
    ROWS : (K, B, 1) of bool, the cut: steps after which a row's state starts anew
    """

    kinds: Kinds
    arrays: tuple[Array, ...]

    @property
    def cut(self) -> bool:
        """Whether there is a cut."""
        return self.kinds[-1] is Kind.ROWS

    @property
    def start(self) -> bool:
        """Whether the states from which rows start anew are given."""
        return Kind.START in self.kinds

    @property
    def entries(self) -> tuple[Array, ...]:
        """The arrays that have an entry for each step."""
        pairs = zip(self.kinds, self.arrays, strict=True)
        return tuple([v for kind, v in pairs if kind not in WHOLE])

    def of_step(self, entries: Iterable[Array]) -> tuple[Array, ...]:
        """Return the arguments of one step; entries: its entry of each of `self.entries`."""
        left, pairs = iter(entries), zip(self.kinds, self.arrays, strict=True)
        return tuple([v if kind in WHOLE else next(left) for kind, v in pairs])

    def at(self, t: int) -> tuple[Array, ...]:
        """Return the arguments of step t."""
        return self.of_step([v[t, :, :] for v in self.entries])


def kinds_of(extra: Extra | None) -> Kinds:
    """Return the kinds of the further arguments, if any."""
    return () if extra is None else extra.kinds


class Output(Protocol):
    """An array (T, ...) that is filled block by block."""

    def put(self, block: slice, piece: Array, alive: Alive = None) -> None:
        """Store the piece of these steps, with zeros where steps are skipped."""

    def array(self) -> Array:
        """Return the whole array."""


class Scans(Protocol):
    """Runs the recurrence over a block of K steps."""

    def forward(
        self,
        step: Step,
        a: InputProducts,
        h: Array,
        recurrent: Recurrent,
        alive: Alive,
        reverse: bool,
        keep: bool,
        extra: Extra | None = None,
    ) -> tuple[Array, Sequence[Array] | None]:
        """Run the steps of a block.

        a: what `affine` returned, (K, B, 3H). h: (B, H), the state before the first step run.
        alive: a sequence that has finished keeps its state. reverse: from the last step to the
        first. extra: further arguments of the step.

        Returns the states, path (K + 1, B, H), in which step t leads from path[t] to path[t + 1]
        (in reverse from path[t + 1] to path[t]); and the residuals that `step` saved, each
        (K, B, H), or None without `keep`. With a cut one more array comes last, without `keep` too:
        the h' of each step, since the path then holds the state that the next step reads.
        """

    def backward(
        self,
        step: Step,
        dy: Array | None,
        dh: Array,
        previous: Array,
        saved: Sequence[Array],
        U: Matrix,
        alive: Alive,
        reverse: bool,
        taps: bool,
        extra: Extra | None = None,
    ) -> tuple[tuple[Array, ...], Array, Array | None]:
        """Run the backward pass of a block.

        step: the gradient of a step. dy: (K, B, H). dh: (B, H), the gradient to the state after
        the block. previous: (K, B, H), the state before each step. reverse, extra: as in the
        forward pass.

        Returns the gradients to the pre-activations, each (K, B, .), followed with a start by the
        gradient that reaches it at each step (K, B, H); dh before the block; and with `taps`
        dL/dh' of every step (K, B, H), else None.
        """

    def single_step(self, step: Step, W: Matrix, b: Array | None, recurrent: Recurrent) -> OneStep:
        """Return a function of x (B, I) and h (B, H) that runs one step; see `OneStep`."""

    def prepare_step(self, step: Step, W: Matrix, b: Array | None, recurrent: Recurrent) -> OneStep:
        """Return such a function for many calls; it may keep copies of the weights."""

    def prepare_block(
        self, step: Step, W: Matrix, b: Array | None, recurrent: Recurrent, reverse: bool
    ) -> OneBlock:
        """Return a function that runs blocks in which no step is skipped; see `OneBlock`.

        h is the state before the first step run. W, b and recurrent are what `frozen_weights`
        returned.
        """


class Products(Protocol):
    """Multiplies matrices."""

    def pack_weights(self, W: Matrix, U: Matrix, rows: int) -> tuple[Matrix, Matrix]:
        """Return W and U, packed if that pays for products of `rows` rows (steps times batch)."""

    def frozen_weights(
        self, step: Step, W: Array, b: Array | None, recurrent: Recurrent, small: str
    ) -> tuple[Matrix, Array | None, Recurrent]:
        """Return W, b and recurrent for any number of calls, packed if that pays.

        small: "bfloat16" or "int8" where W and U are rounded to that and may be stored so, else "".
        """

    def frozen_matrix(self, W: Array, small: str) -> Matrix:
        """Return W (N, K) for any number of calls of `frozen_affine`, packed if that pays."""

    def frozen_affine(self, x: Array, W: Matrix, b: Array | None) -> Array:
        """Return x W^T + b (M, N) of x (M, K)."""

    def affine(self, x: Array, W: Matrix, b: Array | None) -> InputProducts:
        """Return x W^T + b (K, B, N) of x (K, B, I), W (N, I) and b (N,)."""

    def as_matrix(self, v: Array) -> Array:
        """Reshape (..., N) to a matrix (rows, N)."""

    def as_steps(self, v: Array, steps: int) -> Array:
        """Reshape a matrix (steps * B, N) to (steps, B, N)."""

    def product(self, left: Array, right: Matrix) -> Array:
        """Return left (M, K) @ right (K, N), in the dtype of the arithmetic."""

    def row_sum(self, v: Array) -> Array:
        """Return the sum of an array over its first axis, in the dtype of the arithmetic."""

    def weight_gradients(
        self,
        weights: WeightGradients,
        h: Array,
        saved: Sequence[Array],
        parts: Sequence[Array],
    ) -> Iterable[Array]:
        """Return the gradients that the equations' `weights` computes, over all rows of a block.

        h, and each array saved: (K, B, .); parts: matrices of as many rows.
        """


class Memory(Protocol):
    """Makes and converts arrays."""

    def upcast(self, v: Array, dtype: DType) -> Array:
        """Return `v` in the dtype of the arithmetic, which is float32 for half precision."""

    def as_contiguous(self, v: Array) -> Array:
        """Return a copy of `v`, which may be a view of a larger array."""

    def zero_skipped(self, v: Array, alive: StepMask, own: bool = False) -> Array:
        """Return v (K, B, .) with zeros at skipped steps, whatever v holds there.

        own: v may be written.
        """

    def output(self, shape: Shape, dtype: DType) -> Output:
        """Return an object that collects blocks of steps into an array of this shape."""

    def stacked(self, states: Sequence[Array], dtype: DType) -> Array:
        """Return states (B, H) as one array (N, B, H) of this dtype, in memory of its own."""


class Movable(Protocol):
    """An object that calls a runner, and can be given another one."""

    def on(self, run: "Runner") -> "Movable":
        """Return a copy of the object that calls this runner."""


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
        static: tuple[Any, ...],
        arrays: Pytree,
        steps: int | None = None,
        tape: object = None,
        gradients: Callable[..., Pytree] | None = None,
    ) -> tuple[Pytree, object]:
        """Return function(owner.on(runner), *static, arrays[, tape])."""


class Runner(Scans, Products, Memory, Schedules, Protocol):
    """How a backend runs a block of steps."""

    xp: Namespace
    device: Device
    whole: bool  # whether all steps are one block
