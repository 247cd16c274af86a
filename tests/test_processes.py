"""Processes that tests start end with them, whatever they do."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import finished, started

HANGS = ["sh", "-c", "sleep 60 & echo $!; wait"]


def gone(pid):
    """Whether a process has ended; it may wait for its parent to ask how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells what runs")
def test_a_command_that_hangs_is_killed_with_its_child():
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        finished(HANGS, timeout=2)
    pids = [int(caught.value.output)]
    with started(HANGS, stdout=subprocess.PIPE, timeout=2) as process:
        pids.append(int(process.stdout.readline()))
        assert process.stdout.readline() == ""  # the end of its output: it has been killed
    assert process.returncode == -9
    began = time.monotonic()
    while not all(map(gone, pids)) and time.monotonic() < began + 30:
        time.sleep(0.01)
    assert all(map(gone, pids))


def test_another_exit_status_than_expected_is_told():
    with pytest.raises(AssertionError, match=r"exit status 3\s+why"):
        finished([sys.executable, "-c", "print('why'); raise SystemExit(3)"], code=0)
