"""One call of a GRU of ours over tensors, and its pullback."""

from ast import literal_eval
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from inspect import signature
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

from ...backend import NUMPY, Backend, select
from ...backend.cpu.openmp import lent
from ...nn.cell import GRUCell
from ...nn.gru import GRU
from ...typing import Array
from .pieces import InPieces, pieces

Tensors: TypeAlias = tuple[torch.Tensor, ...]
Recurrent = TypeVar("Recurrent", bound=GRU | GRUCell)
# the settings that torch.nn.GRU has too, and those that change no result
OF_TORCH = (
    "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional",
    "recompute", "precision",
)  # fmt: skip


@lru_cache(maxsize=256)
def template(settings: str, dropout: float = 0.0) -> GRU:
    """Return the GRU of these settings (a dict, as text), whose parameters have shapes alone."""
    gru = GRU(**literal_eval(settings), dropout=dropout, backend="numpy", seed=0)
    zero = np.zeros((), "float32")
    shapes = ((name, np.broadcast_to(zero, p.shape)) for name, p in gru.params.items())
    return gru.over(NUMPY, "float32", shapes)


def is_of_torch(gru: GRU) -> bool:
    """Whether torch.nn.GRU computes the same."""
    usual = signature(GRU).parameters
    others = {k: v for k, v in gru.settings.items() if k not in (*OF_TORCH, "reset_after")}
    return gru.reset_after and all(v == usual[k].default for k, v in others.items())


def over(layer: Recurrent, weights: Sequence[torch.Tensor]) -> Recurrent:
    """Return the layer over these tensors: on NumPy, where they are on the CPU, else on PyTorch.

    On the CPU float16 and bfloat16 become float32, which is their arithmetic; all else is shared in
    memory.
    """
    first = weights[0]
    host = first.device.type == "cpu"
    backend = NUMPY if host else select("torch", str(first.device))
    dtype = "float32" if host and is_low(first.dtype) else plain(first.dtype)
    backend.dtype(dtype)  # raises where the backend lacks it
    arrays = (to_array(w, backend) for w in weights)
    return layer.over(backend, dtype, zip(layer.params, arrays, strict=True))  # type: ignore[return-value]


def by_torch(
    settings: str,
    lengths: torch.Tensor | None,
    batch_sizes: torch.Tensor | None,
    seed: torch.Tensor | None,
    resets: torch.Tensor | None,
) -> Callable[..., Tensors] | None:
    """Return f(x, [h0,] *weights) -> y, h_n by PyTorch's own operator; None where it has none."""
    gru = template(settings)
    # PyTorch's operator for packed sequences fails under torch.func
    if not is_of_torch(gru) or any(t is not None for t in (lengths, batch_sizes, seed, resets)):
        return None

    def call(x: torch.Tensor, *rest: torch.Tensor) -> Tensors:
        h0, weights = (rest[0], rest[1:]) if len(rest) > len(gru.params) else (None, rest)
        if h0 is None:
            B = x.shape[0 if gru.batch_first else 1]
            h0 = x.new_zeros(gru.num_layers * len(gru.suffixes), B, gru.hidden_size)
        kind = gru.bias, gru.num_layers, 0.0, False, gru.bidirectional, gru.batch_first
        found: Tensors = torch._VF.gru(x, h0, weights, *kind)
        return found

    return call


class Call:
    """One call, and the pullback that it leaves."""

    def __init__(
        self,
        gru: GRU,
        lengths: torch.Tensor | None = None,
        batch_sizes: torch.Tensor | None = None,
        seed: torch.Tensor | None = None,
        resets: torch.Tensor | None = None,
    ) -> None:
        self.gru = gru
        self.lengths = None if lengths is None else lengths.cpu().numpy()
        self.batch_sizes = batch_sizes
        self.seed = seed
        self.options: dict[str, Any] = {} if resets is None else {"resets": resets.cpu().numpy()}

    def run(self, x: torch.Tensor, h0: torch.Tensor | None, keep: bool) -> Tensors:
        """Return y and h_n; x and y are the data of PackedSequences where there are batch sizes."""
        gru: Any = self.gru
        self.dtype, self.given = x.dtype, h0 is not None
        if self.batch_sizes is not None:
            x, packed = _padded(x, self.batch_sizes, self.gru.batch_first)
            self.lengths = packed.numpy()
            # weights are dropped for a whole batch
            whole = not gru.backend.host or (self.seed is not None and gru.weight_dropout > 0)
            if not whole and len(cut := pieces(self.lengths)) > 1:
                gru = InPieces(self.gru, cut)
        given = self._array(x), self._array(h0), self.lengths
        with lent, no_autocast(x.device.type):
            if keep or self.seed is not None:
                rng = None if self.seed is None else np.random.default_rng(int(self.seed.item()))
                (y, h_n), self.pullback = gru.vjp(*given, rng, **self.options)
            else:
                y, h_n = gru(*given, **self.options)
        return self._packed(self._tensor(y)), self._tensor(h_n)

    def back(self, dy: torch.Tensor | None, dh_n: torch.Tensor | None) -> list[torch.Tensor]:
        """Return dL/d of x, of h0 where one was given, and of the weights."""
        if dy is not None and self.batch_sizes is not None:
            dy, _ = _padded(dy, self.batch_sizes, self.gru.batch_first)
        with lent, no_autocast((dy if dh_n is None else dh_n).device.type):  # type: ignore[union-attr]
            grads, dx, dh0 = self.pullback(self._array(dy), self._array(dh_n))
        states = [dh0] if self.given else []
        return [
            self._packed(self._tensor(dx)),
            *map(self._tensor, (*states, *grads.values())),
        ]

    def _array(self, tensor: torch.Tensor | None) -> Array:
        return None if tensor is None else to_array(tensor, self.gru.backend)

    def _tensor(self, array: Array) -> torch.Tensor:
        tensor = to_tensor(array, self.gru.backend)
        return tensor if tensor.dtype == self.dtype else tensor.to(self.dtype)

    def _packed(self, y: torch.Tensor) -> torch.Tensor:
        if self.batch_sizes is None:
            return y
        lengths = torch.from_numpy(self.lengths)
        data: torch.Tensor = torch._VF._pack_padded_sequence(y, lengths, self.gru.batch_first)[0]
        return data


def _padded(
    data: torch.Tensor, batch_sizes: torch.Tensor, batch_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sequences of a PackedSequence, padded, and their lengths."""
    T = len(batch_sizes)
    found: tuple[torch.Tensor, torch.Tensor] = torch._VF._pad_packed_sequence(
        data, batch_sizes, batch_first, 0.0, T
    )
    return found


# tensors and arrays ------------------------------------------------------------------------------


def plain(name: object) -> str:
    """Return the name of a dtype or a layout without its module."""
    return str(name).rpartition(".")[2]


def is_low(dtype: torch.dtype) -> bool:
    """Whether the arithmetic of a dtype is float32, not its own."""
    return dtype in (torch.float16, torch.bfloat16)


def no_autocast(kind: str) -> AbstractContextManager[object]:
    """Return a context without autocast for our own products, whose dtype is chosen before."""
    available = torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if available else nullcontext()


def to_array(tensor: torch.Tensor, backend: Backend) -> Array:
    """Return a tensor as an array; on NumPy float32 in place of the low precisions."""
    tensor = tensor.detach()
    if not backend.host:
        return tensor
    return (tensor.float() if is_low(tensor.dtype) else tensor).numpy()


def to_tensor(array: Array, backend: Backend) -> torch.Tensor:
    """Return an array as a tensor, over the same memory where the library is NumPy or PyTorch."""
    if torch.is_tensor(array):
        return array
    host = backend.to_numpy(array)
    return torch.from_numpy(host if host.flags.writeable else host.copy())
