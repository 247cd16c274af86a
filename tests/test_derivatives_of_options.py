"""Derivatives beyond the gradient of models with options: against finite differences."""

import numpy as np
import pytest
from conftest import running

from gru_any import GRU

OPTIONS = {
    "activations": {"activation": "softsign", "gate_activation": ("hard_sigmoid", 0.2, 0.5)},
    "clip": {"clip": 0.8},
    "merge": {"bidirectional": True, "merge": "mul"},
    "zoneout": {"zoneout": 0.3},
    "recurrent dropout": {"recurrent_dropout": 0.3},
    "weight dropout": {"weight_dropout": 0.3},
    "together": {"zoneout": 0.2, "recurrent_dropout": 0.3, "weight_dropout": 0.3, "clip": 2.0},
}  # fmt: skip
STEP = 1e-6


class Case:
    """A GRU of two layers with a direction in which its inputs and parameters change."""

    def __init__(self, reset_after, **options):
        rng, self.options = np.random.default_rng(0), {"reset_after": reset_after, **options}
        self.gru = self.model()
        directions = 2 if options.get("bidirectional") else 1
        self.x, self.x_dot = rng.standard_normal((2, 4, 4, 3))
        self.h0, self.h0_dot = rng.standard_normal((2, 2 * directions, 4, 5))
        self.lengths = np.array([4, 2, 1, 3])
        shapes = {name: v.shape for name, v in self.gru.params.items()}
        self.dots = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        with running("traced"):
            self.dy = rng.standard_normal(self.gru(self.x)[0].shape)
        self.along = {"x_dot": self.x_dot, "h0_dot": self.h0_dot, "params_dot": self.dots}

    def model(self):
        return GRU(3, 5, 2, dtype="float64", seed=1, **self.options)

    def at(self, s):
        """The model, x and h0 at a point of the line."""
        gru = self.model()
        gru.load_params({name: v + s * self.dots[name] for name, v in gru.params.items()})
        return gru, self.x + s * self.x_dot, self.h0 + s * self.h0_dot

    def gradients(self, s, seed):
        gru, x, h0 = self.at(s)
        _, pullback = gru.vjp(x, h0, self.lengths, generator(seed))
        grads, dx, dh0 = pullback(self.dy)
        return [*grads.values(), dx, dh0]


def generator(seed):
    return None if seed is None else np.random.default_rng(seed)


def differences(function):
    """Central differences of what a function of s returns."""
    pairs = zip(function(STEP), function(-STEP), strict=True)
    return [(above - below) / (2 * STEP) for above, below in pairs]


@pytest.mark.parametrize("path", ["plain", "traced"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_derivatives_equal_finite_differences(options, after, path):
    with running(path):
        case = Case(after, **options)

        def outputs(s):
            gru, x, h0 = case.at(s)
            return gru(x, h0, case.lengths)

        values, found = case.gru.jvp(case.x, case.h0, case.lengths, **case.along)
        assert np.array_equal(values[0], case.gru(case.x, case.h0, case.lengths)[0])
        for dot, expected in zip(found, differences(outputs), strict=True):
            assert np.allclose(dot, expected, atol=1e-8)
        for seed in (None, 7):
            given = case.x, case.h0, case.lengths, generator(seed)
            *_, pullback = case.gru.forward_over_reverse(*given, **case.along)
            _, (grads, dx, dh0) = pullback(case.dy)
            expected = differences(lambda s, seed=seed: case.gradients(s, seed))
            for dot, difference in zip([*grads.values(), dx, dh0], expected, strict=True):
                assert np.allclose(dot, difference, atol=3e-8)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_of_examples_sum_to_the_gradient(options):
    case = Case(False, **options)
    one = np.zeros_like(case.dy)
    one[:, 2] = case.dy[:, 2]
    with running("traced"):
        _, pullback = case.gru.vjp(case.x, case.h0, case.lengths, generator(7))
        grads, *_ = pullback(case.dy)
        each, *_ = pullback.per_example(case.dy)
        alone, *_ = pullback(one)
    for name, grad in grads.items():
        assert each[name].shape == (4, *grad.shape)
        assert np.allclose(each[name].sum(0), grad, atol=1e-13)
        assert np.allclose(each[name][2], alone[name], atol=1e-13)
