"""scripts/deployment.py compares the same steps; scripts/benchmarks/int8.py rounds as it says."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
from conftest import require, running

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS / "benchmarks")]
deployment = pytest.importorskip("deployment")
deployed = pytest.importorskip("benchmarks.deployed")


@pytest.mark.filterwarnings("ignore:os.fork")  # of OpenVINO, where JAX was imported before
def test_the_contenders_agree(tmp_path):
    """Each that runs here: steps, and what a sequence of equal steps ends in."""
    for name in ("torch", "onnx", "onnxruntime"):
        require(name)
    deployed.write(str(tmp_path), [8])
    found = {}
    with running("traced"):
        for name, make in deployed.MAKERS.items():
            try:
                found[name] = make(str(tmp_path), 8)
            except (deployed.MissingError, ImportError):
                continue
        ours, T = found["NumPy"], deployed.STEPS
        expected = [ours.step().ravel().copy() for _ in range(T)]
        assert {"NumPy", "PyTorch", "onnxruntime"} <= set(found)
        for name, them in found.items():
            limit = 2e-6 if not name.endswith(("int8", "bfloat16")) else 0.02
            ends = [
                them.sequence(),
                *(() if them is ours else [them.step() for _ in range(T)][-1:]),
            ]
            for end in ends:
                np.testing.assert_allclose(np.ravel(end), expected[-1], rtol=0, atol=limit)


def test_the_report_names_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(deployment, "start", started)
    starts = deployment.begun(str(tmp_path), ["C", "NumPy"], 1)
    assert (list(starts), len(starts["NumPy"])) == (["NumPy"], 1)
    assert "C is missing: no C compiler" in capsys.readouterr().out
    with pytest.raises(AssertionError, match=r"int8 is off by 0\.5"):
        deployment.agree({"NumPy": [{"y": [0.0]}], "C int8": [{"y": [0.5]}]})


def started(name, folder):
    done = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE)
    return done, {"missing": "no C compiler"} if name == "C" else {"y": [1.0]}


def test_what_is_installed_is_counted():
    pytest.importorskip("packaging")
    one, two = deployment.installed(["numpy"]), deployment.installed(["numpy", "safetensors"])
    assert 10e6 < one < two
    assert deployment.size("C") == deployment.size("NumPy") > two
    with pytest.raises(PackageNotFoundError):
        deployment.installed(["gru_any.deploy.c"])
