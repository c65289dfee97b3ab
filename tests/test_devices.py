"""Where passes run and in which type: what `auto` means, what is refused before anything is read, what is said."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import bozzetto
from bozzetto.checkpoints.load_settings import LoadSettings, best_device, check_gpus, gpus_of
from bozzetto.checkpoints.weights import usual_type
from bozzetto.cli import doctor
from bozzetto.cli.main import main
from bozzetto.errors import UsageError
from published import families

VERBS: dict[str, list[str]] = {
    "generate": ["--out"],
    "bench": ["--json"],
    "profile": ["--json"],
    "sample": ["--out"],
    "evaluate": ["--out"],
    "serve": [],
}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that there are so many."""

    def pretend(count: int) -> None:
        real = torch.zeros
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr("torch.zeros", lambda *a, device="cpu", **k: real(*a, **k))

    return pretend


def test_auto_is_the_processor_where_there_is_no_gpu() -> None:
    assert torch.cuda.is_available() or LoadSettings().device == "cpu"
    assert LoadSettings(device="cpu").for_weights(lambda: "bfloat16").dtype == "float32"


def test_auto_is_a_gpu_where_there_is_one_and_each_process_of_torchrun_has_its_own(gpus, monkeypatch) -> None:
    gpus(1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert best_device() == LoadSettings().device == "cuda"
    gpus(2)
    assert best_device() == "cuda:1"
    monkeypatch.delenv("LOCAL_RANK")
    assert best_device() == "cuda"


@pytest.mark.parametrize(("stored", "wanted"), [("bfloat16", "bfloat16"), ("float16", "float16"), ("odd", "float32")])
def test_on_a_gpu_auto_is_the_type_of_the_weights(stored: str, wanted: str, gpus: Any) -> None:
    gpus(1)
    assert LoadSettings().for_weights(lambda: stored).dtype == wanted
    assert LoadSettings(dtype="float32").for_weights(lambda: stored).dtype == "float32"


def test_models_in_folders_are_drawn_in_float32_on_a_processor(tiny_model: Path) -> None:
    pipe = bozzetto.load(tiny_model, device="cpu")
    assert (pipe.dtype, pipe.target.dtype) == ("float32", torch.float32)
    assert usual_type(tiny_model / "model.safetensors") == "float16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "abacus", "meta"])
def test_a_device_that_is_not_there_is_refused_by_every_verb_before_weights_are_read(
    verb: str, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bozzetto.checkpoints.weights.read_weights", lambda *given: pytest.fail("weights were read"))
    monkeypatch.setattr("bozzetto.evaluate.features.make_extractor", lambda spec: pytest.fail("weights were read"))
    words = [word for flag in VERBS[verb] for word in (flag, str(tmp_path / "made"))]
    assert main([verb, "--model", "flowers", *words, "--device", device]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and f"device '{device}' is not available here (there is: auto, cpu)" in said[0]
    assert not list(tmp_path.iterdir())


def test_a_device_without_float64_is_refused_since_seeds_are_drawn_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def mps(*given: Any, **named: Any) -> Any:  # torch 2.13 says so of mps
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")

    monkeypatch.setattr("torch.zeros", mps)
    with pytest.raises(UsageError, match=r"'mps' is not available here .*float64"):
        LoadSettings(device="mps")


def test_a_gpu_that_nobody_named_is_said_in_one_line(gpus: Any, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    gpus(1)
    seen: list[LoadSettings] = []

    def load(model: object, wanted: LoadSettings, report: object) -> None:
        seen.append(wanted)
        raise UsageError("far enough")

    monkeypatch.setattr("bozzetto.pipeline.loading.load", load)
    for words in ([], ["--device", "cuda"], ["--device", "cpu"]):
        assert main(["bench", "--model", "flowers", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("device")] == ["device: cuda (--device cpu for the processor)"]
    assert [wanted.device for wanted in seen] == ["cuda", "cuda", "cpu"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_device_in_its_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--device ", "--device-map", "--dtype"))


def test_a_manifest_holds_the_type_and_the_device_that_were_used(tiny_model: Path, tmp_path: Path) -> None:
    assert main(["generate", "rose", "--model", str(tiny_model), "--device", "cpu", "--out", str(tmp_path / "o")]) == 0
    settings = json.loads((tmp_path / "o" / "manifest.json").read_text())["settings"]
    assert (settings["dtype"], settings["device"]) == ("float32", "cpu")


def test_a_device_map_is_for_models_of_transformers(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match=r"device_map = 'auto' is not allowed: .*no model of transformers"):
        bozzetto.load(tiny_model, device_map="auto")
    with pytest.raises(UsageError, match="device_map = 'both' is not allowed: auto, balanced, sequential"):
        LoadSettings(device_map="both")


def test_float16_draws_and_its_near_ties_are_flagged(tiny_model: Path) -> None:
    exact, half = (bozzetto.load(tiny_model, dtype=name, device="cpu") for name in ("float32", "float16"))
    assert (half.dtype, half.target.dtype) == ("float16", torch.float16)
    for settings in ({"drafter": "none"}, {"drafter": "jacobi", "rule": "exact"}):
        assert len(half.generate(count=3, batch=3, **settings).images) == 3
    one, other = (pipe.generate(count=6, drafter="none").images for pipe in (exact, half))
    assert all(a.sha256 == b.sha256 or b.near_tie for a, b in zip(one, other, strict=True))


def test_workers_of_ray_get_a_gpu_each_or_are_refused(gpus: Any) -> None:
    assert gpus_of(LoadSettings(device="cpu")) == 0
    gpus(2)
    assert gpus_of(LoadSettings()) == gpus_of(LoadSettings(device="cuda")) == 1
    for bad in ({"device": "cuda:1"}, {"device": "cuda", "device_map": "auto"}):
        with pytest.raises(UsageError, match="is not allowed with Ray, which gives each worker a GPU of its own"):
            gpus_of(LoadSettings(**bad))
    check_gpus(2, "2 replicas", {"GPU": 2.0, "CPU": 8.0})
    with pytest.raises(UsageError, match=r"3 replicas is not allowed: 3 GPUs are needed, .*has 2"):
        check_gpus(3, "3 replicas", {"GPU": 2.0})


def test_the_doctor_lists_every_device(monkeypatch: pytest.MonkeyPatch, gpus: Any) -> None:
    gpus(2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (2**30, 4 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")
    assert [finding.what for finding in doctor._device()] == ["device cuda:0", "device cuda:1"]


def test_there_are_no_kernels_for_float16(tiny_model: Path) -> None:
    pipe = bozzetto.load(tiny_model, dtype="float16", device="cpu")
    with pytest.raises(UsageError, match=r"compile is not allowed here: no kernels for torch.float16 on a processor"):
        pipe.generate(["rose"], compile="max")


def test_a_device_map_without_accelerate_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("bozzetto.adapters.source.find_spec", lambda name: None)
    model = families()["janus"].write(tmp_path)
    with pytest.raises(UsageError, match="device_map = 'auto' needs accelerate: pip install accelerate"):
        bozzetto.load(model, device_map="auto")


@pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
def test_a_device_map_draws_the_same(tmp_path: Path) -> None:
    model = families()["janus"].write(tmp_path)
    one, other = (bozzetto.load(model, **more).generate(["a dog"]).images[0] for more in ({"device_map": "auto"}, {}))
    assert one.sha256 == other.sha256 or one.near_tie
