"""The activations and merge modes of Keras: from their names to settings, and back."""

from typing import Any, TypeAlias

from ...nn.gru import GRU
from ...nn.options import DEFAULTS, Named
from ..table import EQUATIONS
from .archive import Config

Options: TypeAlias = tuple[
    tuple[str, Named | float | None], ...
]  # settings that are not the usual ones
NAMES: dict[str, Named] = {
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "relu": "relu",
    "softsign": "softsign",
    "softplus": "softplus",
    "linear": ("affine", 1.0, 0.0),
    "elu": ("elu", 1.0),
    "leaky_relu": ("leaky_relu", 0.2),
    "hard_sigmoid": ("hard_sigmoid", 1 / 6, 0.5),
}
HARD_SIGMOID: Named = ("hard_sigmoid", 0.2, 0.5)  # of Keras 1 and 2
THEIRS = {"activation": ("tanh", "n"), "recurrent_activation": ("sigmoid", "z")}
MERGE_MODES = {"concat": "concat", "sum": "sum", "ave": "mean", "mul": "mul", None: None}
OURS = {"activation": "activation", "recurrent_activation": "gate_activation"}


def read_functions(config: Config, version: int) -> Options:
    """Return the settings that a cell's activations are; version: of Keras, 0 where unknown.

    Raises
    ------
    ValueError
        One of them has no counterpart, or is not the same in all versions.
    """
    found: dict[str, Named] = {}
    for name, (usual, letter) in THEIRS.items():
        given = config.get(name, usual)
        given = "linear" if given is None else given
        if not isinstance(given, str) or given not in NAMES:
            equation = EQUATIONS[config.get("reset_after") is not False if letter == "n" else "z"]
            raise ValueError(
                f"{name} {given!r} in place of the {usual} in {equation} has no counterpart here, "
                f"only {', '.join(NAMES)}"
            )
        if given == "hard_sigmoid" and not version:
            raise ValueError(
                f"{name} 'hard_sigmoid' is 0.2 v + 0.5 in Keras 2 and v/6 + 0.5 in Keras 3, and "
                "the file does not say which version wrote it: save the whole model"
            )
        old = given == "hard_sigmoid" and version < 3
        found[OURS[name]] = HARD_SIGMOID if old else NAMES[given]
    return tuple((name, value) for name, value in found.items() if value != DEFAULTS[name])


def write_functions(gru: GRU) -> dict[str, Any]:
    """Return the arguments of Keras' GRU for the activations, where they are not the usual ones.

    Raises
    ------
    ValueError
        Keras 3 has no such function by name.
    """
    names = {ours: theirs for theirs, ours in NAMES.items()}
    written = {}
    for theirs, ours in OURS.items():
        if ours not in gru.settings:
            continue
        if gru.settings[ours] not in names:
            raise ValueError(
                f"{ours}={gru.settings[ours]!r} is no function that Keras has by name, expected "
                f"one of {', '.join(map(repr, names))}"
            )
        written[theirs] = names[gru.settings[ours]]
    return written
