"""scripts/gpu_check.py without a device, so that it works where there is one."""

import json
import sys
from pathlib import Path

import pytest
from conftest import finished, require

SCRIPTS = Path(__file__).parent.parent / "scripts"


def check(*arguments):
    return finished([sys.executable, SCRIPTS / "gpu_check.py", *arguments], timeout=200)


def test_a_dry_run(tmp_path):
    done = check("--dry-run", "--part", "bench", "--minutes", 0.1, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert found["dry run"]
    assert found["bench"][0]["ours training"] > 0
    assert found["bench"][0]["whole training"] > 0
    assert set(found["rule"]["whole training"]) == {"5"}
    assert "- whole training: {5: " in (tmp_path / "results.md").read_text("utf-8")
    assert not [key for row in found["bench"] for key in row if "error" in key]
    assert "a dry run" in (tmp_path / "results.md").read_text("utf-8")
    assert (tmp_path / "speed.png").exists()


def test_a_part_that_fails_does_not_stop_the_rest(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import gpu_check

    def fails(check):
        raise RuntimeError("out of memory")

    made = gpu_check.Check(True, False, tmp_path, 1)
    made.part("bench", fails)
    made.part("tests", lambda check: "fine")
    assert made.results["bench error"] == "RuntimeError('out of memory')"
    assert made.results["tests"] == "fine"
    row = gpu_check.measure(made, gpu_check.Cell(-1, 1), 0.1)
    assert "ours error" in row
    assert gpu_check.compare(made.name, "graph", True, "float32")[0] < 2e-6
    worst, limit = gpu_check.compare(made.name, "graph", True, "float16")
    assert 1e-5 < worst <= limit


def test_figures_for_the_rules(monkeypatch):
    """A kernel that is the faster up to 32 rows at 512 units, and nowhere at 64."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import gpu_check

    times = {(512, 1): 1, (512, 32): 2, (512, 128): 4, (512, 256): 2, (64, 1): 3, (64, 32): 1}
    rows = [{**gpu_check.Cell(*size)._asdict(), "ours training": 3, "whole training": ms}
            for size, ms in times.items()]  # fmt: skip
    rows += [{**gpu_check.Cell(H, 32, 2)._asdict(), "ours training": 3, "apart training": ms}
             for H, ms in ((128, 4), (256, 4), (1024, 2))]  # fmt: skip
    found = gpu_check.rule(rows)
    assert found["whole training"] == {64: 0, 512: 32}
    assert found["overlap training"] == 256 * 32
    assert found["whole training not faster (HxB)"].startswith("512x128 L1 D1 full after, 64x1")
    assert found["whole forward"] == {}


def test_the_kernel_of_the_whole_device_is_what_is_measured(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import gpu_check

    from gru_any.backend.cuda import runner

    made, taken = runner.cooperative_kernel, []
    monkeypatch.setattr(runner, "cooperative_kernel", lambda *v: taken.append(v) or made(*v))
    _, calls = gpu_check.whole(gpu_check.Check(True, False, tmp_path, 1), gpu_check.DRY[0])
    for mode, directions in (("forward", 1), ("training", 2)):
        calls[mode]()
        assert len(taken) == directions
        taken.clear()
    assert gpu_check.whole(gpu_check.Check(True, False, tmp_path, 1), gpu_check.Cell(4, 65)) is None


def test_arrays_of_other_libraries_on_the_device(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import gpu_check

    [row] = gpu_check.libraries(gpu_check.Check(True, False, tmp_path, 1))
    assert row["good"], row
    assert "fake_cuda.array on host runs the call" in row["way"]
    assert 0 < row["worst"] < 2e-6
    rows = gpu_check.libraries(gpu_check.Check(False, False, tmp_path, 1))
    assert all("left out" in row or not row["good"] for row in rows)  # no device, or a real one


def test_paths_end_in_time(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import gpu_check

    made = gpu_check.Check(True, False, tmp_path, 0)
    monkeypatch.setattr(made, "left", lambda most: -1)
    rows = gpu_check.paths(made)
    assert len(rows) == 36
    assert {row["error"] for row in rows} == {"the time was up"}


def test_the_cells(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import gpu_check

    usual, full = gpu_check.cells(False), gpu_check.cells(True)
    assert len(usual) == 5 * 4 * 2 + 9 + 8 + 3
    assert set(usual) <= set(full)
    assert usual[0].H == 512


def test_without_a_device_it_says_why(tmp_path):
    if require("cupy").cuda.is_available():
        pytest.skip("there is a device")
    done = check("--part", "tests", "--out", tmp_path)
    assert done.returncode == 1
    assert "CUDA" in done.stderr


def test_the_tests_end_in_time_and_a_failure_is_told(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import gpu_check

    made = gpu_check.Check(True, False, tmp_path, 0)  # no time at all
    assert gpu_check.tests(made).startswith("FAILED: the time was up")
    done = check("--dry-run", "--part", "tests", "--out", tmp_path, "--minutes", 0)
    assert done.returncode == 1
