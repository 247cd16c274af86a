"""Two runs never write to one folder at once; what a killed run held is free."""

import os
import subprocess
import sys

import pytest

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
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(
                ValueError, match=rf"process {other.pid} on .*, since 2.*a folder of its"
            ),
            alone_in(tmp_path),
        ):
            pass
        other.kill()  # it cannot release anything
        other.wait()
        with alone_in(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


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
