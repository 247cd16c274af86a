"""The layers around a GRU."""

import math

import numpy as np
import pytest
from conftest import require

from gru_any import GRU, Chain, Dropout, Embedding, GRUCell, Linear, softmax_cross_entropy
from gru_any.backend import of
from gru_any.nn.init import glorot_uniform, orthogonal, uniform


def test_linear_is_torchs(backend):
    torch = require("torch")
    theirs = torch.nn.Linear(3, 4).double()
    ours = Linear(3, 4, backend=backend.name, device=backend.device, dtype="float64")
    ours.load_params({k: v.detach().numpy() for k, v in theirs.named_parameters()})
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((5, 2, 3)), rng.standard_normal((5, 2, 4))
    X = torch.tensor(x, requires_grad=True)
    Y = theirs(X)
    Y.backward(torch.tensor(dy))
    y, pullback = ours.vjp(backend.put(x))
    grads, dx = pullback(backend.put(dy))
    for a, b in ((y, Y.detach()), (dx, X.grad), (grads["weight"], theirs.weight.grad)):
        assert np.allclose(backend.host(a), b.numpy(), rtol=1e-12, atol=1e-14)
    assert np.allclose(backend.host(grads["bias"]), theirs.bias.grad.numpy(), rtol=1e-12)


def test_linear_without_bias_and_without_batch():
    linear = Linear(3, 4, bias=False, seed=0)
    x = np.ones(3, "float32")
    y, pullback = linear.vjp(x)
    assert list(linear.params) == ["weight"]
    assert np.allclose(y, linear.params["weight"].sum(axis=1), rtol=1e-5)
    grads, dx = pullback(y)
    assert dx.shape == (3,)
    assert np.allclose(grads["weight"], np.outer(y, x))


def test_embedding(backend):
    table = Embedding(6, 3, seed=0, backend=backend.name, device=backend.device, dtype="float64")
    x = np.array([[0, 5, 0], [2, 0, 5]])
    y, pullback = table.vjp(backend.put(x))
    weight = backend.host(table.params["weight"])
    assert np.array_equal(backend.host(y), weight[x])
    dy = np.random.default_rng(0).standard_normal((2, 3, 3))
    grads, dx = pullback(backend.put(dy))
    assert dx is None
    expected = np.zeros((6, 3))
    np.add.at(expected, x, dy)
    assert np.allclose(backend.host(grads["weight"]), expected, rtol=1e-14)
    again, _ = pullback(backend.put(dy))
    assert np.array_equal(backend.host(again["weight"]), backend.host(grads["weight"]))


@pytest.mark.parametrize("wrong", [-1, 6])
def test_an_index_out_of_range(backend, wrong):
    table = Embedding(6, 3, backend=backend.name, device=backend.device)
    linear = Linear(3, 2, backend=backend.name, device=backend.device)
    x = backend.put(np.array([1, wrong, 2]))
    if backend.name == "numpy":
        with pytest.raises(IndexError, match="expected 0 to n - 1 = 5"):
            table(x)
        return
    y = table(x)
    assert np.isnan(backend.host(y)).any(axis=1).tolist() == [False, True, False]
    loss, _ = softmax_cross_entropy(linear(y), backend.put(np.array([0, 1, 0])))
    assert math.isnan(float(backend.host(loss)))


def test_embedding_takes_integers_alone():
    with pytest.raises(TypeError, match="expected integers"):
        Embedding(6, 3)(np.zeros(3))


def test_scatter_add_of_many_rows(backend):
    rng = np.random.default_rng(0)
    indices, rows = rng.integers(0, 2500, 400), rng.standard_normal((400, 2))
    expected = np.zeros((2500, 2))
    np.add.at(expected, indices, rows)
    home = of(backend.put(rows))
    found = home.scatter_add(backend.put(indices), backend.put(rows), 2500)
    assert np.allclose(backend.host(found), expected, rtol=1e-13)
    none = home.scatter_add(backend.put(indices[:0]), backend.put(rows[:0]), 3)
    assert none.shape == (3, 2)


def test_dropout():
    layer, x = Dropout(0.3, dtype="float64"), np.ones((200, 50))
    assert np.array_equal(layer(x), x)
    y, pullback = layer.vjp(x)
    assert np.array_equal(y, x)
    y, pullback = layer.vjp(x, rng=np.random.default_rng(0))
    assert set(np.unique(y)) == {0.0, 1 / 0.7}
    assert abs((y == 0).mean() - 0.3) < 0.02
    assert np.array_equal(pullback(x)[1], y)


def test_dropout_that_cannot_act_is_refused():
    with pytest.raises(ValueError, match="num_layers is 1"):
        GRU(3, 4, dropout=0.5)
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="expected 0 <= "):
            Dropout(p)
        with pytest.raises(ValueError, match="expected 0 <= "):
            GRU(3, 4, 2, dropout=p)
    with pytest.raises(TypeError, match="expected a numpy Generator"):
        GRU(3, 4, 2, dropout=0.5).vjp(np.zeros((1, 1, 3), "float32"), rng=0)


def test_chain_carries_state_and_names_parameters():
    chain = Chain(Embedding(9, 3, seed=0), GRU(3, 4, 2, seed=1), GRU(4, 5, seed=2), Linear(5, 9))
    assert [k for k in chain.params if k.startswith("1.")] == [
        f"1.{name}_l{k}" for k in (0, 1) for name in ("weight_ih", "weight_hh", "bias_ih")
    ]
    x = np.random.default_rng(0).integers(0, 9, (6, 2))
    whole, last = chain(x)
    assert [h.shape for h in last] == [(2, 2, 4), (1, 2, 5)]
    first, state = chain(x[:4])
    second, state = chain(x[4:], state)
    assert np.allclose(np.concatenate([first, second]), whole, atol=1e-6)
    (_, _), pullback = chain.vjp(x)
    grads, dx, dstate = pullback(None, [None, np.ones((1, 2, 5), "float32")])
    assert dx is None
    assert list(grads) == list(chain.params)
    assert not grads["3.weight"].any()
    assert grads["2.weight_hh_l0"].any()
    assert [d.shape for d in dstate] == [(2, 2, 4), (1, 2, 5)]


def test_chain_refuses_what_does_not_fit():
    chain = Chain(GRU(3, 4), Linear(4, 2))
    x = np.zeros((2, 1, 3), "float32")
    with pytest.raises(ValueError, match="state holds 2, expected 1"):
        chain(x, [None, None])
    with pytest.raises(ValueError, match="neither dy nor dstate"):
        chain.vjp(x)[1](None)
    for wrong in (3, GRUCell(3, 4), chain):
        with pytest.raises(TypeError, match="a Chain is made of"):
            Chain(wrong)
    with pytest.raises(ValueError, match="at least one layer"):
        Chain()
    with pytest.raises(ValueError, match="must share backend and dtype"):
        Chain(GRU(3, 4), Linear(4, 2, dtype="float64"))
    with pytest.raises(KeyError, match=r"2\.weight"):
        chain.params["2.weight"] = np.zeros((2, 4), "float32")
    with pytest.raises(KeyError, match=r"missing \['1.bias'\], unused \['bias'\]"):
        chain.load_params({("bias" if k == "1.bias" else k): v for k, v in chain.params.items()})


def test_load_params_is_all_or_nothing():
    gru = GRU(3, 4, seed=0)
    before = {k: v.copy() for k, v in gru.params.items()}
    bad = {k: v + 1 for k, v in gru.params.items()}
    bad["bias_ih_l0"] = bad["bias_ih_l0"][:-1]
    with pytest.raises(ValueError, match=r"bias_ih_l0 is \(11,\), expected \(12,\)"):
        gru.load_params(bad)
    assert all(np.array_equal(before[k], gru.params[k]) for k in before)
    bad["bias_ih_l0"] = np.zeros(12, int)
    with pytest.raises(TypeError, match="expected a real floating dtype"):
        gru.load_params(bad)


def test_weights_of_the_other_variant_are_refused_with_the_reason():
    before, after = GRU(3, 4), GRU(3, 4, reset_after=True)
    with pytest.raises(KeyError, match="bias_hh belongs to reset_after=True"):
        before.load_params(after.params)
    with pytest.raises(KeyError, match="belong to reset_after=False"):
        after.load_params(before.params)


def test_to_another_home(backend):
    gru = GRU(3, 4, 2, seed=0, bidirectional=True)
    there = gru.to(backend.name, backend.device, "float64")
    assert there.backend == backend.backend
    assert there.dtype == "float64"
    back = there.to("numpy", dtype="float32")
    assert all(np.array_equal(back.params[k], gru.params[k]) for k in gru.params)


def test_repr():
    text = repr(GRU(88, 46, 2, reset_after=True))
    assert "input_size=88, hidden_size=46, num_layers=2" in text
    assert "reset_after=True" in text
    assert 3 * 46 * (88 + 46 + 2) + 3 * 46 * (46 + 46 + 2) == 31_740
    assert "backend='numpy', dtype='float32')  # 31,740 parameters" in text
    assert "reset_after=False" in repr(GRU(3, 4))
    assert "reset_after=False" in repr(GRUCell(3, 4))


def test_initialisers():
    rng = np.random.default_rng(0)
    blocks = np.split(orthogonal(rng, (12, 4), blocks=3), 3)
    for block in blocks:
        assert np.allclose(block @ block.T, np.eye(4), atol=1e-14)
    assert not np.allclose(blocks[0], blocks[1])
    tall, wide = orthogonal(rng, (5, 2)), orthogonal(rng, (2, 5))
    assert np.allclose(tall.T @ tall, np.eye(2), atol=1e-14)
    assert np.allclose(wide @ wide.T, np.eye(2), atol=1e-14)
    glorot = glorot_uniform(rng, (300, 200), blocks=3)
    assert np.abs(glorot).max() == pytest.approx(math.sqrt(6 / 300), rel=1e-3)
    assert np.abs(uniform(rng, (1000,), 0.5)).max() == pytest.approx(0.5, rel=1e-2)
    gru = GRU(4, 4)
    gru.params["weight_hh_l0"] = orthogonal(rng, (12, 4), blocks=3).astype("float32")


def test_orthogonal_is_uniform_over_rotations_and_reflections():
    rng = np.random.default_rng(0)
    entries = np.array([orthogonal(rng, (2, 2))[0, 0] for _ in range(2000)])
    assert abs(entries.mean()) < 0.05
    assert abs((entries**2).mean() - 0.5) < 0.03
