"""The vocabulary of the signatures.

Arrays of every library pass through this package, and the array API standard has no class that they
share. So a type checker takes `Array` and the aliases like it for `Any`; they tell a reader what a
thing is. The checker does check the classes and protocols that are written with them.
"""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

Array: TypeAlias = Any  # of any library that follows the Python array API standard
HostArray: TypeAlias = np.ndarray[Any, Any]  # of NumPy
Namespace: TypeAlias = Any  # `xp`, the module with a library's functions
DType: TypeAlias = Any  # of an array of that library, or its name
Device: TypeAlias = Any  # where arrays of that library live; None is its default
Shape: TypeAlias = tuple[int, ...]
Arrays: TypeAlias = Mapping[str, Array]  # parameters, gradients or states by name
Path: TypeAlias = str | PathLike[str]
if TYPE_CHECKING:
    Rng: TypeAlias = np.random.Generator
else:
    Rng = Any  # numpy.random is loaded on first need
# (xp, a, h, U, ...) -> the next state, and its residuals
Step: TypeAlias = Callable[..., tuple[Array, tuple[Array, ...]]]
# (xp, h, saved, ...) -> gradients to U and to the biases of the step
WeightGradients: TypeAlias = Callable[..., tuple[Array, ...]]
# (y, target, mask=None) -> the value, dL/dy
Loss: TypeAlias = Callable[..., tuple[Array, Array]]
Saved: TypeAlias = Sequence[Array]  # the residuals of a step, each (B, H)
Gradients: TypeAlias = dict[str, Array]  # by the name of the parameter
# grads, dx, dh0, and dstart where a start was given
Derivatives: TypeAlias = tuple[Gradients, *tuple[Array, ...]]
Lengths: TypeAlias = Sequence[int] | Array  # B integers
Pytree: TypeAlias = Any  # arrays and Nones in nested tuples, lists and dicts
