"""Every Python block of the README runs, in order, as one program; in both languages."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EACH = pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])


@EACH
def test_the_snippets_run(readme):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text("utf-8"), re.DOTALL)
    assert len(blocks) >= 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, readme, "exec"), names)


@EACH
def test_the_commands_of_the_readme_are_those_of_the_checks(readme):
    text = (ROOT / readme).read_text("utf-8")
    assert 'pip install -e ".[test]" && python -m pytest' in text
    assert 'pip install ".[train,fast]" && python scripts/train_text.py' in text
