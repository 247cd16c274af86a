"""Whole calls on a device that the host plays: recorded once for a shape, and replayed."""

import threading
import warnings
import weakref

import numpy as np
import pytest

from gru_any import GRU, asarray, explain, to_numpy
from gru_any.backend import run, runner
from gru_any.backend.cuda import calls, fake, recording
from gru_any.backend.cuda.fake_ops import Ops
from gru_any.backend.cuda.memory import StreamError, count

pytestmark = pytest.mark.usefixtures("compiler")
HOST = fake.__name__


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Each test records anew."""
    monkeypatch.setattr(run, "chosen_on_cuda", "graph")
    run._runner.cache_clear()
    yield
    run._runner.cache_clear()


def pair(**settings):
    gru = GRU(3, 5, **settings, seed=0)
    return gru, gru.to(HOST)


def batch(gru, T=6, B=4, seed=0):
    rng = np.random.default_rng(seed)
    D, H = len(gru.suffixes), gru.hidden_size
    shapes = [(T, B, 3), (gru.num_layers * D, B, H), (T, B, D * H), (gru.num_layers * D, B, H)]
    return [rng.standard_normal(shape).astype(gru.dtype) for shape in shapes]


def training(gru, arrays, **options):
    """A forward and a way back -> all that comes out, on the host."""
    x, h0, dy, dh = (asarray(v, like=gru) for v in arrays)
    (y, h_n), pullback = gru.vjp(x, h0, **options)
    return [to_numpy(v) for v in (y, h_n, *flat(pullback(dy, dh)))]


def flat(results):
    grads, dx, dh0 = results
    return [dx, dh0, *(grads[name] for name in sorted(grads))]


def assert_near(found, expected, limit=2e-6):
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(to_numpy(ours) - theirs).max() <= limit * np.abs(theirs).max()


SHAPES = [
    {"num_layers": 3},
    {"num_layers": 2, "bidirectional": True, "reset_after": True},
    {"num_layers": 3, "reverse": True, "reset_after": True, "bias": False},
    {"num_layers": 2, "batch_first": True, "recompute": 64},
]


@pytest.mark.parametrize("settings", SHAPES)
def test_a_call_is_one_replay(settings):
    """From the second call on, forward and back are a graph each; nothing else is launched."""
    host, device = pair(**settings)
    T, B = (4, 70) if device.batch_first else (70, 4)
    for seed in range(4):
        arrays = batch(host, T, B, seed)
        before, launches = count["replays"], count["launches"]
        found = training(device, arrays)
        assert_near(found, training(host, arrays), 4e-6)
        assert count["replays"] - before == (0, 1, 2, 2)[seed] + 0
    assert count["launches"] == launches
    y, h_n = device(*(asarray(v, like=device) for v in arrays[:2]))
    assert_near([y, h_n], found[:2])
