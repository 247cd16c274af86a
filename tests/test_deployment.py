"""scripts/deployment.py compares the same steps; scripts/benchmarks/int8.py rounds as it says."""

import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import require, running

from gru_any import GRU

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS / "benchmarks")]
deployment = pytest.importorskip("deployment")


def test_the_contenders_agree(tmp_path, monkeypatch):
    for name in ("torch", "onnx", "onnxruntime"):
        require(name)
    monkeypatch.setattr(deployment, "SIZES", [8])
    deployment.write(str(tmp_path))
    makers = (deployment.ours, deployment.torch, deployment.onnxruntime)
    with running("traced"):
        steps = [make(str(tmp_path), 8) for make in makers]
        for _ in range(3):
            ours, *others = (step().ravel() for step in steps)
            for theirs in others:
                assert np.allclose(ours, theirs, rtol=0, atol=1e-6)


def test_what_is_installed_is_counted():
    pytest.importorskip("packaging")
    one, two = deployment.installed(["numpy"]), deployment.installed(["numpy", "safetensors"])
    assert 10e6 < one < two


def test_rounding_to_int8():
    int8 = pytest.importorskip("int8")
    W = GRU(5, 6, seed=0).params["weight_hh_l0"]
    Q, scale = int8.rounded(W)
    assert (Q.dtype, np.abs(Q).max()) == (np.int8, 127)
    assert (np.abs(Q * scale - W) <= scale / 2 * 1.001).all()
