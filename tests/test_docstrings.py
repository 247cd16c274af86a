"""Every example in a docstring runs, the public names have one, and links between pages lead on."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
from conftest import refuse, running

import gru_any

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("README*.md"), *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [
    module.name
    for module in pkgutil.walk_packages(gru_any.__path__, "gru_any.")
    if not module.name.endswith("__main__")
]
# these differ in a word or two from one that has an example
ALIKE = {
    "AdamW", "Dropout", "RMSprop", "SGD", "clip_by_value", "load", "sigmoid_cross_entropy",
    "to_numpy",
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        module = importlib.import_module(name)
    except ImportError as e:
        library = (e.name or "").partition(".")[0]
        if library in ("", "gru_any"):
            raise
        refuse(library, f"{name} needs it")
    with running("traced"):
        assert not doctest.testmod(module).failed


def test_the_public_names_have_examples():
    without = {k for k in gru_any.__all__ if ">>>" not in (getattr(gru_any, k).__doc__ or "")}
    assert without <= ALIKE


def test_the_reference_lists_the_public_names():
    page = (ROOT / "docs" / "reference.md").read_text("utf-8")
    folder = ROOT / "gru_any" / "convert"
    converters = {
        f"convert.{path.parent.name if path.stem == '__init__' else path.stem}"
        for path in (*folder.glob("*.py"), *folder.glob("*/__init__.py"))
        if re.search(r"^def (save|to_arrays)\(|^__all__", path.read_text("utf-8"), re.M)
    }
    assert len(converters) > 8
    named = set(re.findall(r"^::: gru_any\.(\S+)", page, re.M))
    assert not {*gru_any.__all__, *converters, "deploy.freeze", "inspect", "train"} - named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"
