"""Whole calls on a device that the host emulates: recorded once for a shape, and replayed."""

import warnings
import weakref

import numpy as np
import pytest
from conftest import at_once

from gru_any import GRU, asarray, explain, to_numpy
from gru_any.backend import modes as run
from gru_any.backend import runner
from gru_any.backend.cuda import calls, recording, tuning
from gru_any.nn import sweep
from gru_any.testing.fake_cuda import array as fake
from gru_any.testing.fake_cuda import memory, ops
from gru_any.testing.fake_cuda.memory import StreamError, count
from gru_any.testing.fake_cuda.ops import Ops

pytestmark = pytest.mark.usefixtures("compiler")
HOST = fake.__name__


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Each test records anew; blocks are short, so that there are several."""
    monkeypatch.setattr(sweep, "STEPS", 4)
    monkeypatch.setattr(sweep, "ROWS", 1)
    monkeypatch.setattr(run, "chosen_on_cuda", "graph")
    run._runner.cache_clear()
    run._on_cuda.cache_clear()
    yield
    run._runner.cache_clear()
    run._on_cuda.cache_clear()


def tuned(monkeypatch, **values):
    monkeypatch.setattr(tuning, "current", tuning.current._replace(**values))


def pair(**settings):
    gru = GRU(3, 5, **settings, seed=0)
    return gru, gru.to(HOST)


def batch(gru, T=6, B=4, seed=0):
    rng = np.random.default_rng(seed)
    D, H = len(gru.suffixes), gru.hidden_size
    shapes = [(T, B, 3), (gru.num_layers * D, B, H), (T, B, D * H), (gru.num_layers * D, B, H)]
    x, h0, dy, dh = (rng.standard_normal(shape).astype(gru.dtype) for shape in shapes)
    if gru.batch_first:
        x, dy = (v.transpose(1, 0, 2) for v in (x, dy))
    return [x, h0, dy, dh]


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
    {"num_layers": 2, "batch_first": True, "recompute": 4},
]


@pytest.mark.parametrize("settings", SHAPES)
def test_a_call_is_one_replay(settings):
    """Of two blocks a layer; nothing but the two graphs runs from the third step on."""
    host, device = pair(**settings)
    for seed in range(4):
        arrays = batch(host, seed=seed)
        x, h0, dy, dh = (asarray(v, like=device) for v in arrays)
        before = count["replays"]
        (y, h_n), pullback = device.vjp(x, h0)
        results = pullback(dy, dh)
        if seed > 1:
            assert count["replays"] - before == 2
        assert_near([y, h_n, *flat(results)], training(host, arrays), 4e-6)
        del pullback
    assert runner(device.backend).graphs.captures == 1
    before = count["replays"]
    for _ in range(2):
        found = device(x, h0), device.last(x, h0)
    assert count["replays"] - before >= 2
    assert_near([*found[0], found[1]], [to_numpy(v) for v in (y, h_n, h_n)])


def test_the_pullback_of_the_step_before():
    """It is still held at the next forward, as in most loops: two recordings take turns."""
    host, device = pair(num_layers=2)
    for seed in range(6):
        arrays = batch(host, seed=seed)
        x, h0, dy, dh = (asarray(v, like=device) for v in arrays)
        before = count["replays"]
        (y, h_n), pullback = device.vjp(x, h0)
        found = [y, h_n, *flat(pullback(dy, dh))]
        if seed > 3:
            assert count["replays"] - before == 2
        assert_near(found, training(host, arrays))
    assert runner(device.backend).graphs.captures == 2


def test_what_is_lent_stays_as_it_is():
    """Five forwards before their ways back, of which two are recorded; and each back twice."""
    host, device = pair(num_layers=2, bidirectional=True)
    steps = []
    for seed in range(5):
        arrays = batch(host, seed=seed)
        x, h0, dy, dh = (asarray(v, like=device) for v in arrays)
        steps.append((arrays, dy, dh, *device.vjp(x, h0)))
    assert [isinstance(step[4]._residuals, recording.Lease) for step in steps] == [0, 1, 1, 0, 0]
    for _ in range(2):
        for arrays, dy, dh, outputs, pullback in reversed(steps):
            assert_near([*outputs, *flat(pullback(dy, dh))], training(host, arrays))
    lent = [r for copies in runner(device.backend).graphs.kept.values() for r in copies]
    assert [r.leased for r in lent] == [True, True]
    del steps, outputs, pullback
    assert [r.leased for r in lent] == [False, False]


def test_every_option_beside_a_recording():
    """Lengths of all kinds by one recording; dy or dh_n alone; taps; dropout; a list of states."""
    host, device = pair(num_layers=3, dropout=0.4)
    for n, lengths in enumerate(([6, 2, 0, 5], [1, 1, 1, 1], [6, 5, 6, 6], [3, 3, 6, 0])):
        arrays = batch(host, seed=n)
        masks = [np.random.default_rng(n) for _ in range(2)]
        x, h0, dy, dh = (asarray(v, like=device) for v in arrays)
        found = [training(gru, arrays, lengths=lengths, rng=rng)
                 for gru, rng in zip((device, host), masks, strict=True)]  # fmt: skip
        assert_near(*found)
        _, pullback = device.vjp(x, h0, lengths)
        _, expected = host.vjp(*arrays[:2], lengths)
        assert_near(flat(pullback(dy)), flat(expected(arrays[2])))
        assert_near(flat(pullback(None, dh)), flat(expected(None, arrays[3])))
        assert_near([pullback.taps(dy, dh)], [expected.taps(*arrays[2:])])
        assert_near(device.taps(x, h0, lengths).values(), host.taps(*arrays[:2], lengths).values())
        del pullback
    assert runner(device.backend).graphs.captures == 2  # with a mask and without one


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("settings", [{}, {"recompute": "sqrt", "precision": "tf32"}])
def test_a_wavefront_changes_no_bit(settings, dtype, monkeypatch):
    """Four layers, three blocks: the next layer begins when the one below is done with a block."""
    _, device = pair(num_layers=4, dtype=dtype, **settings)
    arrays, lengths, found = batch(device, 10, 3), [10, 6, 0], []
    for idle, streams in ((tuning.current.idle, 2), (0, 1)):
        tuned(monkeypatch, idle=idle)
        run._runner.cache_clear()
        run._on_cuda.cache_clear()
        found += [training(device, arrays, lengths=lengths) for _ in range(3)]
        [[made]] = device._runner.graphs.kept.values()
        [[back]] = made.backward.kept.values()
        assert [len(r.graph.capture.streams) for r in (made, back)] == [streams, streams]
    for other in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_block_is_read_as_soon_as_it_is_there():
    """Another stream waits for that block, and for nothing that came after it."""
    ops, made = Ops(), calls.Arriving(None, Ops(), (4, 1, 1), "f4")
    made.put(slice(0, 2), fake.ones((2, 1, 1), dtype="f4"))
    later = fake.ones((2, 1, 1), dtype="f4")
    made.put(slice(2, 4), later)
    with ops.on(30):
        assert made[slice(0, 2), :, :] is made.pieces[0]
        made.pieces[0] + 1.0
        with pytest.raises(StreamError, match="did not wait"):
            later + 1.0
        made[slice(2, 4), :, :]
        later + 1.0


def test_streams_and_threads_take_turns():
    host, device = pair(num_layers=2)
    inputs = [batch(host, seed=seed) for seed in range(3)]
    expected = [training(host, arrays) for arrays in inputs]

    def work(n):
        for turn in range(4):
            with Ops().on(20 + n + turn % 2):
                assert_near(training(device, inputs[n]), expected[n])

    for arrays in inputs:
        training(device, arrays)
    at_once(work, 3)


def test_weights_and_equations_of_the_moment():
    """Written, replaced, of another variant: the recording follows, or is another."""
    host, device = pair()
    arrays = batch(host)
    for turn in range(4):
        for gru in (host, device):
            if turn % 2:
                gru.params["weight_ih_l0"] *= 0.5
            else:
                gru.params["weight_hh_l0"] = gru.params["weight_hh_l0"] + 0.1
        assert_near(training(device, arrays), training(host, arrays))
    assert runner(device.backend).graphs.captures == 1
    other = GRU(3, 5, reset_after=True, seed=1)
    for _ in range(3):
        assert_near(training(other.to(HOST), arrays), training(other, arrays))


def test_no_steps_and_no_rows():
    """Layers overlap where nothing is recorded too."""
    _, device = pair(num_layers=2)
    for T, B in ((0, 2), (3, 0)):
        for _ in range(2):
            x = asarray(np.zeros((T, B, 3), "f4"), like=device)
            (y, h_n), pullback = device.vjp(x)
            grads, dx, dh0 = pullback(y)
            assert (y.shape, h_n.shape) == ((T, B, 5), (2, B, 5))
            assert (dx.shape, dh0.shape) == ((T, B, 3), (2, B, 5))
            assert all(np.all(to_numpy(g) == 0) for g in grads.values())
    assert not device._runner.graphs.kept


# how many ----------------------------------------------------------------------------------------


def test_recordings_are_few_and_can_be_let_go_of(monkeypatch):
    tuned(monkeypatch, captured_shapes=2)
    _, device = pair()
    for B in (1, 2, 3, 1):
        x = asarray(np.zeros((3, B, 3), "f4"), like=device)
        for _ in range(3):
            device(x)
    found = runner(device.backend).graphs
    assert (len(found.kept), found.captures) == (2, 2)  # more have to be earned
    tuned(monkeypatch, calls_of_capture=4)
    x = asarray(np.zeros((3, 3, 3), "f4"), like=device)
    device(x)
    assert (len(found.kept), found.captures) == (2, 3)
    known = [weakref.ref(r) for copies in found.kept.values() for r in copies]
    run.forget(device.backend)
    assert not runner(device.backend).graphs.kept
    del found
    assert [ref() for ref in known] == [None, None]


def test_all_memory_is_returned(monkeypatch):
    """What is let go of too: of a shape that others followed, with its way back."""
    pools = []
    monkeypatch.setattr(Ops, "pool", lambda self: pools.append(memory.Pool()) or pools[-1])
    tuned(monkeypatch, captured_shapes=2)
    _, device = pair(num_layers=2, bidirectional=True)
    for T in (3, 4, 5):
        for _ in range(3):
            training(device, batch(device, T))
        tuned(monkeypatch, calls_of_capture=4)
    assert len(pools) > 4
    assert pools[0].kept == 0 < pools[-1].kept
    run.forget(device.backend)
    assert not any(pool.kept for pool in pools)


def test_a_shape_that_goes_while_another_stream_works_on_it(monkeypatch):
    tuned(monkeypatch, captured_shapes=1)
    tuned(monkeypatch, calls_of_capture=1)
    _, device = pair()
    x, others = (asarray(np.zeros((3, B, 3), "f4"), like=device) for B in (2, 4))
    ops = runner(device.backend).ops
    device(x), device(x)
    start = ops.event()
    with ops.on(1):
        ops.wait(start)
        for v in (x, others, others):
            device(v)
    fake.zeros((3, 2, 3), dtype="f4")  # as large as what the recording was given
    ops.synchronize()  # before x goes


def test_a_call_that_is_too_long_is_recorded_by_blocks(monkeypatch):
    tuned(monkeypatch, captured_steps=11)
    host, device = pair(num_layers=2)
    arrays = batch(host)
    for _ in range(3):
        assert_near(training(device, arrays), training(host, arrays))
    assert not runner(device.backend).graphs.kept
    assert "12 steps" in explain(device, (6, 4, 3))
    assert "replayed as one recording" in explain(device, (5, 4, 3))
    assert "replayed as one recording" in explain(device)
    assert "recorded as a whole" not in explain(host)
    for way in ("eager", "blocks"):
        monkeypatch.setattr(run, "chosen_on_cuda", way)
        assert f"not recorded as a whole: GRU_ANY_CUDA is set to {way}" in explain(device)


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, MemoryError])
def test_a_device_that_refuses_a_whole_call(error, monkeypatch):
    """Half way through; the blocks are recorded all the same, and it is told once."""
    right, asked = Ops.launch, []

    def refuse(self, *arguments):
        if getattr(memory.local, "pool", None) is not None:  # as in a recording of a call
            asked.append(arguments)
            if len(asked) == 9:
                raise error("no more")
        right(self, *arguments)

    monkeypatch.setattr(Ops, "launch", refuse)
    host, device = pair(num_layers=2, bidirectional=True)
    arrays = batch(host)
    training(device, arrays)
    with pytest.warns(RuntimeWarning, match="refused to record a whole call; .*no more"):
        assert_near(training(device, arrays), training(host, arrays))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = count["replays"]
        assert_near(training(device, arrays), training(host, arrays))
    assert count["replays"] - before > 2
    assert run.path(device.backend, 1000)[0] == "blocks"
    assert "CUDA refused to" in explain(device)


@pytest.mark.parametrize("way", ["graph", "blocks", "eager"])
def test_a_device_without_memory(way, monkeypatch):
    """Whichever array it refuses, the error arrives, and the next call is right."""
    monkeypatch.setattr(run, "chosen_on_cuda", way)
    right, left = memory.allocate, [0]

    class OutOfMemoryError(MemoryError):
        """What CuPy raises."""

    def allocate(shape, dtype):
        left[0] -= 1
        if not left[0]:
            raise OutOfMemoryError(f"allocating {np.prod(shape) * np.dtype(dtype).itemsize} bytes")
        return right(shape, dtype)

    for module in (fake, ops):  # each has its own name for it
        monkeypatch.setattr(module, "allocate", allocate)
    host, device = pair(num_layers=2, bidirectional=True)
    arrays = batch(host)
    expected, failed = training(host, arrays), 0
    for n in [*range(1, 60, 8), *range(60, 400, 34)]:
        left[0] = n
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            try:
                training(device, arrays)
            except OutOfMemoryError:
                failed += 1
        left[0] = 0
        assert_near(training(device, arrays), expected)
        runner(device.backend).graphs.refused = False
        run.forget(device.backend)
    assert failed > 9
