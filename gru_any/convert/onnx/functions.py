"""The activations and the clip of the operator GRU: from its attributes to settings, and back."""

from collections.abc import Mapping
from typing import Any

from ...activations import DEFINITIONS
from ...nn import options
from ...nn.gru import GRU
from .check import Node

NAMES = {
    "Sigmoid": "sigmoid", "Tanh": "tanh", "Relu": "relu", "Affine": "affine",
    "LeakyRelu": "leaky_relu", "ThresholdedRelu": "thresholded_relu", "ScaledTanh": "scaled_tanh",
    "HardSigmoid": "hard_sigmoid", "Elu": "elu", "Softsign": "softsign", "Softplus": "softplus",
}  # fmt: skip
KNOWN = {theirs.lower(): ours for theirs, ours in NAMES.items()}
# of those that have any; for Affine, ScaledTanh and ThresholdedRelu onnxruntime takes 0
DEFAULTS = {"leaky_relu": [0.01], "hard_sigmoid": [0.2, 0.5], "elu": [1.0]}
LISTS = {"alpha": "activation_alpha", "beta": "activation_beta"}


def read_functions(node: Node, directions: int) -> dict[str, Any]:
    """Return the settings of a GRU node that are not the usual ones; refuse unknown functions."""
    given = node.attributes
    names = given.get("activations", [])
    if names and len(names) != 2 * directions:
        node.refuse(f"has the activations {names}, expected {2 * directions}")
    lists = {number: list(given.get(name, [])) for number, name in LISTS.items()}
    found = [_read(node, name, lists) for name in names]
    if found[2:] and found[2:] != found[:2]:
        node.refuse(f"has other activations in each direction: {found}")
    settings: dict[str, Any] = {}
    try:
        if found:
            settings["gate_activation"] = options.activation("its activation", found[0])
            settings["activation"] = options.activation("its activation", found[1])
        settings["clip"] = options.clip(given.get("clip") or None)
    except (TypeError, ValueError) as e:
        node.refuse(f"has activations or a clip without counterpart: {e}")
    return {name: v for name, v in settings.items() if v != options.DEFAULTS[name]}


def _read(node: Node, name: str, lists: Mapping[str, list[float]]) -> object:
    """Return one activation, and take its numbers off the lists."""
    ours = KNOWN.get(name.lower())
    if ours is None:
        node.refuse(f"has the activation {name!r}, expected one of {', '.join(NAMES)}")
    wanted, usual = DEFINITIONS[ours].numbers, DEFAULTS.get(ours, [])
    if not usual and not all(lists[number] for number in wanted):
        node.refuse(f"has the activation {name} without {' and '.join(wanted)}: runtimes differ")
    pairs = zip(wanted, usual or wanted, strict=True)
    numbers = [lists[number].pop(0) if lists[number] else default for number, default in pairs]
    return [ours, *numbers]


def write_functions(gru: GRU, directions: int) -> dict[str, Any]:
    """Return the attributes of a GRU node, as far as they are not the usual ones."""
    written: dict[str, Any] = {}
    if {"activation", "gate_activation"} & set(gru.settings):
        names = {ours: theirs for theirs, ours in NAMES.items()}
        for f in gru.functions * directions:
            written.setdefault("activations", []).append(names[f.name])
            for number, value in zip(DEFINITIONS[f.name].numbers, f.numbers, strict=True):
                written.setdefault(LISTS[number], []).append(value)
    return written if gru.clip is None else {**written, "clip": gru.clip}
