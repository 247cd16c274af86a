"""Frozen models: the numbers of the model that they were made from, whatever becomes of it."""

import copy
import pickle

import numpy as np
import pytest
from conftest import PATHS, at_once, require, running

from gru_any import GRU, SGD, Chain, Embedding, GRUCell, Last, Linear, save
from gru_any.deploy import freeze
from gru_any.stream import Stream

VARIANTS = pytest.mark.parametrize("reset_after", [False, True], ids=["before", "after"])
EVERY = pytest.mark.parametrize("path", [*PATHS, *(["packed"] if "compiled" in PATHS else [])])
COMPILED = pytest.mark.skipif("compiled" not in PATHS, reason="numba: only it has thresholds")
RNG = np.random.default_rng(0)


def close(a, b, dtype="float32"):
    limit = {"float16": 2e-3, "float32": 2e-6, "float64": 1e-13}[dtype]
    return a.dtype == b.dtype == dtype and np.allclose(a, b, rtol=0, atol=limit)


@EVERY
@VARIANTS
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("B", [1, 3, 40])
def test_it_computes_what_the_model_does(path, reset_after, dtype, B):
    x = RNG.standard_normal((6, B, 5)).astype(dtype)
    h0 = RNG.standard_normal((4, B, 7)).astype(dtype)
    lengths = RNG.integers(0, 7, B)
    gru = GRU(5, 7, 2, bidirectional=True, reset_after=reset_after, dtype=dtype, seed=0)
    with running(path):
        frozen = freeze(gru)
        for _ in range(2):
            for a, b in zip(frozen(x, h0, lengths), gru(x, h0, lengths), strict=True):
                assert close(a, b, dtype)
        assert close(frozen.last(x), gru.last(x), dtype)
        for name, tap in gru.taps(x, h0, lengths).items():
            assert close(frozen.taps(x, h0, lengths)[name], tap, dtype)


@EVERY
@VARIANTS
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"num_layers": 2}])
@pytest.mark.parametrize("B", [1, 20])
def test_steps_and_streams(path, reset_after, options, B):
    x = RNG.standard_normal((6, B, 5)).astype("float32")
    gru = GRU(5, 7, reset_after=reset_after, seed=0, **options)
    with running(path):
        y, _ = gru(x)
        frozen, state = freeze(gru), None
        stream = Stream(frozen)
        for gru_params in gru.params.values():
            gru_params[...] = 9
        for t in range(3):
            y_t, state = frozen.step(x[t], state)
            assert close(y_t, y[t])
            assert close(stream.step(x[t]), y[t])
        assert close(stream(x[3:]), y[3:])


def test_on_every_backend(backend):
    x = RNG.standard_normal((4, 2, 3)).astype("float32")
    gru = GRU(3, 4, seed=0, backend=backend.backend)
    before = backend.host(gru(backend.put(x))[0])
    frozen = freeze(gru)
    gru.load_params({name: np.zeros(p.shape) for name, p in gru.params.items()})
    assert close(backend.host(frozen(backend.put(x))[0]), before)
    step, _ = frozen.step(backend.put(x[0]))
    assert close(backend.host(step), before[0])


@EVERY
def test_a_chain(path):
    x = np.array([[1, 2], [3, 4], [0, 1]])
    chain = Chain(Embedding(5, 3, seed=0), GRU(3, 40, seed=0), Linear(40, 2, seed=0))
    with running(path):
        y, (h,) = chain(x)
        frozen = freeze(chain)
        twins = [frozen, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), frozen.to()]
        stream = Stream(frozen)
        for name in chain.params:
            chain.params[name] = np.zeros_like(chain.params[name])
        for twin in twins:
            assert type(twin) is type(frozen)
            found, (h_n,) = twin(x)
            assert close(found, y)
            assert close(h_n, h)
        assert close(stream.step(x[0]), y[0])
        assert close(frozen.to(dtype="float64")(x)[0].astype("float32"), y)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), GRU.to])
def test_copies_stay_frozen(how):
    x = np.ones((3, 2, 3), "float32")
    frozen = freeze(GRU(3, 4, seed=0))
    twin = frozen.to() if how is GRU.to else how(frozen)
    assert type(twin) is type(frozen)
    assert np.array_equal(twin(x)[0], frozen(x)[0])


@pytest.mark.parametrize("model", [GRU(3, 4), Chain(GRU(3, 4), Linear(4, 2))], ids=["gru", "chain"])
def test_what_would_change_it_is_refused(model, tmp_path):
    x = np.ones((3, 2, 3), "float32")
    frozen = freeze(model)
    before, grads = frozen(x)[0], model.vjp(x)[1](model(x)[0])[0]
    name = next(iter(model.params))
    refused = [
        lambda: frozen.vjp(x),
        lambda: frozen.load_params(model.params),
        lambda: frozen.params.__setitem__(name, model.params[name]),
        lambda: SGD(frozen.params, lr=1.0).step(frozen.params, grads),
    ]
    for call in refused:
        with pytest.raises(TypeError, match="frozen model never change"):
            call()
    with pytest.raises(TypeError, match="cannot save FrozenGRU"):
        save(tmp_path / "model.safetensors", frozen)
    frozen.params[name][...] = 9  # a copy
    assert np.array_equal(frozen(x)[0], before)


def test_as_a_module_of_pytorch_it_is_refused():
    torch = require("torch")
    from gru_any.convert.torch import as_module

    with pytest.raises(TypeError, match="frozen model never change"):
        as_module(freeze(GRU(3, 4)))(torch.ones(2, 1, 3))


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="a GRUCell, expected a GRU or a Chain"):
        freeze(GRUCell(3, 4))


# what a call of arrays as they stand decides once -------------------------------------------------

OPTIONS = [
    {},
    {"num_layers": 2, "bias": False, "reverse": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"bidirectional": True, "merge": "mul", "zoneout": 0.25},
    {"bidirectional": True, "merge": None},
    {"dtype": "float16"},
    {"dtype": "float64"},
]
SHAPES = [(1, 1), (6, 1), (1, 4), (6, 20), (64, 1), (65, 9), (0, 3), (3, 0)]  # T, B


def general(frozen, x, h0=None, lengths=None, outputs=True):
    """The call of a GRU, in place of what a frozen one has prepared."""
    mask = np.ones(x.shape[:-1], bool)  # which asks for nothing
    return GRU._forward(frozen, outputs, x, h0, lengths, mask, None, None, "zero")


def same(found, expected):
    """Whether arrays, or tuples of them, are the same bit by bit."""
    if isinstance(expected, tuple):
        return all(map(same, found, expected))
    return found.dtype == expected.dtype and np.array_equal(found, expected)


def drawn(gru, T, B):
    """An input and an initial state for a GRU."""
    shape = (B, T) if gru.batch_first else (T, B)
    x = RNG.standard_normal((*shape, gru.input_size)).astype(gru.dtype)
    states = gru.num_layers * len(gru.suffixes)
    return x, RNG.standard_normal((states, B, gru.hidden_size)).astype(gru.dtype)


@EVERY
@VARIANTS
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_calls_in_any_order_have_the_bits_of_the_general_call(path, reset_after, options):
    frozen = freeze(GRU(5, 37, reset_after=reset_after, seed=0, **options))
    calls = [(*drawn(frozen, T, B), RNG.integers(0, T + 1, B)) for T, B in SHAPES]
    with running(path):
        for x, h0, lengths in 2 * calls:
            kept = x.copy(), h0.copy()
            assert same(frozen(x), general(frozen, x))
            assert same(frozen(x, h0), general(frozen, x, h0))
            assert same(frozen.last(x, h0), general(frozen, x, h0, outputs=False)[1])
            assert same(frozen(x, h0, lengths), general(frozen, x, h0, lengths))
            assert same((x, h0), kept)


@EVERY
def test_arrays_in_any_layout(path):
    frozen = freeze(GRU(5, 37, seed=0))
    x, h0 = drawn(frozen, 6, 20)
    fixed, odd = x.copy(), np.zeros(x.nbytes + 1, np.uint8)[1:].view("float32").reshape(x.shape)
    fixed.flags.writeable, odd[...] = False, x
    with running(path):
        expected = frozen(x, h0)
        for other in (np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], fixed, odd):
            assert same(frozen(other, np.asfortranarray(h0)), expected)


@EVERY
def test_results_are_the_callers_own(path):
    frozen = freeze(GRU(5, 37, seed=0))
    x, h0 = drawn(frozen, 6, 20)
    with running(path):
        y, h_n = frozen(x, h0)
        before = y.copy(), h_n.copy()
        frozen(x + 1, h0 - 1)
        assert same((y, h_n), before)
        y[...] = 0
        assert same(h_n, before[1])
        h_n[...] = 0
        assert same(frozen(x, h0), before)


@EVERY
def test_what_a_call_did_not_have_the_next_one_may(path):
    frozen = freeze(GRU(5, 37, seed=0))
    (x, h0), gru = drawn(frozen, 6, 3), GRU(5, 37, seed=0)
    at = np.zeros((6, 3), bool)
    at[2, 1] = True
    with running(path):
        plain = frozen(x, h0)
        options = [
            {"lengths": [6, 4, 0]},
            {"mask": ~at},
            {"resets": at},
            {"mask": ~at, "skipped": "repeat"},
        ]
        for given in options:
            found, expected = frozen(x, h0, **given), gru(x, h0, **given)
            assert all(map(close, found, expected))
            assert not np.allclose(found[0], plain[0])
            others = {k: v for k, v in given.items() if k != "skipped"}
            assert close(frozen.last(x, h0, **others), expected[1])
            assert same(frozen(x, h0), plain)
        assert same(frozen(x), general(frozen, x))
        assert not np.allclose(frozen(x)[0], plain[0])


@EVERY
def test_what_is_refused_is_refused_after_calls_too(path):
    frozen = freeze(GRU(5, 37, seed=0))
    x, h0 = drawn(frozen, 6, 3)
    refused = [
        ((x.astype("float64"),), TypeError, "x has dtype float64, expected float32"),
        ((x.astype(">f4"),), TypeError, "x has dtype"),
        ((x[..., :4],), ValueError, "x is .*6, 3, 4.*I = 5"),
        ((x[None],), ValueError, "x is .*1, 6, 3, 5"),
        ((x.tolist(),), TypeError, "x is a list"),
        ((x, h0.astype("float64")), TypeError, "h0 has dtype float64, expected float32"),
        ((x, h0[:, :2]), ValueError, "h0 is .*1, 2, 37"),
        ((x, h0[0]), ValueError, "h0 is .*3, 37"),
        ((x, h0, [6, 7, 1]), ValueError, "lengths"),
    ]
    with running(path):
        for _ in range(2):
            frozen(x, h0)
            for given, kind, text in refused:
                with pytest.raises(kind, match=text):
                    frozen(*given)
                with pytest.raises(kind, match=text):
                    frozen.last(*given)
        with pytest.raises(ValueError, match="skipped is 'no'"):
            frozen(x, skipped="no")


@COMPILED
def test_modes_and_thresholds_are_those_of_each_call(monkeypatch):
    from gru_any.backend.cpu.numba_runner import Scan

    frozen, ran = freeze(GRU(5, 37, seed=0)), []

    def noted(name):
        function = getattr(Scan, name).func
        return property(lambda scan: ran.append(name) or function(scan))

    for name in ("scan", "few"):
        monkeypatch.setattr(Scan, name, noted(name))
    x, h0 = drawn(frozen, 6, 3)
    expected = {"plain": [], "traced": [], "compiled": ["few"], "packed": ["scan"]}
    for path in [*expected, *reversed(expected)]:
        with running(path):
            ran.clear()
            found = frozen(x, h0)
            assert ran == expected[path]
            assert same(found, general(frozen, x, h0))


@COMPILED
def test_threads_are_those_of_each_call(monkeypatch):
    from gru_any.backend.cpu import numba_runner

    # shorter vectors share larger steps
    monkeypatch.setattr(numba_runner, "has_512_bits", lambda: True)
    frozen, members = freeze(GRU(128, 256, seed=0)), []
    x, h0 = drawn(frozen, 1, 8)
    expected = frozen(x, h0)
    run_team = numba_runner.run_team

    def noted(call, rows, most):
        members.append(most)
        return run_team(call, rows, most)

    monkeypatch.setattr(numba_runner, "run_team", noted)
    for threads, found in ((2, [2]), (1, []), (3, [3]), (1, [])):
        monkeypatch.setattr(numba_runner, "count", lambda threads=threads: threads)
        members.clear()
        assert same(frozen(x, h0), expected)
        assert members == found


@EVERY
@VARIANTS
def test_many_threads(path, reset_after):
    with running(path):
        for _ in range(5):
            frozen = freeze(GRU(30, 70, reset_after=reset_after, seed=0))
            x = [RNG.standard_normal((2, 20 + i, 30)).astype("float32") for i in range(8)]
            expected = [frozen.to()(v)[0] for v in x]

            def work(i, frozen=frozen, x=x, expected=expected):
                for _ in range(3):
                    assert np.array_equal(frozen(x[i])[0], expected[i])

            at_once(work, 8)


def test_its_size_is_told():
    text = repr(freeze(GRU(256, 256, reset_after=True)))
    assert text.startswith("freeze(GRU(input_size=256, hidden_size=256, reset_after=True")
    weights = 3 * 256 * (256 + 256 + 2) * 4
    low, high = 1e-6 * weights, 2.2e-6 * weights
    assert low - 0.1 < float(text.split(", ")[-1].removesuffix(" MB")) < high


def test_a_tied_chain_and_one_result_a_row():
    layers = Embedding(9, 4, seed=0), GRU(4, 4, seed=1), Linear(4, 9, seed=2)
    tied = Chain(*layers, tied={"2.weight": "0.weight"})
    judge = Chain(Embedding(9, 4, seed=0), GRU(4, 4, seed=1), Last(), Linear(4, 2, seed=2))
    x = np.array([[1, 2], [3, 4], [5, 6]])
    for model in (tied, judge):
        frozen = freeze(model)
        expected = model(x, lengths=[3, 1])[0].copy()
        for w in model.params.values():
            w[...] = 0
        for other in (frozen, pickle.loads(pickle.dumps(frozen))):
            assert np.allclose(other(x, lengths=[3, 1])[0], expected, atol=1e-6)
