"""Both distributions, built and installed where bozzetto is not: their sizes, and the README's first example."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 45_000_000  # bytes: the package index takes 100 MB, a person waits for less


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wheels by the name of their distribution."""
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(ROOT), str(ROOT / "models")], check=True)
    return {path.name.split("-")[0]: path for path in folder.glob("*.whl")}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment that sees what bozzetto needs and not bozzetto."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "needs.pth").write_text(
        sysconfig.get_path("purelib")
    )  # links of editable installs in there are not followed
    return folder / "bin" / "python"


def installed(python: Path, wheel: Path) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*command, str(wheel)], check=True)


def said(python: Path, folder: Path, *arguments: str) -> str:
    """What a command prints on both streams, without this process's paths."""
    command = [str(python), "-I", *arguments]
    done = subprocess.run(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    return done.stdout


def test_wheels_are_small_and_carry_what_they_should(wheels: dict[str, Path]) -> None:
    names = {name: zipfile.ZipFile(path).namelist() for name, path in wheels.items()}
    assert set(names) == {"bozzetto", "bozzetto_models"}
    assert all(path.stat().st_size < LARGEST * (1 if name == "bozzetto" else 2) for name, path in wheels.items())
    shipped = {
        name: {m[1] for n in held if (m := re.match(r".*?([\w-]+)/config.json$", n))} for name, held in names.items()
    }
    others = {"emoji", "flowers-flow", "flowers-mar", "flowers-drift"}
    assert others <= shipped["bozzetto_models"]
    assert "flowers" in shipped["bozzetto"] and not others & shipped["bozzetto"]
    for held in names.values():
        assert {Path(n).name for n in held} >= {"LICENSE", "NOTICE", "emoji128.txt", "flowers160-photographers.txt"}
        assert not [n for n in held if "test" in n or n.endswith(".pyc")]


def test_the_readmes_first_example_runs_from_the_wheel(wheels: dict[str, Path], python: Path, tmp_path: Path) -> None:
    installed(python, wheels["bozzetto"])
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    script = f"import bozzetto\nassert bozzetto.__file__.startswith({str(python.parents[1])!r})\n{example}"
    assert "passes for 256 tokens" in said(python, tmp_path, "-c", script)
    assert (tmp_path / "tulip.png").stat().st_size > 10_000
    assert "emoji" in said(python, tmp_path, "-m", "bozzetto", "models").splitlines()[-1]
    missing = said(python, tmp_path, "-m", "bozzetto", "generate", "--model", "flowers-flow", "--out", "out")
    assert "is not installed: pip install bozzetto-models" in missing
    installed(python, wheels["bozzetto_models"])
    listed = said(python, tmp_path, "-m", "bozzetto", "models")
    assert "unreadable" not in listed and "not installed" not in listed and len(listed.splitlines()) == 6
    law = ("--model", "flowers-drift", "--count", "1", "--out", "out")
    assert "1 image" in said(python, tmp_path, "-m", "bozzetto", "generate", "tulip", *law)
