"""What runs passes, and in which type, where nobody asks: our kernels where they compute, else torch, which is said."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bozzetto
from bozzetto.cli.main import main
from bozzetto.errors import UsageError
from bozzetto.evaluate.sampling import RUN, SampleRun, sample
from bozzetto.pipeline.pipeline import GenerateSettings
from bozzetto.runtime import native

CPU = torch.device("cpu")


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Kernels that are neither built nor can be."""
    monkeypatch.setenv("BOZZETTO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "library", cache(lambda: native.load_kernels(tmp_path / "cache")))
    monkeypatch.setattr(native, "compiler", lambda: None)
    monkeypatch.setattr("bozzetto.pipeline.runner.kernels_compute", native.kernels_compute.__wrapped__)
    return monkeypatch


def test_auto_is_our_kernels_and_what_is_drawn_says_so(tiny_model: Path, tmp_path: Path) -> None:
    pipe = bozzetto.load(tiny_model)
    assert pipe.resolve(GenerateSettings()).compile == "max" and pipe.target_in("auto").own
    assert main(["generate", "rose", "--model", str(tiny_model), "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["compile"] == "max"


def test_without_a_compiler_torch_runs_the_passes_and_a_line_says_why(
    tiny_model: Path, bare_machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = bozzetto.load(tiny_model)
    images = pipe.generate(["rose"], seed=2).images
    assert capsys.readouterr().err.startswith("passes are run by torch: compile needs a C++ compiler (g++ or clang++)")
    assert images[0].sha256 == pipe.generate(["rose"], seed=2, compile="off").images[0].sha256
    assert not pipe.target_in("auto").own
    for asked in ({"compile": "max"}, {"deterministic": True}):
        with pytest.raises(UsageError, match="compile"):
            pipe.generate(["rose"], **asked)
    assert native.usual_dtype() == "float32"


def test_a_type_without_kernels_is_said_once(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native.kernels_compute.cache_clear()
    pipe = bozzetto.load(tiny_model, dtype="float16")
    pipe.generate(["rose"], count=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("passes are run by torch: ") and "no kernels for torch.float16 on a processor" in line


@pytest.mark.parametrize(
    ("flags", "wanted"), [("fma avx512_bf16", "bfloat16"), ("fma avx512f", "float32"), ("", "float32")]
)
def test_the_usual_type_follows_the_instructions(flags: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_told", lambda *names: flags)
    assert native.usual_dtype() == wanted


def test_shipped_models_have_the_usual_type_and_folders_float32(
    tiny_model: Path, tiny_flow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bozzetto.pipeline.loading.usual_dtype", lambda: "bfloat16")
    assert [bozzetto.load(m).dtype for m in (tiny_model, tiny_flow)] == ["float32", "float32"]
    monkeypatch.setattr("bozzetto.pipeline.loading.shipped_folders", lambda: {"tiny": tiny_model})
    assert (
        bozzetto.load(tiny_model).dtype == "bfloat16" and bozzetto.load(tiny_model, dtype="float32").dtype == "float32"
    )


@pytest.mark.parametrize("rule", ["seed-exact", "exact"])
def test_shipped_bytes_depend_on_nothing_but_the_seed(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = bozzetto.load("flowers", dtype="bfloat16")
    law = {"seed": 3, "rule": rule, "window": 6, "indices": (0, 1, 2)}
    several = pipe.generate(["rose"], batch=4, **law).images
    for image in several:
        (alone,) = pipe.generate(["rose"], **law | {"indices": (image.index,)}).images
        assert alone.sha256 == image.sha256 and not image.near_tie
    if rule == "seed-exact":
        (plain,) = pipe.generate(["rose"], drafter="none", seed=3, indices=(1,)).images
        assert plain.sha256 == several[1].sha256


def test_runs_go_on_as_they_were_begun(tiny_model: Path, tmp_path: Path) -> None:
    """A run of before there was `auto` has no word of it: its passes are torch's."""
    pipe = bozzetto.load(tiny_model)
    for name, asked, kept in (("old", "off", None), ("new", "auto", "max")):
        run = SampleRun(tmp_path / name, pipe, GenerateSettings("none", compile=asked))
        sample(run, 2)
        assert json.loads((tmp_path / name / RUN).read_text())["settings"].get("compile") == kept
        again = SampleRun(tmp_path / name, pipe, GenerateSettings("none"))
        assert again.settings.compile == (kept or "off") and sample(again, 3) == 1
    with pytest.raises(UsageError, match="compile = 'max' there, None asked"):
        SampleRun(tmp_path / "new", pipe, GenerateSettings("none", compile="off"))


def test_samples_go_on_in_their_type(tiny_model: Path, tmp_path: Path) -> None:
    from bozzetto.cli.options import Sample, loading_of

    command = ["sample", "--model", str(tiny_model), "--method", "none", "--count", "2", "--out", str(tmp_path / "run")]
    assert main([*command, "--dtype", "bfloat16"]) == 0 and main(command) == 0
    assert loading_of(Sample(), tmp_path / "run").dtype == "bfloat16"
    assert loading_of(Sample(dtype="float32"), tmp_path / "run").dtype == "float32"
    assert loading_of(Sample(), tmp_path / "nowhere").dtype == "auto"


def test_near_ties_are_torchs(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = bozzetto.load(tiny_model)
    monkeypatch.setitem(bozzetto.pipeline.pipeline.ROUNDING, "float32", 1e9)
    assert [pipe.generate(["rose"], compile=mode).images[0].near_tie for mode in ("auto", "off")] == [False, True]
    assert pipe.rounding(SimpleNamespace(compile="max")) == 0  # type: ignore[arg-type]
