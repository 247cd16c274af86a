"""Models in ONNX files: GRUs, and chains of Embedding, GRU, Last and Linear.

ONNX' operator GRU has the gates in the order z, r, h, both biases side by side, and the reset gate
before the matrix product unless `linear_before_reset` is 1. Its definition:
https://onnx.ai/onnx/operators/onnx__GRU.html. The package onnx comes with
`pip install "gru-any[onnx]"`.
"""

from ...nn.chain import Chain
from ...nn.gru import GRU
from ...typing import Device, Path
from ..files import naming

__all__ = ["load", "save"]


def load(
    path: Path, backend: object = None, device: Device = None, *, node: str | None = None
) -> GRU | Chain:
    """Read the GRU or the chain of layers that an ONNX file describes.

    Each array is followed through the graph by the meaning of its axes, so that it does not matter
    how an exporter transposes, slices and joins arrays on the way. What cannot be a layer of this
    library is refused; nothing is skipped.

    Parameters
    ----------
    path : str or path
        Weights may stand in a second file beside it, as PyTorch's exporter writes them.
    backend, device
        As in `GRU`.
    node : str, optional
        Read only this GRU node, by its name, or several, by what their names begin with, up to a
        slash, dot, colon or, if there are none, underscore: "encoder/rnn" for
        "/encoder/rnn/GRU" and "/encoder/rnn/GRU_1". Several must be consecutive layers or the two
        directions of a layer. x is the input of the first: (T, B, I), or (B, T, I) if its attribute
        `layout` is 1, whatever the layout of the rest of the graph. Lengths and initial states are
        arguments of the call, wherever the graph takes them from; the logger `gru_any.convert`
        names them.

    Returns
    -------
    GRU or Chain
        A GRU where the graph holds nothing else. `batch_first` is set where the graph's input is
        (B, T, .). Adjacent GRU nodes of the same kind are the layers of one GRU, unless the graph
        has inputs or outputs for the state of each; a forward and a reverse node that read the
        same and whose outputs are joined are one bidirectional layer. Where the result is the last
        state, a `Last` follows the GRU. Outputs have this library's layout whatever the graph does
        to them last.

    Raises
    ------
    ValueError
        The file is damaged or unsafe, or holds what has no counterpart here, such as a Reshape to
        a constant number of steps where the input leaves it free; the text names the node. `node`
        selects no GRU, or several that are not layers of one another; the text lists
        the GRU nodes of the graph.
    ImportError
        The package onnx is missing.
    OSError
        The file cannot be read.

    Notes
    -----
    Where the reset gate comes before the product the operator has two biases and this library has
    one. They are added, the sum is rounded once, and the logger `gru_any.convert` reports it.
    """
    from .read import read

    with naming(path):
        return read(path, backend, device, node)


def save(
    path: Path,
    model: GRU | Chain,
    *,
    lengths: bool = True,
    resets: bool = False,
    start: bool = False,
) -> None:
    """Write a GRU or a Chain to an ONNX file, for any T and B.

    Inputs are `x`, `lengths` (B,) int32, and the initial state; outputs `y` and the last state. The
    states are `h0` and `h_n` (L*D, B, H) of a GRU, and `h0_0`, `h_n_0`, `h0_1`... of the GRUs of a
    Chain, in order. To stream, pass the last state of one call as the initial state of the next.
    Dropout is left out.

    **Not every runtime uses lengths.** onnxruntime does; OpenVINO and the reference evaluator of
    the package onnx read each row to its end, whatever `sequence_lens` of the operator GRU says,
    and give other results where a length is below T. With `lengths=False` the file has no such
    input, and gives the same results in all of them.

    With `resets=True` each GRU is a Scan over its steps, whose body sets the state anew and runs
    the operator GRU on one step. Lengths are heeded by all three then. `load` does not read it.

    Before the file is written, the model is run: read back by `load` it must give the same results,
    and on onnxruntime, where that is installed and the dtype is float32, results close to them.

    Parameters
    ----------
    path : str or path
        An existing file is replaced at once or not at all.
    model : GRU or Chain
        float32, float64 or float16, on any backend.
    lengths : bool
        Whether the file has the input `lengths`.
    resets : bool
        Whether it has the input `resets`, (T, B) or (B, T) of bool, as of a call.
    start : bool
        Whether it has the inputs that resets set the states to: `start` (L*D, B, H) of a GRU,
        `start_0`, `start_1`... of the GRUs of a Chain.

    Raises
    ------
    TypeError
        The model is something else, or bfloat16.
    ValueError
        A chain without a GRU, or with GRUs of which only some are `batch_first`; or more than 2 GB;
        or start without resets.
    RuntimeError
        The results do not agree; nothing is written.
    ImportError
        The package onnx is missing.
    """
    from .write import write

    write(path, model, lengths, resets, start)
