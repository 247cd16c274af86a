"""What may be missing or broken beside the core: calls go on without it, and say so."""

import compileall
import os
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import PATHS, finished, running

import gru_any
from gru_any import GRU, Chain, Linear
from gru_any.backend.cpu import jit_cache as compiled
from gru_any.deploy import freeze
from gru_any.stream import Stream

ROOT = Path(gru_any.__file__).parent
NUMBA = pytest.mark.skipif("compiled" not in PATHS, reason="numba: not installed")

# few rows, rows that are worth packed weights, a gradient, single steps
CALLS = """
import warnings, numpy as np
warnings.simplefilter("always")
from gru_any import GRU, Linear
from gru_any.stream import Stream
gru, x = GRU(3, 4, seed=0), np.ones((60, 2, 3), "float32")
y, h = gru(x[:2])
(y, h), pullback = gru.vjp(x)
grads, dx, dh0 = pullback(np.ones_like(y))
z, back = Linear(4, 5, seed=1).vjp(y)
stream = Stream(gru)
s = [stream.step(x_t).sum() for x_t in x[:2]]
found = [y.sum(), dx.sum(), grads["weight_hh_l0"].sum(), back(z)[1].sum(), *s]
print("found", *map(float, found))
"""
# two recurrences, quickly compiled
SHORT = """
import numpy as np
from gru_any import GRU, Linear
x = np.ones((2, 2, 3), "float32")
y, h = GRU(3, 4, seed=0)(x)
z, h = GRU(3, 4, reset_after=True, seed=0)(x)
print("found", float(y.sum()), float(z.sum()))
"""
# a product whose code imports ours
PRODUCT = """
layer = Linear(64, 64, bias=False, seed=1)
y = layer(np.ones((120, 64), "float32"))
np.testing.assert_allclose(y[7], layer.params["weight"].sum(axis=1), rtol=1e-4, atol=1e-5)
"""
EXPLAIN = "from gru_any import GRU, explain\nprint(explain(GRU(3, 4)))"


def python(code, first=None, **variables):
    """Run code in a process of its own, with a folder or archive before all others."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(first or ""), str(ROOT.parent)]))
    folder = Path(first).parent if first else None
    return finished([sys.executable, "-c", code], code=0, env=environment, cwd=folder)


def numbers(done):
    line = next(line for line in done.stdout.splitlines() if line.startswith("found"))
    return np.array(line.split()[1:], float)


@pytest.fixture(scope="module")
def expected():
    return numbers(python(CALLS, GRU_ANY_PLAIN="1"))


@pytest.fixture(scope="module")
def short():
    return numbers(python(SHORT, GRU_ANY_PLAIN="1"))


def broken_numba(folder, text):
    """A package that is found in Numba's place."""
    (folder / "first" / "numba").mkdir(parents=True)
    (folder / "first" / "numba" / "__init__.py").write_text(text)
    return folder / "first"


@pytest.mark.parametrize(
    "text",
    [
        "raise ImportError('Numba needs NumPy 2.3 or less. Got NumPy 9.9.')",
        "raise SystemError('initialization of _internal failed')",
        "raise AttributeError('module numpy has no attribute _x')",
        "",  # an empty folder that was left behind
    ],
)
def test_numba_that_cannot_be_imported(tmp_path, expected, text):
    first = broken_numba(tmp_path, text)
    done = python(CALLS, first)
    np.testing.assert_allclose(numbers(done), expected, rtol=1e-5)
    assert done.stderr.count("Numba cannot be imported") == 1
    told = python(EXPLAIN, first).stdout
    assert "A call runs traced" in told
    assert "Why not faster: Numba cannot be imported" in told
    report = python("from gru_any.__main__ import main\nraise SystemExit(main())", first).stdout
    assert "numpy: calls run traced, because Numba cannot be imported" in report


FAILING = """
import numba, numba.core.dispatcher as dispatcher
real, count = dispatcher._FunctionCompiler.compile, 0
def fail(self, *arguments):
    global count
    count += 1
    if count > LEFT:
        raise ERROR
    return real(self, *arguments)
dispatcher._FunctionCompiler.compile = fail
"""


@NUMBA
@pytest.mark.parametrize(
    ("error", "left"), [("numba.core.errors.LoweringError('no')", 0), ("RuntimeError('LLVM')", 20)]
)
def test_numba_that_fails_while_compiling(tmp_path, expected, left, error):
    code = FAILING.replace("LEFT", str(left)).replace("ERROR", error) + CALLS
    done = python(code, GRU_ANY_CACHE=str(tmp_path))
    np.testing.assert_allclose(numbers(done), expected, rtol=1e-5)
    assert done.stderr.count("Numba cannot compile here") == 1
    if not left:
        code = FAILING.replace("LEFT", "0").replace("ERROR", error) + EXPLAIN
        assert "Why not faster: Numba cannot compile here" in python(code).stdout


def archive(folder):
    """The package in a zip."""
    with zipfile.ZipFile(folder / "packed.zip", "w") as packed:
        for path in ROOT.rglob("*.py"):
            packed.write(path, path.relative_to(ROOT.parent))
    return folder / "packed.zip"


def sourceless(folder):
    """The package as byte code alone."""
    shutil.copytree(
        ROOT, folder / "bytes" / "gru_any", ignore=shutil.ignore_patterns("__pycache__")
    )
    compileall.compile_dir(folder / "bytes", quiet=1, legacy=True)
    for path in (folder / "bytes").rglob("*.py"):
        path.unlink()
    return folder / "bytes"


@pytest.mark.parametrize("pack", [archive, sourceless])
def test_an_installation_without_files_of_source(tmp_path, short, pack):
    first, cache = pack(tmp_path), tmp_path / "cache"
    code = "import gru_any\nprint(gru_any.__file__)\n" + SHORT
    code += PRODUCT if pack is archive else ""  # which takes long to compile
    done = python(code, first, GRU_ANY_CACHE=str(cache))
    assert str(first) in done.stdout
    np.testing.assert_allclose(numbers(done), short, rtol=1e-5)
    assert "cannot" not in done.stderr
    if "compiled" in PATHS:
        # two recurrences, and the product that they share; of PRODUCT, how threads share its rows
        assert len(list(cache.glob("gru_any_*.py"))) == 3 + (pack is archive)
        assert "compiling" not in python(SHORT, first, GRU_ANY_CACHE=str(cache)).stderr
    told = python(EXPLAIN, first).stdout
    assert f"A call runs {PATHS[-1]}" in told
    assert ("r = sigmoid" in told) == (pack is archive)
    assert ("source of gru_any is not installed" in told) == (pack is sourceless)


@NUMBA
def test_a_cache_folder_that_vanishes_or_holds_rubbish(tmp_path, short):
    cache = tmp_path / "cache"
    vanish = f"import shutil\nshutil.rmtree({str(cache)!r})\nz, h ="
    done = python(SHORT.replace("z, h =", vanish), GRU_ANY_CACHE=str(cache))
    np.testing.assert_allclose(numbers(done), short, rtol=1e-5)
    assert "cannot" not in done.stderr
    kept = [*cache.rglob("*.nbi"), *cache.rglob("*.nbc")]
    assert kept
    for path in kept:
        path.write_bytes(path.read_bytes()[:40])
    done = python(SHORT, GRU_ANY_CACHE=str(cache))
    np.testing.assert_allclose(numbers(done), short, rtol=1e-5)


@pytest.fixture
def unbroken(monkeypatch):
    """What is found out about Numba in a test is forgotten after it."""
    monkeypatch.setattr(compiled, "_failures", [])


def results():
    gru, x = GRU(3, 4, 2, seed=0, bidirectional=True), np.ones((9, 5, 3), "float32")
    (y, h), pullback = gru.vjp(x, lengths=[9, 4, 0, 9, 1])
    grads, dx, dh0 = pullback(np.ones_like(y), h)
    stream = Stream(GRU(3, 4, seed=0))
    single = [stream.step(x_t) for x_t in x[:2]]
    z, back = Linear(8, 5, seed=1).vjp(y)
    frozen = freeze(Chain(GRU(3, 4, seed=0), Linear(4, 5, seed=1)))(np.repeat(x, 9, axis=1))[0]
    return [y, h, dx, dh0, frozen, *grads.values(), *single, z, *back(z)[0].values()]


@NUMBA
@pytest.mark.parametrize(
    "method",
    [
        "forward",
        "backward",
        "prepare_step",
        "prepare_block",
        "frozen_weights",
        "multiply",
    ],
)
def test_each_method_that_fails_to_compile(monkeypatch, unbroken, method):
    with running("traced"):
        wanted = results()

    def fail(*arguments):
        raise compiled.CompileError("no") from RuntimeError("LLVM")

    monkeypatch.setattr(f"gru_any.backend.cpu.numba_runner.Numba.{method}", fail)
    with running("packed"):
        with pytest.warns(RuntimeWarning, match=r"compile here \(RuntimeError: LLVM\).*slower"):
            found = results()
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        for one, other in zip(results(), wanted, strict=True):  # told once: warnings are errors
            np.testing.assert_array_equal(one, other)


@NUMBA
def test_what_is_not_numbas_fault_is_raised(unbroken, tmp_path, monkeypatch):
    from gru_any.backend.cpu.fallback import rescued

    monkeypatch.setenv("GRU_ANY_CACHE", str(tmp_path))  # whose machine code is discarded

    def attempt(call, instead):
        try:
            return call()
        except Exception as e:
            return rescued(e, call, instead)

    class AlarmError(Exception):
        """Raised by a signal handler of the caller, say."""

    def fail(error):
        raise error

    for error in (AlarmError(), TimeoutError(), MemoryError(), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            attempt(lambda error=error: fail(error), lambda: 1)
    with pytest.raises(ValueError, match="both"):
        attempt(lambda: fail(ValueError("one")), lambda: fail(ValueError("both")))
    assert not compiled.problem()
    errors = [PermissionError(13, "no")]
    assert attempt(lambda: fail(errors.pop()) if errors else 2, lambda: 1) == 2


THREADS = """
import threading
def refuse(self):
    global left
    left -= 1
    if left < 0:
        raise RuntimeError("can't start new thread")
    real(self)
real, left = threading.Thread.start, LEFT
threading.Thread.start = refuse
import numpy as np
from gru_any import GRU
from gru_any.backend.cpu import cores, threads
cores.available, threads.crowd.present = lambda: 4, lambda: False  # whatever this machine has
rng = np.random.default_rng(0)
for B, H in ((64, 200), (1, 600)):
    gru = GRU(H, H, seed=0)
    x = rng.standard_normal((40, B, H), dtype="float32")
    for _ in range(3):
        (y, h), pullback = gru.vjp(x)
        dx = pullback(np.ones_like(y))[1]
        print("found", float(abs(y).sum()), float(abs(dx).sum()))
"""


@NUMBA
@pytest.mark.parametrize("left", [0, 1])
def test_a_place_where_no_thread_can_start(left):
    few = python(THREADS.replace("LEFT", str(left)), OMP_NUM_THREADS="4")
    assert few.stderr.count("can't start new thread") == 1
    many = python(THREADS.replace("LEFT", "99"), OMP_NUM_THREADS="4")
    assert "thread" not in many.stderr
    found, wanted = (
        np.array([line.split()[1:] for line in done.stdout.splitlines()], float)
        for done in (few, many)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert len(found) == 6


@pytest.mark.parametrize("kind", ["missing", "failing"])
def test_the_number_of_processors_that_cannot_be_asked_for(expected, kind):
    change = {
        "missing": "import os\nvars(os).pop('sched_getaffinity', None)\n",
        "failing": "import os\ndef f(n): raise OSError(1, 'no')\nos.sched_getaffinity = f\n",
    }[kind]
    done = python(change + CALLS, OMP_NUM_THREADS="")
    np.testing.assert_allclose(numbers(done), expected, rtol=1e-5)
    done = python(change + THREADS.replace("LEFT", "99"), OMP_NUM_THREADS="")
    assert done.stdout.count("found") == 6
