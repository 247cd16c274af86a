"""One result a sequence: the last states of a GRU, for the layers after it."""

import numpy as np
import pytest
from conftest import require

from gru_any import GRU, Chain, Dropout, Last, Linear, explain, gradcheck, load, save
from gru_any.inspect.values import activity
from gru_any.stream import Stream

T, B, I, H = 5, 3, 2, 4
LENGTHS = [5, 1, 3]
X = np.random.default_rng(0).standard_normal((T, B, I))
WAYS = [
    {},
    {"bidirectional": True},
    {"reverse": True},
    {"bidirectional": True, "batch_first": True},
]


def model(way, dtype="float64", layers=2, **home):
    width = H * (2 if "bidirectional" in way else 1)
    home = {"dtype": dtype, **home}
    gru = GRU(I, H, layers, reset_after=True, seed=0, **way, **home)
    return Chain(gru, Last(**home), Linear(width, 2, seed=1, **home))


def laid_out(way):
    return X.transpose(1, 0, 2) if "batch_first" in way else X


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_it_is_what_torch_has_of_each_row_alone(way):
    torch = require("torch")
    chain = model(way)
    gru, linear = chain.layers[0], chain.layers[2]
    theirs = torch.nn.GRU(I, H, 2, bidirectional="bidirectional" in way, dtype=torch.float64)
    names = {k: k.removesuffix("_reverse") if "reverse" in way else k for k in gru.params}
    theirs.load_state_dict({names[k]: torch.tensor(a) for k, a in gru.params.items()})
    y, _ = chain(laid_out(way), lengths=LENGTHS)
    for row, length in enumerate(LENGTHS):
        x = X[:length, row][::-1].copy() if "reverse" in way else X[:length, row]
        h = theirs(torch.tensor(x))[1].detach().numpy()[-len(gru.suffixes) :].reshape(-1)
        expected = linear.params["weight"] @ h + linear.params["bias"]
        assert np.abs(y[row] - expected).max() < 1e-12


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("lengths", [None, [5, 0, 3]])
def test_its_gradients(way, lengths):
    state = [np.random.default_rng(1).standard_normal((2 * (1 + ("bidirectional" in way)), B, H))]
    errors = gradcheck(model(way), laid_out(way), state, method="complex", lengths=lengths)
    assert {"input0", "input1.0", "0.weight_hh_l1" + "_reverse" * ("reverse" in way)} <= set(errors)


def test_gradients_through_the_state_alone_and_both():
    chain = model({"bidirectional": True})
    (y, state), pullback = chain.vjp(X)
    dy, dstate = np.ones_like(y), [np.full_like(state[0], 2.0)]
    grads, dx, _ = pullback(dy, dstate)
    parts = [pullback(dy), pullback(None, dstate)]
    for name, grad in grads.items():
        assert np.allclose(grad, sum(part[0][name] for part in parts), rtol=1e-12, atol=1e-13)
    assert np.allclose(dx, parts[0][1] + parts[1][1], rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match=r"dh_n is \(1, 3, 4\), expected \(4, 3, 4\)"):
        pullback(dy, [np.ones((1, B, H))])
    with pytest.raises(ValueError, match=r"dy is \(5, 3, 8\)"):
        Last(dtype="float64").vjp(state[0], 2)[1](np.ones((T, B, 2 * H)))


def test_on_every_backend(backend):
    chain = model({"bidirectional": True}, "float32")
    there = chain.to(backend.backend)
    x = X.astype("float32")
    (y, _), pullback = there.vjp(backend.put(x), lengths=LENGTHS)
    (expected, _), back = chain.vjp(x, lengths=LENGTHS)
    assert np.allclose(backend.host(y), expected, rtol=0, atol=1e-6)
    _, dx, _ = pullback(backend.put(np.ones((B, 2), "float32")))
    assert np.allclose(backend.host(dx), back(np.ones((B, 2), "float32"))[1], rtol=0, atol=1e-5)


def test_without_a_batch_and_saved(tmp_path):
    chain = model({"bidirectional": True})
    y, _ = chain(X[:, 0])
    assert y.shape == (2,)
    assert np.allclose(y, chain(X)[0][0], rtol=0, atol=1e-14)
    save(tmp_path / "m.safetensors", chain)
    assert np.array_equal(load(tmp_path / "m.safetensors")(X)[0], chain(X)[0])


def test_what_it_must_follow():
    for layers in ([Last()], [Linear(2, 3), Last()], [GRU(2, 3), Dropout(0.1), Last()]):
        with pytest.raises(ValueError, match="must follow a GRU directly"):
            Chain(*layers)
    with pytest.raises(ValueError, match="leaves no steps to read"):
        Chain(GRU(2, 3), Last(), Linear(3, 3), GRU(3, 3))
    with pytest.raises(ValueError, match=r"h_n is \(3, 2, 4\), expected \(L\*D, B, H\), D = 2"):
        Last()(np.ones((3, 2, 4), "float32"), 2)
    for merge in (None, "average"):  # neither is a mean
        with pytest.raises(ValueError, match=f"merge is {merge!r}, expected"):
            Last()(np.ones((2, 2, 4), "float32"), 2, merge)
    with pytest.raises(ValueError, match="directions is 0, expected 1 or 2"):
        Last()(np.ones((2, 2, 4), "float32"), 0)
    with pytest.raises(ValueError, match="cannot stream"):
        Stream(model({}))


def test_it_is_explained_and_looked_into():
    chain = model({"batch_first": True})
    assert "x (3, 5, 4) -> (3, 4)" in explain(chain, shape=(B, T, I))
    assert "x (T, B, D*H) -> (B, D*H)" in explain(Last())
    assert activity(model({"bidirectional": True}), X)[0]["z"].shape == (4, T, B, H)
