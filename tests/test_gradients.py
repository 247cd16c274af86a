"""Every gradient against differences of the forward call, in float64."""

import numpy as np
import pytest
from conftest import THOROUGH, running, tuned
from hypothesis import given
from hypothesis import strategies as st

from gru_any import GRU, Chain, Embedding, GRUCell, Linear, gradcheck
from gru_any.inspect.gradcheck import GradientError

VARIANTS = pytest.mark.parametrize("reset_after", [False, True], ids=["before", "after"])
METHODS = pytest.mark.parametrize("method", ["central", "complex"])


def randomise(layer, seed=0):
    """Everything random and non-zero, biases too."""
    rng = np.random.default_rng(seed)
    layer.load_params({k: rng.normal(0, 0.5, v.shape) for k, v in layer.params.items()})
    return layer


def problem(gru, T, B, seed, h0, layout="batch"):
    """x and h0 for a GRU, as host arrays."""
    rng = np.random.default_rng(seed)
    states = len(gru.suffixes) * gru.num_layers
    shape = (T, B) if not gru.batch_first else (B, T)
    if layout == "single":
        shape, B = (T,), None
    batch = () if B is None else (B,)
    x = rng.standard_normal((*shape, gru.input_size))
    h = rng.standard_normal((states, *batch, gru.hidden_size)) if h0 else None
    return x, h


@METHODS
@VARIANTS
@given(
    sizes=st.tuples(*[st.integers(1, 4)] * 4),
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    ragged=st.booleans(),
    h0=st.booleans(),
    layout=st.sampled_from(["time", "batch", "single"]),
    copied=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_gru(
    method, reset_after, sizes, layers, bidirectional, bias, ragged, h0, layout, copied, seed
):
    T, B, I, H = sizes
    gru = GRU(
        I,
        H,
        layers,
        bias=bias,
        bidirectional=bidirectional,
        reset_after=reset_after,
        batch_first=layout == "batch",
        dtype="float64",
    )
    x, h = problem(randomise(gru, seed), T, B, seed, h0, layout)
    options = {}
    if ragged and layout != "single":
        options["lengths"] = np.random.default_rng(seed).integers(0, T + 1, B)
        options["lengths"][0] = T  # one row is whole, so that no gradient vanishes
    vanishing = []
    if not h0 and T == 1:  # from a zero state nothing reaches the recurrent weights in one step
        vanishing = [f"weight_hh_l{k}{s}" for k in range(layers) for s in gru.suffixes]
    options |= {"method": method, "seed": seed, "vanishing": vanishing, "directions": 1}
    with tuned(**({"packed_rows": 0, "stored_elements": 0} if copied else {})):
        gradcheck(gru, x, h, **options)


@METHODS
@VARIANTS
def test_long_enough_for_several_blocks(method, reset_after):
    gru = randomise(GRU(3, 4, 2, bidirectional=True, reset_after=reset_after, dtype="float64"))
    x, h = problem(gru, 150, 3, 1, True)
    gradcheck(gru, x, h, lengths=[150, 3, 90], method=method)


@METHODS
@VARIANTS
def test_cell(method, reset_after):
    cell = randomise(GRUCell(3, 4, reset_after=reset_after, dtype="float64"))
    rng = np.random.default_rng(0)
    gradcheck(cell, rng.standard_normal((5, 3)), rng.standard_normal((5, 4)), method=method)
    gradcheck(cell, rng.standard_normal(3), rng.standard_normal(4), method=method)


@METHODS
def test_chain(method):
    chain = Chain(
        Embedding(7, 3, dtype="float64"),
        GRU(3, 4, 2, dtype="float64"),
        GRU(4, 2, reset_after=True, bidirectional=True, dtype="float64"),
        Linear(4, 5, dtype="float64"),
    )
    rng = np.random.default_rng(0)
    randomise(chain)
    state = [rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 3, 2))]
    x = rng.integers(0, 7, (6, 3))
    gradcheck(chain, x, state, lengths=[6, 0, 2], method=method)


@VARIANTS
def test_on_every_backend(backend, reset_after):
    home = {"backend": backend.name, "device": backend.device}
    gru = GRU(3, 4, 2, bidirectional=True, reset_after=reset_after, dtype="float64", **home)
    x, h = problem(randomise(gru), 5, 3, 2, True)
    methods = ("central", "complex")
    if backend.name == "jax.numpy" and not THOROUGH:
        methods = methods[reset_after:][:1]  # it compiles each operation for each shape
    for method in methods:
        gradcheck(gru, x, h, lengths=[2, 5, 0], method=method, directions=1)


@VARIANTS
def test_half_precision_settings_do_not_change_the_mathematics(reset_after):
    gru = GRU(3, 4, reset_after=reset_after, dtype="float16", seed=3)
    gradcheck(gru, np.random.default_rng(0).standard_normal((4, 2, 3)))


def test_a_wrong_gradient_is_caught(monkeypatch):
    from gru_any import equations

    right = equations.reset_before_backward

    def wrong(xp, g, h, saved, U):
        dh, (da,) = right(xp, g, h, saved, U)
        return dh, (da * 1.001,)

    monkeypatch.setattr(equations, "reset_before_backward", wrong)
    gru = GRU(3, 4, dtype="float64", seed=0)
    with running("plain"), pytest.raises(GradientError, match="weight_ih_l0 is off by"):
        gradcheck(gru, np.ones((4, 2, 3)))


def test_a_vanishing_gradient_fails_unless_expected():
    gru = GRU(3, 4, dtype="float64", seed=0)
    x = np.zeros((4, 2, 3))
    with pytest.raises(GradientError, match="weight_ih_l0 is exactly 0"):
        gradcheck(gru, x)
    gradcheck(gru, x, vanishing=["weight_ih_l0"])
    with pytest.raises(ValueError, match=r"vanishing holds \['weight'\], expected some of \['weig"):
        gradcheck(gru, x, vanishing=["weight_ih_l0", "weight"])
    with pytest.raises(TypeError, match="vanishing is 'input0', expected a list of names"):
        gradcheck(gru, x, vanishing="input0")
    with pytest.raises(ValueError, match="directions is 0, expected an integer of at least 1"):
        gradcheck(gru, x, directions=0)
    with pytest.raises(GradientError, match="not exactly 0"):
        gradcheck(gru, x + 1, vanishing=["weight_ih_l0"])


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method is 'forward'"):
        gradcheck(Linear(2, 2), np.ones((1, 2)), method="forward")
