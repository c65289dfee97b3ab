"""Run folders appear whole or not at all; tables line up; a listing survives a broken model."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from bozzetto.errors import UsageError
from bozzetto.output import check_writable, list_models, staged_folder, table


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_missing_folder_appears_only_at_the_end(tmp_path):
    out = tmp_path / "a" / "b"
    with staged_folder(out) as folder:
        (folder / "x").write_text("1")
        assert not out.exists()
    assert tree(tmp_path) == {"a/b/x": "1"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, ValueError])
def test_after_a_failure_even_created_parents_are_gone(error, tmp_path):
    with pytest.raises(error), staged_folder(tmp_path / "a" / "b") as folder:
        (folder / "x").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_unchanged_by_a_failure(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path) as folder:
        (folder / "x").write_text("new")
        raise KeyboardInterrupt
    assert tree(tmp_path) == {"x": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_failure_while_files_move_puts_the_old_ones_back(tmp_path, monkeypatch):
    for name in "ac":
        (tmp_path / name).write_text("old")
    real, moves = os.replace, []

    def replace(source: Path, target: Path) -> None:
        moves.append(source)
        if len(moves) == 5:  # the new c
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path) as folder:
        for name in "abc":
            (folder / name).write_text("new")
    assert tree(tmp_path) == {"a": "old", "c": "old"}


def test_a_new_folder_has_ordinary_permissions(tmp_path):
    with staged_folder(tmp_path / "out"):
        pass
    (tmp_path / "plain").mkdir()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("out", "plain")]
    assert modes[0] == modes[1]


def test_check_writable_names_the_obstacle(tmp_path):
    (tmp_path / "file").touch()
    check_writable(tmp_path / "new" / "b.json")
    with pytest.raises(UsageError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(UsageError, match="file is not a folder"):
        check_writable(tmp_path / "file" / "b.json")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_table_columns_line_up_with_numbers_to_the_right():
    assert table(("name", "n"), [("a", "1"), ("bcdef", "10")]) == "name    n\na       1\nbcdef  10"


def test_a_broken_model_does_not_hide_the_others(tiny_model, tmp_path):
    (tmp_path / "fine").symlink_to(tiny_model)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{")
    lines = list_models(tmp_path).splitlines()
    assert lines[1].startswith("tiny")
    assert "unreadable" in lines[2]
    assert "not valid JSON" in lines[2]


def test_an_empty_folder_is_not_an_error(tmp_path):
    assert list_models(tmp_path) == f"no models found in {tmp_path}"
