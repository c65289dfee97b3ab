"""Files kept from one run to the next: damaged ones are made again; a folder that cannot be written is never fatal."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bozzetto.methods.resources import Resources, kept_neighbours
from bozzetto.pipeline.hosted import HostedResources
from bozzetto.rules.neighbours import nearest_codes
from bozzetto.runtime import kept, native
from bozzetto.runtime.kept import cache_folder, damaged, find, keep, made

CODES = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))


def written(text: str) -> Callable[[str], object]:
    return lambda name: Path(name).write_text(text)


def no_room(folder: Path, way: str) -> Path:
    """A folder where nothing can be kept; file permissions would not stop the superuser."""
    if way == "a file":
        folder.write_text("not a folder")
        return folder
    if way == "below a file":
        folder.write_text("not a folder")
        return folder / "cache"
    return Path("/proc/cache")  # nobody makes folders there


NO_ROOM = pytest.mark.parametrize("way", ["a file", "below a file", "read-only"])


@pytest.fixture(autouse=True)
def own_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(kept.tempfile, "tempdir", str(tmp_path / "tmp"))
    for cached in (kept._temporary, kept._say_once):
        cached.cache_clear()


def test_a_file_is_made_once(tmp_path: Path) -> None:
    first = made("a.so", written("one"), tmp_path / "cache")
    assert first.read_text() == "one" and first.parent == tmp_path / "cache"
    assert made("a.so", written("two"), tmp_path / "cache") == first == find("a.so", tmp_path / "cache")
    assert first.read_text() == "one"
    assert find("b.so", tmp_path / "cache") is None


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "one bit": lambda data: data[:2] + bytes([data[2] ^ 1]) + data[3:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: str) -> None:
    path = made("a.so", written("kernels"), tmp_path)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert damaged(tmp_path) == [path]
    assert find("a.so", tmp_path) is None and not path.exists()
    assert made("a.so", written("kernels"), tmp_path).read_text() == "kernels"
    assert damaged(tmp_path) == []


@NO_ROOM
def test_what_cannot_be_kept_lies_in_a_temporary_folder_and_that_is_said_once(
    tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = no_room(tmp_path / "cache", way)
    one, two = (made(name, written(name), folder) for name in ("a.so", "b.so"))
    assert one.read_text() == "a.so" and tmp_path / "tmp" in one.parents
    assert made("a.so", written("again"), folder) == one and two.exists()
    (said,) = caplog.messages
    assert str(folder) in said and "BOZZETTO_CACHE" in said


def test_a_server_that_ends_at_once_leaves_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("uvicorn")
    from bozzetto.serve import server

    ended: list[int] = []
    monkeypatch.setattr(server.os, "_exit", ended.append)
    server.leave("", 3)
    path = made("a.so", written("one"), no_room(tmp_path / "cache", "a file"))
    assert path.exists()
    server.leave("", 0)
    assert ended == [3, 0] and list((tmp_path / "tmp").iterdir()) == []


def test_a_disk_that_fills_up_while_copying_is_not_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*names: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept.shutil, "copyfile", full)
    assert made("a.so", written("one"), tmp_path / "cache").read_text() == "one"
    assert list((tmp_path / "cache").iterdir()) == []


def test_many_at_once_get_whole_files(tmp_path: Path) -> None:
    """Each makes bytes of its own, as compilers do."""
    gate, found = threading.Barrier(8), []

    def work(number: int) -> None:
        gate.wait()
        found.append(made("a.so", written(f"{number}" * 50_000), tmp_path / "cache"))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and damaged(tmp_path / "cache") == []
    assert all(len(path.read_text()) == 50_000 for path in found)


def test_threads_that_make_the_same_file_together_all_get_it(tmp_path: Path) -> None:
    together = threading.Barrier(4)
    paths: list[Path] = []

    def make(at: str) -> None:
        together.wait(10)  # nobody is first
        Path(at).write_text("the same")

    threads = [threading.Thread(target=lambda: paths.append(made("same.so", make, tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [path.read_text() for path in paths] == ["the same"] * 4 and {path.parent for path in paths} == {tmp_path}


# Kernels.


def test_a_cut_kernel_library_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """glibc 2.36 maps a library before it looks at its length: opening one that is cut to three quarters ends the
    process with SIGBUS, and the loss of the last kilobytes goes unnoticed."""
    opened: list[str] = []
    monkeypatch.setattr(native, "_build", lambda path: Path(path).write_text("kernels"))
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: opened.append(Path(path).read_text()))
    for _ in range(2):
        native.load_kernels(tmp_path / "cache")
        (path,) = (tmp_path / "cache").glob("*.so")
        path.write_text("ker")
    assert opened == ["kernels"] * 2
    assert list((tmp_path / "cache").glob("*.so")) == [path]


# Neighbours.


def workshop(folder: Path | None, codes: torch.Tensor = CODES) -> Resources:
    return Resources(SimpleNamespace(device=torch.device("cpu"), vocab=45), codes, folder)  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["cut", "permuted", "of another model"])
def test_a_table_of_neighbours_that_does_not_fit_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setenv("BOZZETTO_CACHE", str(tmp_path / "cache"))
    wanted = nearest_codes(CODES, 39)
    assert torch.equal(workshop(tmp_path).neighbours(39), wanted)
    (path,) = (tmp_path / "cache").glob("neighbours-*")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "permuted":
        save_file({name: value.flip(0).contiguous() for name, value in load_file(path).items()}, path)
    else:
        other = kept_neighbours(CODES.flip(0), 39)
        (theirs,) = set((tmp_path / "cache").glob("neighbours-*")) - {path}
        assert not torch.equal(other, wanted)
        shutil.copyfile(theirs, path)
    assert torch.equal(workshop(tmp_path).neighbours(39), wanted)
    assert damaged(tmp_path / "cache") == []


def test_a_table_is_kept_for_the_next_run_and_not_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOZZETTO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    first = workshop(tmp_path / "model").neighbours(5)
    monkeypatch.setattr("bozzetto.methods.resources.nearest_codes", None)
    assert torch.equal(workshop(tmp_path / "model").neighbours(5), first)
    assert list((tmp_path / "model").iterdir()) == []


@NO_ROOM
@pytest.mark.parametrize("kind", [Resources, HostedResources])
def test_neighbours_need_no_folder_that_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, kind: type[Resources]
) -> None:
    monkeypatch.setenv("BOZZETTO_CACHE", str(no_room(tmp_path / "cache", way)))
    target = SimpleNamespace(device=torch.device("cpu"), vocab=40)
    made_here = kind(target, CODES) if kind is HostedResources else workshop(None)  # type: ignore[arg-type, call-arg]
    assert torch.equal(made_here.neighbours(7), nearest_codes(CODES, 39)[:, :7])


# No home directory.


def test_without_a_home_nothing_is_kept_and_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("BOZZETTO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert cache_folder() is None
    assert made("a.so", written("one"), None).read_text() == "one"
    with pytest.raises(OSError, match="no home"):
        keep("a.so", written("one"), None)
    assert torch.equal(workshop(None).neighbours(3), nearest_codes(CODES, 39)[:, :3])
