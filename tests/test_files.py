"""Files appear whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from bozzetto.common.files import parse_json, read_json, write_text, write_whole
from bozzetto.errors import UsageError


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


BAD_JSON = {
    "empty": (b"", "not valid JSON"),
    "cut": (b'{"a": [1, 2', "not valid JSON"),
    "lists in lists": (b"[" * 100_000 + b"]" * 100_000, "nested"),  # RecursionError in Python's reader
    "mappings in mappings": (b'{"a":' * 100_000, "nested"),
    "deep, though Python could read it": (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "nested"),
    "a number of 5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "digits"),  # Python reads 4,300 (ValueError)
    "NaN": (b'{"a": NaN}', "NaN is no number"),  # Python's reader takes these names, which are no JSON
    "-Infinity": (b'{"a": -Infinity}', "-Infinity is no number"),
    "a number beyond float": (b'{"a": 1e999}', "1e999 is no number"),  # Python's reader makes it inf
    "a key twice": (b'{"b": {"a": 1, "c": 0, "a": 2}}', "'a' stands there twice"),  # Python's reader keeps the last
    "no UTF-8": (b'{"a": "\xff"}', "utf-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "utf-8"),
    "half a surrogate pair": (b'{"a": "\\ud800"}', "surrogates"),  # a str that nothing can print
    "half a surrogate pair as key": (b'{"\\ud800": 1}', "surrogates"),
    "a list": (b"[]", "expected a JSON object, found list"),
    "null": (b"null", "found NoneType"),
    "two values": (b"{} {}", "Extra data"),
}


@pytest.mark.parametrize(("data", "said"), BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json_is_one_error_that_names_the_file(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "note.json").write_bytes(data)
    with pytest.raises(UsageError, match=rf"note\.json.*{said}"):
        read_json(tmp_path / "note.json")


def test_what_is_no_file_is_no_json(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")  # opening it would wait for a writer
    for name in ("missing.json", ".", "pipe.json", "null\0byte", "x" * 300):
        with pytest.raises(UsageError):
            read_json(tmp_path / name)


def test_large_json_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "note.json", "wb") as f:
        f.truncate(65 * 2**20)
    with pytest.raises(UsageError, match=r"note\.json: 68157440 bytes"):
        read_json(tmp_path / "note.json")


def test_good_json_is_read_as_it_is(tmp_path: Path) -> None:
    content = {"città": [1, -2.5, 1e300, True, None, "🎨"], "deep": {"deeper": {}}}
    text = json.dumps(content)
    for data in (text.encode(), b"\xef\xbb\xbf" + text.encode()):  # some editors write a byte-order mark
        (tmp_path / "note.json").write_bytes(data)
        assert read_json(tmp_path / "note.json") == content
    assert parse_json("[1]", "here", (dict, list)) == [1]
    assert parse_json("null", "here", object) is None


def test_a_full_disk_is_an_os_error_whatever_the_writer_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.13.0 raises RuntimeError ("unexpected pos 576 vs 534") where torch.save finds no room."""

    def fail(name: str) -> None:
        raise RuntimeError("unexpected pos 576 vs 534")

    with pytest.raises(RuntimeError, match="unexpected pos"):
        write_whole(tmp_path / "a.pt", fail)
    monkeypatch.setattr("bozzetto.common.files.shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(OSError, match=r"No space left on device: .*a\.pt"):
        write_whole(tmp_path / "a.pt", fail)
    assert list(tmp_path.iterdir()) == []
