"""What may import what, and where things stand, read from the source."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import gru_any

ROOT = Path(gru_any.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
EACH = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))

# what each file imports that is neither ours nor Python's; the backend's files are free
HOST = [
    "arguments",
    "deploy/c/compiler",
    "deploy/c/library",
    "deploy/c/parts",
    "deploy/c/selftest",
    "deploy/c/weights",
    "inspect/gradcheck",
    "inspect/values",
    "nn/init",
    "nn/params",
    "nn/steps",
    "stream",
    "train/compress",
    "train/data",
    "train/exchange",
    "train/mixed",
    "train/run",
    "train/shard",
    "train/share",
    "typing",
]
FOREIGN = {name: {"numpy"} for name in HOST} | {
    "tensors": {"numpy", "safetensors"},
    "train/history": {"matplotlib"},
    "train/loop": {"tqdm"},
    "train/distributed": {"numpy", "mpi4py"},
    "train/watch": {"mpi4py"},
}
TORCH = [f"torch/{name}" for name in (
    "autograd", "call", "chain", "check", "evaluate", "module", "replace", "weights",
)]  # fmt: skip
# the converters: what their files import beside NumPy
CONVERT = {
    "keras/hdf5": {"h5py"},
    **{name: {"torch"} for name in TORCH},
    "onnx/check": {"onnx"},
    "onnx/graph": {"onnx"},
    "onnx/part": {"onnx"},
    "onnx/read": {"onnx"},
    "onnx/reshape": {"onnx"},
    "onnx/scan": {"onnx"},
    "onnx/walk": {"onnx"},
    "onnx/wire": {"google"},
    "onnx/prove": {"onnxruntime"},
}
IMPORT = re.compile(r"from gru_any[\w.]* import [\w, ]+")
# source for a compiler that imports what is compiled with it
PRINTED = {
    "codegen/numba_source": {f"backend/cpu/{n}" for n in ("barrier", "gemm", "handoff", "stored")},
    "backend/cpu/packed": {f"backend/cpu/{n}" for n in ("barrier", "gemm", "handoff", "integers")},
    "backend/cpu/unpacked": {f"backend/cpu/{n}" for n in ("barrier", "gemm", "handoff", "stored")},
    "backend/cpu/threads": {"backend/cpu/barrier", "backend/cpu/handoff"},
}
LIBRARIES = {"numpy", "cupy", "torch", "jax", "jax.numpy", "array_api_strict"}

# a file may import from the lines below its own; a folder stands for its files that are not named
LAYERS = [
    {"__main__", "__init__", "codegen/__main__"},
    {"train/__init__"},
    {"train/loop"},
    {"train/run"},
    {"train/mixed"},
    {"train/shard"},
    {"train/distributed"},
    {"train/exchange", "train/share"},
    {"convert", "deploy", "train/history", "train/resume", "stream"},
    {"checkpoint", "inspect/__init__"},
    {"inspect/explain", "inspect/gradcheck", "inspect/values"},
    {"train/compress", "train/data", "train/lock", "train/schedules", "train/watch"},
    {"train/sentinel"},
    {"nn/chain"},
    {"nn/gru", "nn/cell", "nn/layers", "nn/losses", "train/optim"},
    {"nn/pullback"},
    {"nn/tangents"},
    {"nn/stack"},
    {"nn/layout", "nn/weights"},
    {"nn/params", "nn/steps", "nn/sweep"},
    {"nn/init", "nn/masks", "nn/options", "nn/__init__"},
    {"nn/merge", "normalisation", "regularisation"},
    {"equations", "inspect/formulas"},
    {"activations"},
    {"backend/__init__"},
    {"backend/bridge"},
    {"backend/modes"},
    {"testing", "backend/cuda", "backend/jax_host"},
    {"backend/cpu", "backend/jax_scan"},
    {"backend/reductions", "backend/rounding", "backend/transfer"},
    {"backend/dual_backend", "backend/dual_runner"},
    {"backend/dual"},
    {"backend/libraries", "backend/reference"},
    {"backend/alignment", "backend/jax_arrays"},
    {"backend/contract"},
    {"backend/cuda/device", "backend/cuda/operations"},
    {"tensors"},
    {"arguments", "errors", "files", "version"},
    {"codegen"},
    {"typing"},
]
LEVEL = {name: i for i, names in enumerate(LAYERS) for name in names}


def module(path):
    """The file's name below the package, such as nn/gru."""
    return path.relative_to(ROOT).with_suffix("").as_posix()


def room(path):
    """The first folder of the file, or its name."""
    return module(path).partition("/")[0]


def folder(name):
    """What stands on a line of LAYERS for a module: itself or one of its folders."""
    while name and name not in LEVEL:
        name = name.rpartition("/")[0]
    assert name, "a line of LAYERS must name it"
    return name


def level(name):
    """The line of LAYERS on which a module stands."""
    return LEVEL[folder(name)]


def nodes(path, *kinds):
    """The nodes of these kinds in the file."""
    tree = ast.walk(ast.parse(path.read_text("utf-8")))
    return [node for node in tree if isinstance(node, kinds)]


def resolved(path, node):
    """The modules of this package that an import names, as those of their files."""
    if node.level:
        base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
    else:
        base = ROOT.parent.joinpath(*node.module.split("."))
    for alias in node.names:
        tried = (base / f"{alias.name}.py", base / alias.name / "__init__.py")
        tried += (base.with_suffix(".py"), base / "__init__.py")
        yield module(next(file for file in tried if file.exists()))


def ours(path):
    """The modules of this package that a file imports, also in a function."""
    found = [node for node in nodes(path, ast.ImportFrom) if node.level]
    return {name for node in found for name in resolved(path, node)}


def printed(path):
    """The modules of this package that source imports which the file holds as text."""
    texts = [n.value for n in nodes(path, ast.Constant) if isinstance(n.value, str)]
    lines = [line for text in texts for line in text.splitlines()]
    found = [ast.parse(line).body[0] for line in lines if IMPORT.fullmatch(line)]
    return {name for node in found for name in resolved(path, node)}


def foreign(path):
    """The libraries that a file imports."""
    names = [alias.name for node in nodes(path, ast.Import) for alias in node.names]
    names += [node.module for node in nodes(path, ast.ImportFrom) if not node.level]
    return {name.partition(".")[0] for name in names}


@EACH
def test_imports_point_down(path):
    here, line = module(path), level(module(path))
    # files of a folder that stands on a line as a whole may import each other, without circles
    beside = {name for name in ours(path) if here not in LEVEL and folder(name) == folder(here)}
    above = [name for name in ours(path) - beside if level(name) <= line]
    assert not above, f"{here} imports {above}"


def test_source_that_is_printed_imports_what_its_file_may_name():
    found = {module(path): printed(path) for path in FILES}
    found = {name: modules for name, modules in found.items() if modules}
    assert found == PRINTED


def test_what_cached_code_imports_is_in_its_key():
    """Its key holds the modules that its source imports: all that count, directly or not."""
    for part in PRINTED.values():
        assert {name for m in part for name in ours(ROOT / f"{m}.py")} <= part | {"typing"}


def test_who_writes_to_stderr_and_to_a_log():
    """As docs/architecture.md says: what takes long, and details of a conversion."""
    stderr = {room(p) for p in FILES if any(n.attr == "stderr" for n in nodes(p, ast.Attribute))}
    log = {room(p) for p in FILES if "logging" in foreign(p)}
    assert (stderr, log) == ({"backend", "train", "checkpoint", "testing"}, {"convert"})


def test_there_are_no_circles():
    graph = {module(path): ours(path) for path in FILES}
    assert list(TopologicalSorter(graph).static_order())


@EACH
def test_the_package_imports_itself_by_relative_names(path):
    assert "gru_any" not in foreign(path)


def test_the_equations_import_types_alone():
    assert foreign(ROOT / "equations.py") <= {"functools", "typing"}
    assert ours(ROOT / "equations.py") <= {"activations", "typing"}
    assert foreign(ROOT / "activations.py") <= {"collections", "math", "types", "typing"}
    assert ours(ROOT / "activations.py") <= {"typing"}


@EACH
def test_only_the_backend_imports_an_array_library(path):
    if room(path) == "convert":
        found = foreign(path) - sys.stdlib_module_names
        assert found <= CONVERT.get(module(path).removeprefix("convert/"), set()) | {"numpy"}
    elif room(path) not in ("backend", "codegen", "testing"):
        assert foreign(path) - sys.stdlib_module_names == FOREIGN.get(module(path), set())


@EACH
def test_only_the_backend_asks_which_library_it_is(path):
    # the report and the converters name what they look for
    if room(path) in ("backend", "codegen", "testing", "convert", "__main__"):
        return
    assert not LIBRARIES & {node.value for node in nodes(path, ast.Constant)}
    for node in nodes(path, ast.If, ast.IfExp, ast.While):
        assert not any(name in ast.unparse(node.test) for name in ("cupy", "torch", "jax"))


@EACH
def test_the_gates_are_written_once(path):
    """tanh is called in one place alone; elsewhere it is a word in a table of operations."""
    names = {n.attr for n in nodes(path, ast.Attribute)} | {n.id for n in nodes(path, ast.Name)}
    assert bool(names & {"tanh", "sigmoid"}) == (module(path) == "activations")
