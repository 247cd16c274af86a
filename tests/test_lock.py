"""Two runs never write to one folder at once; what a killed run held is free."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import started

from gru_any import GRU, Adam, Chain, squared_error
from gru_any.train import fit
from gru_any.train.lock import alone_in

HOLDER = """
import sys, time
from pathlib import Path
from gru_any.train.lock import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_and_told_who_holds_the_folder(tmp_path):
    with started([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(
                ValueError, match=rf"process {other.pid} on .*, since 2.*a folder of its"
            ),
            alone_in(tmp_path),
        ):
            pass
        other.kill()  # it cannot release anything
        other.wait(60)
        with alone_in(tmp_path):
            pass


def test_it_is_released_at_the_end_and_after_an_error(tmp_path):
    with pytest.raises(KeyError), alone_in(tmp_path):
        raise KeyError
    with (
        alone_in(tmp_path),
        pytest.raises(ValueError, match=rf"process {os.getpid()} on"),
        alone_in(tmp_path),
    ):
        pass
    with alone_in(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def train(folder, batches=lambda epoch: [(np.ones((2, 1, 1), "float32"),) * 2], lr=0.1):
    model = Chain(GRU(1, 1, seed=0))
    return fit(model, squared_error, batches, Adam(model.params, lr=lr), steps=3, out=folder,
               log_every=1, bar=False)  # fmt: skip


def test_a_second_run_is_refused_before_it_reads_or_writes(tmp_path):
    """Whether it is the same or another one, until the first has written all."""

    def batches(epoch):
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        for lr in (0.1, 0.2):
            with pytest.raises(ValueError, match=rf"another run .* process {os.getpid()} on"):
                train(tmp_path, lr=lr)
        after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        for name, content in before.items():  # the first run may have added a line meanwhile
            assert after[name].startswith(content)
        tried.append(epoch)
        return [(np.ones((2, 1, 1), "float32"),) * 2]

    tried = []
    history = train(tmp_path, batches)
    assert 0 in tried
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    assert train(tmp_path).records == history.records


def test_a_lock_that_was_removed_between_opening_and_locking_is_taken_anew(tmp_path, monkeypatch):
    """The holder removes its file at the end; a lock of the removed file would hold nothing."""
    from gru_any.train import lock

    real, calls = lock._lock, []

    def late(file):
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / lock.NAME).unlink()
        real(file)

    monkeypatch.setattr(lock, "_lock", late)
    with alone_in(tmp_path):
        assert len(calls) == 2
        monkeypatch.undo()
        with pytest.raises(ValueError, match="another run"), alone_in(tmp_path):
            pass
