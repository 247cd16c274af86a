"""A call of a GRU in PyTorch's graphs: those that it records, and those that it compiles.

`Run` is what autograd and `torch.func` see. Where PyTorch compiles or exports, `Run` calls the
operators `gru_any::gru` and `gru_any::gru_backward`, which are opaque there. An operator returns
tensors alone, so the pullback of a call hangs on one of them, its handle: a number, whose memory
keeps the pullback alive. Where only a copy of the number is left, the call is run again.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any, NoReturn, Protocol, TypeAlias
from weakref import WeakValueDictionary

import numpy as np
import torch

from ...nn.gru import GRU
from .call import Call, Tensors, by_torch, over, template
from .check import check

Some: TypeAlias = tuple[torch.Tensor | None, ...]
ONLY_FIRST = (
    "this module runs gru_any's pullback, which gives first derivatives in reverse mode alone: "
    "for {} use torch.nn.GRU with the same weights, where the GRU has reset_after "
    "(torch.nn.GRUCell for a cell)"
)


class _Handle(np.ndarray[Any, Any]):
    """A number, and the call that it stands for."""

    call: Call


_numbers = count(1)
_handles: WeakValueDictionary[int, _Handle] = WeakValueDictionary()


def start(call: Call, x: torch.Tensor, h0: torch.Tensor | None, keep: bool) -> Tensors:
    """Return y, h_n and, with `keep`, the handle of the pullback; else 0."""
    found = call.run(x, h0, keep)
    array = np.zeros(1, np.int64).view(_Handle)
    if keep:
        array[0], array.call = next(_numbers), call
        _handles[int(array[0])] = array
    return (*found, torch.from_numpy(array))


def finish(
    handle: torch.Tensor, dy: torch.Tensor | None, dh_n: torch.Tensor | None,
    again: Callable[[], Call], x: torch.Tensor, h0: torch.Tensor | None,
) -> list[torch.Tensor]:  # fmt: skip
    """Return dL/d of x, of h0 where one was given, and of the weights."""
    kept = _handles.get(int(handle))
    if kept is not None:
        return kept.call.back(dy, dh_n)
    call = again()
    call.run(x, h0, keep=True)
    return call.back(dy, dh_n)


# the operators -----------------------------------------------------------------------------------


@torch.library.custom_op("gru_any::gru", mutates_args=())
def gru(
    x: torch.Tensor, h0: torch.Tensor | None, weights: Sequence[torch.Tensor],
    lengths: torch.Tensor | None, batch_sizes: torch.Tensor | None, seed: torch.Tensor | None,
    keep: bool, dropout: float, settings: str, resets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return y, h_n and the handle; settings: those of a gru_any.GRU, as the text of a dict."""
    made = template(settings, dropout)
    check(made.params, weights, x, h0)
    call = Call(over(made, weights), lengths, batch_sizes, seed, resets)
    y, h_n, handle = start(call, x, h0, keep)
    return y, h_n, handle


@gru.register_fake
def _(
    x: torch.Tensor, h0: torch.Tensor | None, weights: Sequence[torch.Tensor],
    lengths: torch.Tensor | None, batch_sizes: torch.Tensor | None, seed: torch.Tensor | None,
    keep: bool, dropout: float, settings: str, resets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    made = template(settings, dropout)
    check(made.params, weights, x, h0)
    D, H = len(made.suffixes), made.hidden_size
    B: int | torch.SymInt = x.shape[0 if made.batch_first else 1]
    if h0 is not None:
        B = h0.shape[1]
    elif batch_sizes is not None:
        B = torch.library.get_ctx().new_dynamic_size()
    y, h_n = (*x.shape[:-1], D * H), (made.num_layers * D, B, H)
    return x.new_empty(y), x.new_empty(h_n), torch.empty(1, dtype=torch.int64)


@torch.library.custom_op("gru_any::gru_backward", mutates_args=())
def gru_backward(
    handle: torch.Tensor, dy: torch.Tensor | None, dh_n: torch.Tensor | None,
    x: torch.Tensor, h0: torch.Tensor | None, weights: Sequence[torch.Tensor],
    lengths: torch.Tensor | None, batch_sizes: torch.Tensor | None, seed: torch.Tensor | None,
    dropout: float, settings: str, resets: torch.Tensor | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """Return dL/d of x, of h0 where one was given, and of the weights."""

    def again() -> Call:
        made = over(template(settings, dropout), weights)
        return Call(made, lengths, batch_sizes, seed, resets)

    return finish(handle, dy, dh_n, again, x, h0)


@gru_backward.register_fake
def _(
    handle: torch.Tensor, dy: torch.Tensor | None, dh_n: torch.Tensor | None,
    x: torch.Tensor, h0: torch.Tensor | None, weights: Sequence[torch.Tensor],
    lengths: torch.Tensor | None, batch_sizes: torch.Tensor | None, seed: torch.Tensor | None,
    dropout: float, settings: str, resets: torch.Tensor | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    return [t.new_empty(t.shape) for t in (x, h0, *weights) if t is not None]


# the functions -----------------------------------------------------------------------------------


class _Context(Protocol):
    """The context of autograd: it keeps a call's values for its backward pass."""

    gru: GRU | None
    settings: str
    dropout: float
    saved_tensors: tuple[Any, ...]

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        """Keep tensors."""

    def set_materialize_grads(self, value: bool) -> None:
        """Choose whether a missing cotangent is zeros or None."""

    def mark_non_differentiable(self, *tensors: torch.Tensor) -> None:
        """Say of which results there is no gradient."""


class Run(torch.autograd.Function):
    """A call: gru (None: the operator makes it of `settings`), ... -> y, h_n and the handle."""

    @staticmethod
    def forward(
        gru: GRU | None, settings: str, dropout: float, keep: bool,
        lengths: torch.Tensor | None, batch_sizes: torch.Tensor | None, seed: torch.Tensor | None,
        resets: torch.Tensor | None,
        x: torch.Tensor, h0: torch.Tensor | None, *weights: torch.Tensor,
    ) -> Tensors:  # fmt: skip
        """Return y, h_n and the handle."""
        if gru is not None:
            return start(Call(gru, lengths, batch_sizes, seed, resets), x, h0, keep)
        made: Tensors = torch.ops.gru_any.gru(
            x, h0, weights, lengths, batch_sizes, seed, keep, dropout, settings, resets
        )
        return made

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Any, ...], output: Tensors) -> None:
        """Keep what the backward pass needs."""
        ctx.gru, ctx.settings, ctx.dropout, _, *tensors = inputs
        ctx.save_for_backward(output[2], *tensors)  # so that PyTorch notices writes in between
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(
        ctx: _Context, dy: torch.Tensor | None, dh_n: torch.Tensor | None, _: object
    ) -> tuple[object, ...]:
        """Return dL/d of the inputs."""
        handle, *tensors = ctx.saved_tensors
        if dy is None and dh_n is None:
            return (None,) * (4 + len(tensors))
        given = ctx.gru, ctx.settings, ctx.dropout, handle, dy, dh_n, *tensors
        kind = Back if torch.compiler.is_compiling() else BackTransformed
        call: Callable[..., Tensors] = kind.apply if torch.is_grad_enabled() else kind.forward
        found: list[torch.Tensor | None] = list(call(*given))
        if tensors[5] is None:
            found.insert(1, None)
        return *(None,) * 8, *found

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensors, Any]:
        """Run the examples one by one."""
        return _one_by_one(RunTransformed, info.batch_size, in_dims, inputs)


class Back(torch.autograd.Function):
    """The pullback of `Run`, which has derivatives where PyTorch has the same equations."""

    @staticmethod
    def forward(
        gru: GRU | None, settings: str, dropout: float, handle: torch.Tensor,
        dy: torch.Tensor | None, dh_n: torch.Tensor | None,
        lengths: torch.Tensor | None, batch_sizes: torch.Tensor | None, seed: torch.Tensor | None,
        resets: torch.Tensor | None,
        x: torch.Tensor, h0: torch.Tensor | None, *weights: torch.Tensor,
    ) -> Tensors:  # fmt: skip
        """Return dL/d of x, of h0 where one was given, and of the weights."""
        if gru is not None:
            again = partial(Call, gru, lengths, batch_sizes, seed, resets)
            return tuple(finish(handle, dy, dh_n, again, x, h0))
        return tuple(
            torch.ops.gru_any.gru_backward(
                handle,
                dy,
                dh_n,
                x,
                h0,
                weights,
                lengths,
                batch_sizes,
                seed,
                dropout,
                settings,
                resets,
            )
        )

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Any, ...], output: Tensors) -> None:
        """Keep what the second derivative needs."""
        _, ctx.settings, _, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: _Context, *cotangents: torch.Tensor) -> Some:
        """Return the derivatives of the pullback, as PyTorch's operator has them."""
        dy, dh_n, lengths, batch_sizes, seed, resets, *given = ctx.saved_tensors
        call = by_torch(ctx.settings, lengths, batch_sizes, seed, resets)
        if call is None:
            raise RuntimeError(ONLY_FIRST.format("second derivatives"))
        of_call = [t for t in given if t is not None]
        of_results = [d for d in (dy, dh_n) if d is not None]

        def pullback(*tensors: torch.Tensor) -> Any:
            results, back, *_ = torch.func.vjp(call, *tensors[len(of_results) :])
            filled = iter(tensors)
            return back(tuple(
                torch.zeros_like(result) if d is None else next(filled)
                for d, result in zip((dy, dh_n), results, strict=True)
            ))  # fmt: skip

        found = iter(torch.func.vjp(pullback, *of_results, *of_call)[1](cotangents))
        places = (None, None, None, None, dy, dh_n, None, None, None, None, *given)
        return tuple(None if place is None else next(found) for place in places)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensors, Any]:
        """Run the examples one by one."""
        return _one_by_one(BackTransformed, info.batch_size, in_dims, inputs)


class RunTransformed(Run):
    """`Run` that refuses forward mode in words; a `jvp` makes `torch.compile` break the graph."""

    @staticmethod
    def jvp(ctx: _Context, *tangents: torch.Tensor | None) -> NoReturn:
        """Refuse forward mode."""
        raise RuntimeError(ONLY_FIRST.format("forward-mode derivatives"))


class BackTransformed(Back):
    """`Back` that refuses forward mode in words."""

    jvp = RunTransformed.jvp


class RunEager(torch.autograd.Function):
    """`Run` for calls outside of transforms, in the form that PyTorch calls at less cost."""

    @staticmethod
    def forward(ctx: _Context, *inputs: Any) -> Tensors:
        """Return the results of `Run`."""
        output = Run.forward(*inputs)
        Run.setup_context(ctx, inputs, output)
        return output

    backward = Run.backward
    jvp = RunTransformed.jvp


def _one_by_one(
    function: type[torch.autograd.Function], size: int, in_dims: tuple[int | None, ...],
    inputs: Sequence[Any],
) -> tuple[Tensors, tuple[int, ...]]:  # fmt: skip
    """Return the results of each example of a vmap, stacked, and their axes."""
    pairs = list(zip(inputs, in_dims, strict=True))
    apply: Callable[..., Tensors] = function.apply
    rows = [apply(*(v if d is None else v.select(d, i) for v, d in pairs)) for i in range(size)]
    columns = tuple(torch.stack(column) for column in zip(*rows, strict=True))
    return columns, (0,) * len(columns)
