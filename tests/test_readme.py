"""Every Python block of the README runs, in order, as one program."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_snippets_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert len(blocks) >= 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)


def test_the_commands_of_the_readme_are_those_of_the_checks():
    text = README.read_text("utf-8")
    assert 'pip install -e ".[test]" && python -m pytest' in text
    assert 'pip install ".[train,fast]" && python scripts/train_text.py' in text
