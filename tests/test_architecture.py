"""What may import what, and where things stand, read from the source."""

import ast
import sys
from pathlib import Path

import pytest

import gru_any

ROOT = Path(gru_any.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
EACH = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))

# what each file imports that is neither ours nor Python's; the backend's files are free
HOST = [
    "arguments",
    "checks",
    "data",
    "gru",
    "init",
    "inspect",
    "layers",
    "mixed",
    "params",
    "run",
    "stream",
]
FOREIGN = {name: {"numpy"} for name in HOST} | {
    "checkpoint": {"numpy", "safetensors"},
    "resume": {"numpy", "safetensors"},
    "history": {"matplotlib"},
    "train": {"tqdm"},
}
# the converters: what their files import beside NumPy
CONVERT = {
    "files.py": {"safetensors"},
    "hdf5.py": {"h5py"},
    "torch.py": {"torch"},
    "torch_module.py": {"torch"},
    "moves.py": {"onnx"},
    "read.py": {"onnx"},
    "write.py": {"onnx"},
    "check.py": {"onnx"},
    "prove.py": {"onnxruntime"},
}
LIBRARIES = {"numpy", "cupy", "torch", "jax", "jax.numpy", "array_api_strict"}

# each file may import from the lines below its own
LAYERS = [
    {"__main__", "__init__"},
    {"train"},
    {"run"},
    {"convert", "deploy", "history", "mixed", "resume", "stream"},
    {"checkpoint", "checks", "explain", "inspect"},
    {"data", "schedules"},
    {"chain"},
    {"gru", "cell", "layers", "losses", "optim"},
    {"pullback"},
    {"stack"},
    {"weights"},
    {"params", "sweep"},
    {"equations", "init"},
    {"arguments", "backend", "errors"},
    {"files"},
    {"trace", "formulas"},
]
LEVEL = {name: i for i, names in enumerate(LAYERS) for name in names}


def part(path):
    """The file's name, or its folder's."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def nodes(path, *kinds):
    """The nodes of these kinds in the file."""
    tree = ast.walk(ast.parse(path.read_text("utf-8")))
    return [node for node in tree if isinstance(node, kinds)]


def ours(path):
    """The modules of this package that a file imports, with `from .a import b` as (1, "a")."""
    for node in nodes(path, ast.ImportFrom):
        names = [node.module] if node.module else [alias.name for alias in node.names]
        yield from ((node.level, name.partition(".")[0]) for name in names if node.level)


def foreign(path):
    """The libraries that a file imports."""
    names = [alias.name for node in nodes(path, ast.Import) for alias in node.names]
    names += [node.module for node in nodes(path, ast.ImportFrom) if not node.level]
    return {name.partition(".")[0] for name in names}


@EACH
def test_imports_point_down(path):
    depth = len(path.relative_to(ROOT).parts)
    for level, found in ours(path):
        if level == depth and found != "__version__":
            assert LEVEL[part(path)] < LEVEL[found], f"{part(path)} imports {found}"


@EACH
def test_the_package_imports_itself_by_relative_names(path):
    assert "gru_any" not in foreign(path)


def test_the_equations_import_nothing():
    assert foreign(ROOT / "equations.py") <= {"typing"}
    assert not list(ours(ROOT / "equations.py"))


@EACH
def test_only_the_backend_imports_an_array_library(path):
    if part(path) == "convert":
        found = foreign(path) - sys.stdlib_module_names
        assert found <= CONVERT.get(path.name, set()) | {"numpy"}
    elif part(path) != "backend":
        assert foreign(path) - sys.stdlib_module_names == FOREIGN.get(part(path), set())


@EACH
def test_only_the_backend_asks_which_library_it_is(path):
    # the report and the converters name what they look for
    if part(path) in ("backend", "convert", "__main__"):
        return
    assert not LIBRARIES & {node.value for node in nodes(path, ast.Constant)}
    for node in nodes(path, ast.If, ast.IfExp, ast.While):
        assert not any(name in ast.unparse(node.test) for name in ("cupy", "torch", "jax"))


@EACH
def test_the_gates_are_written_once(path):
    """tanh is called in the equations alone; elsewhere it is a word in a table of operations."""
    names = {n.attr for n in nodes(path, ast.Attribute)} | {n.id for n in nodes(path, ast.Name)}
    assert bool(names & {"tanh", "sigmoid"}) == (part(path) == "equations")
