"""Mistakes that a CUDA path invites, made on purpose: each is noticed without a device.

A missing barrier is in test_cuda_persistent.py.
"""

from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest

from gru_any import GRU, asarray, to_numpy
from gru_any.backend import modes as run
from gru_any.backend.cuda import calls, plan, recording, runner
from gru_any.codegen import cuda_source as source
from gru_any.codegen.schedule import Finished, Gemm
from gru_any.nn import sweep
from gru_any.testing.fake_cuda import array as fake
from gru_any.testing.fake_cuda import memory
from gru_any.testing.fake_cuda.memory import CLOCKS, StreamError, enqueue
from gru_any.testing.fake_cuda.ops import Event, Ops

pytestmark = pytest.mark.usefixtures("compiler")


def noticed():
    """Whether whole GRUs give other numbers than on NumPy, or a check of the device speaks."""
    source.forward_scan.cache_clear()
    source.backward_scan.cache_clear()
    run._runner.cache_clear()
    run._on_cuda.cache_clear()
    Ops().synchronize()  # what a mistake before this one left undone
    host = GRU(3, 5, bidirectional=True, seed=0, dtype="float64")
    device, rng = host.to(fake.__name__), np.random.default_rng(0)
    x, dy = rng.standard_normal((6, 4, 3)), rng.standard_normal((6, 4, 10))
    lengths, results = [6, 2, 0, 5], []
    try:
        for gru in (host, device, device):
            (y, h), pullback = gru.vjp(asarray(x, like=gru), lengths=lengths)
            grads, dx, dh = pullback(asarray(dy, like=gru))
            results.append([to_numpy(v) for v in (y, h, dx, dh, *grads.values())])
    except AssertionError as e:
        return type(e).__name__
    good = [np.allclose(a, b, rtol=0, atol=1e-12)
            for found in results[1:] for a, b in zip(found, results[0], strict=True)]  # fmt: skip
    return not all(good)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(run, "chosen_on_cuda", "graph")
    yield
    source.forward_scan.cache_clear()
    source.backward_scan.cache_clear()
    run._runner.cache_clear()
    run._on_cuda.cache_clear()


def test_no_mistake_no_notice():
    assert noticed() is False


MISTAKES = {
    "leading dimension": lambda b: (
        lambda ta, tb, m, n, k, a, lda, *rest: b(ta, tb, m, n, k, a, lda + 1, *rest)
    ),
    "transposition": lambda b: lambda ta, *rest: b(not ta, *rest),
    "sizes": lambda b: lambda ta, tb, m, n, *rest: b(ta, tb, n, m, *rest),
    "beta": lambda b: lambda *v: b(*v[:9], 0.0, *v[10:]),
    "rows of U": lambda b: lambda *v: b(*v[:5], v[5] + 8, *v[6:]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_product(mistake, monkeypatch):
    right = Ops.blas
    monkeypatch.setattr(Ops, "blas", lambda self, p: MISTAKES[mistake](right(self, p)))
    assert noticed()


def test_a_dropped_operand(monkeypatch):
    """The last sum of every kernel is of one number alone."""
    right = source.operations

    def wrong(ops, number):
        lines = right(ops, number)
        last = max(n for n, line in enumerate(lines) if " + " in line)
        lines[last] = lines[last].partition(" + ")[0] + ";"
        return lines

    monkeypatch.setattr(source, "operations", wrong)
    assert noticed()


@pytest.mark.parametrize("rule", [Finished.KEPT, Finished.ZERO])
def test_rows_that_have_ended(rule, monkeypatch):
    right = source.stored

    def wrong(store, old):
        computed = store._replace(finished=Finished.COMPUTED)
        return right(computed if store.finished is rule else store, old)

    monkeypatch.setattr(source, "stored", wrong)
    assert noticed()


def test_the_wrong_order_of_stages(monkeypatch):
    def wrong(right, *arguments):
        found = right(*arguments)
        first = next(n for n, stage in enumerate(found.stages) if isinstance(stage, Gemm))
        return found._replace(stages=[*found.stages[first + 1 :], *found.stages[: first + 1]])

    for name in ("forward_schedule", "backward_schedule"):
        monkeypatch.setattr(source, name, partial(wrong, getattr(source, name)))
    assert noticed()


@pytest.mark.parametrize("change", [lambda t: t + 1, lambda t: 0])
def test_the_wrong_step(change, monkeypatch):
    """A kernel that is given another step: outside of an array, or the same again."""
    right = Ops.launch

    def wrong(self, kernel, grid, threads, numbers, shared=0):
        if kernel.name != "set_table" and numbers[1] != change(numbers[1]) < 6:
            numbers = [numbers[0], change(numbers[1]), *numbers[2:]]
        right(self, kernel, grid, threads, numbers, shared)

    monkeypatch.setattr(Ops, "launch", wrong)
    assert noticed()


def test_a_table_that_is_not_filled_again(monkeypatch):
    """A replay over the arrays of the call before, whose memory was given back."""
    right, seen = Ops.launch, []

    def wrong(self, kernel, *arguments):
        if kernel.name != "set_table" or seen.count(kernel) < 1:
            right(self, kernel, *arguments)
        seen.append(kernel)

    monkeypatch.setattr(Ops, "launch", wrong)
    assert noticed()


def test_a_stream_that_does_not_wait(monkeypatch):
    monkeypatch.setattr(Ops, "wait", lambda self, event: None)
    assert noticed() == "StreamError"


def test_swapped_streams(monkeypatch):
    """The second direction ends on another stream than the one that is waited for."""
    right = Ops.on

    @contextmanager
    def wrong(self, number):
        with right(self, number), right(self, number + 5):
            yield

    def event(self):
        event = Event()

        def mark():
            event.update(CLOCKS.get(0, {}))

        event.capture = memory.capturing()
        enqueue(mark)
        return event

    monkeypatch.setattr(Ops, "on", wrong)
    monkeypatch.setattr(Ops, "event", event)
    assert noticed() == "StreamError"


def test_a_workspace_without_its_lock(monkeypatch):
    """Two streams use the buffers of one plan."""

    @contextmanager
    def unlocked(self):
        yield

    gru = GRU(3, 5, seed=0, backend=fake.__name__)
    x, ops = fake.asarray(np.ones((6, 4, 3), "f4")), Ops()
    for right in (True, False):
        if not right:
            monkeypatch.setattr(plan.Workspace, "locked", unlocked)
        ready = ops.event()
        with ops.on(3):
            ops.wait(ready)
            gru(x)
        if right:
            gru(x)
        else:
            with pytest.raises(StreamError, match="did not wait"):
                gru(x)


# of whole calls ----------------------------------------------------------------------------------


def layers(monkeypatch):
    """Whether training two layers shows anything: three forwards, then their ways back."""
    monkeypatch.setattr(sweep, "STEPS", 3)
    monkeypatch.setattr(sweep, "ROWS", 1)
    run._runner.cache_clear()
    run._on_cuda.cache_clear()
    Ops().synchronize()
    host = GRU(3, 5, 2, seed=0, dtype="float64")
    device, good = host.to(fake.__name__), []
    try:
        for seed in range(4):
            inputs = np.random.default_rng(seed).standard_normal((3, 8, 4, 3))
            pairs = [backwards(gru, inputs) for gru in (host, device)]
            good += [np.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*pairs, strict=True)]
    except AssertionError as e:
        return type(e).__name__
    assert device._runner.graphs.kept
    return not all(good)


def backwards(gru, inputs):
    found, steps = [], [gru.vjp(asarray(x, like=gru)) for x in inputs]
    while steps:
        (y, h), pullback = steps.pop()
        grads, dx, dh = pullback(y)
        found += [to_numpy(v) for v in (y, h, dx, dh, *grads.values())]
    return found


def test_no_mistake_in_layers_no_notice(monkeypatch):
    assert layers(monkeypatch) is False


def test_a_layer_that_does_not_wait_for_the_one_below(monkeypatch):
    monkeypatch.setattr(calls.Arriving, "__getitem__", lambda self, key: self.pieces[key[0].start])
    assert layers(monkeypatch) == "StreamError"


def test_an_end_that_nobody_waits_for(monkeypatch):
    right = calls.Calls._on_stream
    monkeypatch.setattr(
        calls.Calls, "_on_stream", lambda self, n, start, _: right(self, n, start, [])
    )
    assert layers(monkeypatch) == "StreamError"


def test_a_buffer_that_two_layers_use_at_the_same_time(monkeypatch):
    """Each stage of a step, in a recording alone."""
    right, made = runner.Plan, {}

    def wrong(ops, blas, scan, *shape):
        if memory.capturing() is None:
            return right(ops, blas, scan, *shape)
        return made.setdefault((scan, *map(str, shape)), right(ops, blas, scan, *shape))

    monkeypatch.setattr(runner, "Plan", wrong)
    assert layers(monkeypatch) == "StreamError"


def test_a_recording_that_is_lent_twice(monkeypatch):
    monkeypatch.setattr(recording.Lease, "__init__", lambda self, r: setattr(self, "call", r))
    assert layers(monkeypatch)


def test_inputs_of_the_call_before(monkeypatch):
    right = recording.CapturedCall.fill

    def wrong(self, arrays):
        if not hasattr(self, "graph"):
            right(self, arrays)

    monkeypatch.setattr(recording.CapturedCall, "fill", wrong)
    assert layers(monkeypatch)


def test_results_that_are_not_copied_out(monkeypatch):
    monkeypatch.setattr(
        recording.CapturedCall, "__call__",
        lambda self, arrays: (self.fill(arrays), self.graph.launch(), self.results)[2],
    )  # fmt: skip
    gru = GRU(3, 5, seed=0, backend=fake.__name__)
    inputs = [fake.asarray(np.full((6, 4, 3), n, "f4")) for n in range(3)]
    found = [gru(x)[0] for x in inputs]
    assert np.array_equal(found[1].get(), found[2].get())


def test_memory_that_a_recording_shares(monkeypatch):
    """What it uses in between is given to others too."""
    monkeypatch.setattr(Ops, "pool", lambda self: memory._pool)
    assert layers(monkeypatch)


def test_memory_that_is_given_back_too_early(monkeypatch):
    """A plan that does not keep its buffers."""
    right = plan.Plan.__init__

    def wrong(self, *arguments):
        right(self, *arguments)
        self.pointers = dict(self.pointers)
        for name in [n for n in self.buffers if n != "state"]:
            del self.buffers[name]

    monkeypatch.setattr(plan.Plan, "__init__", wrong)
    assert noticed() == "StreamError"
