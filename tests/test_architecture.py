"""What may import what, and where things stand."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gru_any

ROOT = Path(gru_any.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LIBRARIES = {"numpy", "cupy", "torch", "jax", "array_api_compat", "array_api_strict", "numba"}
NUMPY_ON_THE_HOST = {"params.py", "gru.py", "cell.py", "layers.py", "checks.py", "checkpoint.py",
                     "init.py"}  # fmt: skip

# each file may import the ones below it
LAYERS = [
    {"__main__", "__init__"},
    {"checks", "checkpoint"},
    {"chain"},
    {"cell", "layers", "losses", "optim"},
    {"gru"},
    {"params", "sweep"},
    {"equations", "init"},
    {"backend", "errors"},
]
LEVEL = {name: i for i, names in enumerate(LAYERS) for name in names}


def name_of(path):
    return str(path.relative_to(ROOT))


def imports(path):
    """(is it ours, first part of the name) of each import in the file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((False, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield False, node.module.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((True, name.partition(".")[0]) for name in names)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path):
    name = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if name == "backend":
        inside = {p.stem for p in (ROOT / "backend").glob("*.py")}
        assert {found for ours, found in imports(path) if ours} <= inside
        return
    for ours, found in imports(path):
        if ours and found != "__version__":
            assert LEVEL[name] < LEVEL[found], f"{name} imports {found}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_backend_names_an_array_library(path):
    found = {name for ours, name in imports(path) if not ours} & LIBRARIES
    if path.parent.name == "backend":
        return
    assert found <= ({"numpy"} if name_of(path) in NUMPY_ON_THE_HOST else set())


def test_the_equations_import_nothing():
    assert {name for _, name in imports(ROOT / "equations.py")} == {"typing"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_question_about_a_library_outside_of_the_backend(path):
    if path.parent.name == "backend":
        return
    tests = [
        node.test
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, (ast.If, ast.IfExp, ast.While))
    ]
    for test in tests:
        assert not any(name in ast.unparse(test) for name in ("cupy", "torch", "jax", "'numpy'"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_gates_are_written_once(path):
    """tanh stands in the equations, and in no other code but the check of a namespace."""
    if name_of(path) in ("equations.py", "backend/select.py"):
        return
    tree = ast.parse(path.read_text("utf-8"))
    names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    names |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    assert not names & {"tanh", "sigmoid"}


def test_the_public_list_is_what_there_is():
    public = {k for k, v in vars(gru_any).items() if not k.startswith("_") and callable(v)}
    assert public == set(gru_any.__all__)
    assert all(getattr(gru_any, name).__doc__ for name in gru_any.__all__)


@pytest.mark.parametrize("work", ["", "; gru_any.GRU(3, 4)(numpy.zeros((5, 2, 3), 'float32'))"])
def test_the_core_imports_numpy_alone(work):
    code = (
        "import sys, numpy; before = set(sys.modules); import gru_any" + work + "\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "foreign = new - set(sys.stdlib_module_names) - {'gru_any', 'numpy', 'cython_runtime'}\n"
        "foreign = {m for m in foreign if not m.startswith('_')}\n"
        "sys.exit(', '.join(foreign) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
