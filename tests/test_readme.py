"""The Python blocks of the README and of every page of docs/ run, in order, a program a page."""

import re
import shutil
from pathlib import Path

import pytest
from conftest import refuse, require, running

ROOT = Path(__file__).parent.parent
READMES = ["README.md", "README.zh.md"]
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
# what a page needs beside the library; the pages on the derivation take their steps one by one
NEEDS = {
    "docs/onnx.md": ["onnx", "onnxruntime"],
    "docs/array_api.md": ["array_api_strict"],
    "docs/convert.md": ["h5py", "torch"],
    "docs/jax.md": ["jax"],
    "docs/libraries.md": ["torch", "jax"],
}
PLAIN = {"docs/derivation.md", "docs/mistakes.md"}


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


# the other Chinese pages hold the same blocks; see test_pages.py
@pytest.mark.parametrize("page", [*READMES, *(p for p in PAGES if blocks(p) and ".zh" not in p)])
def test_the_blocks_run(page, tmp_path, monkeypatch):
    for name in NEEDS.get(page, []):
        require(name)
    if page == "docs/c.md" and shutil.which("cc") is None:
        refuse("cc", "no C compiler")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with running("plain" if page in PLAIN else "compiled" if page in READMES else "traced"):
        for block in blocks(page):
            exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("readme", READMES)
def test_the_commands_of_the_readme_are_those_of_the_checks(readme):
    text = (ROOT / readme).read_text("utf-8")
    assert len(blocks(readme)) >= 5
    assert 'pip install -e ".[test]" && python -m pytest' in text
    assert 'pip install ".[train,fast]" && python scripts/train_text.py' in text
