"""Writes the files of this folder with the libraries they are of, and what these compute.

    KERAS_BACKEND=torch python tests/data/make.py

It ran on 2026-11-24, and `of_keras_trained` on 2026-11-26, with torch 2.13.0, keras 3.15.1,
equinox 0.13.8 and mlx 0.32.4. Chainer does not install beside NumPy 2: its file is laid out as
`chainer.serializers.save_npz` does.
"""

import json
from pathlib import Path

import equinox
import jax
import keras
import mlx.core as mx
import mlx.nn
import numpy as np
import torch

HERE = Path(__file__).parent
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 4, 3)).astype("float32")  # (B, T, I)
expected = {"x": X.tolist()}


def of_torch() -> None:
    torch.manual_seed(0)
    gru = torch.nn.GRU(3, 4, 2, bidirectional=True, batch_first=True)
    from safetensors.torch import save_file

    save_file(gru.state_dict(), HERE / "torch.safetensors")
    torch.save(gru.state_dict(), HERE / "torch.pt")
    expected["torch"] = gru(torch.tensor(X))[0].tolist()


def of_keras() -> None:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    for name, after in (("after", True), ("before", False)):
        gru = layers.GRU(4, return_sequences=True, reset_after=after, bias_initializer="normal")
        both = layers.Bidirectional(layers.GRU(3, return_sequences=True, reset_after=after))
        model = keras.Sequential([keras.Input((None, 3)), gru, both, layers.Dense(2)])
        model.save(HERE / f"keras_{name}.keras")
        expected[f"keras_{name}"] = model(X).tolist()
    model.save_weights(HERE / "keras.weights.h5")
    expected["keras.weights"] = gru(X).tolist()


def of_keras_trained() -> None:
    """One result a sequence, from a model that was trained; in the older format too."""
    keras.utils.set_random_seed(1)
    layers = keras.layers
    both = layers.Bidirectional(layers.GRU(2, bias_initializer="normal"))
    model = keras.Sequential([keras.Input((None, 3)), both, layers.Dense(2)])
    model.compile("sgd", "mse", metrics=["mae"])
    model.train_on_batch(X, np.ones((2, 2)))
    for name in ("trained.keras", "trained.h5"):
        model.save(HERE / f"keras_{name}")
        expected[f"keras_{name}"] = model(X).tolist()


def of_equinox() -> None:
    cell = equinox.nn.GRUCell(3, 4, key=jax.random.key(0))
    equinox.tree_serialise_leaves(HERE / "equinox.eqx", cell)
    rows = []
    for row in X:
        h, ys = jax.numpy.zeros(4), []
        for x in row:
            h = cell(x, h)
            ys.append(h.tolist())
        rows.append(ys)
    expected["equinox"] = rows


def of_mlx() -> None:
    mx.random.seed(0)
    gru = mlx.nn.GRU(3, 4)
    gru.save_weights(str(HERE / "mlx.safetensors"))
    gru.save_weights(str(HERE / "mlx.npz"))
    expected["mlx"] = gru(mx.array(X)).tolist()


def of_chainer() -> None:
    """A StatelessGRU from zeros, in NumPy: h' = (1 - z) h + z h_bar."""
    shapes = {"W_r": (4, 3), "W_z": (4, 3), "W": (4, 3), "U_r": (4, 4), "U_z": (4, 4), "U": (4, 4)}
    link = {f"{k}/W": RNG.standard_normal(s).astype("float32") for k, s in shapes.items()}
    link |= {f"{k}/b": RNG.standard_normal(4).astype("float32") for k in shapes}
    np.savez_compressed(HERE / "chainer.npz", **{f"gru/{k}": a for k, a in link.items()})

    def linear(name: str, v: np.ndarray) -> np.ndarray:
        return v @ link[f"{name}/W"].T + link[f"{name}/b"]

    h, ys = np.zeros((2, 4)), []
    for t in range(4):
        r = 1 / (1 + np.exp(-linear("W_r", X[:, t]) - linear("U_r", h)))
        z = 1 / (1 + np.exp(-linear("W_z", X[:, t]) - linear("U_z", h)))
        h = (1 - z) * h + z * np.tanh(linear("W", X[:, t]) + linear("U", r * h))
        ys.append(h)
    expected["chainer"] = np.stack(ys, 1).tolist()


if __name__ == "__main__":
    for make in (of_torch, of_keras, of_keras_trained, of_equinox, of_mlx, of_chainer):
        make()
    (HERE / "expected.json").write_text(json.dumps(expected))
