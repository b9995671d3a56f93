"""Compiled code stays in a folder of the user's own."""

import os

import pytest

from flashddpm.execution import compile_cache


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for variable in compile_cache.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv(variable, "x")  # so that it is put back
        monkeypatch.delenv(variable)


def test_the_folder_is_private_and_said_to_both(tmp_path):
    root = tmp_path / "a" / "flashddpm"
    assert compile_cache.keep_compiled_code(root) == root
    assert root.stat().st_mode & 0o777 == 0o700
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(root / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(root / "triton")


def test_what_the_user_says_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    compile_cache.keep_compiled_code(tmp_path / "b")
    assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_may_write_is_refused(tmp_path, mode):
    root = tmp_path / "c"
    root.mkdir()
    root.chmod(mode)
    with pytest.raises(ValueError, match="must be yours alone"):
        compile_cache.keep_compiled_code(root)
    assert "TRITON_CACHE_DIR" not in os.environ


def test_where_no_folder_can_be_made_torchs_choice_stays(tmp_path):
    (tmp_path / "file").write_text("")
    assert compile_cache.keep_compiled_code(tmp_path / "file" / "d") is None
    assert "TRITON_CACHE_DIR" not in os.environ


def test_it_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cache.folder() == tmp_path / "flashddpm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compile_cache.folder().parts[-2:] == (".cache", "flashddpm")
