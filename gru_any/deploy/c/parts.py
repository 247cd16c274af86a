"""From a model to the parts of a C program: each with its weights as they lie in memory."""

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ...backend import to_numpy
from ...backend.rounding import restore, round_weights
from ...codegen.c_source import IN_PLACE, CSource
from ...codegen.schedule import forward_schedule
from ...nn.chain import Chain
from ...nn.gru import GRU
from ...nn.layers import Dropout, Embedding, Linear
from ...nn.params import Layer
from ...nn.weights import parameter_names, weights
from ...typing import HostArray

WEIGHTS = ("float32", "int8")
LIMIT = 2**31 - 1  # bytes: no object of a 32-bit machine is larger
# settings of a GRU that C follows, or that change nothing in a step
FOLLOWED = {
    "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "reset_after",
    "precision", "recompute", "activation", "gate_activation", "clip", "weight_dropout",
    "recurrent_dropout", "zoneout",
}  # fmt: skip


class Field(NamedTuple):
    """A member of the struct of weights."""

    name: str
    array: HostArray  # float32 or int8, as it lies in memory


class Part(NamedTuple):
    """A layer: `Embedding`, `Linear`, or one layer of a GRU.

    run: in float64, of x and h -> y, which is the next h of a GRU; source: of a GRU's step.
    """

    name: str
    inputs: int
    outputs: int
    fields: list[Field]
    run: Callable[[HostArray, HostArray], HostArray]
    bias: bool = False
    source: CSource | None = None

    @property
    def embeds(self) -> bool:
        """Whether it takes an index."""
        return self.name.startswith("embedding")


class Parts(NamedTuple):
    """A model as C sees it."""

    about: str  # the layers, for people
    weights: str
    batch_first: bool
    chain: bool
    states: list[list[int]]  # (L, H) of each GRU
    parts: list[Part]

    @property
    def fields(self) -> list[Field]:
        """All weights, those in float32 first, so that no member of the struct needs padding."""
        found = [field for part in self.parts for field in part.fields]
        return sorted(found, key=lambda field: field.array.dtype == np.int8)

    @property
    def embeds(self) -> bool:
        """Whether a step takes an index."""
        return self.parts[0].embeds

    @property
    def inputs(self) -> int:
        """The length of x, or the number of indices."""
        return self.parts[0].inputs

    @property
    def outputs(self) -> int:
        """The length of y."""
        return self.parts[-1].outputs

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any weight, size or equation."""
        found = hashlib.sha256(self.weights.encode())
        for part in self.parts:
            stages = part.source.schedule.stages if part.source else ""
            found.update(f"{part.name} {part.inputs} {part.outputs} {stages}".encode())
        for name, array in self.fields:
            found.update(f"{name} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return found.hexdigest()[:16]

    def example(self, steps: int) -> tuple[HostArray, HostArray]:
        """Return inputs of so many steps, drawn at random, and their outputs in float64."""
        rng = np.random.default_rng(0)
        shape = steps, *(() if self.embeds else (self.inputs,))
        x = rng.standard_normal(shape).astype("float32")
        if self.embeds:
            x = rng.integers(0, self.inputs, shape).astype("int32")
        states = {part.name: np.zeros(part.outputs) for part in self.parts}
        rows = []
        for v in x:
            for part in self.parts:
                v = states[part.name] = part.run(v, states[part.name])
            rows.append(v)
        return x, np.stack(rows)


def parts_of(model: GRU | Chain, kind: str) -> Parts:
    """Return the parts of a model with weights of this kind, "float32" or "int8".

    Raises
    ------
    ValueError, TypeError
        The model cannot be written as C; the text says why and what to do.
    """
    if kind not in WEIGHTS:
        raise ValueError(f"weights is {kind!r}, expected one of {', '.join(WEIGHTS)}")
    if not isinstance(model, GRU | Chain):
        raise TypeError(f"the model is a {type(model).__name__}, expected a GRU or a Chain")
    if isinstance(model, Chain):
        model.params.refuse_untied()
    layers = model.layers if isinstance(model, Chain) else (model,)
    for layer in layers:
        _refuse(layer)
    grus = [layer for layer in layers if isinstance(layer, GRU)]
    if not grus:
        raise ValueError("the Chain has no GRU: there is nothing to step")
    size = sum(p.size for layer in layers for p in map(to_numpy, layer.params.values()))
    if size * (1 if kind == "int8" else 4) > LIMIT:
        raise ValueError(f"the model has {size:,} weights, which are more than {LIMIT:,} bytes")
    found: list[Part] = []
    for layer in layers:
        found += _of_layer(layer, len(found), kind == "int8")
    return Parts(
        "\n".join(repr(layer) for layer in layers),
        kind,
        grus[0].batch_first,
        isinstance(model, Chain),
        [[gru.num_layers, gru.hidden_size] for gru in grus],
        found,
    )


def _refuse(layer: Layer) -> None:
    """Raise where C does not do what the layer does."""
    if not isinstance(layer, GRU | Linear | Embedding | Dropout):
        raise ValueError(
            f"{type(layer).__name__} cannot be written as C, which steps through GRU, Linear, "
            "Embedding and Dropout layers"
        )
    if layer.dtype != "float32":
        raise ValueError(
            f'the model is {layer.dtype}, and C computes in float32: model.to(dtype="float32")'
        )
    if isinstance(layer, GRU):
        if "_reverse" in layer.suffixes:
            raise ValueError(f"{layer!r} cannot be written as C: it reads from the end")
        usual = GRU(1, 1).settings
        other = {k: v for k, v in layer.settings.items() if k not in FOLLOWED and v != usual.get(k)}
        if other:
            raise ValueError(
                f"C does not follow {', '.join(f'{k}={v!r}' for k, v in other.items())}"
            )
    for name, array in layer.params.items():
        rows = np.atleast_2d(to_numpy(array))
        wrong = ~np.isfinite(rows).all(axis=1)
        if wrong.any():
            raise ValueError(
                f"{name} of {layer!r} holds NaN or infinity, first in row {int(wrong.argmax())}: "
                "such weights cannot be written"
            )


def _of_layer(layer: Layer, number: int, int8: bool) -> Iterator[Part]:
    """The parts of a layer; number: how many there are before it."""
    params = {name: to_numpy(array) for name, array in layer.params.items()}
    if isinstance(layer, GRU):
        for n in range(layer.num_layers):
            names = parameter_names(layer.bias, layer.reset_after, n, "")
            yield _cell(layer, [params[k] for k in names], f"gru{number + n}", int8)
    elif isinstance(layer, Linear):
        yield _linear(params["weight"], params.get("bias"), f"linear{number}", int8)
    elif isinstance(layer, Embedding):
        yield _embedding(params["weight"], f"embedding{number}", int8)


def _cell(gru: GRU, params: list[HostArray], name: str, int8: bool) -> Part:
    step = gru.variant.step
    W, b, (U, *vectors) = weights(np, gru.reset_after, *params)
    source = CSource(forward_schedule(step, len(vectors), False, IN_PLACE), name, int8)
    W, fields = _matrix(f"{name}_W", W, int8)
    fields += [] if b is None else [Field(f"{name}_b", b)]
    wide, (H, n) = np.zeros(U.shape), (U.shape[1], 0)
    for gemm in source.schedule.gemms:
        rows = slice(H * gemm.product.rows.start, H * gemm.product.rows.stop)
        wide[rows], more = _matrix(f"{name}_U{n}", U[rows], int8)
        fields, n = fields + more, n + 1
    fields += [Field(f"{name}_c{i}", c) for i, c in enumerate(vectors)]
    bias = np.zeros(3 * H) if b is None else b.astype("float64")
    c = [v.astype("float64") for v in vectors]

    def run(x: HostArray, h: HostArray) -> HostArray:
        new: HostArray = step(np, W @ x + bias, h, wide, *c)[0]
        return new

    return Part(name, W.shape[1], H, fields, run, b is not None, source)


def _linear(W: HostArray, b: HostArray | None, name: str, int8: bool) -> Part:
    W, fields = _matrix(f"{name}_W", W, int8)
    fields += [] if b is None else [Field(f"{name}_b", b)]

    def run(x: HostArray, h: HostArray) -> HostArray:
        y: HostArray = W @ x + (0 if b is None else b)
        return y

    return Part(name, W.shape[1], W.shape[0], fields, run, b is not None)


def _embedding(table: HostArray, name: str, int8: bool) -> Part:
    rows, fields = _matrix(f"{name}_W", table, int8, transposed=False)

    def run(x: HostArray, h: HostArray) -> HostArray:
        row: HostArray = rows[x]
        return row

    return Part(name, len(table), table.shape[1], fields, run)


def _matrix(
    name: str, W: HostArray, int8: bool, transposed: bool = True
) -> tuple[HostArray, list[Field]]:
    """Return the matrix as C multiplies it, in float64, and its fields, rounded where int8."""
    stored, fields = W, list[Field]()
    if int8:
        stored, scale = round_weights(name, W, "int8")
        fields.append(Field(f"{name}_scale", np.asarray(scale)))
        W = restore(stored, scale)
    fields.append(Field(name, np.ascontiguousarray(stored.T if transposed else stored)))
    return W.astype("float64"), fields
