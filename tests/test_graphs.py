"""Graphs kept on disk: found again under the same conditions only, whole or not there, the oldest dropped."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bozzetto.errors import UsageError
from bozzetto.runtime import graphs
from bozzetto.runtime.graphs import Compiler, Graph
from bozzetto.runtime.kept import cache_folder
from bozzetto.targets.compiled import ChainStep, SlotStep


class Counted(nn.Module):
    """A map of rows, which counts its calls in a tensor that it changes in place."""

    def __init__(self, seed: int = 0, wide: int = 4):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.map = nn.Linear(wide, 3)
        self.eval().requires_grad_(False)

    def forward(self, rows: Tensor, calls: Tensor) -> tuple[Tensor, Tensor]:
        calls.add_(1)
        return self.map(rows).relu() + calls, rows.sum(0)


def arguments(rows: int = 3, wide: int = 4) -> list[Tensor]:
    return [torch.randn(rows, wide, generator=torch.Generator().manual_seed(rows)), torch.zeros(1)]


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


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, Path, list[str]]:
    """A real graph of any number of rows, where it is kept, and what was reported."""
    folder, module = tmp_path_factory.mktemp("kept"), Counted()
    heard: list[str] = []
    graph = Compiler("default", heard.append, folder).graph(module, arguments(), "a map", {0: {0: ("rows", 64)}})
    return graph, folder, heard


@pytest.mark.parametrize("rows", [2, 3, 17, 64])
def test_a_graph_gives_the_modules_numbers_for_any_size(compiled: tuple[Graph, Path, list[str]], rows: int) -> None:
    graph, module = compiled[0], Counted()
    ours, theirs = arguments(rows), arguments(rows)
    for _ in range(2):
        found, wanted = graph(ours), module(*theirs)
        assert len(found) == 2
        for a, b in zip(found, wanted, strict=True):
            assert a.shape == b.shape and torch.allclose(a, b, atol=1e-5)
    assert ours[1].tolist() == [2]  # changed in place, as the module does it


def test_a_graph_that_is_on_disk_is_not_compiled_again(
    compiled: tuple[Graph, Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder, heard = compiled
    assert [line.split(" ")[0] for line in heard] == ["compiling", "compiled"]
    assert "a map" in heard[0] and str(folder) in heard[1]
    monkeypatch.setattr(Compiler, "_package", None)
    (path,) = folder.glob("*.pt2")
    again: list[str] = []
    os.utime(path, (0, 0))
    graph = Compiler("default", again.append, folder).graph(Counted(), arguments(), "a map", {0: {0: ("rows", 64)}})
    assert again == []
    assert path.stat().st_mtime > 0  # it counts as used now
    assert torch.allclose(graph(arguments())[0], Counted()(*arguments())[0], atol=1e-5)


Names = Callable[..., set[str]]


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Names:
    """Asks for a graph that nobody compiles; returns the names of all that are kept."""
    monkeypatch.setattr(Compiler, "_package", lambda self, *given: Path(given[-1]).write_text("a graph"))
    loaded = SimpleNamespace(loader=SimpleNamespace(run=list))
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: loaded)

    def ask(
        module: nn.Module | None = None,
        mode: str = "default",
        given: list[Tensor] | None = None,
        dynamic: graphs.Dynamic | None = None,
        compiler: Compiler | None = None,
    ) -> set[str]:
        compiler = compiler or Compiler(mode, folder=tmp_path)
        compiler.graph(module or Counted(), given or arguments(), "a map", dynamic)
        return {path.name for path in tmp_path.glob("*.pt2")}

    return ask


def test_a_name_changes_with_all_that_a_graph_depends_on(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(names()) == len(names(Counted())) == 1
    changes: list[dict[str, Any]] = [
        {"module": Counted(seed=1)},
        {"mode": "max"},
        {"given": arguments(rows=4)},
        {"given": arguments(wide=5), "module": Counted(wide=5)},
        {"given": [part.double() for part in arguments()]},
        {"dynamic": {0: {0: ("rows", 64)}}},
        {"dynamic": {0: {0: ("rows", 32)}}},
    ]
    for number, change in enumerate(changes):
        assert len(names(**change)) == 2 + number, change
    monkeypatch.setattr(torch, "get_num_threads", lambda: 57)
    assert len(names()) == 2 + len(changes)
    monkeypatch.setattr(graphs, "instructions", lambda: "another one")
    assert len(names()) == 3 + len(changes)


def test_a_name_changes_with_the_numbers_that_a_step_is_made_with(names: Names) -> None:
    """The packages of two widths, or of two leads, have weights and argument shapes in common."""
    inner: Any = Counted()
    chains = [ChainStep(inner, lead) for lead in (0, 3)]
    steps = [*chains, *(SlotStep(chains[0], nn.Identity(), width, 2) for width in (2, 4))]
    assert [len(names(step)) for step in steps] == [1, 2, 3, 4]


def test_a_module_is_not_taken_for_one_that_is_gone(names: Names, tmp_path: Path) -> None:
    compiler = Compiler("default", folder=tmp_path)
    for seed in range(5):  # each may get the address of the one before
        found = names(Counted(seed), compiler=compiler)
        assert len(found) == seed + 1


def test_the_graphs_not_used_for_longest_go_first(
    names: Names, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST_BYTES", 3 * len("a graph"))
    for age, name in enumerate(("new", "used", "old", "older")):
        (tmp_path / f"{name}.pt2").write_text("a graph")
        os.utime(tmp_path / f"{name}.pt2", (10**9 - age, 10**9 - age))
    (tmp_path / "other.so").write_text("not a graph")
    os.utime(tmp_path / "other.so", (0, 0))
    found = names()
    assert len(found) == 3 and {"new.pt2", "used.pt2"} < found
    assert (tmp_path / "other.so").exists()


def test_the_graph_just_made_stays_even_where_it_is_too_large(
    names: Names, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST_BYTES", 3)
    (tmp_path / "newer.pt2").write_text("a graph")
    os.utime(tmp_path / "newer.pt2", (1e11, 1e11))
    found = names()
    assert len(found) == 1 and "newer.pt2" not in found


@pytest.mark.parametrize(
    ("raised", "caught", "message"),
    [
        (torch._inductor.exc.InvalidCxxCompiler(), UsageError, r"C\+\+ compiler.*compile = 'off'"),
        (OSError("disk full"), OSError, "disk full"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
)
def test_nothing_half_written_is_left_where_compiling_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    caught: type[BaseException],
    message: str,
) -> None:
    def fail(*given: object, package_path: str, **options: object) -> None:
        Path(package_path).write_text("half a gr")
        raise raised

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(caught, match=message):
        Compiler("default", folder=tmp_path).graph(Counted(), arguments(), "a map")
    assert list(tmp_path.iterdir()) == []


def test_a_mode_that_there_is_not_is_refused() -> None:
    with pytest.raises(UsageError, match="compile = 'fast' is not allowed: off, default, max"):
        Compiler("fast")
