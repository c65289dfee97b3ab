"""A run folder knows whose samples it holds: of these weights, this tokenizer, these captions, this drafter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bozzetto
from bozzetto.adapters.load import checkpoint_digest
from bozzetto.checkpoints.folders import save_llamagen
from bozzetto.errors import UsageError
from bozzetto.evaluate.sampling import SampleRun, method_settings, sample
from bozzetto.evaluate.shards import RUN, read_run
from bozzetto.pipeline.pipeline import GenerateSettings, Pipeline, model_folder
from conftest import write_tiny_vectors
from test_hosted import EMU3_SIZE, WRITERS


def run_in(folder: Path, pipe: Pipeline) -> SampleRun:
    return SampleRun(folder, pipe, method_settings("none", GenerateSettings(batch=2)), classes=["a red tulip"])


@pytest.fixture(scope="module")
def janus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosted") / "toy"
    WRITERS["janus"](folder)
    return folder


def other_weights(folder: Path, name: str = "model.safetensors") -> None:
    state = load_file(folder / name)
    key = next(k for k in sorted(state) if state[k].is_floating_point() and state[k].ndim == 2)
    state[key] = state[key] + 1
    save_file(state, folder / name, metadata={"format": "pt"})


def test_two_checkpoints_of_one_name_do_not_share_a_folder(janus, tmp_path):
    """Equal names, sizes and shapes: only the numbers differ."""
    other = Path(shutil.copytree(janus, tmp_path / "other" / janus.name))
    other_weights(other)
    assert (other / "model.safetensors").stat().st_size == (janus / "model.safetensors").stat().st_size
    pipes = [bozzetto.load(folder) for folder in (janus, other)]
    assert pipes[0].name == pipes[1].name and "unknown" not in {pipe.fingerprint() for pipe in pipes}
    assert sample(run_in(tmp_path / "run", pipes[0]), 2) == 2
    with pytest.raises(UsageError, match=r"weights = '\w{16}' there, '\w{16}' asked"):
        run_in(tmp_path / "run", pipes[1])
    again = shutil.copytree(janus, tmp_path / "elsewhere" / janus.name)
    assert sample(run_in(tmp_path / "run", bozzetto.load(again)), 3) == 1


@pytest.mark.parametrize(
    ("file", "counts"), [("tokenizer.json", True), ("config.json", True), ("README.md", False), ("more.py", False)]
)
def test_a_checkpoints_fingerprint_is_of_what_loading_reads(file, counts, janus, tmp_path):
    folder = Path(shutil.copytree(janus, tmp_path / "toy"))
    before = checkpoint_digest(folder)
    (folder / file).write_text((folder / file).read_text() + " " if (folder / file).exists() else "new")
    assert (checkpoint_digest(folder) != before) is counts


def test_a_hub_checkpoint_is_known_by_its_files_in_the_cache(janus, tmp_path, monkeypatch):
    """huggingface_hub 1.x: models--OWNER--NAME/{refs/main,snapshots/COMMIT}, files as links to blobs, which are called
    by their sha256 where they are large."""
    commit, root = "0" * 40, tmp_path / "hub" / "models--owner--toy"
    snapshot = root / "snapshots" / commit
    for part in (snapshot, root / "blobs", root / "refs"):
        part.mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "blobs" / ("a" * 64)).write_bytes((janus / "model.safetensors").read_bytes())
    (snapshot / "model.safetensors").symlink_to(root / "blobs" / ("a" * 64))
    shutil.copy(janus / "config.json", snapshot)
    import huggingface_hub.constants
    import huggingface_hub.file_download

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    first = checkpoint_digest("owner/toy")
    assert first not in ("unknown", checkpoint_digest(janus)) and checkpoint_digest("owner/other") == "unknown"
    (snapshot / "model.safetensors").unlink()
    (root / "blobs" / ("a" * 64)).rename(root / "blobs" / ("b" * 64))
    (snapshot / "model.safetensors").symlink_to(root / "blobs" / ("b" * 64))
    assert checkpoint_digest("owner/toy") != first


def test_a_folder_whose_weights_nobody_noted_is_not_gone_on_with(janus, tmp_path):
    pipe = bozzetto.load(janus)
    sample(run_in(tmp_path / "run", pipe), 1)
    content = read_run(tmp_path / "run")
    content["settings"]["weights"] = "unknown"
    (tmp_path / "run" / RUN).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UsageError, match="an earlier version did not note the weights"):
        run_in(tmp_path / "run", pipe)


def test_every_kind_of_pipeline_has_a_fingerprint(tiny_model, tiny_flow, tiny_mar, tmp_path):
    emu3 = tmp_path / "emu3"
    WRITERS["emu3"](emu3)
    pipes = [bozzetto.load(folder) for folder in (tiny_model, tiny_flow, tiny_mar, "flowers-drift")]
    pipes.append(bozzetto.load(emu3, image_size=EMU3_SIZE))
    found = [pipe.fingerprint() for pipe in pipes]
    assert len(set(found)) == len(found) and "unknown" not in found


def test_a_decoder_from_another_folder_counts(tmp_path):
    """flowers-mar has the weights of its decoder from flowers-flow."""
    for name, family in (("own", "mar"), ("other", "flow")):
        write_tiny_vectors(tmp_path / name, family)
    content = json.loads((tmp_path / "own" / "tokenizer.json").read_text())
    (tmp_path / "own" / "tokenizer.json").write_text(json.dumps({**content, "same_as": "other"}))
    (tmp_path / "own" / "tokenizer.safetensors").unlink()
    before = bozzetto.load(tmp_path / "own").fingerprint()
    state = load_file(tmp_path / "other" / "tokenizer.safetensors")
    save_file({k: v * 0.5 for k, v in state.items()}, tmp_path / "other" / "tokenizer.safetensors")
    assert bozzetto.load(tmp_path / "own").fingerprint() != before
    assert bozzetto.load("flowers-mar").fingerprint() != "unknown" and model_folder("flowers-mar").is_dir()


def test_captions_count(tmp_path, tiny_model):
    from bozzetto.checkpoints.folders import load_tokenizer
    from bozzetto.targets.llamagen import LlamaGen, LlamaGenConfig

    network = LlamaGen(LlamaGenConfig(32, 2, 2, vocab=16, grid=4, classes=0, condition_tokens=3, caption_dim=8))
    save_llamagen(tmp_path / "model", network, load_tokenizer(tiny_model), {"name": "text", "class_names": []})
    found = set()
    for number in range(2):
        file = tmp_path / f"{number}.safetensors"
        features = torch.full((1, 3, 8), float(number))
        save_file({"features": features, "mask": torch.ones(1, 3, dtype=torch.bool)}, file, {"captions": '["a dog"]'})
        found.add(bozzetto.load(tmp_path / "model", captions=file).fingerprint())
    assert len(found) == 2
