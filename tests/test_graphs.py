"""Where made files are kept; kernels that are built once per machine, or not at all."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest

from bozzetto.errors import UsageError
from bozzetto.runtime import native
from bozzetto.runtime.graphs import check_mode
from bozzetto.runtime.kept import cache_folder


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"BOZZETTO_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, Path("/own")),
        ({"XDG_CACHE_HOME": "/xdg"}, Path("/xdg/bozzetto")),
        ({"BOZZETTO_CACHE": "", "XDG_CACHE_HOME": ""}, Path("/nowhere/user/.cache/bozzetto")),
        ({}, Path("/nowhere/user/.cache/bozzetto")),
    ],
)
def test_the_folder_is_the_first_that_the_environment_names(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], wanted: Path
) -> None:
    for name in ("BOZZETTO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nowhere/user")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == wanted


def test_kernels_are_built_once_and_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = native.load_kernels(tmp_path / "kept")
    assert isinstance(first, ctypes.CDLL)
    assert capsys.readouterr().err == "building the kernels for this machine, once ...\n"
    monkeypatch.setattr(native, "_build", None)
    native.load_kernels(tmp_path / "kept")
    assert capsys.readouterr().err == "" and len(list((tmp_path / "kept").iterdir())) == 1


def test_without_a_compiler_it_is_said_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match=r"needs a C\+\+ compiler .* or use compile = 'off'"):
        native.load_kernels(tmp_path / "kept")
    assert list(tmp_path.rglob("*.so")) == []


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c++").write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    with pytest.raises(UsageError, match="could not build the kernels: no such luck"):
        native.load_kernels(tmp_path / "kept")
    assert list(tmp_path.rglob("*.so")) == []


def test_a_mode_that_there_is_not_is_refused() -> None:
    with pytest.raises(UsageError, match="compile = 'fast' is not allowed: auto, off, default, max"):
        check_mode("fast")
