"""A description of a model: its equations, its parameters, and how a call runs.

The equations are read from the source of the step functions that run, so the two cannot differ.
"""

import ast
import inspect
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import NamedTuple, SupportsIndex, TypeAlias

from .. import equations
from ..backend import bridged, path, recorded
from ..errors import check_shape
from ..nn.cell import GRUCell
from ..nn.chain import Chain
from ..nn.gru import GRU
from ..nn.layers import Embedding, Last, Linear
from ..nn.params import Layer
from ..typing import Shape
from .formulas import called, formulas, latex, normalised

Sizes: TypeAlias = tuple[int | str, ...]  # a shape; letters stand for sizes that are left open
MERGED = {"mul": "product"}  # in words, where that is no word
Formulas: TypeAlias = list[tuple[str, Sequence[ast.AST]]]  # headings, each with its lines


def explain(model: Layer | Chain, shape: Shape | None = None, format: str = "text") -> str:
    """Describe what a model computes, with its sizes filled in.

    Parameters
    ----------
    model : GRU, GRUCell, Linear, Embedding, Dropout, Last or Chain
    shape : tuple of int or None
        The shape of x, from which those of the results follow; None leaves sizes open, as letters.
    format : "text" or "latex"
        LaTeX is a fragment for a document with the package amsmath.

    Returns
    -------
    str
        For each layer its shapes and parameters; for a GRU also its equations and their gradient,
        the order of its gates, the meaning of its biases, which code runs a call, and why no faster
        code does.

    Raises
    ------
    ValueError
        The format is another, or the model does not take this shape.
    TypeError
        The model is something else.

    Notes
    -----
    The lines are those of `gru_any.equations`, which also names their sources.

    Examples
    --------
    >>> from gru_any import GRU, explain
    >>> text = explain(GRU(8, 16), shape=(5, 2, 8))
    >>> for line in text.splitlines()[1:3]:
    ...     print(line)
    x (5, 2, 8) -> y (5, 2, 16), h_n (1, 2, 16)
    Gates: the thirds of W, U, a and the biases are r, z, n in this order, each 16 wide.
    """
    if format not in ("text", "latex"):
        raise ValueError(f'format is {format!r}, expected "text" or "latex"')
    if not isinstance(model, (Layer, Chain)):
        raise TypeError(f"explain takes a layer or a Chain, not a {type(model).__name__}")
    sizes = isinstance(shape, (tuple, list)) and all(isinstance(n, SupportsIndex) for n in shape)
    if shape is not None and not sizes:
        kind = type(shape).__name__
        raise TypeError(f"shape is a {kind}, expected integers such as x.shape, (T, B, I)")
    write = _text if format == "text" else _latex
    now: Sizes | None = None if shape is None else tuple(shape)  # the shape between two layers
    parts, batch_first = [], False
    for layer in model.layers if isinstance(model, Chain) else (model,):
        batch_first = getattr(layer, "batch_first", batch_first)
        now, facts = _facts(layer, now, batch_first)
        parts.append(write(facts))
    for alias, name in model.tied.items() if isinstance(model, Chain) else ():
        note = f"{alias} is tied to {name}: they are one parameter."
        parts.append(note if format == "text" else _escaped(note))
    return "\n\n".join(parts) + "\n"


class _Facts(NamedTuple):
    """The description of one layer, before it is written as text or LaTeX."""

    title: str
    notes: list[str]
    formulas: Formulas
    parameters: dict[str, Shape]


def _facts(layer: Layer, shape: Sizes | None, batch_first: bool) -> tuple[Sizes, _Facts]:
    """Return the shape of the layer's results, and its description."""
    after, results = _shapes(layer, shape, batch_first)
    lines: Formulas = []
    if isinstance(layer, (GRU, GRUCell)):
        notes, lines = _recurrent(layer, shape), _lines(layer)
    else:
        notes = _about(layer)
    parameters = {name: tuple(array.shape) for name, array in layer.params.items()}
    return after, _Facts(repr(layer), [results, *notes], lines, parameters)


def _about(layer: Layer) -> list[str]:
    return [(inspect.getdoc(layer) or "").partition("\n\n")[0].replace("\n", " ")]


# shapes ------------------------------------------------------------------------------------------


def _shapes(layer: Layer, shape: Sizes | None, batch_first: bool) -> tuple[Sizes, str]:
    """Return the shape of the layer's results, and a line that states it."""
    if isinstance(layer, GRU):
        letters = "(B, T, I)" if batch_first else "(T, B, I)"
        letters, width = "(T, I)" if shape and len(shape) == 2 else letters, layer.input_size
    elif isinstance(layer, GRUCell):
        letters, width = "(I,)" if shape and len(shape) == 1 else "(B, I)", layer.input_size
    elif isinstance(layer, Linear):
        letters, width = "(..., I)", layer.in_features
    elif isinstance(layer, Last):
        letters, width = "(T, B, D*H)", 0
    else:
        letters, width = "(...)" if shape else "(T, B)", 0
    if shape is None:
        shape = tuple(width if n == "I" else n for n in letters.strip("(,)").split(", "))
    if width:
        check_shape("shape", SimpleNamespace(shape=shape), letters, {"I": width})
    return _results(layer, shape, batch_first)


def _results(layer: Layer, shape: Sizes, batch_first: bool) -> tuple[Sizes, str]:
    rows, new = shape[:-1], shape
    if isinstance(layer, GRU):
        H, D = layer.hidden_size, len(layer.suffixes)
        y, batch = (
            (*rows, layer.output_size),
            rows[:0] if len(rows) == 1 else (rows[0 if batch_first else 1],),
        )
        states = (layer.num_layers * D, *batch, H)
        return y, f"x {_shown(shape)} -> y {_shown(y)}, h_n {_shown(states)}"
    if isinstance(layer, Embedding):
        new = (*shape, layer.params["weight"].shape[1])
    elif isinstance(layer, Linear):
        new = (*rows, layer.out_features)
    elif isinstance(layer, Last):
        new = (*(rows[:1] if batch_first and len(rows) == 2 else rows[1:]), shape[-1])
    elif isinstance(layer, GRUCell):
        new = (*rows, layer.hidden_size)
    return new, f"x {_shown(shape)} -> {_shown(new)}"


def _shown(shape: Sizes) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


# a GRU -------------------------------------------------------------------------------------------


def _recurrent(layer: GRU | GRUCell, shape: Sizes | None) -> list[str]:
    """Describe gates, biases, layers and directions, how a call runs, and the functions called."""
    H, L = layer.hidden_size, getattr(layer, "num_layers", 1)
    way, why = path(layer.backend, H, layer.dtype, _normalised(layer))
    step = equations.variant(layer.reset_after, layer.functions).step
    notes = [
        f"Gates: the thirds of W, U, a and the biases are r, z, n in this order, each {H} wide.",
        _biases(layer.bias, layer.reset_after),
        f"A call runs {way}: {way.words}. Why not faster: {why}.",
        *filter(None, [bridged(layer.backend, layer.dtype)]),
        *(_recorded(layer, shape) if isinstance(layer, GRU) else []),
        *_called(step),
    ]
    if isinstance(layer, GRU):
        notes[2:2] = _regularisation(layer)
    if L > 1:
        every = getattr(layer, "outputs", "top") == "all"
        held = " y is a tuple of the outputs of all." if every else ""
        notes.insert(2, f"{L} layers (l0 to l{L - 1}): each reads the y of the one before.{held}")
    suffixes = getattr(layer, "suffixes", [""])
    if "_reverse" in suffixes:
        both = f"; y holds {_merged(layer)}" if len(suffixes) == 2 else ""
        notes.insert(2, f"_reverse reads from each sequence's end{both}.")
    return notes


def _normalised(layer: GRU | GRUCell) -> bool:
    return isinstance(layer, GRU) and layer.layer_norm


def _merged(layer: GRU | GRUCell) -> str:
    mode = getattr(layer, "merge", "concat")
    words = {"concat": "both directions side by side", None: "both directions as a pair of arrays"}
    return words.get(mode) or f"the {MERGED.get(mode, mode)} of both directions"


def _regularisation(layer: GRU) -> list[str]:
    """Describe layer normalisation, what acts in training, and what zoneout does to inference."""
    q, k, w = layer.recurrent_dropout, layer.zoneout, layer.weight_dropout
    notes = []
    if layer.layer_norm:
        notes.append(
            "Layer normalisation: N(v) = e * s, where e = v - mean(v) and "
            "s = 1 / sqrt(mean(e * e) + 1e-5), over the 3H columns of each row. The gradient "
            "to v is dN(dn) = s * (dn - mean(dn) - e * s * s * mean(dn * e))."
        )
    if w:
        notes.append(f"Weight dropout: in vjp with rng, a share {w:g} of U is 0 in each call.")
    if q:
        notes.append(
            f"Recurrent dropout: in vjp with rng, U stands for U diag(d), where d is 0 with "
            f"probability {q:g}, else 1 / (1 - {q:g}); one d a row and call."
        )
    if k:
        notes.append(
            f"Zoneout: the new state is {k:g} * h + (1 - {k:g}) * h', h' as below; in vjp with rng "
            f"each unit keeps h with probability {k:g}."
        )
    return notes


def _recorded(layer: GRU, shape: Sizes | None) -> list[str]:
    """Say whether whole calls are captured, on a backend that captures."""
    T = None if shape is None else shape[1 if layer.batch_first and len(shape) == 3 else 0]
    many = layer.num_layers * len(layer.suffixes)
    text = recorded(layer.backend, T * many if isinstance(T, int) else None)
    return [text] if text else []


def _biases(bias: bool, after: bool) -> str:
    if not bias:
        return "Biases: none" + (", so c = 0." if after else ".")
    if not after:
        return "Biases: b is bias_ih. There is no bias_hh: it would only add to b."
    return "Biases: b is bias_ih plus the r and z thirds of bias_hh; c is the n third of bias_hh."


def _called(step: Callable[..., object]) -> list[str]:
    try:
        return [f"{name}(v): {text}" for name, text in called(step).items()]
    except OSError:  # installed as byte code alone
        return ["The equations are not shown: the source of gru_any is not installed here."]


def _lines(layer: GRU | GRUCell) -> Formulas:
    try:
        return _equations(layer)
    except OSError:  # reported by `_called`
        return []


def _equations(layer: GRU | GRUCell) -> Formulas:
    step, backward, *_ = equations.variant(layer.reset_after, layer.functions)
    H, order = layer.hidden_size, "after" if layer.reset_after else "before"
    parts: tuple[Sequence[ast.AST], ...] = (
        ast.parse("a = x @ W.T + b" if layer.bias else "a = x @ W.T").body,
        formulas(step, "h'", H=H),
        formulas(backward, "dh", H=H),
    )
    product, forward, gradient = normalised(*parts) if _normalised(layer) else parts
    return [
        ("For all steps at once, W being weight_ih:", product),
        (
            f"Each step, reset {order} the product, U being weight_hh, * element by element:",
            forward,
        ),
        ("Its gradient, g being dL/dh', dv being dL/dv:", gradient),
    ]


# two ways to write it down -----------------------------------------------------------------------


def _text(facts: _Facts) -> str:
    lines = [facts.title, *facts.notes]
    for heading, formulas_ in facts.formulas:
        lines += [heading, *(f"    {ast.unparse(line)}" for line in formulas_)]
    width = max(map(len, facts.parameters), default=0)
    for name, shape in facts.parameters.items():
        lines.append(f"{name:{width}}  {_shown(shape):>12}  {math.prod(shape):>10,}")
    return "\n".join(lines)


def _latex(facts: _Facts) -> str:
    lines = [rf"\paragraph{{\texttt{{{_escaped(facts.title)}}}}}"]
    lines += [_escaped(note) + r"\\" for note in facts.notes]
    for heading, formulas_ in facts.formulas:
        rows = " \\\\\n".join(map(latex, formulas_))
        lines += [_escaped(heading), rf"\begin{{align*}}{chr(10)}{rows}{chr(10)}\end{{align*}}"]
    if facts.parameters:
        lines.append(r"\begin{tabular}{lrr}")
        for name, shape in facts.parameters.items():
            lines.append(
                rf"\texttt{{{_escaped(name)}}} & ${_shown(shape)}$ & {math.prod(shape)} \\"
            )
        lines.append(r"\end{tabular}")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Escape the characters that are special in LaTeX."""
    special = {c: f"\\{c}" for c in "#$%&_{}"} | {"^": r"\^{}"}
    return "".join(special.get(c, c) for c in text).replace("->", r"$\to$")
