"""`GRU` and `GRUCell`: modules that stand in for `torch.nn.GRU` and `torch.nn.GRUCell`."""

from collections.abc import Callable
from copy import copy
from operator import is_
from typing import Any, TypeAlias

import torch
from torch.nn.utils.rnn import PackedSequence

from ... import arguments
from ...errors import check_shape
from ...nn import cell, gru
from ...typing import Array, Arrays, Lengths
from .call import is_of_torch, over, template
from .check import DTYPES, check, check_tensor
from .evaluate import evaluate

FEW = 4  # below so many steps PyTorch's own operator is about as fast
_forward_of_torch: Callable[..., Any] = torch.nn.GRU.forward
_operator: Callable[..., Any] = torch._VF.gru  # which is what takes the time in it
_transformed: Callable[[], bool] = torch._C._are_functorch_transforms_active
Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]


class GRU(torch.nn.RNNBase):
    """A GRU that is made, called, saved, loaded and moved like `torch.nn.GRU`.

    It has the same parameters, drawn from the same random numbers, under the same names. On the
    CPU it computes with this library, forward and backward; on other devices, and for up to three
    steps, with PyTorch's own operator. Its base is `torch.nn.RNNBase`: it is no instance of
    `torch.nn.GRU`, at which `torch.compile` would break the graph.

    Parameters
    ----------
    input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype
        As of `torch.nn.GRU`.
    reset_after : bool
        False is the other variant, with the reset gate before the matrix product, which PyTorch
        does not have. It has no `bias_hh`.
    **options
        Other arguments of `gru_any.GRU`, such as `reverse` or `recompute`.

    Notes
    -----
    Derivatives beyond the first, and those of forward mode, are PyTorch's where it has the same
    equations; with packed sequences, `lengths`, `resets`, dropout or other equations they raise.
    `torch.jit.script` takes PyTorch's GRU in place of this one.

    Examples
    --------
    >>> import torch
    >>> from gru_any.convert.torch import GRU
    >>> gru = GRU(3, 4, num_layers=2)
    >>> y, h_n = gru(torch.ones(5, 2, 3))
    >>> y.shape, h_n.shape
    (torch.Size([5, 2, 4]), torch.Size([2, 2, 4]))
    """

    # as torch.nn.GRU is; what `accelerate` replaces has no attributes of its own
    reset_after = True
    _others = "'reset_after': True"  # the settings that torch.nn.GRU does not have
    _of_torch = True  # whether PyTorch has the same equations
    _drops = False  # whether something is dropped in training beside `dropout`

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        **options: Any,
    ) -> None:
        if "proj_size" in options:
            raise ValueError("proj_size is of torch.nn.LSTM alone: put a Linear after the GRU")
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        super().__init__("GRU", *sizes, device=device, dtype=dtype)
        if reset_after is True and not options:
            return
        self.reset_after = reset_after
        self._others = repr({"reset_after": reset_after, **options}).strip("{}")
        made = template(self._settings())
        if made.merge != "concat":
            raise ValueError(f"merge={made.merge!r} is none of a module: merge its y yourself")
        if made.outputs != "top":
            raise ValueError('outputs="all" is none of a module: make one of each layer')
        self._of_torch = is_of_torch(made)
        self._drops = max(made.weight_dropout, made.recurrent_dropout, made.zoneout) > 0
        if list(made.params) != self._flat_weights_names:
            self._rename(made.params, next(self.parameters()))

    def _rename(self, params: Arrays, like: torch.Tensor) -> None:
        """Have these parameters in place of those of torch.nn.GRU."""
        for name in self._flat_weights_names:
            delattr(self, name)
        self._flat_weights_names = []  # which assignments to parameters look at
        for name, array in params.items():
            setattr(self, name, torch.nn.Parameter(like.new_empty(array.shape)))
        self._flat_weights_names = list(params)
        ends = dict.fromkeys(name.partition("_l")[2] for name in params)
        self._all_weights = [[n for n in params if n.partition("_l")[2] == end] for end in ends]
        self._init_flat_weights()
        self.reset_parameters()

    def _settings(self) -> str:
        """Return the settings of the GRU of ours, as the text of a dict."""
        return (
            f"{{'input_size': {self.input_size}, 'hidden_size': {self.hidden_size}, "
            f"'num_layers': {self.num_layers}, 'bias': {self.bias}, "
            f"'batch_first': {self.batch_first}, 'bidirectional': {self.bidirectional}, "
            f"{self._others}}}"
        )

    def forward(
        self,
        input: torch.Tensor | PackedSequence,
        hx: torch.Tensor | None = None,
        lengths: Lengths | None = None,
        resets: Array | None = None,
    ) -> tuple[torch.Tensor | PackedSequence, torch.Tensor]:
        """Return output and h_n, as `torch.nn.GRU` does.

        Parameters
        ----------
        input : tensor (T, B, I), (B, T, I) with batch_first, or (T, I); or a PackedSequence
        hx : tensor (L*D, B, H), or (L*D, H) without a batch; zeros if None
        lengths : B integers, as of `gru_any.GRU`; another way to say what a PackedSequence does
        resets : (T, B) of bool, (B, T) with batch_first, or (T,), as of `gru_any.GRU`
            Where it is true, an episode begins: the row's state is set to 0 before the step.
        """
        if isinstance(input, PackedSequence):
            if resets is not None:
                raise ValueError(
                    "resets were given beside a PackedSequence, whose steps have no (T, B): give "
                    "the padded sequences with lengths"
                )
            return self._run_packed(input, hx, lengths)
        few = self._run_few(input, hx) if lengths is resets is None else None
        if few is not None:
            return few
        check_tensor("input", input)
        if input.dim() not in (2, 3):
            raise ValueError(f"GRU: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        first = self.batch_first and batched
        if lengths is resets is None and self._is_for_torch(input, input.shape[first]):
            return _forward_of_torch(self, input, hx)  # type: ignore[no-any-return]
        if hx is not None and hx.dim() != input.dim():
            shapes = "(L*D, B, H) of input (T, B, I)" if batched else "(L*D, H) of input (T, I)"
            raise RuntimeError(f"hx is {tuple(hx.shape)}, expected {shapes}")
        if batched:
            return self._run(input, hx, _as_tensor(lengths), resets=_as_tensor(resets))
        if lengths is not None:
            raise ValueError("lengths were given, but input (T, I) has no batch; cut it instead")
        axis = 0 if self.batch_first else 1
        at = _as_tensor(resets)
        if at is not None:
            check_shape("resets", at, "(T,)", {"T": input.shape[0]})
            at = at.unsqueeze(axis)
        hx = None if hx is None else hx.unsqueeze(1)
        y, h_n = self._run(input.unsqueeze(axis), hx, resets=at)
        return y.squeeze(axis), h_n.squeeze(1)

    def _run_packed(
        self, input: PackedSequence, hx: torch.Tensor | None, lengths: Lengths | None
    ) -> tuple[PackedSequence, torch.Tensor]:
        if lengths is not None:
            raise ValueError("lengths were given beside a PackedSequence, which has its own")
        data, batch_sizes, sort, unsort = input
        if self._is_for_torch(data, len(batch_sizes)):
            return _forward_of_torch(self, input, hx)  # type: ignore[no-any-return]
        if hx is not None:
            hx = self.permute_hidden(hx, sort)
        y, h_n = self._run(data, hx, batch_sizes=batch_sizes)
        return PackedSequence(y, batch_sizes, sort, unsort), self.permute_hidden(h_n, unsort)

    def _run_few(self, x: torch.Tensor, hx: torch.Tensor | None) -> Pair | None:
        """Return the results of PyTorch's operator; None: the call is another kind, or is wrong.

        The forward call of torch.nn.GRU looks at all parameters and sizes in more time.
        """
        weights: list[Any] = self._flat_weights
        if not (self._of_torch and type(x) is torch.Tensor and x.dim() == 3):
            return None
        B, T, I = x.shape if self.batch_first else (x.shape[1], x.shape[0], x.shape[2])
        if T >= FEW or torch.compiler.is_compiling() or _transformed():
            return None
        if self.input_size != I or x.dtype not in DTYPES or x.dtype != weights[0].dtype:
            return None
        if x.layout is not torch.strided or x.is_meta or torch._C._get_tracing_state() is not None:
            return None
        if not all(map(is_, weights, map(self._parameters.get, self._flat_weights_names))):
            return None
        shape = self.num_layers * (1 + self.bidirectional), B, self.hidden_size
        if hx is None:
            hx = x.new_zeros(shape)
        elif type(hx) is not torch.Tensor or hx.shape != shape:
            return None
        kind = self.bias, self.num_layers, self.dropout, self.training, self.bidirectional
        return _operator(x, hx, weights, *kind, self.batch_first)  # type: ignore[no-any-return]

    def _is_for_torch(self, x: torch.Tensor, T: int) -> bool:
        """Whether PyTorch's own operator serves a call: it can, and is as fast or does more."""
        return self._of_torch and (
            (T < FEW and not torch.compiler.is_compiling() and not _transformed())
            or x.device.type != "cpu"
            or torch.autograd.forward_ad._current_level >= 0
            or torch._C._get_tracing_state() is not None
        )

    def _run(
        self,
        x: torch.Tensor,
        hx: torch.Tensor | None,
        lengths: torch.Tensor | None = None,
        batch_sizes: torch.Tensor | None = None,
        resets: torch.Tensor | None = None,
    ) -> Pair:
        if not torch.compiler.is_compiling():
            if self._flat_weights[0] is not self._parameters.get(self._flat_weights_names[0]):
                self._update_flat_weights()
            self.check_input(x, batch_sizes)
        if hx is not None:
            self.check_hidden_size(hx, self.get_expected_hidden_size(x, batch_sizes))
        dropout = self.dropout if self.training and self.num_layers > 1 else 0.0
        settings, names = self._settings(), self._flat_weights_names
        drops = self._drops and self.training
        return evaluate(self, settings, names, x, hx, lengths, batch_sizes, dropout, resets, drops)

    def gru(self) -> gru.GRU:
        """Return a gru_any.GRU over the parameters as they are now; memory is shared if it can."""
        made = template(self._settings(), self.dropout if self.num_layers > 1 else 0.0)
        weights = [getattr(self, name) for name in self._flat_weights_names]
        check(made.params, weights)
        return over(made, weights)

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets."""
        return super().extra_repr() + ("" if self._others == GRU._others else f", {self._others}")

    def _get_name(self) -> str:
        return f"gru_any.{type(self).__name__}"

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return scriptable(self, self._of_torch, torch.nn.GRU)


class GRUCell(torch.nn.GRUCell):
    """A cell that is made, called, saved, loaded and moved like `torch.nn.GRUCell`.

    With reset_after it is that cell: PyTorch's operator is as fast for one step.

    Parameters
    ----------
    input_size, hidden_size, bias, device, dtype
        As of `torch.nn.GRUCell`.
    reset_after : bool
        False is the other variant, which PyTorch does not have. It has no `bias_hh`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.reset_after = arguments.flag("reset_after", reset_after)
        if bias and not reset_after:
            del self.bias_hh
            self.register_parameter("bias_hh", None)

    def forward(self, input: torch.Tensor, hx: torch.Tensor | None = None) -> torch.Tensor:
        """Return the next state of input (B, I) or (I,), and hx (B, H) or (H,), zeros if None."""
        if self.reset_after:
            return super().forward(input, hx)
        check_tensor("input", input)
        one = input.dim() == 1
        sizes = {"I": self.input_size, "H": self.hidden_size}
        check_shape("input", input, "(I,)" if one else "(B, I)", sizes)
        if hx is not None:
            check_tensor("hx", hx)
            sizes |= {} if one else {"B": input.shape[0]}
            check_shape("hx", hx, "(H,)" if one else "(B, H)", sizes)
        x = input[None, None] if one else input[None]
        h = hx if hx is None else hx[None, None] if one else hx[None]
        _, h_n = evaluate(self, self._settings(), self._names(), x, h)
        return h_n[0, 0] if one else h_n[0]

    def _settings(self) -> str:
        """Return the settings of a gru_any.GRU that takes the same step."""
        return (
            f"{{'input_size': {self.input_size}, 'hidden_size': {self.hidden_size}, "
            f"'num_layers': 1, 'bias': {self.bias}, 'reset_after': {self.reset_after}}}"
        )

    def _names(self) -> list[str]:
        of_bias = ["bias_ih", "bias_hh"][: 1 + self.reset_after] if self.bias else []
        return ["weight_ih", "weight_hh", *of_bias]

    def cell(self) -> cell.GRUCell:
        """Return a gru_any.GRUCell over the parameters as they are now."""
        sizes, after = (self.input_size, self.hidden_size), self.reset_after
        made = cell.GRUCell(*sizes, bias=self.bias, reset_after=after, backend="numpy", seed=0)
        weights = [getattr(self, name) for name in self._names()]
        check(made.params, weights)
        return over(made, weights)

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets."""
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")

    def _get_name(self) -> str:
        return f"gru_any.{type(self).__name__}"

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return scriptable(self, self.reset_after, torch.nn.GRUCell)


def become(module: torch.nn.Module, kind: type[torch.nn.Module]) -> None:
    """Give a module another class, with the properties of its parametrizations."""
    own = type(module)
    if torch.nn.utils.parametrize.is_parametrized(module):
        kept = {k: v for k, v in vars(own).items() if k not in ("__dict__", "__weakref__")}
        kind = type(own.__name__, (kind,), kept)
    module.__class__ = kind


def scriptable(
    module: torch.nn.Module, of_torch: bool, kind: type[torch.nn.Module]
) -> torch.nn.Module:
    """Return PyTorch's module over the same parameters, for TorchScript."""
    if not of_torch:
        raise RuntimeError(
            f"TorchScript has no {kind.__name__} with these equations ({module.extra_repr()}): use "
            "torch.export or torch.compile, or gru_any.convert.onnx.save(path, module.gru())"
        )
    twin = copy(module)
    become(twin, kind)
    return twin


def _as_tensor(values: Lengths | Array | None) -> torch.Tensor | None:
    return None if values is None else torch.as_tensor(values)
