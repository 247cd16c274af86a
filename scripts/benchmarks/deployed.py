"""The contenders of deployment.py: a trained GRU (reset after, I = H, one row, one thread).

A maker takes the folder that `write` filled and H. It returns a function that runs one step, and
one that runs STEPS steps in a call; they return the last state, as a NumPy array. It raises
`MissingError` where this machine or version lacks what it needs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

STEPS = 100  # of a sequence


class MissingError(Exception):
    """A contender cannot run here: a library or a tool is missing."""


class Deployed(NamedTuple):
    """A model that keeps its state between calls of `step`."""

    step: Callable[[], Any]
    sequence: Callable[[], Any]


# this library -------------------------------------------------------------------------------------


def ours(folder: str, H: int, weights: str = "") -> Deployed:
    """A Stream of the model; weights: of a frozen one."""
    import numpy as np

    from gru_any import load
    from gru_any.stream import Stream

    model = load(f"{folder}/{H}.safetensors")
    if weights:
        from gru_any.deploy import freeze

        try:
            model = freeze(model) if weights == "float32" else freeze(model, weights)
        except (TypeError, ValueError, ImportError) as e:
            raise MissingError(f"freeze(model, {weights!r}): {e}") from e
    stream, x = Stream(model), np.ones((1, H), "float32")
    sequence = np.ones((STEPS, 1, H), "float32")
    return Deployed(lambda: stream.step(x), lambda: model(sequence)[0][-1])


def frozen_bfloat16(folder: str, H: int) -> Deployed:
    """A Stream of a frozen model with bfloat16 weights."""
    return ours(folder, H, "bfloat16")


def frozen_float32(folder: str, H: int) -> Deployed:
    """A Stream of a frozen model."""
    return ours(folder, H, "float32")


def frozen_int8(folder: str, H: int) -> Deployed:
    """A Stream of a frozen model with int8 weights."""
    return ours(folder, H, "int8")


def c_float32(folder: str, H: int, weights: str = "float32") -> Deployed:
    """A shared library that `gru_any.deploy.c.build` made."""
    import numpy as np

    from gru_any.deploy import c

    path = Path(f"{folder}/{H}_{weights}.so")
    if not path.exists():
        raise MissingError("no C compiler")
    stream, other, x = c.load(path), c.load(path), np.ones((1, H), "float32")
    sequence = np.ones((STEPS, 1, H), "float32")

    def run() -> Any:
        other.reset()
        return other(sequence)[-1]

    return Deployed(lambda: stream.step(x), run)


def c_int8(folder: str, H: int) -> Deployed:
    """The C code with int8 weights."""
    return c_float32(folder, H, "int8")


# others -------------------------------------------------------------------------------------------


def torch(folder: str, H: int, int8: bool = False) -> Deployed:
    """torch.nn.GRUCell for steps, torch.nn.GRU for sequences."""
    import torch as library

    library.set_num_threads(1)
    cell, gru = library.nn.GRUCell(H, H), library.nn.GRU(H, H)
    state = library.load(f"{folder}/{H}.pt", weights_only=True)
    gru.load_state_dict(state)
    cell.load_state_dict({name.removesuffix("_l0"): v for name, v in state.items()})
    if int8:
        cell, gru = (_dynamically_quantized(module) for module in (cell, gru))
    x, sequence, h = library.ones(1, H), library.ones(STEPS, 1, H), library.zeros(1, H)

    def step() -> Any:
        nonlocal h
        with library.inference_mode():
            h = cell(x, h)
            return h.numpy()

    def run() -> Any:
        with library.inference_mode():
            return gru(sequence)[0][-1].numpy()

    return Deployed(step, run)


def _dynamically_quantized(module: Any) -> Any:
    """PyTorch's int8 weights, with activations that are rounded in each call."""
    import warnings

    import torch as library

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            parent = library.nn.ModuleList([module])
            kinds = {library.nn.GRU, library.nn.GRUCell}
            return library.ao.quantization.quantize_dynamic(parent, kinds, library.qint8)[0]
        except (AttributeError, RuntimeError) as e:
            raise MissingError(f"PyTorch's dynamic quantization: {e}") from e


def torch_int8(folder: str, H: int) -> Deployed:
    """PyTorch with dynamic quantization of the weights."""
    return torch(folder, H, True)


def onnxruntime(folder: str, H: int) -> Deployed:
    """The GRU operator of onnxruntime."""
    import numpy as np
    import onnxruntime as library

    options = library.SessionOptions()
    options.intra_op_num_threads = 1
    one, many = (
        library.InferenceSession(
            f"{folder}/{H}_{T}.onnx", options, providers=["CPUExecutionProvider"]
        )
        for T in (1, STEPS)
    )
    return _with_state(
        lambda given: one.run(None, given), lambda given: many.run(None, given), H, np
    )


def openvino(folder: str, H: int) -> Deployed:
    """OpenVINO on the same file, in float32."""
    import numpy as np
    import openvino as library

    core = library.Core()
    core.set_property("CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"})
    one, many = (
        core.compile_model(f"{folder}/{H}_{T}.onnx", "CPU").create_infer_request()
        for T in (1, STEPS)
    )
    return _with_state(
        lambda given: [one.infer(given)[0]], lambda given: [many.infer(given)[0]], H, np
    )


def _with_state(one: Callable[..., Any], many: Callable[..., Any], H: int, np: Any) -> Deployed:
    """Pass the state in and out; both take x and h by name."""
    x, h = np.ones((1, 1, H), "float32"), np.zeros((1, 1, H), "float32")
    sequence, zeros = np.ones((STEPS, 1, H), "float32"), h

    def step() -> Any:
        nonlocal h
        h = np.array(one({"x": x, "h": h})[0])
        return h

    return Deployed(step, lambda: many({"x": sequence, "h": zeros})[0])


MAKERS: dict[str, Callable[[str, int], Deployed]] = {
    "NumPy": ours,
    "Numba": ours,
    "frozen": frozen_float32,
    "frozen bfloat16": frozen_bfloat16,
    "frozen int8": frozen_int8,
    "C": c_float32,
    "C int8": c_int8,
    "PyTorch": torch,
    "PyTorch int8": torch_int8,
    "onnxruntime": onnxruntime,
    "OpenVINO": openvino,
}
# the distributions and first imports of those that are not ours
LIBRARIES = {
    "PyTorch": "torch", "PyTorch int8": "torch",
    "onnxruntime": "onnxruntime", "OpenVINO": "openvino",
}  # fmt: skip
# of ours, whose names are imported at their first use
IMPORTS = {"C": "gru_any.deploy.c", "C int8": "gru_any.deploy.c", **LIBRARIES}
NEEDS = ["numpy", "array-api-compat", "safetensors"]
COMPILED = ("Numba", "frozen", "frozen bfloat16", "frozen int8")  # with Numba


# the files ----------------------------------------------------------------------------------------


def write(folder: str, sizes: list[int]) -> None:
    """Write the weights of each size as every contender reads them."""
    import numpy as np
    import torch as library

    from gru_any import GRU, save
    from gru_any.deploy import c

    for H in sizes:
        gru = GRU(H, H, reset_after=True, seed=0)
        save(f"{folder}/{H}.safetensors", gru)
        tensors = {name: library.tensor(np.array(a)) for name, a in gru.params.items()}
        library.save(tensors, f"{folder}/{H}.pt")
        for T in (1, STEPS):
            Path(f"{folder}/{H}_{T}.onnx").write_bytes(onnx_model(gru, T))
        for weights in ("float32", "int8"):
            try:
                c.build(gru, f"{folder}/{H}_{weights}.so", weights)
            except RuntimeError as e:
                print(e)


def onnx_model(gru: Any, T: int) -> bytes:
    """T steps as one node of ONNX: x (T, 1, I), h (1, 1, H) -> the last h."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    from gru_any.convert import keras

    H = gru.hidden_size
    W, R, b = keras.to_arrays(gru)  # whose gates are those of ONNX, z, r, n
    weights = {"W": W.T[None], "R": R.T[None], "B": b.reshape(1, -1)}
    node = helper.make_node(
        "GRU", ["x", "W", "R", "B", "", "h"], ["", "next"], hidden_size=H, linear_before_reset=1
    )
    inputs, outputs = (
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, shape) for k, shape in of.items()]
        for of in ({"x": (T, 1, H), "h": (1, 1, H)}, {"next": (1, 1, H)})
    )
    constants = [numpy_helper.from_array(np.ascontiguousarray(a), k) for k, a in weights.items()]
    graph = helper.make_graph([node], "step", inputs, outputs, constants)
    opset = [helper.make_opsetid("", 14)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
