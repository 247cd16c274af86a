"""The pages of docs/ in two languages: their quotes stand in the source, both languages agree."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

from gru_any import checks

ROOT = Path(__file__).parent.parent
ENGLISH = ["README.md", "docs/derivation.md", "docs/mistakes.md"]
PAGES = [name.replace(".md", end) for name in ENGLISH for end in (".md", ".zh.md")]


def boxes(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


def rows(page):
    """The rows of numbers in the page's tables, without their first cell."""
    lines = re.findall(r"^\|[^|]+\|(.*\d\.\d{2}.*)\|$", (ROOT / page).read_text("utf-8"), re.M)
    return [re.findall(r"-?\d[\d.e+-]*", line) for line in lines]


def source(path, name):
    """The lines of a function or method."""
    text = (ROOT / path).read_text("utf-8")
    node = ast.parse(text)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return [line.strip() for line in ast.get_source_segment(text, node).splitlines()]


@pytest.mark.parametrize("page", ENGLISH[1:])
def test_quoted_lines_stand_in_the_source(page):
    assert len(boxes(page, "py")) >= 10
    for box in boxes(page, "py"):
        head, *lines = box.splitlines()
        path, _, name = head.removeprefix("# ").partition(": ")
        there = source(path, name) if name else (ROOT / path).read_text("utf-8")
        for line in lines:
            assert line in there, f"{page} quotes {line!r}, which {path} {name} no longer holds"


@pytest.mark.parametrize("page", ENGLISH)
def test_the_languages_hold_the_same(page):
    """The same code but for its comments, the same formulas and quotes, the same figures."""
    chinese = page.replace(".md", ".zh.md")
    code = [[ast.dump(ast.parse(b)) for b in boxes(p, "python")] for p in (page, chinese)]
    assert code[0] == code[1]
    for language in ("py", "text"):
        assert boxes(page, language) == boxes(chinese, language)
    assert rows(page) == rows(chinese)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#:]+)[^):]*\)", (ROOT / page).read_text("utf-8"))
    assert links
    for link in links:
        assert (ROOT / page).parent.joinpath(link).exists(), f"{page} links to {link}"


@pytest.fixture
def mistakes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import mistakes

    return mistakes


def test_gradcheck_sees_every_mistake(mistakes):
    for mistake in [*mistakes.BEFORE, *mistakes.AFTER]:
        assert float(mistakes.verdict(mistake)) > 1000 * checks.TOLERANCE["central"]


def test_the_figures_of_the_page(mistakes):
    """What does not need the training: errors and cosines before it."""
    printed = [row for row in rows("docs/mistakes.md") if len(row) == 11]
    for row, mistake in zip(printed, [*mistakes.BEFORE, *mistakes.AFTER], strict=True):
        relative, cosines = mistakes.errors(mistake, *mistakes.demo(mistake.reset_after, 0))
        found = [float(mistakes.verdict(mistake)), *relative, *cosines[:2]]
        assert np.allclose(found, [float(v) for v in row[:7]], rtol=0.03, atol=0.006), mistake


def test_the_script_of_the_mistakes(mistakes, tmp_path, capsys):
    mistakes.main(
        ["--iterations", "2", "--seeds", "1", "--picture", str(tmp_path / "mistakes.png")]
    )
    assert capsys.readouterr().out.count("| all four |") == 2
    assert (tmp_path / "mistakes.png").stat().st_size > 10_000
