"""Write the files beside this one: models as other libraries export them, and what they answer.

They were written once, on 2026-11-24, by PyTorch 2.13.0 with onnxscript 0.7.2 and by Keras 3.15.1
on TensorFlow 2.21.0 with tf2onnx 1.17.0 (`python make.py torch`, `keras`, `gru_any`).
They stay as they are, so that what could be read then can be read ever after.
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def without_traces(path: str) -> None:
    """Take out where on the machine each node came from, which is all that is changed."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for part in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]
    for node in model.graph.node:
        node.ClearField("doc_string")
    onnx.save(model, path)


def by_torch() -> None:
    import torch

    nn, rnn = torch.nn, torch.nn.utils.rnn

    class Language(nn.Module):
        """Two layers, both directions, between an embedding and a linear layer."""

        def __init__(self):
            super().__init__()
            self.embedding, self.linear = nn.Embedding(9, 3), nn.Linear(8, 9)
            self.gru = nn.GRU(3, 4, 2, bidirectional=True)

        def forward(self, x):
            y, h_n = self.gru(self.embedding(x))
            return self.linear(y), h_n

    class Stream(nn.Module):
        """Batch first, with a state in and out; weights in a second file."""

        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(3, 4, 2, batch_first=True)

        def forward(self, x, h0):
            return self.gru(x, h0)

    class Packed(nn.Module):
        """With lengths."""

        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(3, 4, bidirectional=True, bias=False)

        def forward(self, x, lengths):
            y, h_n = self.gru(rnn.pack_padded_sequence(x, lengths))
            return rnn.pad_packed_sequence(y)[0], h_n

    class Unsorted(nn.Module):
        """With lengths in any order, two layers, and a first state."""

        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(3, 4, 2, bidirectional=True, batch_first=True)

        def forward(self, x, lengths, h0):
            options = {"enforce_sorted": False, "batch_first": True}
            y, h_n = self.gru(rnn.pack_padded_sequence(x, lengths, **options), h0)
            return rnn.pad_packed_sequence(y, batch_first=True)[0], h_n

    torch.manual_seed(0)
    answers = {}
    x = torch.randn(5, 2, 3)

    def export(name, model, arguments, **options):
        path = str(HERE / f"{name}.onnx")
        torch.onnx.export(model.eval(), tuple(arguments.values()), path, **options)
        without_traces(path)
        outputs = dict(zip(("y", "h_n"), model(*arguments.values()), strict=True))
        for key, value in (arguments | outputs).items():
            answers[f"{name}.{key}"] = value.detach().numpy()

    axes = {"x": {0: "T", 1: "B"}}
    for name, dynamo in (("script", False), ("dynamo", True)):
        auto = torch.export.Dim.AUTO
        options = {"dynamic_shapes": ({0: auto, 1: auto},)} if dynamo else {"dynamic_axes": axes}
        export(
            f"torch_{name}_chain", Language(), {"x": torch.randint(0, 9, (5, 2))},
            input_names=["x"], dynamo=dynamo, **options,
        )  # fmt: skip
        options = {"dynamic_shapes": ({0: auto, 1: auto}, {1: auto})}
        if not dynamo:
            options = {"dynamic_axes": {"x": {0: "B", 1: "T"}, "h0": {1: "B"}}}
        export(
            f"torch_{name}_stream", Stream(), {"x": x.transpose(0, 1), "h0": torch.randn(2, 2, 4)},
            input_names=["x", "h0"], dynamo=dynamo, **options,
        )  # fmt: skip
    export(
        "torch_script_packed", Packed(), {"x": x, "lengths": torch.tensor([5, 3])},
        input_names=["x", "lengths"], dynamo=False, dynamic_axes=axes | {"lengths": {0: "B"}},
    )  # fmt: skip
    export(
        "torch_script_unsorted", Unsorted(),
        {"x": x.transpose(0, 1), "lengths": torch.tensor([3, 5]), "h0": torch.randn(4, 2, 4)},
        input_names=["x", "lengths", "h0"], dynamo=False,
        dynamic_axes={"x": {0: "B", 1: "T"}, "lengths": {0: "B"}, "h0": {1: "B"}},
    )  # fmt: skip
    np.savez(HERE / "torch.npz", **answers)


def by_keras() -> None:
    import keras

    L, answers, rng = keras.layers, {}, np.random.default_rng(0)
    ids = {"shape": (None,), "dtype": "int32"}
    for name, layers in {
        "after": [L.Input((None, 3)), L.GRU(4, return_sequences=True)],
        "before": [L.Input((None, 3)), L.GRU(4, return_sequences=True, reset_after=False)],
        "both": [L.Input((None, 3)), L.Bidirectional(L.GRU(4, return_sequences=True))],
        "chain": [
            L.Input(**ids),
            L.Embedding(9, 3),
            L.GRU(4, return_sequences=True),
            L.GRU(5, return_sequences=True),
        ],
    }.items():
        model = keras.Sequential([*layers, L.Dense(2)])
        model.set_weights([rng.uniform(-1, 1, w.shape) for w in model.get_weights()])
        x = rng.standard_normal((2, 5, 3)).astype("float32")
        x = rng.integers(0, 9, (2, 5)).astype("int32") if name == "chain" else x
        answers |= {f"keras_{name}.x": x, f"keras_{name}.y": np.asarray(model(x))}
        model.export(str(HERE / f"keras_{name}.onnx"), format="onnx", verbose=False)
    np.savez(HERE / "keras.npz", **answers)


def by_gru_any() -> None:
    from gru_any import GRU, Chain, Embedding, Linear
    from gru_any.convert import onnx

    model = Chain(
        Embedding(9, 3, seed=0),
        GRU(3, 4, 2, bidirectional=True, reset_after=True, seed=1),
        Linear(8, 9, seed=2),
    )
    onnx.save(HERE / "gru_any_chain.onnx", model)
    rng = np.random.default_rng(0)
    x, lengths = rng.integers(0, 9, (5, 3)), np.array([5, 0, 2])
    h0 = rng.standard_normal((4, 3, 4)).astype("float32")
    y, (h_n,) = model(x, [h0], lengths)
    answers = {"x": x, "lengths": lengths, "h0": h0, "y": y, "h_n": h_n}
    np.savez(HERE / "gru_any.npz", **{f"chain.{k}": v for k, v in answers.items()})


if __name__ == "__main__":
    {"torch": by_torch, "keras": by_keras, "gru_any": by_gru_any}[sys.argv[1]]()
