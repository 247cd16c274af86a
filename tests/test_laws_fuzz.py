"""The fuzzer of results finds nothing in a few cases, and finds and shrinks what is planted."""

import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import require

from gru_any import GRU, equations

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts/maintenance"))

import fuzz_results as fuzz
from fuzz_results import Case, check

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("seed", range(0, 40, 8))
def test_a_random_case(seed, monkeypatch):
    require("numba")
    monkeypatch.setattr(fuzz, "OTHERS", {})
    assert check(fuzz.random_case(seed)) == []


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_pytorch_agrees_on_every_kind_of_data(kind, monkeypatch):
    require("torch")
    monkeypatch.setattr(fuzz, "PATHS", ())
    monkeypatch.setattr(fuzz, "OTHERS", {"torch": fuzz.by_torch})
    case = Case(3, 4, 2, 5, layers=2, bidirectional=True, reset_after=True, kind=kind, data=1)
    assert check(case) == []
    assert fuzz.by_torch(case, fuzz.numbers(case)) is not None


def test_a_wrong_formula_is_found_and_shrunk(monkeypatch):
    """z and 1 - z exchanged on the traced path alone."""
    right = equations.reset_before

    def wrong(xp, a, h, U):
        new, (r, z, n, s) = right(xp, a, h, U)
        return n + h - new, (r, z, n, s)

    ours = fuzz.ours

    def one_path_wrong(case, given, path, dtype=""):
        if path == "traced":
            monkeypatch.setattr(equations, "reset_before", wrong)
        try:
            return ours(case, given, path, dtype)
        finally:
            monkeypatch.setattr(equations, "reset_before", right)

    monkeypatch.setattr(fuzz, "PATHS", ("traced",))
    monkeypatch.setattr(fuzz, "OTHERS", {})
    monkeypatch.setattr(fuzz, "ours", one_path_wrong)
    case = Case(5, 3, 2, 4, layers=2, bidirectional=True, ragged=True, data=3)
    (text,) = check(case)
    assert text.startswith("traced: ")
    small = fuzz.shrunk(case, "traced")
    assert (small.T, small.B, small.I, small.H, small.layers) == (1, 1, 1, 1, 1)
    assert not small.ragged
    assert check(small)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_onnx_of_one_unit_in_two_directions(layers, tmp_path):
    """What the fuzzer found: our reader lost an axis of length 1, so nothing was written."""
    require("onnx")
    from gru_any.convert import onnx

    gru = GRU(2, 1, layers, bidirectional=True, seed=0)
    onnx.save(tmp_path / "model.onnx", gru)
    again, x = onnx.load(tmp_path / "model.onnx"), np.ones((3, 2, 2), "float32")
    assert np.array_equal(again(x)[0], gru(x)[0])
