"""What `import gru_any` gives, and what it asks for."""

import os
import sys
from pathlib import Path

import pytest
from conftest import finished

import gru_any

# one step of training, from weights to new weights
TRAIN = """
import numpy
gru = gru_any.GRU(3, 4, seed=0)
(y, _), pullback = gru.vjp(numpy.ones((5, 2, 3), "float32"), lengths=[5, 0])
_, dy = gru_any.squared_error(y, numpy.zeros_like(y))
gru_any.Adam(gru.params).step(gru.params, pullback(dy)[0])
"""
NEW = """
new = {m.partition(".")[0] for m in set(sys.modules) - before} - {"gru_any", "numpy"}
new -= {"cython_runtime"} | set(sys.stdlib_module_names)
sys.exit(", ".join(m for m in new if not m.startswith("_")) or 0)
"""
# what may be missing where only NumPy is used
BLOCKED = ["array_api_compat", "safetensors", "numba", "cupy", "torch", "jax", "tqdm"]


def run(code):
    """Run it in a new process, which must end well."""
    environment = os.environ | {"GRU_ANY_NO_NUMBA": "1"}
    finished([sys.executable, "-c", code], code=0, env=environment)


def test_the_public_list_is_what_there_is():
    named = {k: getattr(gru_any, k) for k in dir(gru_any) if not k.startswith("_")}
    assert {k for k, v in named.items() if callable(v)} == set(gru_any.__all__)
    assert all(v is getattr(gru_any, k) for k, v in named.items())
    assert not hasattr(gru_any, "LSTM")
    assert all(getattr(gru_any, name).__doc__ for name in gru_any.__all__)


@pytest.mark.parametrize("work", ["", TRAIN], ids=["import", "train"])
def test_numpy_is_the_only_library_imported(work):
    run("import sys, numpy\nbefore = set(sys.modules)\nimport gru_any\n" + work + NEW)


def test_the_test_equipment_is_not_imported():
    run(f"import sys, gru_any\n{TRAIN}\nsys.exit(any('.testing' in m for m in sys.modules))")


def test_numpy_is_the_only_library_needed():
    run(f"import sys\nsys.modules.update(dict.fromkeys({BLOCKED}))\nimport gru_any\n" + TRAIN)


def test_the_submodules_need_no_import_of_their_own():
    names = "deploy.freeze, deploy.c.write, stream.Stream, train.fit, convert.torch.load"
    run("import gru_any\n" + ", ".join(f"gru_any.{name}" for name in names.split(", ")))


def test_the_import_leaves_out_what_training_alone_needs():
    late = {"socket", "subprocess", "concurrent.futures", "logging"}
    run(f"import sys, numpy\nlate = {late} - set(sys.modules)\nimport gru_any\n"
        "sys.exit(', '.join(late & set(sys.modules)) or 0)")  # fmt: skip


def test_a_compiled_model_needs_neither_layers_nor_equations():
    parts = {"arguments", "nn", "backend", "codegen", "train", "inspect", "equations", "checkpoint"}
    late = {f"gru_any.{name}" for name in parts} | {"tempfile", "pathlib", "subprocess", "hashlib"}
    run(f"import sys, numpy\nlate = {late} - set(sys.modules)\nfrom gru_any.deploy import c\n"
        "c.load\nsys.exit(', '.join(late & set(sys.modules)) or 0)")  # fmt: skip


def test_the_types_are_shipped():
    assert (Path(gru_any.__file__).parent / "py.typed").is_file()
