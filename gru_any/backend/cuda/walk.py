"""What a block of steps needs on a device: the stages of a step, and their kernels."""

from functools import cached_property, lru_cache
from typing import Any

from ...codegen.cuda_source import Kernel, prelude, step_kernel, table_kernel
from ...codegen.schedule import STATE, Gemm, Group, Place, Stages, narrowed, staged
from ..cpu.numpy_runner import backward_program, forward_program


class Walk:
    """The way through a block of steps, forward or back.

    stages: of one step; number: the dtype of the arithmetic; widths: of the arrays a step gives
    beside the state, in columns; name: what its kernels begin with; types: dtypes of arrays, and
    of the weights "U", that are not of `number`.
    """

    def __init__(
        self, stages: Stages, widths: list[int], number: str, name: str, types: Any = ()
    ) -> None:
        self.stages, self.widths, self.number = stages, widths, number
        self.name, self.types = name, dict(types)

    @property
    def arrays(self) -> list[str]:
        """The arrays in the table; the mask of the rows that have not ended comes after them."""
        return self.stages.arrays

    @cached_property
    def narrow(self) -> "Walk":
        """For weights in half precision: what products read is of their dtype too."""
        if "U" not in self.types:
            return self
        stages = narrowed(self.stages)
        lefts = {s.left: self.types["U"] for s in stages.stages if isinstance(s, Gemm)}
        return Walk(stages, self.widths, self.number, self.name, {**self.types, **lefts})

    def dtype(self, name: str) -> str:
        """Of an array, or of U."""
        return self.types.get(name, self.number)

    @cached_property
    def kernels(self) -> dict[int, Kernel]:
        """The kernel of each stage that is no product; all are parts of one source."""
        arguments = (self.arrays, self.stages.buffers, self.types, self.number)
        found = {
            n: step_kernel(f"{self.name}_{n}", stage, *arguments)
            for n, stage in enumerate(self.stages.stages)
            if isinstance(stage, Group)
        }
        source = prelude(self.number) + "\n".join(k.source for k in found.values()) + self._table
        return {n: kernel._replace(source=source) for n, kernel in found.items()}

    @cached_property
    def set_table(self) -> Kernel:
        """The kernel that fills the table, in the same source."""
        return Kernel("set_table", next(iter(self.kernels.values())).source)

    @property
    def _table(self) -> str:
        return table_kernel(3 * len(self.arrays) + 3)


@lru_cache(maxsize=64)
def typed(walk: Walk, types: Any) -> Walk:
    """The same over arrays of these dtypes, pairs of a name and a dtype."""
    return Walk(walk.stages, walk.widths, walk.number, walk.name, types) if types else walk


@lru_cache(maxsize=64)
def forward_walk(
    step: Any, vectors: int, keep: bool, number: str, types: Any = (), name: str = "forward"
) -> Walk:
    """The way forward. Arrays: a, path, the vectors c0..., and with `keep` what is saved, s0..."""
    program = forward_program(step, vectors, keep)
    (a, (h,), _, *c) = program.inputs
    inputs = {column: Place("a", n) for n, column in enumerate(a)} | {h: Place(STATE, 0)}
    inputs |= {column: Place(f"c{n}", 0) for n, (column,) in enumerate(c)}
    results = {program.result: [Place(STATE, 0), Place("path", 0)]}
    for n, (column,) in enumerate(program.extras):
        results.setdefault(column, []).append(Place(f"s{n}", 0))
    widths = [1 for _ in program.extras]
    return Walk(staged(program, inputs, results), widths, number, name, types)


@lru_cache(maxsize=64)
def backward_walk(
    step: Any,
    saved: int,
    given: bool,
    taps: bool,
    number: str,
    types: Any = (),
    name: str = "backward",
) -> Walk:
    """The backward pass. Arrays: dy if given, previous, s0..., and p0... for what a step gives."""
    program = backward_program(step, saved, given, taps)
    names = [*(["dy"] if given else []), STATE, "previous", *(f"s{n}" for n in range(saved))]
    columns = [column for ids in program.inputs for column in ids]
    inputs = {c: Place(name, 0) for c, name in zip(columns, names, strict=True)}
    results = {program.result: [Place(STATE, 0)]}
    for p, extra in enumerate(program.extras):
        for n, column in enumerate(extra):
            results.setdefault(column, []).append(Place(f"p{p}", n))
    widths = [len(extra) for extra in program.extras]
    return Walk(staged(program, inputs, results), widths, number, name, types)
