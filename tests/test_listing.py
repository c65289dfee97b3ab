"""`bozzetto models`: models, variants, drafters and checkpoints of transformers are listed as what they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bozzetto.checkpoints.folders import load_target, save_drafter, save_drift
from bozzetto.cli.listing import list_models
from bozzetto.cli.main import main
from bozzetto.drafters.eagle import EagleNet, eagle_config
from bozzetto.targets.drift import DriftConfig, DriftModel


def test_everything_shipped_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    said = capsys.readouterr().out
    assert "unreadable" not in said
    assert "drift (of flowers-flow)" in said


def test_kinds_of_folders_are_told(tiny_model: Path, tiny_flow: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "codes")
    network = load_target(tiny_model, "llamagen")
    save_drafter(tmp_path / "eagle", EagleNet(eagle_config(network.config)), tiny_model, {})
    (tmp_path / "drift").mkdir()
    variant = DriftModel(load_target(tiny_flow, "flow", "mar"), DriftConfig(width=16, depth=1))  # type: ignore[arg-type]
    save_drift(tmp_path / "drift", variant, str(tiny_flow), tiny_flow, {"name": "one-step"})
    (tmp_path / "janus").mkdir()
    (tmp_path / "janus" / "config.json").write_text(json.dumps({"model_type": "janus"}))
    (tmp_path / "words").mkdir()  # a text encoder, say
    (tmp_path / "words" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    codes, drift, eagle, janus, words = list_models(tmp_path).splitlines()[1:]
    assert "model type 't5' draws no images by tokens here" in words and "guidance" not in words
    weights = sum(part.numel() for part in network.parameters())
    assert codes.split()[:6] == ["tiny", "llamagen", f"{weights / 1e6:.2f}", "M", "32x32", "16"]
    assert drift.startswith(f"one-step  drift (of {tiny_flow})") and "32x32" in drift
    assert "eagle (a drafter)" in eagle
    assert "janus (of transformers)" in janus
    assert all("our kernels" in line for line in (codes, drift)) and "our kernels" not in eagle + janus


@pytest.mark.parametrize("field", ["vocab", "grid"])
def test_a_folder_whose_config_is_wrong_is_unreadable_and_says_why(
    tiny_model: Path, tmp_path: Path, field: str
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "codes")
    content = json.loads((folder / "config.json").read_text())
    content["config"][field] = 10**9
    (folder / "config.json").write_text(json.dumps(content))
    assert f"{field} = 1000000000 is not allowed" in list_models(tmp_path)


def test_a_broken_model_does_not_hide_the_others(tiny_model, tmp_path):
    (tmp_path / "fine").symlink_to(tiny_model)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{")
    lines = list_models(tmp_path).splitlines()
    assert lines[1].startswith("tiny")
    assert "unreadable" in lines[2]
    assert "not valid JSON" in lines[2]


def test_an_empty_folder_is_not_an_error(tmp_path):
    assert list_models(tmp_path) == f"no models found in {tmp_path}"
