"""From a module's tensors to its results: checks, autocast, and the way into PyTorch's graphs."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias
from weakref import WeakKeyDictionary

import torch

from ...nn.gru import GRU
from .autograd import Run, RunEager, RunTransformed
from .call import Call, Tensors, is_low, over, template
from .check import check, check_tensor

Key: TypeAlias = tuple[object, ...]
PLAIN = (torch.Tensor, torch.nn.Parameter)
# the GRU over a module's weights, and where these are: kept as long as both stay
_kept: WeakKeyDictionary[torch.nn.Module, tuple[Key, GRU]] = WeakKeyDictionary()


def evaluate(
    module: torch.nn.Module,
    settings: str,
    names: Sequence[str],
    x: torch.Tensor,
    h0: torch.Tensor | None,
    lengths: torch.Tensor | None = None,
    batch_sizes: torch.Tensor | None = None,
    dropout: float = 0.0,
    resets: torch.Tensor | None = None,
    drops: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y and h_n of the GRU that has these parameters of a module; dropout acts.

    drops: whether the other kinds of dropout, which are among the settings, act too.
    """
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            f"torch.jit.trace would take this call of {module} for a constant: use torch.export, "
            "torch.compile, or gru_any.convert.onnx.save of its `gru()`"
        )
    named: dict[str, torch.Tensor] = {name: getattr(module, name) for name in names}
    x_dtype, low = x.dtype, None
    if torch._C._is_any_autocast_enabled() and x_dtype != torch.float64:
        low = _autocast(x.device.type)
    if low is not None:  # what PyTorch's products see; the arithmetic is float32 as ever
        x, h0 = _rounded(x, low), None if h0 is None else _rounded(h0, low)
        named = {name: _rounded(w, low) for name, w in named.items()}
    for name, weight in named.items():
        if not isinstance(weight, torch.Tensor):
            check_tensor(name, weight)
    weights = list(named.values())
    seed = torch.randint(2**62, ()) if dropout or drops else None
    given = [x, *weights] if h0 is None else [x, h0, *weights]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    compiled = torch.compiler.is_compiling()
    transformed = not compiled and torch._C._are_functorch_transforms_active()
    opaque = compiled or transformed or _is_traced(given)
    gru = None if opaque else _over(module, settings, dropout, named, x, h0)
    watched = keep or transformed or torch.autograd.forward_ad._current_level >= 0
    if gru is not None and not watched:
        y, h_n = Call(gru, lengths, batch_sizes, seed, resets).run(x, h0, keep)
    else:
        function = Run if compiled else RunTransformed if transformed else RunEager
        call: Callable[..., Tensors] = function.apply if watched else Run.forward
        rest = lengths, batch_sizes, seed, resets, x, h0, *weights
        y, h_n, _ = call(gru, settings, dropout, keep, *rest)
    if low is None:
        return y, h_n
    # on CUDA PyTorch's results are of the low dtype, on the CPU they follow x
    result = low if x.is_cuda else torch.promote_types(x_dtype, low)
    return y.to(result), h_n.to(result)


def _autocast(kind: str) -> torch.dtype | None:
    """Return the dtype of autocast on this kind of device, where it is on."""
    known = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if known else None


def _rounded(tensor: torch.Tensor, low: torch.dtype) -> torch.Tensor:
    """Round a tensor as autocast does, but return it in float32; float64 is left alone."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(low).float()


def _is_traced(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the tensors have no memory to work on, or a mode of PyTorch follows the call."""
    modes = torch._C._len_torch_dispatch_stack() > 0
    return modes or not all(type(t) in PLAIN and t.layout is torch.strided for t in tensors)


def _over(
    module: torch.nn.Module,
    settings: str,
    dropout: float,
    named: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    h0: torch.Tensor | None,
) -> GRU:
    """Return the GRU over these weights, the one of the call before where they stand as then."""
    places = [(w.data_ptr(), w.dtype, w.device, w.shape, w.stride()) for w in named.values()]
    key = settings, dropout, x.dtype, x.device, *places
    found = _kept.get(module)
    if found is not None and found[0] == key and (h0 is None or h0.dtype == x.dtype):
        return found[1]
    made, weights = template(settings, dropout), list(named.values())
    check(made.params, weights, x, h0)
    gru = over(made, weights)
    if not is_low(x.dtype):  # of which the GRU has copies
        _kept[module] = key, gru
    return gru
