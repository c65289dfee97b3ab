"""Files appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bozzetto.files import write_text, write_whole


def test_a_written_file_is_whole_and_alone(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "note.txt", "città")
    assert (tmp_path / "deep" / "note.txt").read_text(encoding="utf-8") == "città"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["note.txt"]


def test_the_target_keeps_its_old_content_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("old")

    def write(name: str) -> None:
        Path(name).write_text("new")
        assert path.read_text() == "old"

    write_whole(path, write)
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), ValueError("bad")])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, old: str | None, error: BaseException) -> None:
    path = tmp_path / "note.txt"
    if old:
        path.write_text(old)

    def write(name: str) -> None:
        Path(name).write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_whole(path, write)
    assert [p.name for p in tmp_path.iterdir()] == (["note.txt"] if old else [])
    assert not old or path.read_text() == old


def test_a_writer_that_removes_its_file_fails_cleanly(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "note.txt", os.unlink)
    assert list(tmp_path.iterdir()) == []


def test_written_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "note.txt", "x")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert (tmp_path / "note.txt").stat().st_mode & 0o777 == 0o640
