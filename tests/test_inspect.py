"""What is measured inside of a GRU, against numbers worked out by hand."""

import numpy as np
import pytest
from conftest import running

from gru_any import GRU, Chain, Embedding, GRUCell, Linear
from gru_any.inspect.values import activity, fading, half_life, saturation, spectrum
from gru_any.nn import init


@pytest.fixture(autouse=True)
def _without_compiling():
    with running("traced"):
        yield


def constant_gate(H=3, keep=(0.5, 0.25, 0.9)):
    """A GRU whose update gates are constants, and whose units do not hear each other."""
    gru = GRU(2, H, dtype="float64", seed=0)
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0"):
        gru.params[name][:] = 0
    z = np.array(keep)
    gru.params["bias_ih_l0"][H : 2 * H] = np.log(z / (1 - z))
    return gru


def test_memory_of_constant_gates():
    gru = constant_gate()
    z = activity(gru, np.ones((7, 4, 2)))[0]["z"][0]
    assert np.allclose(half_life(z), np.log(0.5) / np.log([0.5, 0.25, 0.9]), rtol=1e-12)
    h0 = np.ones((1, 1, 3))
    steps = round(half_life(z)[0])
    assert np.allclose(gru.last(np.ones((steps, 1, 2)), h0)[0, 0, 0], 0.5)


def test_gates_at_their_ends():
    assert half_life(np.array([[0.0, 1.0]])).tolist() == [0.0, np.inf]
    assert half_life(np.array([[1.0, 0.9], [1.0, 0.9], [0.0, 0.9]])).tolist() == [2.0, np.inf]
    below, above = saturation(np.array([[[0.0, 0.95]], [[0.5, 0.95]]]))
    assert below.tolist() == [0.5, 0.0]
    assert above.tolist() == [0.0, 1.0]


def test_fading_of_constant_gates():
    """With one unit, what is left after d steps is z^d."""
    left = fading(constant_gate(1, (0.8,)), np.ones((12, 5, 2)))
    assert np.allclose(left[0], 0.8 ** np.arange(12), rtol=1e-12)


@pytest.mark.parametrize("reset_after", [False, True])
def test_fading_is_the_slope_of_the_loss(reset_after):
    """The first layer's gradient at distance d, by differences at a state put in from outside."""
    gru = GRU(2, 3, 2, reset_after=reset_after, dtype="float64", seed=0)
    x = np.random.default_rng(1).standard_normal((6, 1, 2))
    direction = np.random.default_rng(0).standard_normal((1, 3))
    h = gru.last(x[:4])
    slopes = []
    for i in range(3):
        ends = []
        for e in (1e-5, -1e-5):
            moved = h.copy()
            moved[1, 0, i] += e
            ends.append(np.sum(direction * gru.last(x[4:], moved)[1]))
        slopes.append((ends[0] - ends[1]) / 2e-5)
    left = fading(gru, x)
    assert np.allclose(left[1, 2], np.linalg.norm(slopes) / np.linalg.norm(direction), rtol=1e-7)


def test_activity_of_each_gru_of_a_chain():
    model = Chain(
        Embedding(9, 4, seed=0), GRU(4, 5, seed=1), Linear(5, 3, seed=2), GRU(3, 2, 2, seed=3)
    )
    x = np.array([[1, 2], [3, 4], [8, 0]])
    one, two = activity(model, x)
    assert one["r"].shape == (1, 3, 2, 5)
    assert two["h"].shape == (2, 3, 2, 2)
    y, state = model(x)
    assert np.array_equal(two["h"][-1], y)
    assert np.array_equal(one["h"][:, -1], state[0])
    options = {"lengths": [3, 2], "mask": x != 1, "resets": (x == 8) | (x == 4)}
    options["start"] = [np.ones((1, 5), "float32"), np.full((2, 2), 0.5, "float32")]
    y, state = model(x, **options)
    one, two = activity(model, x, **options)
    assert np.array_equal(two["h"][-1], y)
    assert np.array_equal(one["h"][:, -1, 0], state[0][:, 0])  # of the row that is read to its end
    options["start"] = options["start"][0]
    alone = activity(model.layers[1], model.layers[0](x), **options)
    assert np.array_equal(alone[0]["z"], one["z"])


def test_spectrum_of_known_matrices():
    H, gru = 6, GRU(2, 6, 2, seed=0)
    U = gru.params["weight_hh_l1"]
    U[:] = init.orthogonal(np.random.default_rng(0), (3 * H, H), blocks=3)
    U[:H] = np.diag(np.arange(H))
    found = spectrum(gru)
    assert list(found) == ["weight_hh_l0", "weight_hh_l1"]
    assert np.allclose(found["weight_hh_l1"]["r"], np.arange(H)[::-1])
    assert np.allclose(np.abs(found["weight_hh_l1"]["z"]), 1, rtol=1e-6)
    assert list(spectrum(GRUCell(2, 3))) == ["weight_hh"]


def test_fading_where_the_last_step_is_the_first():
    gru = GRU(2, 3, dtype="float64", seed=0)
    turned = GRU(2, 3, reverse=True, dtype="float64")
    turned.load_params({f"{name}_reverse": array for name, array in gru.params.items()})
    x = np.random.default_rng(1).standard_normal((6, 2, 2))
    assert np.allclose(fading(turned, x[::-1]), fading(gru, x), rtol=1e-12)


def test_two_directions_have_no_last_step():
    with pytest.raises(ValueError, match="this one is bidirectional"):
        fading(GRU(2, 3, bidirectional=True), np.ones((4, 1, 2), "float32"))
