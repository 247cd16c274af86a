"""PyTorch's GRUs inside a model, replaced in place."""

from typing import NamedTuple

import torch

from . import module as ours
from .check import DTYPES


class Accelerated(NamedTuple):
    """What `accelerate` has done, by the names of `model.named_modules()`."""

    replaced: list[str]
    left: dict[str, str]  # and why

    def __str__(self) -> str:
        lines = [f"{name or 'the model'}: replaced" for name in self.replaced]
        lines += [f"{name or 'the model'}: left alone, {why}" for name, why in self.left.items()]
        return "\n".join(lines or ["there is no GRU in the model"])


def accelerate(model: torch.nn.Module) -> Accelerated:
    """Replace every `torch.nn.GRU` in a model by `gru_any.convert.torch.GRU`, in place.

    Each module stays the same object, and changes its class. So parameters, optimisers, hooks,
    parametrizations and other references to it stay as they are, and so does its state_dict.
    `restore` undoes it.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    Accelerated : `replaced`, the names of these modules, and `left`, the names of other modules
        that are GRUs or GRUCells, and why each was left alone.

    Examples
    --------
    >>> import torch
    >>> from gru_any.convert.torch import accelerate
    >>> print(accelerate(torch.nn.Sequential(torch.nn.GRU(3, 4), torch.nn.Tanh())))
    0: replaced
    """
    _check(model)
    found = Accelerated([], {})
    for name, module in model.named_modules():
        if (why := _why_not(module)) is None:
            ours.become(module, ours.GRU)
            found.replaced.append(name)
        elif why:
            found.left[name] = why
    return found


def restore(model: torch.nn.Module) -> list[str]:
    """Make PyTorch's modules again of those of gru_any in a model, in place; return their names.

    Raises
    ------
    TypeError
        There is no torch.nn.Module, or one of the GRUs has equations that PyTorch does not have.
    """
    _check(model)
    mine = {n: m for n, m in model.named_modules() if isinstance(m, ours.GRU | ours.GRUCell)}
    for name, module in mine.items():
        if not (module._of_torch if isinstance(module, ours.GRU) else module.reset_after):
            raise TypeError(f"{name or 'the model'} is {module}, which PyTorch does not have")
    for module in mine.values():
        is_gru = isinstance(module, ours.GRU)
        ours.become(module, torch.nn.GRU if is_gru else torch.nn.GRUCell)
    return list(mine)


def _check(model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")


def _why_not(module: torch.nn.Module) -> str | None:
    """Return why a module is not replaced: None if it is, "" if it is no GRU at all."""
    kind = torch.nn.utils.parametrize.type_before_parametrizations(module)
    if isinstance(module, torch.jit.ScriptModule):
        scripted = getattr(module, "original_name", "") in ("GRU", "GRUCell")
        return "it is scripted, and TorchScript runs code of its own" if scripted else ""
    if isinstance(module, ours.GRU | ours.GRUCell):
        return "it is of gru_any already"
    if isinstance(module, torch.nn.GRUCell):
        return "PyTorch is as fast in a single step"
    if not isinstance(module, torch.nn.GRU):
        of_others = kind.__name__ in ("GRU", "GRUCell")
        return f"it is a {kind.__module__}.{kind.__name__}, not a torch.nn.GRU" if of_others else ""
    if kind is not torch.nn.GRU:
        return (
            f"{kind.__name__} is a class of its own: derive it from gru_any.convert.torch.GRU in "
            "place of torch.nn.GRU"
        )
    if "forward" in vars(module):
        return "its forward was replaced"
    if module.proj_size:
        return "it has a projection, which gru_any lacks"
    return _why_not_weights(module)


def _why_not_weights(module: torch.nn.Module) -> str | None:
    """Return why the weights of a GRU keep it from being replaced, or None."""
    for weight in module.parameters():
        if weight.device.type not in ("cpu", "meta"):
            return f"it is on {weight.device}, where PyTorch's own operator serves it"
        if weight.dtype not in DTYPES or weight.layout != torch.strided:
            return f"its weights are {weight.dtype}, {weight.layout}"
    return None
