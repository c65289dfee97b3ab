"""The house stays as ARCHITECTURE.md says: rooms, sizes, docstrings, licences, and nothing of a developer's machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "bozzetto"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

# A room imports from lower floors and from itself. Two rooms of one floor do not know each other.
FLOORS = {
    "errors": 0,
    "common": 1,
    "laws": 1,
    "data": 2,
    "runtime": 2,
    "autoencoders": 2,
    "drafts": 2,  # drafts of continuous tokens carry laws
    "rules": 3,
    "targets": 3,
    "drafters": 4,
    "checkpoints": 5,
    "methods": 6,
    "adapters": 6,
    "settings": 7,
    "decoding": 8,
    "pipeline": 9,
    "admission": 9,  # an old name, for one release
    "__init__": 10,  # the public face: the pipeline's names and the version
    "train": 11,
    "evaluate": 11,
    "serve": 11,
    "cli": 12,
    "__main__": 13,
}

by_file = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))


def room_of(path: Path) -> str:
    """First part of the path inside the package: a folder, or a module's name."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(tree: ast.AST) -> list[str]:
    """Dotted names of everything imported anywhere in the file; relative imports keep their dots."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from bozzetto import train` names a room in its alias.
            names += [f"{module}.{a.name}" for a in node.names] if module == "bozzetto" else [module]
    return names


def imported_rooms(tree: ast.AST) -> set[str]:
    parts = [name.split(".") for name in imported_modules(tree) if name.split(".")[0] == "bozzetto"]
    # `import bozzetto` and `from bozzetto import __version__` go through the front door.
    return {p[1] if len(p) > 1 and p[1] in FLOORS else "__init__" for p in parts}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def repository_files() -> list[Path]:
    """Files that are or would be committed; without git (a source archive), everything but caches and results."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
        files = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        skipped = {".git", ".venv", "out", "runs", "build", "dist", "__pycache__"}
        files = [
            p
            for p in ROOT.rglob("*")
            if not any(part in skipped or part.endswith("_cache") for part in p.relative_to(ROOT).parts)
        ]
    return [p for p in files if p.is_file() and not p.is_symlink()]


def text_of(path: Path) -> str | None:
    """The file's text, or None for a binary file."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None


def test_every_room_has_a_floor_and_the_top_is_small():
    assert {room_of(p) for p in SOURCES} == set(FLOORS)
    assert sorted(set(FLOORS.values())) == list(range(14))
    assert len(list(PACKAGE.glob("*.py"))) <= 12


def test_no_files_import_each_other():
    names = {p: ".".join(("bozzetto", *p.relative_to(PACKAGE).with_suffix("").parts)) for p in SOURCES}
    left = {names[p]: {m for m in _modules(parse(p)) if m in names.values()} - {names[p]} for p in SOURCES}
    while free := [name for name, wanted in left.items() if not wanted & set(left)]:
        left = {name: wanted for name, wanted in left.items() if name not in free}
    assert not left, f"in a circle, or above one: {sorted(left)}"


def _modules(tree: ast.AST) -> set[str]:
    """Every name that may be a module's: `from a.b import c` gives a.b and a.b.c."""
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)):
        found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@by_file
def test_functions_fit_a_screen(path):
    defined = (node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    assert not [node.name for node in defined if (node.end_lineno or 0) - node.lineno >= 60]


def test_the_tour_is_read_in_ten_minutes_and_names_files_that_are_there():
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 150
    named = {name for name in re.findall(r"`([\w/]+\.(?:py|cpp|md))`", page) if "NAME" not in name}
    there = [str(p) for p in repository_files()]
    assert not [name for name in named if not any(path.endswith(f"/{name}") for path in there)]


def test_the_drawing_of_the_rooms_is_that_of_the_imports():
    command = [sys.executable, ROOT / "docs" / "draw_rooms.py"]
    drawn = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- rooms -->\n")[2].partition("<!-- /rooms -->\n")[0]
    assert shown == drawn, "python docs/draw_rooms.py --write"


@by_file
def test_rooms_import_only_from_lower_floors(path):
    here = room_of(path)
    wrong = {r for r in imported_rooms(parse(path)) if r != here and FLOORS[r] >= FLOORS[here]}
    assert not wrong, f"{here} (floor {FLOORS[here]}) imports {sorted(wrong)}"


@by_file
def test_imports_are_absolute_and_without_torchvision(path):
    names = imported_modules(parse(path))
    assert not [n for n in names if n.startswith(".") or n.split(".")[0] == "torchvision"]


@by_file
def test_files_fit_a_head(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@by_file
def test_public_top_level_names_have_docstrings(path):
    tree = parse(path)
    if not tree.body:  # an empty __init__.py
        return
    missing = [] if ast.get_docstring(tree) else ["module"]
    missing += [
        f"{node.name} (line {node.lineno})"
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not missing, f"no docstring: {', '.join(missing)}"


def test_no_file_names_a_developers_machine():
    private = re.compile("|".join(rf"(?<![\w./~-])/{top}/[\w.-]" for top in ("work", "home", "root", "Users")))
    found = []
    for path in repository_files():
        for number, line in enumerate((text_of(path) or "").splitlines(), 1):
            if private.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)


def test_large_files_are_few():
    models = (PACKAGE / "assets", ROOT / "models" / "bozzetto_models")
    heavy = {p: p.stat().st_size for p in repository_files()}
    assets = sum(size for p, size in heavy.items() if set(models) & set(p.parents))
    assert assets < 100e6, "the models have outgrown their limit"
    others = {str(p.relative_to(ROOT)): s for p, s in heavy.items() if not set(models) & set(p.parents)}
    assert not [name for name, size in others.items() if size > 5e6]


def test_licence_texts_are_here():
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    for name, words in [
        ("taesd-MIT.txt", "Copyright (c) 2023 Ollin Boer Bohan"),
        ("grocery160-MIT.txt", "Copyright (c) 2019 Marcus Klasson"),
        ("flowers160-photographers.txt", "https://creativecommons.org/licenses/by/2.0/"),
    ]:
        assert words in (ROOT / "licenses" / name).read_text(encoding="utf-8")
        assert f"licenses/{name}" in notice and f"licenses/{name}" in readme


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_core_dependencies_are_not_pinned_and_stay_few():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[^\w-]", d)[0].lower() for d in project["dependencies"]}
    assert not [d for d in project["dependencies"] if "==" in d]
    assert not names & {"torchvision", "transformers", "einops", "wandb", "torch-fidelity"}


def test_ci_runs_the_readmes_test_command():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "exec make test"
