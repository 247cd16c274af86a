"""Which library, which device, and what is said when something is missing."""

import copy
import importlib
import os
import pickle
import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace

import conftest
import numpy as np
import pytest
from conftest import finished, require

from gru_any import GRU, Adam, asarray, to_numpy
from gru_any.backend import NUMPY, Backend, BackendError, of, select
from gru_any.backend.cuda import device as cuda


def test_names_modules_and_the_environment(monkeypatch):
    strict = require("array_api_strict")
    assert select() is NUMPY
    assert select("numpy") is select(np) is NUMPY
    assert select(strict) == select("array_api_strict")
    monkeypatch.setenv("GRU_ANY_BACKEND", "array_api_strict")
    assert GRU(3, 4).backend.name == "array_api_strict"
    assert select("numpy") is NUMPY


def test_a_required_library_fails_in_place_of_a_skip(monkeypatch):
    with pytest.raises(pytest.skip.Exception, match="no_such_library: No module"):
        require("no_such_library")
    monkeypatch.setattr(conftest, "REQUIRED", {"no_such_library"})
    with pytest.raises(pytest.fail.Exception, match=r"no_such_library\.part is required"):
        require("no_such_library.part")


@pytest.mark.parametrize("name", ["no_such_library", "math", "not a name", "", ".", 3])
def test_what_is_no_array_library(name):
    with pytest.raises(BackendError, match="backend "):
        select(name)


def test_numpy_has_one_device():
    assert select("numpy", "cpu") is NUMPY
    for device in ("cuda:1", 1):
        with pytest.raises(BackendError, match='try backend="cupy"'):
            select("numpy", device)


@pytest.mark.parametrize("device", ["cuda:7", 7, "no such device"])
@pytest.mark.parametrize("name", ["torch", "jax.numpy", "array_api_strict"])
def test_a_device_that_is_not_there(name, device):
    require(name)
    with pytest.raises(BackendError, match="cannot use device"):
        select(name, device)


def test_backends_are_values(backend):
    home = backend.backend
    assert select(home) is home
    assert home == select(backend.name, backend.device)
    assert pickle.loads(pickle.dumps(home)) == home
    assert copy.deepcopy(home) == home
    assert home.host == (backend.name == "numpy")


def test_arrays_there_and_back(backend):
    home = backend.backend
    for host in (np.arange(6.0).reshape(2, 3), np.arange(3), np.array([True, False])):
        there = home.put(host)
        assert of(there) == home
        assert np.array_equal(to_numpy(there), host)
        kept = host.copy()
        host[...] = 0
        assert np.array_equal(to_numpy(there), kept)
    assert home.put(np.arange(3.0).astype(">f8"), "float32").dtype == home.dtype("float32")
    assert np.array_equal(to_numpy(home.zeros((2, 3), "float64")), np.zeros((2, 3)))
    home.synchronize()


def test_asarray(backend):
    gru = GRU(3, 4, backend=backend.name, device=backend.device)
    for x in ([[1.0, 2.0]], np.array([[1, 2]], ">f8"), np.array([[1.0, 2.0]], "float16")):
        there = asarray(x, gru)
        assert of(there) == gru.backend
        assert there.dtype == gru.backend.dtype("float32")
        assert np.array_equal(to_numpy(there), [[1.0, 2.0]])
    assert "int" in str(asarray([1, 2], gru).dtype)
    assert np.array_equal(to_numpy(asarray(3.5, there)), 3.5)
    same = asarray(there, gru)
    assert same is there or np.shares_memory(to_numpy(same), to_numpy(there))


def test_asarray_shares_memory_where_it_can():
    torch = require("torch")
    gru, there = GRU(3, 4), GRU(3, 4, backend="torch")
    tensor = torch.zeros(3)
    array = asarray(tensor, gru)
    tensor += 1
    assert np.array_equal(array, np.ones(3))
    host = np.zeros(3, "float32")
    tensor = asarray(host, there)
    host += 1
    assert np.array_equal(to_numpy(tensor), np.ones(3))
    host.flags.writeable = False
    assert np.array_equal(to_numpy(asarray(host, there)), np.ones(3))


@pytest.mark.parametrize(
    ("bad", "message"),
    [("abc", "dtype <U3, expected numbers"), (None, "object"), (["a"], "<U1"), (1j, "complex128")],
)
def test_asarray_takes_numbers_alone(bad, message):
    with pytest.raises(TypeError, match=message):
        asarray(bad, GRU(3, 4))
    if not isinstance(bad, complex):
        with pytest.raises(TypeError, match=r"expected numbers|is no array"):
            to_numpy(bad)


def test_a_library_that_nobody_here_has_heard_of(monkeypatch):
    """array_api_strict under another name, its arrays too."""
    strict = require("array_api_strict")
    other = ModuleType("unheard_of")
    other.__dict__.update({k: v for k, v in vars(strict).items() if k[0] != "_"})
    monkeypatch.setitem(sys.modules, "unheard_of", other)
    array = type(strict.zeros(1))
    monkeypatch.setattr(array, "__module__", "unheard_of.arrays")
    monkeypatch.setattr(array, "__array_namespace__", lambda self, api_version=None: other)
    monkeypatch.setattr(Backend, "to_numpy", lambda self, v: np.asarray(v))
    gru, x = GRU(3, 4, backend="unheard_of", seed=0), np.ones((5, 2, 3), "float32")
    assert of(gru.params["weight_ih_l0"]) == gru.backend
    (y, _), pullback = gru.vjp(asarray(x, gru))
    assert np.allclose(to_numpy(y), GRU(3, 4, seed=0)(x)[0], atol=1e-6)
    assert pullback(y)[1].shape == (5, 2, 3)
    with pytest.raises(TypeError, match="x is an array of numpy, expected an array of unheard_of"):
        gru(x)
    monkeypatch.delattr(array, "__array_namespace__")
    with pytest.raises(TypeError, match="no array library with the Python Array API"):
        of(y)


def test_mixed_libraries():
    strict = require("array_api_strict")
    with pytest.raises(TypeError, match=r"array_api_strict on .* and numpy on cpu in one call"):
        of(np.zeros(3), strict.zeros(3))
    for bad in ([1], 1.0, None, np.float32(1)):
        with pytest.raises(TypeError, match="is no array"):
            of(bad)


def test_jax_without_x64_says_so():
    require("jax")
    code = (
        "from gru_any import GRU\n"
        "GRU(3, 4, backend='jax.numpy')\n"
        "try: GRU(3, 4, backend='jax.numpy', dtype='float64')\n"
        "except ValueError as e: assert 'jax_enable_x64' in str(e)\n"
        "else: raise SystemExit('not refused')\n"
    )
    environment = {**os.environ, "JAX_ENABLE_X64": "0"}
    finished([sys.executable, "-c", code], code=0, env=environment)


# CuPy, as it fails where something is missing -----------------------------------------------------


class MissingError(RuntimeError):
    """As CuPy's CUDARuntimeError: a RuntimeError with a status."""

    def __init__(self, status):
        super().__init__(f"cudaError {status}")
        self.status = status


class Device:
    """As cupy.cuda.Device, but it is only a number."""

    def __init__(self, number=0):
        self.id = number

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def __eq__(self, other):
        return self.id == other.id

    def __hash__(self):
        return self.id


class Array(np.ndarray):
    """As cupy.ndarray, on the host."""

    def get(self):
        return np.asarray(self)


@pytest.fixture
def cupy(monkeypatch):
    """A module that looks like a working CuPy with two devices; tests break it."""
    fake = ModuleType("cupy")

    def counted(n):
        def count():
            if isinstance(n, Exception):
                raise n
            return n

        return count

    fake.cuda = SimpleNamespace(
        Device=Device,
        runtime=SimpleNamespace(
            getDeviceCount=counted(2),
            driverGetVersion=lambda: 12080,
            runtimeGetVersion=lambda: 13020,
        ),
    )
    fake.counted = counted
    fake.arange = lambda n, dtype: np.arange(n, dtype=dtype).view(Array)
    fake.asarray = lambda v, dtype: np.asarray(v, dtype).view(Array)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(cuda, "_version", lambda name: "14.2" if name == "cupy-cuda13x" else "")
    cuda._answers.cache_clear()
    yield fake
    cuda._answers.cache_clear()


def test_a_device_that_answers(cupy):
    assert cuda.problem() == cuda.problem("cuda:1") == cuda.problem(1) == ""


@pytest.mark.parametrize("device", [2, "cuda:2", "2"])
def test_an_index_out_of_range(cupy, device):
    assert cuda.problem(device) == "device is 2, but there are 2: choose from 0 to 1"


@pytest.mark.parametrize("device", ["gpu", "cuda:x", -1, "cpu", 1.5])
def test_what_is_no_device(cupy, device):
    with pytest.raises(ValueError, match="expected a number"):
        cuda.index(device)


def test_no_device(cupy):
    for count in (0, MissingError(cuda.NO_DEVICE)):
        cupy.cuda.runtime.getDeviceCount = cupy.counted(count)
        assert "sees no device: check nvidia-smi" in cuda.problem()


def test_no_driver_or_an_old_one(cupy):
    cupy.cuda.runtime.getDeviceCount = cupy.counted(MissingError(cuda.OLD_DRIVER))
    old = cuda.problem()
    assert "driver is for CUDA 12.8, this CuPy needs 13.2" in old
    assert 'pip install "gru-any[cuda12]"' in old
    cupy.cuda.runtime.driverGetVersion = lambda: 0
    assert "no CUDA driver is installed" in cuda.problem()
    cupy.cuda.runtime.getDeviceCount = cupy.counted(MissingError(999))
    assert "CUDA does not start" in cuda.problem()


def test_nvrtc_missing(cupy):
    def missing(n, dtype):
        raise RuntimeError('Failure finding "libnvrtc.so.13"')

    cupy.arange = missing
    why = cuda.problem()
    assert why.startswith('CuPy cannot use NVRTC (Failure finding "libnvrtc.so.13")')
    assert 'pip install "gru-any[cuda13]"' in why


def test_cublas_missing(cupy):
    def missing(v, dtype):
        raise ImportError("libcublas.so.13: cannot open shared object file")

    cupy.asarray = missing
    assert cuda.problem().startswith("CuPy cannot use cuBLAS (libcublas.so.13")


def test_a_device_that_gives_wrong_numbers(cupy):
    cupy.arange = lambda n, dtype: np.zeros(n, dtype).view(Array)
    assert "wrong numbers" in cuda.problem()


def test_two_wheels(cupy, monkeypatch):
    monkeypatch.setattr(cuda, "_version", lambda name: "14" if "cuda" in name else "")
    why = cuda.problem()
    assert "several CuPy wheels are installed" in why
    assert "pip uninstall -y cupy-cuda11x cupy-cuda12x cupy-cuda13x" in why


def test_cupy_absent_or_broken(monkeypatch):
    real = importlib.import_module

    def without(name, *rest):
        if name == "cupy":
            raise ImportError("No module named 'cupy'")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    monkeypatch.setattr(cuda, "_version", lambda name: "")
    assert cuda.problem().startswith('CuPy is not installed: pip install "gru-any[cuda13]"')
    with pytest.raises(BackendError, match="CuPy is not installed"):
        select("cupy")
    assert select("auto") is NUMPY
    monkeypatch.setattr(cuda, "_version", lambda name: "14" if name == "cupy-cuda12x" else "")
    assert "is installed (cupy-cuda12x) but cannot be imported" in cuda.problem()


def test_auto_takes_cupy_where_a_device_answers(cupy, monkeypatch):
    namespace = SimpleNamespace(
        asarray=0, astype=0, permute_dims=0, concat=0, tanh=0, cuda=cupy.cuda
    )
    monkeypatch.setitem(sys.modules, "array_api_compat.cupy", namespace)
    chosen = select("auto", "cuda:1")
    assert (chosen.name, chosen.device.id) == ("cupy", 1)
    cupy.cuda.runtime.getDeviceCount = cupy.counted(0)
    assert select("auto") is NUMPY


def test_another_current_device_is_refused(cupy):
    home = SimpleNamespace(name="cupy", xp=cupy, device=Device(1))
    with pytest.raises(TypeError, match=r"cupy.cuda.Device\(1\).use\(\)"):
        cuda.check_current("x", home)
    cuda.check_current("x", SimpleNamespace(name="cupy", xp=cupy, device=Device(0)))


def test_the_report(monkeypatch):
    environment = {k: v for k, v in os.environ.items() if k != "GRU_ANY_BACKEND"}
    command = [sys.executable, "-m", "gru_any"]
    done = finished(command, code=0, env=environment)
    assert f"numpy {metadata.version('numpy')}" in done.stdout
    assert "auto: " in done.stdout
    assert "because " in done.stdout
    assert "backend=None: numpy on cpu" in done.stdout
    environment["GRU_ANY_BACKEND"] = "no_such_library"
    done = finished(command, code=1, env=environment)
    assert "cannot be imported" in done.stdout


def test_parameters_begin_with_a_line_of_the_cache():
    """New ones, loaded ones, and those that an optimiser changed."""
    gru = GRU(3, 5, num_layers=2, reset_after=True, seed=0)
    gru.load_params({name: np.zeros(v.shape) for name, v in gru.params.items()})
    for model in (gru, GRU(3, 5), gru.to(dtype="float64")):
        Adam(model.params).step(model.params, dict(model.params))
        assert [v.ctypes.data % 64 for v in model.params.values()] == [0] * len(model.params)
