"""Folders that change all at once, whatever ends the process that changes them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import bozzetto
from bozzetto.common.staging import locked, recover, staged_folder
from bozzetto.errors import UsageError


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def write(folder: Path, text: str, names: str = "abc") -> None:
    """Files and a manifest that says what is in them."""
    for name in names:
        (folder / name).write_text(text)
    (folder / "manifest.json").write_text(json.dumps(dict.fromkeys(names, text)))


def check_true(folder: Path) -> None:
    """A manifest that is there says what is there."""
    if (folder / "manifest.json").exists():
        for name, text in json.loads((folder / "manifest.json").read_text()).items():
            assert (folder / name).read_text() == text


def hidden(*folders: Path) -> list[str]:
    return [p.name for folder in folders if folder.is_dir() for p in folder.iterdir() if p.name.startswith(".")]


def test_a_missing_folder_appears_only_at_the_end(tmp_path):
    out = tmp_path / "a" / "b"
    with staged_folder(out) as folder:
        (folder / "x").write_text("1")
        assert not out.exists()
    assert tree(tmp_path) == {"a/b/x": "1"} and not hidden(tmp_path, out.parent, out)


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


class Killed(BaseException):
    """What a test raises in place of SIGKILL: nothing is done after it."""


STEPS = ("rename", "replace", "unlink", "rmdir")  # of os: what changes folders


def die_at(patch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Let the process die before its n-th change of a folder; the names of those until then."""
    done: list[str] = []

    def deadly(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def step(*arguments: object, **options: object) -> object:
            done.append(name)
            if len(done) > number:
                raise Killed
            return real(*arguments, **options)

        return step

    for name in STEPS:
        patch.setattr(os, name, deadly(name))
    patch.setattr(shutil, "rmtree", lambda *a, **k: None if len(done) > number else pytest.fail("cleaned up"))
    return done


@pytest.mark.parametrize("there", [True, False], ids=["into a used folder", "into a new one"])
def test_a_process_killed_at_any_moment_mixes_nothing_and_loses_nothing(there, tmp_path):
    """The next run finishes what was decided and sweeps what was not."""
    for number in range(20):
        out = tmp_path / str(number) / "out"
        if there:
            out.mkdir(parents=True)
            write(out, "old", "abd")
            (out / "notes").write_text("mine")
        else:
            out.parent.mkdir()
        before = tree(out)
        with pytest.MonkeyPatch.context() as patch:
            done = die_at(patch, number)
            try:
                with staged_folder(out) as folder:
                    write(folder, "new")
                survived = True
            except Killed:
                survived = False
        check_true(out)
        decided = done[:number].count("rename") > 0
        for folder in (out, out.parent):
            recover(folder)
        after = {**before, **dict.fromkeys("abc", "new"), "manifest.json": json.dumps(dict.fromkeys("abc", "new"))}
        assert tree(out) == (after if decided else before), number
        assert not hidden(out, out.parent)
        if survived:
            return
    pytest.fail("it never ended")


def test_a_process_that_is_really_killed_is_finished_by_the_next(tmp_path):
    write(tmp_path, "old")
    script = """
import os, signal, sys
from pathlib import Path
from bozzetto.common.staging import staged_folder
real, moved = os.replace, []
def replace(source, target):
    moved.append(source)
    if len(moved) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
os.replace = replace
with staged_folder(sys.argv[1]) as folder:
    for name in ("a", "b", "c", "manifest.json"):
        (Path(folder) / name).write_text('{"a": "new", "b": "new", "c": "new"}' if "j" in name else "new")
"""
    source = Path(bozzetto.__file__).parent.parent
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(source)}, check=False)
    assert done.returncode == -signal.SIGKILL and hidden(tmp_path)
    assert not (tmp_path / "manifest.json").exists()  # nothing is claimed while files move
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path):
        raise KeyboardInterrupt  # of another run: what was decided before is not its own to undo
    assert {k: v for k, v in tree(tmp_path).items() if k != "manifest.json"} == dict.fromkeys("abc", "new")
    check_true(tmp_path)
    assert not hidden(tmp_path)


def test_an_interrupt_while_files_move_comes_too_late(tmp_path, monkeypatch):
    write(tmp_path, "old")
    real, moves = os.replace, []

    def replace(source: Path, target: Path) -> None:
        moves.append(source)
        if len(moves) == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt, match="everything is written"), staged_folder(tmp_path) as folder:
        write(folder, "new")
    assert set(json.loads((tmp_path / "manifest.json").read_text()).values()) == {"new"}
    check_true(tmp_path)
    assert not hidden(tmp_path)


def test_a_disk_that_fails_while_files_move_keeps_them_for_the_next_run(tmp_path, monkeypatch):
    write(tmp_path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(OSError, match="everything is in"), staged_folder(tmp_path) as folder:
            write(folder, "new")
    with staged_folder(tmp_path) as folder:
        (folder / "d").write_text("later")
    check_true(tmp_path)
    assert tree(tmp_path)["a"] == "new" and tree(tmp_path)["d"] == "later" and not hidden(tmp_path)


def test_what_lives_is_not_swept(tmp_path):
    """Nor is what only looks like ours."""
    (tmp_path / ".bozzetto-notes").mkdir()
    (tmp_path / ".bozzetto-0000000g").mkdir()
    (tmp_path / ".bozzetto-00000000").write_text("a file")
    with staged_folder(tmp_path) as first:
        (first / "x").write_text("1")
        with staged_folder(tmp_path) as second:
            (second / "y").write_text("2")
        recover(tmp_path)
        assert (first / "x").exists()
    assert tree(tmp_path) == {".bozzetto-00000000": "a file", "x": "1", "y": "2"}
    assert len(hidden(tmp_path)) == 3


def test_without_locks_nothing_is_swept_and_everything_is_written(tmp_path, monkeypatch):
    """Some network file systems have none."""

    def none(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", none)
    (tmp_path / ".bozzetto-00000000").mkdir()
    for text in ("old", "new"):
        with staged_folder(tmp_path / "out") as folder:
            write(folder, text)
    check_true(tmp_path / "out")
    assert set(tree(tmp_path / "out")) == {*"abc", "manifest.json"} and hidden(tmp_path) == [".bozzetto-00000000"]


def test_many_at_once_leave_one_of_them(tmp_path):
    def run(text: str) -> None:
        with staged_folder(tmp_path / "out") as folder:
            write(folder, text)

    threads = [threading.Thread(target=run, args=(str(i),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_true(tmp_path / "out")
    assert len(tree(tmp_path)) == 4 and not hidden(tmp_path, tmp_path / "out")


def test_nobody_moves_files_while_they_are_asked_whose_they_are(tmp_path):
    """Another run takes manifest.json away for a moment: a file that is gone by then was taken for somebody's own."""
    held = []

    def ours(path: Path) -> bool:
        with locked(tmp_path / "out") as free:
            held.append(not free)
        return path.is_file()

    for text in "ab":
        with staged_folder(tmp_path / "out", ours) as folder:
            write(folder, text)
    assert held == [True] * 4


def test_what_is_not_ours_by_the_end_is_left_and_the_run_is_kept_beside_it(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    named = pytest.raises(UsageError, match="a was not written by this program: everything is in")
    with named as refused, staged_folder(out, lambda path: False) as folder:
        (out / "a").mkdir()
        (out / "a" / "mine").write_text("mine")
        write(folder, "new")
    assert tree(out) == {"a/mine": "mine"} and not hidden(out)
    assert (Path(str(refused.value).rpartition(" ")[2]) / "a").read_text() == "new"


def test_a_new_folder_has_ordinary_permissions(tmp_path):
    with staged_folder(tmp_path / "out"):
        pass
    (tmp_path / "plain").mkdir()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("out", "plain")]
    assert modes[0] == modes[1]


def test_a_folder_with_the_longest_name_can_be_made(tmp_path):
    out = tmp_path / ("n" * 255)
    for _ in range(2):
        with staged_folder(out) as folder:
            write(folder, "new")
    check_true(out)
