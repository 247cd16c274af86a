"""What tests of a GRU's options draw, run and compare: a training call with all that comes out."""

import numpy as np
import pytest

from gru_any import asarray, to_numpy
from gru_any.nn import sweep


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """For each test of a module that imports it: a few steps already are several blocks."""
    monkeypatch.setattr(sweep, "STEPS", 4)
    monkeypatch.setattr(sweep, "ROWS", 1)


def drawn(gru, T, B, seed=0):
    """x, h0, dy and dh_n."""
    rng, I, H = np.random.default_rng(seed), gru.input_size, gru.hidden_size
    L, D = gru.num_layers, len(gru.suffixes)
    shapes = [(T, B, I), (L * D, B, H), (T, B, D * H), (L * D, B, H)]
    return [rng.standard_normal(shape).astype(gru.dtype) for shape in shapes]


def results(gru, x, h0, dy, dh, **options):
    """All that comes out of a training call, on the host; options: of `vjp`."""
    x, h0, dy, dh = (None if v is None else asarray(v, like=gru) for v in (x, h0, dy, dh))
    (y, h_n), pullback = gru.vjp(x, h0, **options)
    grads, *inputs = pullback(dy, dh)
    names = ["dx", "dh0", *(["dstart"] if options.get("start") is not None else [])]
    found = {"y": y, "h_n": h_n, **dict(zip(names, inputs, strict=True)), **grads}
    return {name: to_numpy(v) for name, v in found.items()}


def assert_same(found, expected, limit):
    """Compare relative to the largest number of each array, which counts as 1 at least."""
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        assert found[name].shape == theirs.shape, name
        scale = max(1.0, np.abs(theirs).max(initial=0))
        assert np.abs(found[name] - theirs).max(initial=0) <= limit * scale, name
