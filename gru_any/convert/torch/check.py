"""Whether tensors are what a GRU of ours can read."""

from collections.abc import Sequence

import torch

from ...errors import ShapeError
from ...typing import Arrays
from .call import plain

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check(
    params: Arrays,
    weights: Sequence[torch.Tensor],
    x: torch.Tensor | None = None,
    h0: torch.Tensor | None = None,
) -> None:
    """Raise where these are no dense tensors of one real floating dtype on one device.

    params: arrays of the shapes of the weights, by their names.
    """
    named = dict(zip(params, weights, strict=True))
    first, like = next(iter(params)), weights[0]
    given = {name: t for name, t in (("input", x), ("hx", h0)) if t is not None}
    for name, tensor in (named | given).items():
        check_tensor(name, tensor)
        shape = tuple(params[name].shape) if name in params else tuple(tensor.shape)
        if tuple(tensor.shape) != shape:
            raise ShapeError(f"{name} is {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype != like.dtype:
            raise TypeError(
                f"{name} has dtype {plain(tensor.dtype)}, expected {plain(like.dtype)} as "
                f"{first} has: {name}.to({like.dtype}), or module.to({tensor.dtype})"
            )
        if tensor.device != like.device:
            raise TypeError(
                f"{name} is on {tensor.device}, expected {like.device} as {first} is: "
                f'{name}.to("{like.device}"), or module.to("{tensor.device}")'
            )


def check_tensor(name: str, tensor: object) -> None:
    """Raise where it is no dense tensor of a real floating dtype."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"{name} is a {type(tensor).__name__}, expected a torch.Tensor: torch.as_tensor(...)"
        )
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{name} has dtype {plain(tensor.dtype)}, expected one of "
            f"{', '.join(map(plain, DTYPES))}: {name}.to(torch.float32)"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} is {plain(tensor.layout)}, expected {name}.to_dense()")
    if tensor.is_meta:
        raise TypeError(f"{name} is on meta, where no numbers are")
