"""The doctor finds what is wrong and says what to do; completion scripts know the verbs."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from bozzetto.cli import doctor
from bozzetto.cli.main import main
from bozzetto.common.extras import needed
from bozzetto.errors import UsageError
from bozzetto.runtime import native
from bozzetto.runtime.kept import keep


def finding(name: str) -> doctor.Finding:
    return next(found for found in doctor.examine() if found.what == name)


def test_a_sound_installation_has_no_failures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "everything that is needed is there" in said
    assert all(word in said for word in ("PyTorch", "threads", "device", "model flowers", "extra serve"))


def test_damaged_weights_fail_with_a_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    monkeypatch.setattr(doctor, "shipped_folders", lambda: {"broken": tmp_path / "broken"})
    assert finding("model broken") == doctor.Finding(
        "model broken", "fail", "damaged: model.safetensors", "install bozzetto again"
    )
    assert main(["doctor"]) == 1


def test_a_cache_that_cannot_be_written_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    found = finding("cache")
    assert found.verdict == "fail" and "BOZZETTO_CACHE" in found.fix


def test_a_cache_that_is_a_file_or_nowhere_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("BOZZETTO_CACHE", str(folder))
        found = finding("cache")
        assert found.verdict == "fail" and "it is a file" in found.how and "BOZZETTO_CACHE" in found.fix
    monkeypatch.setattr(doctor, "cache_folder", lambda: None)
    assert finding("cache").how == "there is no home directory: nothing is kept"
    assert main(["doctor"]) == 1


def test_damaged_cached_files_are_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BOZZETTO_CACHE", str(tmp_path / "cache"))
    names = ("a.safetensors", "b.so")
    paths = [keep(name, lambda at: Path(at).write_text("bytes"), tmp_path / "cache") for name in names]
    assert not [found for found in doctor.examine() if found.what == "cached files"]
    paths[1].write_text("byt")
    found = finding("cached files")
    assert found.verdict == "note" and found.how == f"1 damaged: {paths[1].name}"
    assert main(["doctor"]) == 0


def test_too_many_threads_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 512)
    found = finding("threads")
    assert found.verdict == "note" and "OMP_NUM_THREADS=" in found.fix


def test_a_missing_compiler_and_a_missing_extra_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    real = importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "fastapi" else real(name))
    assert finding("C++ compiler").verdict == "note" and "g++" in finding("C++ compiler").fix
    monkeypatch.setattr(doctor, "built", lambda: None)
    assert finding("kernels").verdict == "note" and "torch runs the passes" in finding("kernels").how
    assert finding("extra serve").fix.startswith("pip install 'bozzetto[serve]'")
    assert "0 problems" not in doctor.shown(doctor.examine())


@pytest.mark.parametrize(("pairs", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_what_the_kernels_will_do_is_told(pairs: bool, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (doctor, native):
        monkeypatch.setattr(module, "multiplies_pairs", lambda: pairs)
    found = finding("kernels")
    assert found.verdict == "ok" and f"shipped models are drawn in {dtype}" in found.how
    assert found.how.startswith("built") and ("without pairs" in found.how) != pairs


def test_extras_are_those_of_the_package() -> None:
    import tomllib

    content = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert set(doctor.EXTRAS) == set(content["project"]["optional-dependencies"]) - {"dev", "docs", "models"}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError(name="ray.data"), "this needs ray, which is not installed: pip install 'bozzetto[ray]'"),
        (ImportError(name="uvicorn"), "this needs uvicorn, which is not installed: pip install 'bozzetto[serve]'"),
        (ImportError("of ours", name="bozzetto.nowhere"), ""),
        (ImportError("of nobody"), ""),
    ],
)
def test_a_package_that_is_missing_is_told_with_the_extra_that_brings_it(error: ImportError, said: str) -> None:
    with pytest.raises((UsageError, ImportError)) as caught, needed("this needs", "ray"):
        raise error
    assert str(caught.value) == said if said else caught.value is error


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_know_the_verbs(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["completion", shell])
    assert not stop.value.code
    said = capsys.readouterr().out
    assert all(verb in said for verb in ("generate", "serve", "doctor"))
