"""Checks of a GRU's arguments `activation`, `gate_activation`, `clip`, `merge`, `layer_norm`."""

import math
from typing import TypeAlias

from .. import arguments
from ..activations import DEFINITIONS, USUAL, Activation, Activations
from .merge import MODES

Named: TypeAlias = str | tuple[str | float, ...]  # "relu", ("leaky_relu", 0.1)
# whose alpha must not be negative: the gradient is written from y, so f must be monotone
RISING = "leaky_relu", "thresholded_relu", "elu"
DEFAULTS = {"activation": "tanh", "gate_activation": "sigmoid", "clip": None}
MERGE = {"merge": "concat"}
OUTPUTS = {"outputs": "top"}


def activation(name: str, value: object) -> Named:
    """Return an activation as a setting, which can be written to JSON and compared.

    Raises
    ------
    ValueError
        There is no such function, or it takes other numbers.
    """
    word, *numbers = value if isinstance(value, (tuple, list)) and value else (value,)
    if not isinstance(word, str) or word not in DEFINITIONS:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(DEFINITIONS)}")
    wanted = DEFINITIONS[word].numbers
    if len(numbers) != len(wanted):
        raise ValueError(
            f"{name} is {value!r}, expected {_form(word)}"
            + (": libraries differ in their defaults, so there are none here" if wanted else "")
        )
    if not wanted:
        return word
    found = tuple(
        arguments.number(f"{k} of {name}", v, low=0.0 if word in RISING else -math.inf)
        for k, v in zip(wanted, numbers, strict=True)
    )
    if word == "scaled_tanh" and not found[0]:
        raise ValueError(f"{name} is {value!r}, expected an alpha that is not 0")
    return word, *found


def _form(word: str) -> str:
    """Return how an activation is written with its numbers, for an error."""
    wanted = DEFINITIONS[word].numbers
    return f'("{word}", {", ".join(wanted)})' if wanted else f'"{word}" alone'


def clip(value: object) -> float | None:
    """Return the bound of what goes into the activations, above 0; None for none."""
    return None if value is None else arguments.number("clip", value, above=True)


def layer_norm(value: object, reset_after: bool) -> bool:
    """Return whether products are normalised.

    Raises
    ------
    TypeError, ValueError
        It is no flag, or the reset gate comes before the product.
    """
    found = arguments.flag("layer_norm", value)
    if found and not reset_after:
        raise ValueError(
            "layer_norm=True normalises the three thirds of h U^T together, and with "
            "reset_after=False the candidate has a product of its own: set reset_after=True"
        )
    return found


def merge(value: object, bidirectional: bool) -> str | None:
    """Return how two directions become one; None: not at all.

    Raises
    ------
    ValueError
        It is another word, or there is one direction alone.
    """
    found = None if value is None else arguments.choice("merge", value, MODES)
    if found != "concat" and not bidirectional:
        raise ValueError(f"merge={value!r} joins two directions: set bidirectional=True")
    return found


def activations(gate: Named, candidate: Named, bound: float | None) -> Activations:
    """Return the functions of these settings."""
    if (candidate, gate, bound) == tuple(DEFAULTS.values()):
        return USUAL
    return Activations(_made(gate, bound), _made(candidate, bound))


def _made(named: Named, bound: float | None) -> Activation:
    word, *numbers = (named,) if isinstance(named, str) else named
    return Activation(str(word), tuple(map(float, numbers)), bound)
