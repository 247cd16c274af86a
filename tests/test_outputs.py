"""The outputs of all layers: against one GRU for each layer, one after the other."""

import numpy as np
import pytest
from conftest import HOST, require, running
from vjp_calls import short_blocks  # noqa: F401

from gru_any import GRU, Chain, convert, explain, gradcheck, load, save, to_numpy
from gru_any.backend import modes
from gru_any.deploy import c, freeze
from gru_any.stream import Stream

T, B, I, H, L = 9, 3, 3, 4, 3
KINDS = {
    "plain": {},
    "after": {"reset_after": True, "recompute": 4},
    "both": {"bidirectional": True},
    "mul": {"bidirectional": True, "merge": "mul"},
    "sum": {"bidirectional": True, "merge": "sum", "recompute": "sqrt"},
    "apart": {"bidirectional": True, "merge": None},
    "reverse": {"reverse": True, "layer_norm": True, "reset_after": True},
}


@pytest.fixture(autouse=True)
def traced():
    """Without a compiler, where a test does not choose a path."""
    with running("traced"):
        yield


EVERY = pytest.mark.parametrize("kind", KINDS)
PATH = pytest.mark.parametrize("path", ["plain", "traced"])
RNG = np.random.default_rng(0)
GIVEN = {
    "lengths": [T, 0, 5],
    "mask": RNG.random((T, B)) < 0.8,
    "resets": RNG.random((T, B)) < 0.3,
}


def model(kind, **options):
    return GRU(I, H, L, outputs="all", dtype="float64", seed=0, **KINDS[kind], **options)


def arrays(gru):
    """x, h0, and cotangents of y, one of a layer, and of h_n."""
    rng, D = np.random.default_rng(1), len(gru.suffixes)
    x, h0, dh = (rng.standard_normal(s) for s in ((T, B, I), (L * D, B, H), (L * D, B, H)))
    if gru.merge is None:
        return x, h0, tuple(tuple(rng.standard_normal((D, T, B, H))) for _ in range(L)), dh
    return x, h0, tuple(rng.standard_normal((L, T, B, gru.output_size))), dh


def layers_of(gru):
    """A GRU for each layer, whose outputs are side by side where the next reads a pair."""
    found = []
    for layer in range(L):
        settings = {k: v for k, v in gru.settings.items() if k not in ("outputs", "dropout")}
        width = gru.output_size if layer else I
        one = GRU(**{**settings, "input_size": width, "num_layers": 1}, dtype="float64")
        one.load_params({k: gru.params[k.replace("_l0", f"_l{layer}")] for k in one.params})
        found.append(one)
    return found


def beside(y):
    return np.concatenate(y, axis=-1) if isinstance(y, tuple) else y


def by_layer(gru, x, h0, dy, dh, **options):
    """The same from these GRUs."""
    D, ys, pullbacks, hs = len(gru.suffixes), [], [], []
    for n, one in enumerate(layers_of(gru)):
        (y, h), pullback = one.vjp(x, h0[n * D : n * D + D], **options)
        x = beside(y)
        ys.append(y), hs.append(h), pullbacks.append(pullback)
    grads, states, dx = {}, [], 0.0
    for n in range(L - 1, -1, -1):
        total = beside(dy[n]) + dx
        total = tuple(np.split(total, 2, -1)) if gru.merge is None else total
        of_layer, dx, dh0 = pullbacks[n](total, dh[n * D : n * D + D])
        grads |= {k.replace("_l0", f"_l{n}"): v for k, v in of_layer.items()}
        states[:0] = [dh0]
    return (tuple(ys), np.concatenate(hs)), (grads, dx, np.concatenate(states))


def same(found, expected):
    """Trees of arrays are equal to rounding."""
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        found, expected = (tuple(tree[k] for k in sorted(tree)) for tree in (found, expected))
    if isinstance(expected, tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            same(a, b)
        return
    assert found.shape == expected.shape
    assert np.allclose(to_numpy(found), expected, rtol=0, atol=1e-12)


@PATH
@EVERY
def test_layers_one_after_the_other(path, kind):
    gru = model(kind)
    given = arrays(gru)
    for options in ({}, GIVEN):
        with running(path):
            results, back = by_layer(gru, *given, **options)
            x, h0, dy, dh = given
            found, pullback = gru.vjp(x, h0, **options)
            same(found, results)
            same(pullback(dy, dh), back)
            same(pullback(dy, dh), back)
            same(gru(x, h0, **options), results)
            assert np.array_equal(gru.last(x, h0, **options), found[1])
            grads, dx, dh0 = pullback.per_example(dy, dh)
            same(({k: v.sum(0) for k, v in grads.items()}, dx, dh0), back)


@pytest.mark.parametrize("path", ["compiled", "packed"])
def test_compiled(path):
    require("numba")
    gru = model("plain")
    x, h0, dy, dh = arrays(gru)
    results, back = by_layer(gru, x, h0, dy, dh, **GIVEN)
    with running(path):
        found, pullback = gru.vjp(x, h0, **GIVEN)
        same(found, results)
        same(pullback(dy, dh), back)


@EVERY
def test_gradients_are_slopes(kind):
    gru = model(kind)
    x, h0, *_ = arrays(gru)
    with running("plain"):
        gradcheck(gru, x, h0, method="complex", directions=1, **GIVEN)


def test_none_of_a_layer_is_zeros():
    gru = model("both")
    x, h0, dy, dh = arrays(gru)
    zeros = np.zeros_like(dy[0])
    with running("traced"):
        (y, _), pullback = gru.vjp(x, h0)
        for chosen in ((None, dy[1], None), (dy[0], None, None), (None, None, dy[2])):
            filled = tuple(zeros if v is None else v for v in chosen)
            same(pullback(chosen, dh), pullback(filled, dh))
            same(pullback(list(chosen)), pullback(filled))
        same(pullback((None,) * L, dh), pullback(None, dh))
        usual = GRU(I, H, L, bidirectional=True, dtype="float64", seed=0)
        (top, _), back = usual.vjp(x, h0)
        assert np.array_equal(top, y[-1])
        same(pullback((None, None, dy[2]), dh), back(dy[2], dh))
        with pytest.raises(ValueError, match="neither dy nor dh_n"):
            pullback((None,) * L)


def test_outputs_come_before_dropout():
    """What a layer puts out is what the next one reads before its mask."""
    gru = model("plain", dropout=0.5)
    x, h0, dy, dh = arrays(gru)
    rng = np.random.default_rng
    with running("traced"):
        (y, _), pullback = gru.vjp(x, h0, rng=rng(7))
        assert np.array_equal(y[0], gru(x, h0)[0][0])
        first = layers_of(gru)[0]
        # each mask is drawn of the generator in turn, and multiplies the input of the next layer
        masks = [gru._mask(r, (T, B, H), 0.5) for r in [rng(7)] for _ in range(L - 1)]
        z = y[0] * masks[0]
        assert np.allclose(layers_of(gru)[1](z, h0[1:2])[0], y[1], rtol=0, atol=1e-14)
        grads, dx, _ = pullback(dy, dh)
        mine = first.vjp(x, h0[:1])[1]
        back = layers_of(gru)[1].vjp(z, h0[1:2])[1]
        top = layers_of(gru)[2].vjp(y[1] * masks[1], h0[2:])[1]
        _, d, _ = top(dy[2], dh[2:])
        _, d, _ = back(dy[1] + d * masks[1], dh[1:2])
        of_first, d, _ = mine(dy[0] + d * masks[0], dh[:1])
    same(dx, d)
    same(grads["weight_hh_l0"], of_first["weight_hh_l0"])


def test_skipped_steps_repeat_in_each_layer():
    gru = model("plain")
    x, h0, dy, dh = arrays(gru)
    options = {"mask": GIVEN["mask"], "skipped": "repeat"}
    with running("traced"):
        results, _ = by_layer(gru, x, h0, dy, dh, **options)
        same(gru(x, h0, **options), results)
        gradcheck(gru, x, h0, directions=1, **options)


def test_layouts():
    gru, first = model("both"), model("both", batch_first=True)
    x, h0, dy, dh = arrays(gru)
    with running("traced"):
        (y, _), pullback = gru.vjp(x, h0)
        (turned, _), back = first.vjp(x.transpose(1, 0, 2), h0)
        same(turned, tuple(v.transpose(1, 0, 2) for v in y))
        same(back(tuple(v.transpose(1, 0, 2) for v in dy), dh)[0], pullback(dy, dh)[0])
        one, _ = gru(x[:, 1], h0[:, 1])
        same(one, tuple(v[:, 1] for v in y))


@PATH
def test_along_a_direction(path):
    gru = model("both")
    x, h0, dy, dh = arrays(gru)
    x_dot = np.random.default_rng(5).standard_normal(x.shape)
    with running(path):
        (values, _), (dots, _) = gru.jvp(x, h0, x_dot=x_dot, **GIVEN)
        above, below = (gru(x + s * x_dot, h0, **GIVEN)[0] for s in (1e-6, -1e-6))
        for dot, a, b in zip(dots, above, below, strict=True):
            assert np.allclose(dot, (a - b) / 2e-6, rtol=0, atol=1e-8)
        same(values, gru(x, h0, **GIVEN)[0])
        *_, pullback = gru.forward_over_reverse(x, h0, x_dot=x_dot, **GIVEN)
        (_, dx, _), (_, dx_dot, _) = pullback(dy, dh)
        above, below = (gru.vjp(x + s * x_dot, h0, **GIVEN)[1](dy, dh)[1] for s in (1e-6, -1e-6))
        same(dx, gru.vjp(x, h0, **GIVEN)[1](dy, dh)[1])
        assert np.allclose(dx_dot, (above - below) / 2e-6, rtol=0, atol=1e-7)


def test_every_library(backend):
    gru = model("both")
    x, h0, dy, dh = arrays(gru)
    results, back = by_layer(gru, x, h0, dy, dh)
    there = gru.to(backend.name, backend.device)
    x, h0, dh = map(backend.put, (x, h0, dh))
    found, pullback = there.vjp(x, h0)
    assert all(type(v) is type(x) for v in found[0])
    grads, dx, dh0 = pullback(tuple(map(backend.put, dy)), dh)
    host = backend.host
    same((tuple(map(host, found[0])), host(found[1])), results)
    same(({k: host(v) for k, v in grads.items()}, host(dx), host(dh0)), back)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("way", ["eager", "graph", "persistent", "whole"])
def test_cuda(way, monkeypatch):
    """Thrice, so that the call is compiled, recorded and replayed; one dy is None."""
    monkeypatch.setattr(modes, "chosen_on_cuda", way)
    modes._runner.cache_clear()
    modes._on_cuda.cache_clear()
    gru = model("plain")
    there, put = gru.to(HOST), gru.to(HOST).backend.put
    for n in range(3):
        x, h0, dy, dh = (v + n if isinstance(v, np.ndarray) else v for v in arrays(gru))
        (y, _), pullback = there.vjp(put(x), put(h0))
        (expected, _), back = gru.vjp(x, h0)
        same(tuple(map(to_numpy, y)), expected)
        dy = (dy[0], None, dy[2])
        found = pullback(tuple(None if v is None else put(v) for v in dy), put(dh))
        same(to_numpy(found[1]), back(dy, dh)[1])
    modes._runner.cache_clear()
    modes._on_cuda.cache_clear()


def test_steps_streams_and_frozen_models():
    gru = model("plain")
    x, h0, *_ = arrays(gru)
    y, h_n = gru(x, h0)
    for one in (gru, freeze(gru)):
        same(one(x, h0), (y, h_n))
        stream = Stream(one)
        stream.state = h0
        found = [stream(x[:4]), stream(x[4:6])]
        for t in (6, 7, 8):
            found.append(tuple(v[None] for v in stream.step(x[t])))
        same(tuple(np.concatenate(v) for v in zip(*found, strict=True)), y)
        alone, state = one.step(x[0, 0], h0[:, 0])
        same(alone, tuple(v[0, 0] for v in y))
        assert state.shape == (L, H)


def test_inside_of_jax():
    jax = require("jax")
    gru = model("both")
    x, h0, dy, dh = arrays(gru)
    expected = gru.vjp(x, h0)[1](dy, dh)[1]
    there = gru.to("jax.numpy")

    def loss(x):
        y, h_n = there(x, jax.numpy.asarray(h0))
        return sum((v * d).sum() for v, d in zip(y, dy, strict=True)) + (h_n * dh).sum()

    found = jax.jit(jax.grad(loss))(jax.numpy.asarray(x))
    assert np.allclose(found, expected, rtol=0, atol=1e-10)


def test_as_pytorch_with_a_gru_for_each_layer():
    torch = require("torch")
    gru = model("after", bidirectional=True)
    x, h0, dy, dh = arrays(gru)
    z = start = torch.from_numpy(x).requires_grad_()
    loss, ours = 0.0, []
    for n in range(L):
        one = torch.nn.GRU(z.shape[-1], H, bidirectional=True, dtype=torch.float64)
        one.load_state_dict({
            k: torch.from_numpy(gru.params[k.replace("_l0", f"_l{n}")].copy())
            for k in one.state_dict()
        })  # fmt: skip
        z, h = one(z, torch.from_numpy(h0[2 * n : 2 * n + 2]))
        ours.append(z.detach().numpy())
        loss = loss + (z * torch.from_numpy(dy[n])).sum()
        loss = loss + (h * torch.from_numpy(dh[2 * n : 2 * n + 2])).sum()
    loss.backward()
    (y, _), pullback = gru.vjp(x, h0)
    same(y, tuple(ours))
    same(pullback(dy, dh)[1], start.grad.numpy())


def test_files_and_words(tmp_path):
    gru = model("plain")
    save(tmp_path / "all.safetensors", gru)
    again = load(tmp_path / "all.safetensors")
    assert again.outputs == "all"
    assert "outputs='all'" in repr(again)
    assert "y is a tuple of the outputs of all" in explain(gru)
    assert "outputs" not in GRU(I, H, seed=0).settings
    same(again(np.ones((2, 1, I))), gru(np.ones((2, 1, I))))
    y, _ = GRU(I, H, outputs="all", dtype="float64", seed=0)(np.ones((2, 1, I)))
    assert isinstance(y, tuple)
    assert len(y) == 1


def test_what_is_refused(tmp_path):
    gru = model("after")
    x, h0, dy, _ = arrays(gru)
    with pytest.raises(ValueError, match='outputs is \'last\', expected "top" or "all"'):
        GRU(I, H, outputs="last")
    with pytest.raises(ValueError, match="puts out a tuple, which no layer of a Chain reads"):
        Chain(gru)
    pullback = gru.vjp(x, h0)[1]
    with pytest.raises(TypeError, match="dy is a ndarray, expected a tuple of 3, one for each lay"):
        pullback(dy[2])
    with pytest.raises(TypeError, match="dy is a tuple of 2, expected a tuple of 3"):
        pullback(dy[:2])
    with pytest.raises(ValueError, match=r"dy is \(9, 3, 5\), expected \(T, B, D\*H\)"):
        pullback((None, np.zeros((T, B, 5)), None))
    single = gru.to(dtype="float32")
    for write in (
        lambda: convert.onnx.save(tmp_path / "a.onnx", single),
        lambda: convert.keras.save(tmp_path / "a.keras", single),
        lambda: convert.torch.save(tmp_path / "a.pt", single),
        lambda: c.write(single, tmp_path / "c"),
    ):
        with pytest.raises((ValueError, TypeError), match="outputs"):
            write()
    require("torch")
    with pytest.raises(ValueError, match='outputs="all" is none of a module'):
        convert.torch.as_module(single)
