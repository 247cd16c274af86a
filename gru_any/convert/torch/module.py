"""A model of ours as a part of a PyTorch model: PyTorch's autograd calls our pullbacks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, Protocol, TypeAlias, TypeVar

import numpy as np
import torch

from ...backend import Backend, select
from ...errors import ShapeError
from ...nn.cell import GRUCell
from ...nn.chain import Chain
from ...nn.gru import GRU
from ...nn.layers import Dropout, Embedding, Linear
from ...nn.params import Layer
from ...typing import Array, Rng

Tensors: TypeAlias = tuple[torch.Tensor, ...]
Recurrent = TypeVar("Recurrent", bound=GRU | GRUCell)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ONLY_FIRST = (
    "this module runs gru_any's pullback, which gives first derivatives in reverse mode alone: "
    "for {} use torch.nn.GRU with the same weights, where the GRU has reset_after "
    "(torch.nn.GRUCell for a cell)"
)


def as_module(model: object) -> "Module | CellModule | ChainModule":
    """Return the module over a GRU, a GRUCell or a Chain; TypeError for anything else."""
    if isinstance(model, GRU):
        return Module(model)
    if isinstance(model, GRUCell):
        return CellModule(model)
    if isinstance(model, Chain):
        return ChainModule(model)
    found = model.__name__ if isinstance(model, type) else type(model).__name__
    raise TypeError(f"as_module got {found}, expected a GRU, a GRUCell or a Chain of gru_any")


class _Recurrent(torch.nn.Module):
    """The parameters of a GRU or a GRUCell by our names, and a call over them as they are."""

    def __init__(self, layer: GRU | GRUCell) -> None:
        super().__init__()
        if layer.dtype == "complex128":
            raise TypeError("the model has dtype complex128, expected a real floating dtype")
        self._layer = layer
        for name, array in layer.params.items():
            self.register_parameter(name, _parameter(array, layer.backend))

    def _run(
        self,
        x: torch.Tensor,
        h0: torch.Tensor | None,
        lengths: Array = None,
        rng: Rng | None = None,
    ) -> Tensors:
        named = {"x": x, "h0": h0, **_parameters(self, self._layer)}
        _check_tensor("x", x)
        if h0 is not None:
            _check_tensor("h0", h0)
        kind = x.device.type
        known = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        low = torch.get_autocast_dtype(kind) if known else None
        if low is not None:  # what PyTorch's products see; the arithmetic is float32 as ever
            named = {name: _rounded(t, low) for name, t in named.items()}
        _check_same(named)
        tensors = list(named.values())
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        with _no_autocast(kind):
            found = _apply(_Call(self._layer, keep, lengths, rng), *tensors)
        if low is None or x.dtype == torch.float64:
            return found
        # on CUDA PyTorch's results are of the low dtype, on the CPU they follow x
        result = low if x.is_cuda else torch.promote_types(x.dtype, low)
        return tuple(t.to(result) for t in found)

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets."""
        return repr(self._layer)


def _now(module: _Recurrent, layer: Recurrent) -> Recurrent:
    """Return the layer over the parameters of its module as they are."""
    named = _parameters(module, layer)
    _check_same(named)
    return _over(layer, [t.detach() for t in named.values()])


class Module(_Recurrent):
    """A `torch.nn.Module` over a GRU, called like `torch.nn.GRU`.

    `y, h_n = module(x, h0=None, lengths=None)`, with tensors. Its parameters have our names, which
    are PyTorch's, and are shared in memory with `gru.params` where the GRU is on NumPy or PyTorch:
    a step of a PyTorch optimiser changes both. `.to(...)` and `.double()` make copies, as for any
    module; `gru_any.convert.torch.from_arrays(module.state_dict())` gives their GRU where it has
    reset_after, `module.gru()` in any case.

    Each call reads the parameters by their names, so pruning, weight norm and the other
    parametrizations of `torch.nn.utils` act as they do on `torch.nn.GRU`. Under `torch.autocast`
    x, h0 and the parameters are rounded to its dtype, and results have the dtype that those of
    `torch.nn.GRU` have.

    Gradients are those of our pullback, on NumPy for tensors on the CPU, else on PyTorch. They
    cannot be differentiated again, which raises. Dropout between the layers acts in training mode,
    drawn from a generator that PyTorch seeds.
    """

    _layer: GRU

    def gru(self) -> GRU:
        """Return a GRU over the parameters as they are now; memory is shared where it can be."""
        return _now(self, self._layer)

    def forward(
        self, x: torch.Tensor, h0: torch.Tensor | None = None, lengths: Array = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tensors shaped as in `gru_any.GRU` -> y, h_n."""
        rng = None
        if self.training and self._layer.dropout:
            rng = np.random.default_rng(int(torch.randint(2**62, ()).item()))
        if isinstance(lengths, torch.Tensor):
            lengths = lengths.cpu().numpy()
        y, h_n = self._run(x, h0, lengths, rng)
        return y, h_n


class CellModule(_Recurrent):
    """A `torch.nn.Module` over a GRUCell, called like `torch.nn.GRUCell`; else as `Module`."""

    _layer: GRUCell

    def cell(self) -> GRUCell:
        """Return a GRUCell over the parameters as they are now."""
        return _now(self, self._layer)

    def forward(self, x: torch.Tensor, h0: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, I) or (I,), h0 (B, H) or (H,), zeros if None -> the next state."""
        return self._run(x, h0)[0]


class ChainModule(torch.nn.ModuleList):
    """A `torch.nn.Module` over a Chain: `y, state = module(x, state=None, lengths=None)`.

    Its parts are a `Module` for each GRU and PyTorch's own Linear, Embedding and Dropout, over the
    memory of the Chain's parameters; the names in its state_dict are the Chain's. Dropout acts in
    training mode.
    """

    def __init__(self, chain: Chain) -> None:
        super().__init__(_part(layer) for layer in chain.layers)
        # an array that stands in two layers is one parameter
        made: dict[int, torch.nn.Parameter] = {}
        for part, layer in zip(self, chain.layers, strict=True):
            for name, array in layer.params.items():
                setattr(part, name, made.setdefault(id(array), getattr(part, name)))

    def forward(
        self,
        x: torch.Tensor,
        state: Iterable[torch.Tensor | None] | None = None,
        lengths: Array = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Tensors shaped as in `gru_any.Chain` -> y, the new state of each GRU."""
        count = sum(isinstance(part, Module) for part in self)
        states = [None] * count if state is None else list(state)
        if len(states) != count:
            raise ValueError(f"state holds {len(states)}, expected {count}, one for each GRU")
        new: list[torch.Tensor] = []
        for part in self:
            if isinstance(part, Module):
                x, h = part(x, states[len(new)], lengths)
                new.append(h)
            else:
                x = part(x)
        return x, new


def _part(layer: Layer) -> torch.nn.Module:
    """Return a layer of a Chain as a module."""
    part: torch.nn.Module
    if isinstance(layer, GRU):
        return Module(layer)
    if isinstance(layer, Dropout):
        return torch.nn.Dropout(layer.p)
    if isinstance(layer, Linear):
        sizes = (layer.in_features, layer.out_features)
        part = torch.nn.Linear(*sizes, bias=layer.bias, device="meta")
    elif isinstance(layer, Embedding):
        part = torch.nn.Embedding(layer.n, layer.size, device="meta")
    else:
        raise TypeError(f"a {type(layer).__name__} has no counterpart in a torch.nn.Module")
    for name, array in layer.params.items():
        setattr(part, name, _parameter(array, layer.backend))
    return part


# autograd ----------------------------------------------------------------------------------------


class _Call:
    """One call of a layer, and the pullback that it leaves."""

    def __init__(self, layer: GRU | GRUCell, keep: bool, lengths: Array, rng: Rng | None) -> None:
        self.layer, self.keep, self.lengths, self.rng = layer, keep, lengths, rng

    def run(self, x: torch.Tensor, h0: torch.Tensor | None, *params: torch.Tensor) -> Tensors:
        """Return the results as a tuple."""
        layer = _over(self.layer, params)
        self.backend, self.given, put = layer.backend, h0 is not None, _putter(layer.backend)
        arguments = put(x), None if h0 is None else put(h0)
        found: tuple[Array, ...]
        if isinstance(layer, GRUCell) and self.keep:
            h, self.pullback = layer.vjp(*arguments)
            found = (h,)
        elif isinstance(layer, GRUCell):
            found = (layer(*arguments),)
        elif self.keep or self.rng is not None:
            found, self.pullback = layer.vjp(*arguments, self.lengths, self.rng)
        else:
            found = layer(*arguments, self.lengths)
        return tuple(_tensor(array, self.backend) for array in found)

    def back(self, *cotangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Return the cotangents of x, h0 and the parameters from those of the results."""
        put = _putter(self.backend)
        given = (None if d is None else put(d) for d in cotangents)
        grads, dx, dh0 = self.pullback(*given)
        found = (dx, dh0 if self.given else None, *grads.values())
        return tuple(None if g is None else _tensor(g, self.backend) for g in found)


class _Context(Protocol):
    """What PyTorch keeps between a call and its backward pass."""

    call: _Call
    saved_tensors: Tensors

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        """Keep tensors."""

    def set_materialize_grads(self, value: bool) -> None:
        """Choose whether a missing cotangent is zeros or None."""


class _Run(torch.autograd.Function):
    """The call, in PyTorch's graph."""

    @staticmethod
    def forward(call: _Call, *tensors: torch.Tensor) -> Tensors:
        return call.run(*tensors)

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)  # so that PyTorch notices writes in between
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: _Context, *cotangents: torch.Tensor | None) -> tuple[object, ...]:
        tensors = ctx.saved_tensors
        if all(d is None for d in cotangents):
            return (None,) * (1 + len(tensors))
        return None, *_apply_back(ctx.call, len(cotangents), *cotangents, *tensors)

    @staticmethod
    def jvp(ctx: _Context, *tangents: torch.Tensor | None) -> NoReturn:
        raise RuntimeError(ONLY_FIRST.format("forward-mode derivatives"))

    @staticmethod
    def vmap(info: object, in_dims: object, *inputs: object) -> NoReturn:
        raise RuntimeError("this module has no vmap: give it a batch (T, B, I), or loop over it")


class _Back(torch.autograd.Function):
    """The pullback. It takes the tensors of the call too, so that a second derivative raises."""

    @staticmethod
    def forward(
        call: _Call, results: int, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        with _no_autocast(tensors[-1].device.type):
            return call.back(*tensors[:results])

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Any, ...], output: Tensors) -> None:
        pass

    @staticmethod
    def backward(ctx: _Context, *cotangents: torch.Tensor | None) -> NoReturn:
        raise RuntimeError(ONLY_FIRST.format("second derivatives"))

    jvp = _Run.jvp
    vmap = _Run.vmap


# PyTorch gives `apply` no types
_apply: Callable[..., Tensors] = _Run.apply
_apply_back: Callable[..., tuple[torch.Tensor | None, ...]] = _Back.apply


# tensors and arrays ------------------------------------------------------------------------------


def _parameters(module: torch.nn.Module, layer: Layer) -> dict[str, torch.Tensor]:
    """Return the tensors by the names of the layer's parameters; hooks may have computed them."""
    found = {}
    for name, array in layer.params.items():
        shape = tuple(array.shape)
        try:
            tensor = found[name] = getattr(module, name)
        except AttributeError as e:
            raise AttributeError(f"{name} {shape} is missing in the module: {e}") from e
        _check_tensor(name, tensor)
        if tuple(tensor.shape) != shape:
            raise ShapeError(f"{name} is {tuple(tensor.shape)}, expected {shape}")
    return found


def _check_tensor(name: str, tensor: object) -> None:
    """Raise where it is no dense tensor of a real floating dtype."""
    if isinstance(tensor, torch.nn.utils.rnn.PackedSequence):
        raise TypeError(
            f"{name} is a PackedSequence, expected a tensor: unpack it by "
            "torch.nn.utils.rnn.pad_packed_sequence, which gives x and lengths"
        )
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"{name} is a {type(tensor).__name__}, expected a torch.Tensor: torch.as_tensor(...)"
        )
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{name} has dtype {_plain(tensor.dtype)}, expected one of "
            f"{', '.join(map(_plain, DTYPES))}: {name}.to(torch.float32)"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} is {_plain(tensor.layout)}, expected {name}.to_dense()")
    if tensor.is_meta:
        raise TypeError(f"{name} is on meta, where no numbers are")


def _check_same(named: Mapping[str, torch.Tensor | None]) -> None:
    """Raise where a tensor has another dtype or device than the first parameter."""
    params = ((name, t) for name, t in named.items() if name not in ("x", "h0") and t is not None)
    first, like = next(params)
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.dtype != like.dtype:
            raise TypeError(
                f"{name} has dtype {_plain(tensor.dtype)}, expected {_plain(like.dtype)} as "
                f"{first} has: {name}.to({like.dtype}), or module.to({tensor.dtype})"
            )
        if tensor.device != like.device:
            raise TypeError(
                f"{name} is on {tensor.device}, expected {like.device} as {first} is: "
                f'{name}.to("{like.device}"), or module.to("{tensor.device}")'
            )


def _plain(name: object) -> str:
    return str(name).rpartition(".")[2]


def _rounded(tensor: torch.Tensor | None, low: torch.dtype) -> torch.Tensor | None:
    """Round a tensor as autocast does, but return it in float32; float64 is left alone."""
    if tensor is None or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(low).float()


def _no_autocast(kind: str) -> AbstractContextManager[object]:
    """Return a context without autocast for our own products, whose dtype is chosen before."""
    available = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if available else nullcontext()


def _over(layer: Recurrent, params: Sequence[torch.Tensor]) -> Recurrent:
    """Return the same layer over these tensors, on NumPy where they are on the CPU."""
    first = params[0]
    dtype = _plain(first.dtype)
    host = first.device.type == "cpu" and dtype != "bfloat16"  # which NumPy lacks
    backend = select("numpy") if host else select("torch", str(first.device))
    backend.dtype(dtype)  # raises where the backend lacks it
    put = _putter(backend)
    arrays = zip(layer.params, (put(p) for p in params), strict=True)
    return layer.over(backend, dtype, arrays)  # type: ignore[return-value]


def _putter(backend: Backend) -> Callable[[torch.Tensor], Array]:
    """Return the function from tensors to arrays of the backend over the same memory."""
    return (lambda t: t.detach().numpy()) if backend.host else (lambda t: t.detach())


def _parameter(array: Array, backend: Backend) -> torch.nn.Parameter:
    return torch.nn.Parameter(_tensor(array, backend))


def _tensor(array: Array, backend: Backend) -> torch.Tensor:
    """Return an array as a tensor, over the same memory where the library is NumPy or PyTorch."""
    if torch.is_tensor(array):
        return array
    host = backend.to_numpy(array)
    return torch.from_numpy(host if host.flags.writeable else host.copy())
