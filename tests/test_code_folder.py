"""The folder of compiled code: only what this user wrote there, and what is right, is run."""

import importlib._bootstrap_external as importer
import os
import sys

import pytest
from conftest import PATHS

from gru_any.backend.cpu import code_folder
from gru_any.backend.cpu.jit_cache import compiled

pytestmark = [
    pytest.mark.skipif("compiled" not in PATHS, reason="numba: not installed"),
    pytest.mark.skipif(os.name != "posix", reason="owners and modes of files: not POSIX"),
]
ROOT = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="files of another user: needs root"
)
SOURCE = """
from numba import njit

@njit("int64(int64)", cache=CACHE)
def f(n):
    return n + 3
"""
PLANTED = "raise SystemExit('planted code ran')\n"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder with the code of SOURCE."""
    monkeypatch.setenv("GRU_ANY_CACHE", str(tmp_path / "cache"))
    assert compiled(SOURCE).f(4) == 7
    return tmp_path / "cache"


def source_in(cache):
    (path,) = cache.glob("gru_any_*.py")
    return path


def machine_code(cache):
    return sorted((cache / "__pycache__").glob("*.nb[ic]"))


def test_it_is_private_and_used_again(cache, capsys):
    assert cache.stat().st_mode & 0o777 == 0o700
    before = [path.stat().st_mtime_ns for path in machine_code(cache)]
    assert len(before) == 2
    capsys.readouterr()
    assert compiled(SOURCE).f(4) == 7
    assert capsys.readouterr().err == ""
    assert [path.stat().st_mtime_ns for path in machine_code(cache)] == before


@pytest.mark.parametrize("damage", ["a sign", "truncated", "planted", "a link", "byte code"])
def test_source_is_what_would_be_written(cache, damage, tmp_path):
    path = source_in(cache)
    right = path.read_text()
    if damage == "byte code":  # as Python would take it in place of the source
        name = f"{path.stem}.{sys.implementation.cache_tag}.pyc"
        stamp = (int(path.stat().st_mtime), path.stat().st_size)
        code = compile(PLANTED, str(path), "exec")
        (cache / "__pycache__" / name).write_bytes(importer._code_to_timestamp_pyc(code, *stamp))
    elif damage == "a link":
        (tmp_path / "planted.py").write_text(PLANTED)
        path.unlink()
        path.symlink_to(tmp_path / "planted.py")
    else:
        changed = {"a sign": right.replace("+", "-"), "truncated": right[:60]}
        path.write_text(changed.get(damage, PLANTED))
    assert compiled(SOURCE).f(4) == 7
    assert path.read_text() == right
    assert not path.is_symlink()


def test_machine_code_of_other_source_is_not_used(cache):
    path = source_in(cache)
    other = compiled(SOURCE.replace("+", "-"))
    assert other.f(4) == 1
    (theirs,) = set(cache.glob("gru_any_*.py")) - {path}
    path.write_text(path.read_text().replace("+", "-"))  # and what is compiled of it
    for file in (cache / "__pycache__").glob(f"{theirs.stem}.*"):
        mine = file.name.replace(theirs.stem, path.stem)
        (cache / "__pycache__" / mine).write_bytes(file.read_bytes())
    assert compiled(SOURCE).f(4) == 7


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("length", [0, 40])
def test_machine_code_that_is_damaged_is_replaced(cache, kind, length):
    for path in cache.rglob(f"*.{kind}"):
        path.write_bytes(path.read_bytes()[:length])
    assert compiled(SOURCE).f(4) == 7
    assert len(machine_code(cache)) == 2
    assert min(path.stat().st_size for path in machine_code(cache)) > 40


def test_where_others_may_write_nothing_is_used(cache):
    source_in(cache).write_text(PLANTED)
    cache.chmod(0o777)
    code_folder.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=f"other users.*chmod -R go-w {cache}: code is comp"):
        assert compiled(SOURCE).f(4) == 7
    assert compiled(SOURCE).f(4) == 7  # told once: warnings are errors
    assert source_in(cache).read_text() == PLANTED
    cache.chmod(0o700)
    assert compiled(SOURCE).f(4) == 7
    assert source_in(cache).read_text() != PLANTED


def test_the_usual_folder_is_closed(tmp_path, monkeypatch):
    monkeypatch.delenv("GRU_ANY_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    usual = tmp_path / ".cache" / "gru_any"
    usual.mkdir(parents=True)
    usual.chmod(0o775)  # as older versions made it under some settings
    (usual / "gru_any_0.py").touch()
    (usual / "gru_any_0.py").chmod(0o666)
    assert compiled(SOURCE).f(4) == 7
    assert usual.stat().st_mode & 0o777 == 0o700
    assert not (usual / "gru_any_0.py").exists()
    assert len(machine_code(usual)) == 2


@pytest.mark.skipif(
    '__import__("os").geteuid()', reason="another user's folder: only root can make one"
)
def test_the_folder_of_another_user_is_not_used(cache):
    os.chown(cache, 12345, 12345)
    code_folder.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="belongs to another user"):
        assert compiled(SOURCE).f(4) == 7


@pytest.mark.skipif(
    '__import__("os").geteuid()', reason="another user's file: only root can make one"
)
def test_machine_code_of_another_user_is_not_used(cache):
    for path in machine_code(cache):
        os.chown(path, 12345, 12345)
    cache.chmod(0o755)
    assert compiled(SOURCE).f(4) == 7
    assert {path.stat().st_uid for path in machine_code(cache)} == {os.geteuid()}
