"""What published checkpoints lack, and what is said of files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bozzetto
import hf_toys
from bozzetto.adapters.janus import JanusTarget
from bozzetto.errors import UsageError
from published import janus_original
from published.chameleon_files import language
from published.files import write_shards
from published.lumina import FAMILIES
from test_hosted import refused, write_janus


def test_a_lumina_says_what_it_lacks_and_where_that_is(tmp_path: Path) -> None:
    """The published 7B-512, 7B-1024, 34B and Omni have no tokenizer, and none has a decoder."""
    made = lumina_files(tmp_path)
    beside = {"tokenizer": str(tmp_path / "Lumina-mGPT-7B-768"), "vqgan": tmp_path / "vqgan.ckpt", "image_size": 32}
    refused(made, "no tokenizer.json: .*--tokenizer Alpha-VLLM/Lumina-mGPT-7B-768", **{**beside, "tokenizer": ""})
    refused(made, "no tokenizer.json", **{**beside, "tokenizer": str(tmp_path)})
    refused(made, "no decoder for its image tokens: .*--vqgan", **{**beside, "vqgan": None})
    refused(made, "vqgan.safetensors", **{**beside, "vqgan": tmp_path / "vqgan.safetensors"})
    made.rename(tmp_path / "mine")
    refused(tmp_path / "mine", "its name does not say for which pictures .*--image-size", **{**beside, "image_size": 0})
    assert bozzetto.load(tmp_path / "mine", **beside).size == (4, 4)


def lumina_files(folder: Path) -> Path:
    """As published, with a tokenizer and a decoder beside it."""
    return FAMILIES["lumina-without-words"].write(folder)  # type: ignore[return-value]


@pytest.mark.parametrize("rows", [3, 8])
def test_norms_that_do_not_divide_the_heads_are_refused(tmp_path: Path, rows: int) -> None:
    made = lumina_files(tmp_path)
    write_shards(made, language(rows), 2)
    beside = {"tokenizer": str(tmp_path / "Lumina-mGPT-7B-768"), "vqgan": tmp_path / "vqgan.ckpt", "image_size": 32}
    refused(made, rf"[kq]_norm.bias has {rows} rows, which do not divide its 4 heads", **beside)


# ---- Janus' own files ------------------------------------------------------------------------------------------------


def janus(folder: Path, name: str = "Janus-Pro-1B") -> Path:
    return janus_original.write(name)(folder)


def test_janus_own_files_are_told_from_janusflow_and_what_is_missing_is_named(tmp_path: Path) -> None:
    made = janus(tmp_path)
    weights = torch.load(made / "pytorch_model.bin", weights_only=True)
    for key in ("gen_head.vision_head.bias", "gen_vision_model.decoder.mid.0.conv1.weight"):
        torch.save({k: v for k, v in weights.items() if k != key}, made / "pytorch_model.bin")
        refused(made, "missing in its weights: model")
    torch.save({k: v for k, v in weights.items() if "encoder" not in k}, made / "pytorch_model.bin")
    refused(made, r"config\.json: not Janus' own layout")
    torch.save(weights, made / "pytorch_model.bin")
    for key, change, said in (
        ("gen_head_config", None, "JanusFlow is not read here"),
        ("vision_config", {}, "not Janus' own layout: KeyError"),
        ("gen_aligner_config", {"params": {"projector_type": "linear"}}, "projector_type = 'linear' is not allowed"),
    ):
        content = janus_original.config()
        content.pop(key) if change is None else content.update({key: change})
        (made / "config.json").write_text(json.dumps(content))
        refused(made, said)


def test_janus_reads_nothing_of_what_looks_at_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    whole = JanusTarget.__init__
    monkeypatch.setattr(JanusTarget, "__init__", lambda self, model: made.append(model) or whole(self, model))
    bozzetto.load(janus(tmp_path))
    write_janus(tmp_path / "hf")
    assert bozzetto.load(tmp_path / "hf", dtype="bfloat16").target.dtype == torch.bfloat16
    assert len(made) == 2
    for model in made:
        names = {name for name, _ in model.named_parameters()}
        assert names and not [name for name in names if "vision_model" in name or name.startswith("model.aligner")]


@pytest.mark.parametrize(
    ("name", "words", "roles"),
    [
        ("Janus-Pro-7B", True, janus_original.NEW),
        ("Janus-1.3B", True, janus_original.OLD),
        ("mine", True, janus_original.NEW),
        ("mine", False, janus_original.OLD),
    ],
)
def test_roles_are_those_of_the_generation(tmp_path: Path, name: str, words: bool, roles: tuple[str, str]) -> None:
    """deepseek-ai's README and demos call them otherwise for Janus-1.3B, whose files do not say so."""
    made = janus(tmp_path, name)
    if not words:
        text = (made / "tokenizer.json").read_text()
        (made / "tokenizer.json").write_text(text.replace("<|User|>", "<u>").replace("<|Assistant|>", "<a>"))
    pipe = bozzetto.load(made)
    pipe.labels(["a  dog "])
    prompt = pipe.target.prompts[-1]
    assert list(prompt.given) == janus_original.prompt("a dog", roles)
    padding, begin = 0, hf_toys.IMAGE
    assert list(prompt.without) == [1, *[padding] * (len(prompt.given) - 2), begin]


def test_a_word_that_janus_needs_is_named(tmp_path: Path) -> None:
    made = janus(tmp_path)
    text = (made / "tokenizer.json").read_text()
    (made / "tokenizer.json").write_text(text.replace(janus_original.BEGIN, "<other>"))
    with pytest.raises(UsageError, match="its tokenizer has no word '<begin_of_image>'"):
        bozzetto.load(made)
    (made / "tokenizer.json").unlink()
    refused(made, "no tokenizer.json: ")
    options: dict[str, Any] = {"vqgan": "x"}
    refused(made, "vqgan = 'x' is not allowed", **options)
