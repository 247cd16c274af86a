"""The pages of docs/ in two languages: their quotes stand in the source, both languages agree."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import running

from gru_any import equations
from gru_any.codegen.trace import MATRIX, trace
from gru_any.inspect import gradcheck as checks

ROOT = Path(__file__).parent.parent
ENGLISH = ["README.md", "docs/derivation.md", "docs/mistakes.md"]
PAGES = [name.replace(".md", end) for name in ENGLISH for end in (".md", ".zh.md")]


def text_of(path):
    return (ROOT / path).read_text("utf-8")


def boxes(page, language):
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL)


def rows(text):
    """The rows of numbers in the tables of a page, without their first cell."""
    lines = re.findall(r"^\|[^|]+\|(.*\d\.\d{2}.*)\|$", text, re.M)
    return [re.findall(r"-?\d[\d.e+-]*", line) for line in lines]


def source(path, name):
    """The lines of a function or method."""
    text = text_of(path)
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
        there = source(path, name) if name else text_of(path)
        for line in lines:
            assert line.strip() in there, (
                f"{page} quotes {line!r}, which {path} {name} no longer holds"
            )


@pytest.mark.parametrize("page", ENGLISH)
def test_the_languages_hold_the_same(page):
    """The same code but for its comments, the same formulas and quotes, the same figures."""
    chinese = page.replace(".md", ".zh.md")
    code = [[ast.dump(ast.parse(b)) for b in boxes(p, "python")] for p in (page, chinese)]
    assert code[0] == code[1]
    for language in ("py", "text"):
        assert boxes(page, language) == boxes(chinese, language)
    assert rows(text_of(page)) == rows(text_of(chinese))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#:]+)[^):]*\)", text_of(page))
    assert links
    for link in links:
        assert (ROOT / page).parent.joinpath(link).exists(), f"{page} links to {link}"


def test_the_mistakes(monkeypatch, tmp_path, capsys):
    """The script, with little training: gradcheck sees each, and the page has these figures."""
    monkeypatch.syspath_prepend(ROOT / "scripts/maintenance")
    import mistakes

    monkeypatch.setattr(mistakes.train_text, "read", lambda files: "to be or not to be, " * 100)
    picture = tmp_path / "mistakes.png"
    with running("plain"):
        mistakes.main(["--iterations=1", "--seeds=1", "--steps=1", f"--picture={picture}"])
    assert picture.stat().st_size > 10_000
    found = rows(capsys.readouterr().out)
    assert len(found) == 2 * 8
    for printed, on_page in zip(found, rows(text_of("docs/mistakes.md")), strict=True):
        if len(on_page) == 12:  # not the first of each table, without a mistake
            assert float(printed[0]) > 1000 * checks.TOLERANCE["central"]
            now, then = ([float(v) for v in row[:7]] for row in (printed, on_page))
            assert np.allclose(now, then, rtol=0.03, atol=0.006)


MAP = "docs/architecture.md"


def test_the_map_names_files_that_are_there():
    rooms = [row.split("|")[2] for row in re.findall(r"^\|.*\.py`.*\|$", text_of(MAP), re.M)]
    named = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", text_of(MAP)))
    places = [ROOT, ROOT / "gru_any", ROOT / "gru_any/nn", ROOT / "gru_any/backend/cuda"]
    lost = {name for name in named if not any((place / name).exists() for place in places)}
    assert len(named) > 40
    assert not lost
    listed = set(re.findall(r"`([a-z_]+\.py)`", " ".join(rooms)))
    top = {path.name for path in (ROOT / "gru_any").glob("[!_]*.py")}
    assert not top - listed


def test_the_map_shows_the_program_that_is_traced():
    program = trace(equations.reset_before, 3, 1, MATRIX)
    assert boxes(MAP, "text") == [f"{program}\n"]


def test_the_map_lists_every_environment_variable():
    files = [path for folder in ("gru_any", "tests") for path in (ROOT / folder).rglob("*.py")]
    read = {name for path in files for name in re.findall(r"GRU_ANY_[A-Z_]+", path.read_text())}
    assert read == set(re.findall(r"GRU_ANY_[A-Z_]+", text_of(MAP)))
