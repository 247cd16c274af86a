"""Memory that is used again: never while somebody has a view of it."""

import numpy as np
import pytest
from conftest import at_once

from gru_any.backend.cpu import buffers as memory
from gru_any.backend.cpu import tuning

FLOAT = np.dtype("float32")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(memory, "_owners", {})


def address(v):
    return v.__array_interface__["data"][0]


def test_memory_is_used_again_when_nobody_has_a_view_of_it():
    first = memory.empty((100, 300), FLOAT)
    part, place = first[3:, ::2].T, address(first)
    del first
    assert address(memory.empty((100, 300), FLOAT)) != place  # the part is still there
    del part
    again = memory.empty((300, 100), FLOAT)
    assert address(again) == place
    assert again.shape == (300, 100)
    assert address(memory.empty((30_000,), FLOAT)) != place


def test_what_is_small_or_empty_is_left_to_numpy():
    for shape in [(0, 3), (), (10, 10)]:
        assert memory.empty(shape, FLOAT).shape == shape
    assert not memory._owners


def test_no_more_is_remembered_than_allowed(monkeypatch):
    monkeypatch.setattr(tuning, "current", tuning.current._replace(kept_bytes=1_000_000))
    held = [memory.empty((n, 1000), FLOAT) for n in range(50, 150)]
    assert sum(s * len(o) for s, o in memory._owners.items()) <= 1_000_000
    for n, v in enumerate(held):
        v[...] = n
    assert all((v == n).all() for n, v in enumerate(held))


def test_threads_do_not_get_the_same_memory():
    def work(me):
        for turn in range(300):
            held = [memory.empty((40, 500), FLOAT) for _ in range(3)]
            for n, v in enumerate(held):
                v[...] = 1000 * me + 3 * turn + n
            assert all((v == 1000 * me + 3 * turn + n).all() for n, v in enumerate(held))

    at_once(work, 8)
    assert sum(map(len, memory._owners.values())) <= 3 * 8 + 8
