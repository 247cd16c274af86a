"""Arrays of other libraries, run by NumPy in their own memory, and on a CUDA device by CuPy."""

import copy
import gc
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import at_once, require, running

from gru_any import GRU, Chain, Dropout, Embedding, GRUCell, Linear, explain
from gru_any.backend import Mode, modes, select
from gru_any.backend.bridge import _bridge
from gru_any.backend.transfer import neighbour
from gru_any.deploy import freeze
from gru_any.stream import Stream

LIBRARIES = ["torch", "jax.numpy"]
SCRIPTS = Path(__file__).parent.parent / "scripts" / "maintenance"
DATA = np.random.default_rng(0)


@pytest.fixture(params=LIBRARIES)
def home(request):
    require(request.param)
    return select(request.param)


@pytest.fixture
def torch():
    return require("torch")


def numbers(*shape):
    return DATA.standard_normal(shape).astype("float32")


def pair(home, *sizes, **options):
    """One model twice: over the library's arrays and over NumPy's."""
    return GRU(*sizes, backend=home, seed=1, **options), GRU(*sizes, seed=1, **options)


def same(home, ours, theirs):
    """Results are of the library, and have the bits that NumPy gives."""
    if isinstance(theirs, (tuple, list)):
        for a, b in zip(ours, theirs, strict=True):
            same(home, a, b)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        same(home, list(ours.values()), list(theirs.values()))
    else:
        home.check("a result", ours, str(theirs.dtype))
        np.testing.assert_array_equal(home.to_numpy(ours), theirs)


@pytest.mark.parametrize("library", ["dpnp", "dask.array", "ndonnx"])
def test_other_libraries_give_the_numbers_of_numpy(library, monkeypatch):
    require(library)
    monkeypatch.syspath_prepend(SCRIPTS)
    import libraries

    assert libraries.agrees(library)


@pytest.fixture
def calls(monkeypatch):
    """The libraries of the arrays that layers compute with."""
    found = set()
    forward = GRU._forward

    def look(self, outputs, x, *given):
        found.add(type(x))
        return forward(self, outputs, x, *given)

    monkeypatch.setattr(GRU, "_forward", look)
    return found


OPTIONS = [{}, {"bidirectional": True, "num_layers": 2}, {"reset_after": True, "batch_first": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_every_call_gives_the_bits_of_numpy(home, options):
    ours, theirs = pair(home, 3, 4, **options)
    x, h0 = numbers(5, 2, 3), numbers(len(theirs.suffixes) * theirs.num_layers, 2, 4)
    x = x.swapaxes(0, 1).copy() if theirs.batch_first else x
    X, H0 = home.put(x), home.put(h0)
    for given in ((), (h0,), (h0, [5, 2]), (None, [0, 3])):
        put = [home.put(v) if isinstance(v, np.ndarray) else v for v in given]
        same(home, ours(X, *put), theirs(x, *given))
    same(home, ours(X, lengths=home.put(np.array([3, 1]))), theirs(x, lengths=[3, 1]))
    same(home, ours.last(X, H0), theirs.last(x, h0))
    same(home, ours.taps(X, H0), theirs.taps(x, h0))
    (y, h), back = theirs.vjp(x, h0, [4, 5])
    (Y, H), pullback = ours.vjp(X, H0, [4, 5])
    same(home, (Y, H), (y, h))
    dy, dh = numbers(*y.shape), numbers(*h.shape)
    for given in ((dy, dh), (dy, None), (None, dh)):
        put = [None if v is None else home.put(v) for v in given]
        same(home, pullback(*put), back(*given))
    same(home, pullback.taps(home.put(dy), dh_n=home.put(dh)), back.taps(dy, dh))


def test_steps_streams_cells_and_chains(home):
    ours, theirs = pair(home, 3, 4, num_layers=2)
    x, state, State = numbers(2, 3), None, None
    stream, Streamed = Stream(theirs), Stream(ours)
    for _ in range(3):
        y, state = theirs.step(x, state)
        Y, State = ours.step(home.put(x), State)
        same(home, (Y, State), (y, state))
        same(home, Streamed.step(home.put(x)), stream.step(x))
    same(home, Streamed.state, stream.state)
    cell, Cell = (GRUCell(3, 4, seed=0, backend=b) for b in (None, home))
    (h, back), (H, pullback) = cell.vjp(x), Cell.vjp(home.put(x))
    same(home, (Cell(home.put(x)), H), (cell(x), h))
    same(home, pullback(H), back(h))

    def chain(backend):
        layers = (Embedding(5, 3, seed=0, backend=backend), GRU(3, 4, seed=1, backend=backend))
        last = Linear(4, 5, seed=2, backend=backend)
        return Chain(*layers, last)

    tokens = DATA.integers(0, 5, (6, 2))
    (y, s), back = chain(None).vjp(tokens)
    (Y, S), pullback = chain(home).vjp(home.put(tokens))
    same(home, (Y, S), (y, s))
    same(home, chain(home)(home.put(tokens), S), chain(None)(tokens, s))
    dy = numbers(*y.shape)
    (grads, none, ds), (Grads, None_, dS) = back(dy), pullback(home.put(dy))
    assert none is None_ is None
    same(home, (Grads, dS), (grads, ds))


def test_no_array_is_copied_on_the_way(torch, monkeypatch):
    ours = GRU(64, 256, backend="torch", seed=0)
    x, seen = torch.ones(50, 8, 64), []
    forward = GRU._forward

    def look(self, outputs, x, *given):
        result = forward(self, outputs, x, *given)
        seen.extend([x, *self.params.values(), *result])
        return result

    monkeypatch.setattr(GRU, "_forward", look)
    y, h_n = ours(x)
    mine = [x, *ours.params.values(), y, h_n]
    assert [v.__array_interface__["data"][0] for v in seen] == [v.data_ptr() for v in mine]
    jax = require("jax")
    seen.clear()
    there = GRU(64, 256, backend="jax.numpy", seed=0)
    X = jax.numpy.ones((50, 8, 64), "float32")
    y, _ = there(X)
    mine = [X, *there.params.values(), y]
    assert [v.__array_interface__["data"][0] for v in seen[:-1]] == [
        v.unsafe_buffer_pointer() for v in mine
    ]


def test_results_and_arguments_belong_to_the_caller(home):
    ours, theirs = pair(home, 3, 4)
    x, other = numbers(40, 2, 3), numbers(40, 2, 3)
    X = home.put(x)
    first = ours(X)
    (Y, H), pullback = ours.vjp(X)
    unused = ours.vjp(home.put(other))
    del unused
    for _ in range(3):
        ours(home.put(other))
    gc.collect()
    same(home, first, theirs(x))
    same(home, X, x)
    (y, _), back = theirs.vjp(x)
    dy = numbers(*y.shape)
    expected = back(dy)
    same(home, pullback(home.put(dy)), expected)
    del X, Y, H, ours  # what the pullback needs it keeps alive
    gc.collect()
    again = pullback(home.put(dy))
    same(home, again, expected)
    del pullback
    gc.collect()
    same(home, again, expected)


def test_results_of_torch_can_be_written_without_harm(torch):
    ours, theirs = pair(select("torch"), 3, 4)
    x = torch.ones(5, 2, 3)
    (y, h_n), pullback = ours.vjp(x)
    expected = theirs.vjp(x.numpy())[1](np.ones((5, 2, 4), "float32"))
    y.fill_(9), h_n.fill_(9)
    grads, dx, dh0 = pullback(torch.ones(5, 2, 4))
    same(ours.backend, (grads, dx, dh0), expected)
    grads["weight_hh_l0"].fill_(9), dx.fill_(9)
    same(ours.backend, pullback(torch.ones(5, 2, 4)), expected)


def test_parameters_are_read_anew_in_each_call(torch):
    ours, theirs = pair(select("torch"), 3, 4)
    x, name = np.ones((2, 1, 3), "float32"), "weight_hh_l0"
    X = torch.tensor(x)
    ours(X)
    ours.params[name][0, 0] = 2.0
    theirs.params[name][0, 0] = 2.0
    same(ours.backend, ours(X), theirs(x))
    ours.params[name].data = torch.zeros(12, 4)
    theirs.params[name][...] = 0
    same(ours.backend, ours(X), theirs(x))
    ours.params[name] = torch.ones(12, 4)
    theirs.params[name] = np.ones((12, 4), "float32")
    same(ours.backend, ours(X), theirs(x))
    _, pullback = ours.vjp(X)
    ours.params[name] = torch.zeros(12, 4)
    with pytest.raises(RuntimeError, match="replaced between vjp and its pullback"):
        pullback(torch.ones(2, 1, 4))


def test_settings_that_change_later(home):
    ours, theirs = pair(home, 3, 4, num_layers=2)
    x = numbers(3, 1, 3)
    ours(home.put(x))
    ours.dropout = theirs.dropout = 0.5
    expected, found = (
        model.vjp(v, rng=np.random.default_rng(0))[0]
        for model, v in ((theirs, x), (ours, home.put(x)))
    )
    same(home, found, expected)
    assert not np.array_equal(expected[0], theirs(x)[0])
    ours.zoneout = theirs.zoneout = 0.5
    same(home, ours(home.put(x)), theirs(x))
    assert not np.array_equal(expected[0], theirs(x)[0])


def test_strides_of_torch(torch):
    ours, theirs = pair(select("torch"), 3, 4)
    base = torch.tensor(numbers(3, 4, 6, 2))
    views = [base[0].permute(1, 2, 0)[:, :, :3], base[0, :3].permute(1, 2, 0), base[::2, 1, ::2]]
    views = [v if v.shape[-1] == 3 else v.permute(1, 2, 0)[..., :3] for v in views[:2]]
    for X in (*views, torch.ones(3).expand(5, 2, 3), torch.ones(5, 0, 3), torch.ones(0, 2, 3)):
        same(ours.backend, ours(X), theirs(X.numpy()))
        dy = torch.ones(1).expand(*X.shape[:2], 4)
        found, expected = ours.vjp(X)[1](dy), theirs.vjp(X.numpy())[1](dy.numpy())
        same(ours.backend, found, expected)


def test_arrays_of_jax_are_not_written_and_may_still_be_on_their_way():
    jax = require("jax")
    ours, theirs = pair(select("jax.numpy"), 256, 4)
    (read,) = [_bridge(ours.backend, "float32").read(jax.numpy.ones(3))]
    assert not read.flags.writeable

    @jax.jit
    def slow(v):
        return jax.lax.fori_loop(0, 200, lambda _, w: jax.numpy.tanh(w @ v), v)

    x = slow(jax.numpy.asarray(numbers(256, 256)))
    y = ours(x[:, None, :])[0]
    same(ours.backend, y, theirs(np.asarray(x)[:, None, :])[0])
    layer = Chain(Dropout(0.5, backend=ours.backend))
    assert layer(x)[0] is x  # and not an array over its memory, which x could be donated with


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_half_precision_is_cast_where_numpy_lacks_it(home, half):
    ours = GRU(3, 4, backend=home, dtype=half, seed=0)
    wide = ours.to("numpy", dtype="float32")
    x = home.xp.astype(home.put(numbers(5, 2, 3)), home.dtype(half))
    (y, h_n), pullback = ours.vjp(x)
    (Y, H_n), back = wide.vjp(home.to_numpy(x).astype("float32"))
    dy = home.xp.astype(home.put(numbers(5, 2, 4)), home.dtype(half))
    grads, dx, _ = pullback(dy)
    Grads, dX, _ = back(home.to_numpy(dy).astype("float32"))
    pairs = [(y, Y), (h_n, H_n), (dx, dX), *((grads[name], Grads[name]) for name in Grads)]
    for found, expected in pairs:
        assert found.dtype == home.dtype(half)
        rounded = home.xp.astype(home.put(expected), home.dtype(half))
        np.testing.assert_array_equal(home.to_numpy(found), home.to_numpy(rounded))
    with pytest.raises(TypeError, match=f"x has dtype float32, expected {half}"):
        ours(home.put(numbers(5, 2, 3)))
    assert ("cast to float32" in explain(ours)) == (half == "bfloat16")


def test_what_is_refused_is_refused_in_the_words_of_the_users_library(home):
    ours, _ = pair(home, 3, 4)
    x = home.put(numbers(5, 2, 3))
    with pytest.raises(
        TypeError, match=f"x is an array of numpy, expected an array of {home.name}"
    ):
        ours(numbers(5, 2, 3))
    with pytest.raises(TypeError, match=f"h0 is a list, expected an array of {home.name}"):
        ours(x, [[0.0]])
    with pytest.raises(TypeError, match=f"state is an array of numpy, expected .* {home.name}"):
        ours.step(x[0, ...], numbers(1, 2, 4))
    with pytest.raises(TypeError, match=f"dy is an array of numpy, expected .* {home.name}"):
        ours.vjp(x)[1](numbers(5, 2, 4))
    with pytest.raises(ValueError, match="neither dy nor dh_n"):
        ours.vjp(x)[1](None)
    with pytest.raises(ValueError, match="axis 2 is 4"):
        ours(home.put(numbers(5, 2, 4)))
    with pytest.raises(TypeError, match=r"x has dtype int\d+, expected float32"):
        ours(home.put(np.ones((5, 2, 3), int)))


def test_gradients_of_torch_and_tensors_that_cannot_be_shared(torch, calls):
    ours, theirs = pair(select("torch"), 3, 4)
    x = torch.ones(2, 1, 3)
    for call in (ours, ours.vjp, ours.last):
        with pytest.raises(TypeError, match=r"x requires grad.*x\.detach\(\)"):
            call(x.clone().requires_grad_())
    with pytest.raises(TypeError, match=r"dy requires grad.*dy\.detach\(\)"):
        ours.vjp(x)[1](torch.ones(2, 1, 4, requires_grad=True))
    lazily_negated = torch.complex(x, x).conj().imag
    assert lazily_negated.is_neg()
    calls.clear()
    y = ours(lazily_negated)[0]
    assert calls == {torch.Tensor}  # by itself
    np.testing.assert_allclose(y, theirs(-x.numpy())[0], atol=1e-6)
    ours.params["weight_hh_l0"].requires_grad_()
    assert ours(x)[0].requires_grad


def test_who_runs_a_call(home, calls):
    ours, _ = pair(home, 3, 4)
    x = home.put(numbers(2, 1, 3))
    told = f"Arrays of {home.name} on {home.device} are read where they are, by DLPack, and numpy"
    ours(x)
    assert calls == {np.ndarray}
    assert told in explain(ours)
    for mode in (Mode.TRACED, Mode.PLAIN):
        with running(mode):
            calls.clear()
            ours(x)
            assert calls == ({np.ndarray} if mode == Mode.TRACED else {type(x)})
            assert (told in explain(ours)) == (mode == Mode.TRACED)
            assert modes.path(home, 4)[0] == mode


def test_who_runs_by_itself(torch):
    strict = select("array_api_strict")
    assert neighbour(strict, "float32")[0] is None
    assert "what every library can do" in explain(GRU(3, 4, backend=strict))
    meta = select("torch", "meta")
    assert neighbour(meta, "float32")[0] is None
    assert "not shared by DLPack" in explain(GRU(3, 4, backend=meta))
    y, _ = GRU(3, 4, backend=meta)(torch.ones(2, 1, 3, device="meta"))
    assert y.shape == (2, 1, 4)
    assert neighbour(select("numpy"), "float32")[0] is None


def test_copies_frozen_models_and_threads(home):
    ours, theirs = pair(home, 3, 4)
    x = numbers(5, 2, 3)
    X = home.put(x)
    expected = theirs(x)
    same(home, ours(X), expected)
    for model in (copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert "twins" not in vars(model)
        same(home, model(X), expected)
    same(home, freeze(ours)(X), freeze(theirs)(x))
    same(home, freeze(ours).step(X[0, ...]), freeze(theirs).step(x[0]))
    same(home, freeze(Chain(ours))(X), freeze(Chain(theirs))(x))

    def work(n):
        v = numbers(5, n + 1, 3) if n == 9 else np.full((5, n + 1, 3), n, "float32")
        for _ in range(20):
            same(home, ours(home.put(v)), theirs(v))

    at_once(work, 3)


def test_in_jax_a_result_of_a_shape_that_comes_often_takes_another_way():
    require("jax")
    ours, theirs = pair(select("jax.numpy"), 3, 4)
    x = numbers(2, 1, 3)
    adopt = _bridge(ours.backend, "float32").home.adopt_many
    adopt.seen.clear()
    for _ in range(40):
        same(ours.backend, ours(ours.backend.put(x)), theirs(x))
    kind = np.dtype("float32")
    assert adopt.seen[((2, 1, 4), kind), ((1, 1, 4), kind)] > 32
    for n in range(600):
        adopt([np.zeros(n % 600, bool)])
    assert len(adopt.seen) <= 512


def test_results_are_adopted_at_once_whatever_their_sizes():
    require("jax")
    adopt = select("jax.numpy").adopt_many
    adopt.seen.clear()
    arrays = [numbers(2, 3), numbers(200, 300), np.asfortranarray(numbers(3, 2)), numbers(1)]
    expected = [v.copy() for v in arrays]
    for _ in range(40):
        found = adopt(arrays)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b)
    for n in (0, 2, 3):
        arrays[n][...] = 0
        assert np.array_equal(found[n], expected[n]), "what is small is a copy"


def test_parameters_of_jax_are_read_once_and_replaced_ones_anew(monkeypatch):
    jax = require("jax")
    gru, x = GRU(3, 4, backend="jax.numpy", seed=0), jax.numpy.ones((2, 1, 3), "float32")
    before, read = gru(x)[0], []
    bridge = _bridge(gru.backend, "float32")
    watched = replace(bridge, read=lambda v: (read.append(v), bridge.read(v))[1])
    monkeypatch.setitem(gru.backend.bridges, "float32", watched)
    assert np.array_equal(gru(x)[0], before)
    assert [id(v) for v in read] == [id(x)]
    gru.params["bias_ih_l0"] = gru.params["bias_ih_l0"] + 1
    after = gru(x)[0]
    assert np.array_equal(after, GRU.of(gru.settings, gru.params, gru.backend, gru.dtype)(x)[0])
    assert not np.array_equal(after, before)
    gru.params["weight_hh_l0"].delete()
    with pytest.raises(RuntimeError, match="deleted"):
        gru(x)


# a CUDA device that the host plays ---------------------------------------------------------------


@pytest.fixture
def other(compiler):
    return select("gru_any.testing.fake_cuda.other")


def test_arrays_of_a_cuda_device_run_on_its_runner(other):
    ours, theirs = pair(other, 3, 4, num_layers=2)
    x, dy = numbers(5, 2, 3), numbers(5, 2, 4)
    found, _ = neighbour(other, "float32")
    assert found.backend.cuda
    assert "gru_any.testing.fake_cuda.array on host runs the call" in explain(ours)
    (y, h_n), pullback = ours.vjp(other.put(x), lengths=[5, 3])
    (Y, H_n), back = theirs.vjp(x, lengths=[5, 3])
    grads, dx, dh0 = pullback(other.put(dy))
    Grads, dX, dH0 = back(dy)
    pairs = [(y, Y), (h_n, H_n), (dx, dX), (dh0, dH0), *((grads[k], Grads[k]) for k in Grads)]
    for a, b in pairs:
        other.check("a result", a, "float32")
        np.testing.assert_allclose(other.to_numpy(a), b, atol=1e-5)


def test_streams_wait_for_each_other(other, monkeypatch):
    from gru_any.testing.fake_cuda import memory
    from gru_any.testing.fake_cuda.other import Tensor

    ours, _ = pair(other, 3, 4)
    waits = memory.count["waits"]
    x = other.put(numbers(5, 2, 3))
    y, _ = ours(x)
    other.xp.astype(y, other.dtype("float64"))  # on their stream, which reads what ours wrote
    assert memory.count["waits"] == waits  # and the host waited for neither
    export = Tensor.__dlpack__
    monkeypatch.setattr(Tensor, "__dlpack__", lambda self, *, stream=None: self.inner)
    with pytest.raises(memory.StreamError, match="did not wait for stream theirs"):
        ours(other.put(numbers(5, 2, 3)))
    monkeypatch.setattr(Tensor, "__dlpack__", export)
    array = type(y.inner)
    monkeypatch.setattr(array, "__dlpack__", lambda self, *, stream=None: self)
    y, _ = ours(x)
    with pytest.raises(memory.StreamError, match="stream theirs did not wait"):
        other.xp.astype(y, other.dtype("float64"))
