"""A signal in the middle of a call: its error comes out, and the model works as before."""

import gc
import signal
import sys

import numpy as np
import pytest
from conftest import PATHS, running, tuned

from gru_any import GRU
from gru_any.backend.cpu import threads
from gru_any.backend.cpu.jit_cache import problem, rescued


class StopError(Exception):
    """What the handler of the signal raises."""


def stop(number, frame):
    raise StopError


@pytest.fixture
def no_collection():
    """The callbacks of other libraries run in a garbage collection, which drops what they raise."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers here")
@pytest.mark.parametrize("B", [1, 24])  # threads share the units, or the rows
@pytest.mark.parametrize("path", [*PATHS, *(["packed"] if "compiled" in PATHS else [])])
def test_a_signal_in_the_middle_of_a_call(path, B, monkeypatch):
    gru, rng = GRU(8, 128, 2, reset_after=True, seed=0), np.random.default_rng(0)
    x, dy = (rng.standard_normal((20, B, n)).astype("float32") for n in (8, 128))

    def everything():
        (y, h_n), pullback = gru.vjp(x)
        grads, dx, dh0 = pullback(dy)
        return [y, h_n, dx, dh0, *grads.values()]

    monkeypatch.setattr(threads.crowd, "present", lambda: False)
    for name, module in sys.modules.items():
        if name.endswith(("cpu.threads", "cpu.numba_runner")):
            monkeypatch.setattr(module, "count", lambda: 2)
    usual, before, stopped = signal.signal(signal.SIGALRM, stop), problem(), 0
    try:
        with running(path), tuned(thread_work=1, team_step_work=1, team_units=64, packed_rows=0):
            expected = everything()
            for delay in np.geomspace(2e-5, 2e-2, 25):
                try:
                    try:
                        signal.setitimer(signal.ITIMER_REAL, delay)
                        everything()
                    finally:  # where it may still come
                        signal.setitimer(signal.ITIMER_REAL, 0)
                except StopError:
                    stopped += 1
                assert all(map(np.array_equal, everything(), expected))
    finally:
        signal.signal(signal.SIGALRM, usual)
    assert stopped
    assert problem() == before  # it was not taken for an error of Numba


@pytest.mark.usefixtures("no_collection")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers here")
@pytest.mark.skipif("compiled" not in PATHS, reason="numba: not installed")
def test_a_signal_loses_no_thread(monkeypatch):
    """Each of them is free for the next call, by rows and in a team."""
    workers = threads._Workers(2)
    workers.free.extend(workers.hire(2, []))  # Python's own start of a thread bears no signals
    monkeypatch.setattr(threads, "_workers", lambda: workers)
    monkeypatch.setattr(threads, "count", lambda: 3)
    monkeypatch.setattr(threads.crowd, "present", lambda: False)
    usual, stopped = signal.signal(signal.SIGALRM, stop), 0
    try:
        for delay in np.geomspace(1e-6, 1e-3, 1000):
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, delay)
                    threads.parallel_for(lambda hands: (0, -1), 64, 10**9)
                    threads.run_team(lambda hands: (0, -1), 64, 3)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except StopError:
                stopped += 1
            assert sorted(workers.free) == [0, 1]
    finally:
        signal.signal(signal.SIGALRM, usual)
    assert stopped


@pytest.mark.parametrize("kind", [StopError, KeyboardInterrupt])
def test_an_error_that_numba_hides_in_its_own_is_the_callers(kind):
    inner, outer = SystemError("_numba_unpickle returned a result"), SystemError("few returned")
    inner.__cause__, outer.__cause__ = kind(), inner
    before = problem()
    with pytest.raises(kind):
        rescued(outer, list, list)
    assert problem() == before
