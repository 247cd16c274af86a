"""From layers to an ONNX graph."""

from ... import arguments
from ...backend import to_numpy
from ...files import write_atomically
from ...nn.chain import Chain
from ...nn.gru import GRU
from ...nn.layers import Dropout, Embedding, Last, Linear
from ...typing import Path
from ...version import __version__
from ..cells import refuse_options, refuse_zoneout
from .check import LARGEST, library
from .graph import Graph, Written
from .prove import prove
from .scan import ScanGraph

OPSET, IR = 14, 7
DTYPES = ("float16", "float32", "float64")
WRITTEN = "activation", "gate_activation", "clip"


def write(path: Path, model: GRU | Chain, lengths: bool, resets: bool, start: bool) -> None:
    """See `gru_any.convert.onnx.save`."""
    given = {"lengths": lengths, "resets": resets, "start": start}
    given = {name: arguments.flag(name, v) for name, v in given.items()}
    if start and not resets:
        raise ValueError("start is True without resets, of which it is the state: say both")
    content = build(model, **given)
    prove(content, model, **given)
    write_atomically(path, content)


def build(model: GRU | Chain, lengths: bool, resets: bool, start: bool) -> bytes:
    """Return the content of the file."""
    layers, onnx = _layers(model), library()
    given = model.dtype, layers, lengths
    graph = ScanGraph(*given, start) if resets else Graph(*given)
    name = "x"
    for i, layer in enumerate(layers):
        prefix, mark = (f"{i}.", f"_{len(graph.grus)}") if isinstance(model, Chain) else ("", "")
        if isinstance(layer, GRU):
            name = graph.gru(layer, name, prefix, mark)
        elif isinstance(layer, Embedding):
            table = graph.weight(f"{prefix}weight", layer.params["weight"])
            name = graph.node("Gather", [table, name], axis=0)
        elif isinstance(layer, Last):
            name = graph.last()
        elif isinstance(layer, Linear):
            name = graph.linear(layer, name, prefix)
    graph.node("Identity", [name], "y")
    lead = ["B"] if any(isinstance(layer, Last) for layer in layers) else graph.lead
    graph.outputs.insert(0, graph.declare("y", graph.dtype, [*lead, _width(layers)]))
    made = onnx.helper.make_graph(
        graph.nodes, "gru_any", graph.inputs, graph.outputs, list(graph.weights.values())
    )
    proto = onnx.helper.make_model(
        made,
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR,
        producer_name="gru_any",
        producer_version=__version__,
    )
    return bytes(proto.SerializeToString(deterministic=True))


def _layers(model: GRU | Chain) -> list[Written]:
    """Return the layers to be written; raise where one cannot be."""
    layers = model.layers if isinstance(model, Chain) else (model,)
    for layer in layers:
        if type(layer) not in (GRU, Embedding, Linear, Dropout, Last):
            raise TypeError(
                f"cannot write {type(layer).__name__}, only GRU, or a Chain of Embedding, GRU, "
                "Linear, Dropout and Last"
            )
    if model.dtype not in DTYPES:
        raise TypeError(
            f"cannot write {model.dtype}, only {', '.join(DTYPES)}: model.to(dtype=...)"
        )
    grus = [layer for layer in layers if isinstance(layer, GRU)]
    if not grus:
        raise ValueError("the model has no GRU; there is nothing to write")
    for gru in grus:
        refuse_options(gru, *WRITTEN)
        refuse_zoneout(gru)
    if len({g.batch_first for g in grus}) > 1:
        raise ValueError("some GRUs are batch_first and some are not, expected the same for all")
    if sum(to_numpy(p).nbytes for p in model.params.values()) > LARGEST - 2**20:
        raise ValueError("the model has more than 2 GB, which do not fit into one ONNX file")
    return [layer for layer in layers if isinstance(layer, Written)]


def _width(layers: list[Written]) -> int:
    """Return how many features the last layer puts out."""
    last = [layer for layer in layers if not isinstance(layer, Last)][-1]
    if isinstance(last, GRU):
        return last.hidden_size * len(last.suffixes)
    return last.out_features if isinstance(last, Linear) else last.size
