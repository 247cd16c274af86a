"""A GRU of ours as a part of a PyTorch model: PyTorch's autograd calls our pullback."""

from typing import Any

import numpy as np
import torch

from ..backend import Backend, select
from ..gru import GRU
from ..params import Params


class Module(torch.nn.Module):
    """A `torch.nn.Module` over a GRU, called like `torch.nn.GRU`.

    `y, h_n = module(x, h0=None, lengths=None)`, with tensors. Its parameters have our names, which
    are PyTorch's, and are shared in memory with `gru.params` where the GRU is on NumPy or PyTorch:
    a step of a PyTorch optimiser changes both. `.to(...)` and `.double()` make copies, as for any
    module; `gru_any.convert.torch.from_arrays(module.state_dict())` gives their GRU where it has
    reset_after, `module.gru()` in any case.

    Gradients are those of our pullback, on NumPy for tensors on the CPU, else on PyTorch. They
    cannot be differentiated again. Dropout between the layers acts in training mode, drawn from a
    generator that PyTorch seeds.
    """

    def __init__(self, gru: GRU) -> None:
        super().__init__()
        self._gru = gru
        for name, array in gru.params.items():
            self.register_parameter(name, torch.nn.Parameter(_tensor(array, gru.backend)))

    def gru(self) -> GRU:
        """Return a GRU over the parameters as they are now; memory is shared where it can be."""
        return _over(self._gru, [p.detach() for p in self.parameters()])

    def forward(self, x: Any, h0: Any = None, lengths: Any = None) -> Any:
        """Tensors shaped as in `gru_any.GRU` -> y, h_n."""
        gru = self._gru
        rng = None
        if self.training and gru.dropout:
            rng = np.random.default_rng(int(torch.randint(2**62, ()).item()))
        if isinstance(lengths, torch.Tensor):
            lengths = lengths.cpu().numpy()
        keep = torch.is_grad_enabled()
        return _Run.apply(gru, lengths, rng, keep, x, h0, *self.parameters())

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets."""
        return repr(self._gru)


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gru: Any, lengths: Any, rng: Any, keep: bool, x: Any, h0: Any, *params: Any
    ) -> Any:
        gru = _over(gru, params)
        put = _putter(gru.backend)
        arguments = (put(x), None if h0 is None else put(h0), lengths)
        if rng is None and not (keep and any(ctx.needs_input_grad)):
            y, h_n = gru(*arguments)
        else:
            (y, h_n), ctx.pullback = gru.vjp(*arguments, rng)
        ctx.save_for_backward(x, h0, *params)  # so that PyTorch notices what is written in between
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.given = gru.backend, h0 is not None
        return _tensor(y, gru.backend), _tensor(h_n, gru.backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Any, dh_n: Any) -> Any:
        _ = ctx.saved_tensors
        if dy is None and dh_n is None:
            return (None,) * len(ctx.needs_input_grad)
        put = _putter(ctx.backend)
        grads, dx, dh0 = ctx.pullback(*(None if g is None else put(g) for g in (dy, dh_n)))
        found = (dx, dh0 if ctx.given else None, *grads.values())
        of_arrays = (None if g is None else _tensor(g, ctx.backend) for g in found)
        return None, None, None, None, *of_arrays


def _over(gru: GRU, params: Any) -> GRU:
    """The same GRU over these tensors, on NumPy where they are on the CPU."""
    first = params[0]
    dtype = str(first.dtype).rpartition(".")[2]
    host = first.device.type == "cpu" and dtype != "bfloat16"  # which NumPy has not
    backend = select("numpy") if host else select("torch", str(first.device))
    backend.dtype(dtype)  # it must have it
    put = _putter(backend)
    arrays = zip(gru.params, (put(p) for p in params), strict=True)
    twin = object.__new__(type(gru))
    twin.__dict__.update(gru.__dict__, backend=backend, dtype=dtype)
    twin.__dict__.pop("arithmetic", None)  # which belongs to the dtype
    twin.params = Params(backend, dtype, arrays)
    return twin


def _putter(backend: Backend) -> Any:
    """From tensors to the arrays of the backend, over the same memory."""
    return (lambda t: t.detach().numpy()) if backend.host else (lambda t: t.detach())


def _tensor(array: Any, backend: Backend) -> Any:
    """An array as a tensor, over the same memory where the library is NumPy or PyTorch."""
    if torch.is_tensor(array):
        return array
    host = backend.to_numpy(array)
    return torch.from_numpy(host if host.flags.writeable else host.copy())
