"""The contenders of benchmark.py: each makes a call that runs one GRU layer once.

`make(x, dy, gru, mode)` takes the data, a gru_any.GRU whose weights it uses, and "forward" or
"training" (forward, and the gradients of parameters, x and first state). It returns a function
without arguments whose result is y (T, B, H) as a NumPy array, or for training dx.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from gru_any.deploy import freeze
from gru_any.stream import Stream

Call = Callable[[], np.ndarray]


def ours(x: Any, dy: Any, gru: Any, mode: str) -> Call:
    """gru_any: a step of a stream where T = B = 1, else whole sequences."""
    if mode == "training":
        return lambda: gru.vjp(x)[1](dy)[1]
    if x.shape[:2] == (1, 1):
        x_t, stream = x[0], Stream(gru)
        return lambda: stream.step(x_t)[None]
    return lambda: gru(x)[0]


def frozen(x: Any, dy: Any, gru: Any, mode: str) -> Call | None:
    """gru_any with Numba and weights that were packed before, forward alone."""
    return None if mode == "training" else ours(x, dy, freeze(gru), mode)


def floor(x: Any, dy: Any, gru: Any, mode: str) -> Call:
    """The bare matrix products of the same sizes, step by step; the numbers mean nothing."""
    W, U = gru.params["weight_ih_l0"], gru.params["weight_hh_l0"]
    (T, B, _), H = x.shape, U.shape[1]
    h, q = np.zeros((B, H), "float32"), np.empty((B, 3 * H), "float32")
    rows, d = x.reshape(T * B, -1), np.zeros((T * B, 3 * H), "float32")
    hs, dh = np.zeros((T * B, H), "float32"), np.empty((B, H), "float32")

    def call() -> np.ndarray:
        a = rows @ W.T
        for _ in range(T):
            np.matmul(h, U.T, q)
        if mode == "training":
            for _ in range(T):
                np.matmul(q, U, dh)
            a = d @ W
            _ = d.T @ rows, d.T @ hs
        return a

    return call


def torch(x: Any, dy: Any, gru: Any, mode: str) -> Call:
    """torch.nn.GRU (reset after), and for a single step the faster of it and GRUCell."""
    import torch as library

    layer = library.nn.GRU(x.shape[2], gru.hidden_size)
    weights = {k: library.tensor(v) for k, v in gru.params.items()}
    layer.load_state_dict(weights)
    X, D = library.tensor(x), library.tensor(dy)
    if mode == "training":
        X.requires_grad_()
        h0 = library.zeros(1, x.shape[1], gru.hidden_size, requires_grad=True)  # as ours has one

        def train() -> np.ndarray:
            layer.zero_grad()
            X.grad = h0.grad = None
            layer(X, h0)[0].backward(D)
            return X.grad.numpy()

        return train

    def forward() -> np.ndarray:
        with library.inference_mode():
            return layer(X)[0].numpy()

    if x.shape[:2] != (1, 1):
        return forward
    cell = library.nn.GRUCell(x.shape[2], gru.hidden_size)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in weights.items()})
    h = library.zeros(1, gru.hidden_size)

    def step() -> np.ndarray:
        with library.inference_mode():
            return cell(X[0], h).numpy()[None]

    return min((forward, step), key=_seconds)


def _seconds(call: Call) -> float:
    import timeit

    call()
    return min(timeit.repeat(call, number=100, repeat=5))


def onnx_model(x: Any, gru: Any) -> bytes:
    """Return `gru` as one node of ONNX, whose gates are in the order z, r, n."""
    import onnx
    from onnx import helper

    def as_zrn(name: str) -> np.ndarray:
        r, z, n = np.split(gru.params[name], 3)
        return np.concatenate([z, r, n])

    H = gru.hidden_size
    second = as_zrn("bias_hh_l0") if gru.reset_after else np.zeros(3 * H, "float32")
    arrays = {
        "W": as_zrn("weight_ih_l0")[None],
        "R": as_zrn("weight_hh_l0")[None],
        "B": np.concatenate([as_zrn("bias_ih_l0"), second])[None],
    }
    node = helper.make_node(
        "GRU", ["x", *arrays], ["y"], hidden_size=H, linear_before_reset=int(gru.reset_after)
    )
    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "gru",
        [helper.make_tensor_value_info("x", float32, x.shape)],
        [helper.make_tensor_value_info("y", float32, [x.shape[0], 1, x.shape[1], H])],
        [onnx.numpy_helper.from_array(v, k) for k, v in arrays.items()],
    )
    opset = [helper.make_opsetid("", 14)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def onnxruntime(x: Any, dy: Any, gru: Any, mode: str) -> Call | None:
    """The GRU operator of onnxruntime, forward alone."""
    import onnxruntime as library

    if mode == "training":
        return None
    session = library.InferenceSession(
        onnx_model(x, gru), _onnxruntime_options(), providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, {"x": x})[0][:, 0]


def _onnxruntime_options() -> Any:
    options = importlib.import_module("onnxruntime").SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    return options


def openvino(x: Any, dy: Any, gru: Any, mode: str) -> Call | None:
    """OpenVINO on the same ONNX node, in float32, forward alone."""
    if mode == "training":
        return None
    core = _openvino_core()
    model = core.read_model(model=onnx_model(x, gru), weights=b"")
    request = core.compile_model(model, "CPU").create_infer_request()
    return lambda: request.infer({0: x})[0][:, 0]


def _openvino_core() -> Any:
    core = importlib.import_module("openvino").Core()
    threads = int(os.environ["OMP_NUM_THREADS"])
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    core.set_property("CPU", settings)
    return core


def arrays_of(library: str) -> Callable[..., Call]:
    """gru_any over arrays of another library on the host, as `ours` over NumPy's."""

    def make(x: Any, dy: Any, gru: Any, mode: str) -> Call:
        there = gru.to(library)
        put = there.backend.put
        return ours(put(x), put(dy), there, mode)

    return make


def jax(x: Any, dy: Any, gru: Any, mode: str) -> Call:
    """gru_any inside of `jax.jit`, and `jax.vjp` of it."""
    there = gru.to("jax.numpy")
    return _compiled(x, dy, mode, dict(there.params), lambda params, x: there.apply(params, x)[0])


def flax(x: Any, dy: Any, gru: Any, mode: str) -> Call | None:
    """flax.nnx.RNN over its GRUCell, with weights of its own."""
    if not gru.reset_after:
        return None
    from flax import nnx
    from jax.numpy import zeros

    cell = nnx.GRUCell(x.shape[2], gru.hidden_size, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(nnx.RNN(cell, time_major=True), nnx.Param, ...)
    h0 = zeros((x.shape[1], gru.hidden_size), "float32")

    def run(params: Any, x: Any) -> Any:
        return nnx.merge(graph, params, rest)(x, initial_carry=h0)

    return _compiled(x, dy, mode, params, run)


def equinox(x: Any, dy: Any, gru: Any, mode: str) -> Call | None:
    """Equinox's GRUCell over the batch, in a scan."""
    if not gru.reset_after:
        return None
    import equinox as library
    import jax as lax

    from gru_any.convert.equinox import to_arrays

    cell = library.nn.GRUCell(x.shape[2], gru.hidden_size, key=lax.random.key(0))
    for name, array in to_arrays(gru)[0].items():
        there = lax.numpy.asarray(array)
        cell = library.tree_at(lambda cell, name=name: getattr(cell, name), cell, there)
    zeros = lax.numpy.zeros((x.shape[1], gru.hidden_size), "float32")
    params, static = library.partition(cell, library.is_array)

    def run(params: Any, x: Any) -> Any:
        rows = lax.vmap(library.combine(params, static))

        def step(h: Any, x: Any) -> Any:
            h = rows(x, h)
            return h, h

        return lax.lax.scan(step, zeros, x)[1]

    return _compiled(x, dy, mode, params, run)


def _compiled(x: Any, dy: Any, mode: str, params: Any, run: Callable[[Any, Any], Any]) -> Call:
    """A function of parameters and x, or its gradient, compiled by JAX."""
    import jax as library

    X, D = library.numpy.asarray(x), library.numpy.asarray(dy)
    if mode == "forward":
        forward = library.jit(run)
        return lambda: np.asarray(forward(params, X))
    both = library.jit(lambda params, x, dy: library.vjp(run, params, x)[1](dy))
    return lambda: np.asarray(library.block_until_ready(both(params, X, D))[1])


MAKERS: dict[str, Callable[..., Call | None]] = {
    "numba": ours,
    "frozen": frozen,
    "numpy": ours,
    "torch": torch,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "jax": jax,
    "flax": flax,
    "equinox": equinox,
    "torch-arrays": arrays_of("torch"),
    "jax-arrays": arrays_of("jax.numpy"),
    "floor": floor,
}


NUMBA = ("numba", "frozen", "torch-arrays", "jax", "jax-arrays")  # who runs on Numba's loops


def threads_of(name: str) -> int:
    """How many threads a contender uses in this process, as its own library tells."""
    if name == "torch":
        return int(importlib.import_module("torch").get_num_threads())
    if name in NUMBA:
        return int(importlib.import_module("gru_any.backend.cpu.threads").count())
    if name == "onnxruntime":
        return int(_onnxruntime_options().intra_op_num_threads)
    if name == "openvino":
        return int(_openvino_core().get_property("CPU", "INFERENCE_NUM_THREADS"))
    if name in ("jax", "flax", "equinox"):  # it has no switch, but keeps to the cores it is given
        return len(os.sched_getaffinity(0))
    pools = importlib.import_module("threadpoolctl").threadpool_info()
    return max(int(pool["num_threads"]) for pool in pools if pool["user_api"] == "blas")
