"""What published checkpoints lack, and what is said of files that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bozzetto
import hf_toys
from bozzetto.adapters import janus as family
from bozzetto.adapters.source import Source
from bozzetto.errors import UsageError
from published import families, janus_original
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
    whole = family.target
    monkeypatch.setattr(family, "target", lambda model: made.append(model) or whole(model))
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


# ---- files of every family that do not fit -------------------------------------------------------------------------


def spoilt(path: Path, change: Callable[[Any], Any], key: str = "") -> None:
    """Change one weight of a safetensors file: that of this name, else the last."""
    state = load_file(path)
    key = key or sorted(state)[-1]
    found = change(state.pop(key))
    save_file(state if found is None else {**state, key: found}, path, {"format": "pt"})


def retold(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def nan(value: torch.Tensor) -> torch.Tensor:
    return value * torch.nan


ANOLE = "model-00001-of-00003.safetensors"
DIFFUSED = "diffusion_pytorch_model.safetensors"
SPOILT: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "Anole's decoder": (
        "anole",
        lambda at: spoilt(at / ANOLE, nan, "model.vqmodel.decoder.mid.block_1.norm2.bias"),
        "'decoder.mid.block_1.norm2.bias' has non-finite values",
    ),
    "GLM-Image's transformer": (
        "glm-image",
        lambda at: spoilt(at / "transformer" / DIFFUSED, lambda weight: None),
        "glm-image: transformer: missing in its weights",
    ),
    "GLM-Image's text encoder": (
        "glm-image",
        lambda at: spoilt(at / "text_encoder" / "model.safetensors", nan),
        "glm-image: text_encoder: shared.weight has non-finite",
    ),
    "GLM-Image's layers": (
        "glm-image",
        lambda at: retold(at / "text_encoder" / "config.json", num_layers=10**9),
        r"text_encoder/config\.json: num_layers = 1000000000 is not allowed",
    ),
    "GLM-Image's autoencoder": (
        "glm-image",
        lambda at: spoilt(at / "vae" / DIFFUSED, lambda weight: weight.to(torch.float8_e5m2)),
        "is of type F8_E5M2",
    ),
    "an empty picture": (
        "anole",
        lambda at: retold(at / "processor_config.json", image_seq_length=0),
        "a picture of 0 image tokens is not allowed",
    ),
    "Janus' picture": (
        "janus",
        lambda at: retold(at / "config.json", vision_config={"num_image_tokens": 9, "image_size": 0}),
        r"config\.json: num_image_tokens = 9 is not allowed",
    ),
    "Janus without a word for padding": (
        "janus",
        lambda at: retold(at / "generation_config.json", pad_token_id=10**9),
        r"generation_config\.json: pad_token_id = 1000000000 is not allowed",
    ),
    "no words": (
        "simplear",
        lambda at: (at / "tokenizer.json").unlink(),
        r"its tokenizer has no words: tokenizer\.json",
    ),
    "another model's tokenizer": (
        "nextstep-1.1",
        lambda at: retold(at / "tokenizer_config.json", bos_token="more"),
        "token 262 of a prompt is not allowed: the model has 262 words",
    ),
    "a tokenizer's length": (
        "nextstep-1.1",
        lambda at: retold(at / "tokenizer_config.json", model_max_length="512"),
        "do not fit together: .* .TypeError.",
    ),
    "architectures": ("nextstep-1.1", lambda at: retold(at / "config.json", architectures=7, boi=None), "boi = None"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_not_whole_is_named(tmp_path: Path, what: str) -> None:
    """diffusers 0.42 draws missing weights at random and transformers 5.24 makes a tokenizer out of its class alone,
    both without an error."""
    name, spoil, said = SPOILT[what]
    stand_in = families()[name]
    (tmp_path / name).mkdir()
    model = Path(stand_in.write(tmp_path / name))
    spoil(model)
    with pytest.raises(UsageError, match=said):
        bozzetto.load(model, **stand_in.options)


def test_a_janus_without_a_generation_config_takes_its_tokenizers_words(tmp_path: Path) -> None:
    stand_in = families()["janus"]
    model = Path(stand_in.write(tmp_path))
    drawn = bozzetto.load(model).generate("a red tulip", guidance=5).images[0].sha256
    (model / "generation_config.json").unlink()
    assert bozzetto.load(model).generate("a red tulip", guidance=5).images[0].sha256 == drawn


@pytest.mark.parametrize("name", ["janus", "emu3", "lumina", "glm-image", "nextstep-1.1", "simplear", "lumina-mgpt-2"])
def test_options_are_refused_before_weights_are_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Source, "network", lambda *given: pytest.fail("weights were read"))
    monkeypatch.setattr("bozzetto.adapters.nextstep._network", lambda *given: pytest.fail("weights were read"))
    model = Path(families()[name].write(tmp_path))
    if name != "nextstep-1.1":
        refused(model, "it is for NextStep-1", vae="somewhere", image_size=0 if name == "janus" else 32)
    if name != "janus":
        refused(model, "image_size = 17x17 is not allowed", image_size=17)
