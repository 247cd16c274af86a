"""A signal in the middle of a call: its error comes out, and the model works as before."""

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
        with running(path), tuned(thread_work=1, team_step_work=1, team_units=64, stored_rows=0):
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


@pytest.mark.parametrize("kind", [StopError, KeyboardInterrupt])
def test_an_error_that_numba_hides_in_its_own_is_the_callers(kind):
    inner, outer = SystemError("_numba_unpickle returned a result"), SystemError("few returned")
    inner.__cause__, outer.__cause__ = kind(), inner
    before = problem()
    with pytest.raises(kind):
        rescued(outer, list, list)
    assert problem() == before
