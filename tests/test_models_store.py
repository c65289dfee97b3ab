"""Model folders: round trips, and a UsageError that names whatever is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bozzetto.autoencoders.llamagen_vq import LlamaGenVQ, LlamaGenVQConfig
from bozzetto.autoencoders.vq import VQConfig, VQTokenizer
from bozzetto.checkpoints.folders import load_target, load_tokenizer, read_config, save_llamagen, save_tokenizer
from bozzetto.errors import UsageError
from bozzetto.pipeline.loading import load
from toys import tiny_llamagen

TOKENIZER = VQConfig(codes=11, code_dim=4, width=8, pre_blocks=1, post_blocks=1, image_size=32)


def tokenizer() -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(TOKENIZER)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_llamagen(tmp_path / "m", tiny_llamagen(), tokenizer(), {"license": "Apache-2.0"})
    return tmp_path / "m"


def edit(path: Path, change: dict) -> None:
    """Update the `config` section of a JSON file."""
    content = json.loads(path.read_text())
    content["config"].update(change)
    path.write_text(json.dumps(content))


def test_a_saved_network_comes_back_rounded_to_float16(folder: Path) -> None:
    before, after = tiny_llamagen(), load_target(folder, "llamagen")
    assert after.config == before.config
    assert not after.training
    assert not any(p.requires_grad for p in after.parameters())
    for name, value in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], value.half().float()), name


def test_a_saved_tokenizer_comes_back_rounded_to_float16(folder: Path) -> None:
    before, after = tokenizer(), load_tokenizer(folder)
    assert after.config == TOKENIZER
    for name, value in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], value.half().float()), name


def test_a_tokenizer_without_a_kind_is_the_tiny_one(folder: Path) -> None:
    content = read_config(folder, "tokenizer.json")
    assert content.pop("kind") == "vq-tiny"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert isinstance(load_tokenizer(folder), VQTokenizer)


def test_unknown_kinds_of_tokenizer_are_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"kind": "vq-huge", "config": {}}')
    with pytest.raises(UsageError, match=r"tokenizer\.json.*'vq-huge'.*'vq-llamagen'"):
        load_tokenizer(folder)


def test_a_published_tokenizer_comes_back_rounded_to_float16(tmp_path: Path) -> None:
    config = LlamaGenVQConfig(codes=11, channels=32, multipliers=(1, 2), blocks=1, latent=16, image_size=8)
    before = LlamaGenVQ(config).eval()
    save_tokenizer(tmp_path, before, {})
    after = load_tokenizer(tmp_path)
    assert isinstance(after, LlamaGenVQ)
    assert after.config == config
    for name, value in before.state_dict().items():
        if name != "codebook":
            assert torch.equal(after.state_dict()[name], value.half().float()), name
    assert torch.allclose(after.codebook, before.codebook, atol=1e-3)
    assert torch.allclose(after.codebook.norm(dim=1), torch.ones(11))
    assert not any(part.is_meta for part in after.state_dict().values())


def test_configs_of_before_there_were_captions_still_load(folder: Path) -> None:
    content = read_config(folder)
    for name in ("condition_tokens", "caption_dim"):
        del content["config"][name]
    (folder / "config.json").write_text(json.dumps(content))
    assert load_target(folder, "llamagen").config == tiny_llamagen().config


def test_a_captioned_network_comes_back(tmp_path: Path) -> None:
    before = tiny_llamagen(classes=0, condition_tokens=5, caption_dim=6)
    save_llamagen(tmp_path, before, tokenizer(), {})
    after = load_target(tmp_path, "llamagen")
    assert after.config == before.config
    assert torch.equal(after.cls_embedding.uncond_embedding, before.cls_embedding.uncond_embedding.half().float())


def test_files_hold_float16_and_the_notes(folder: Path) -> None:
    assert {v.dtype for v in load_file(folder / "model.safetensors").values()} == {torch.float16}
    assert read_config(folder)["license"] == "Apache-2.0"
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer.safetensors"}
    assert {p.name for p in folder.iterdir()} == names


def test_unknown_config_keys_are_refused_by_name(folder: Path) -> None:
    edit(folder / "config.json", {"wings": 2})
    with pytest.raises(UsageError, match=r"'wings'.*allowed.*dim"):
        load_target(folder, "llamagen")
    edit(folder / "tokenizer.json", {"feet": 2})
    with pytest.raises(UsageError, match=r"'feet'.*allowed.*codes"):
        load_tokenizer(folder)


def test_missing_config_keys_are_refused_by_name(folder: Path) -> None:
    (folder / "config.json").write_text('{"family": "llamagen", "config": {"dim": 32, "layers": 2}}')
    with pytest.raises(UsageError, match="heads"):
        load_target(folder, "llamagen")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not valid JSON"),
        ("[]", "list"),
        ('{"family": "unicorn"}', "'unicorn'"),
        ('{"family": "llamagen", "config": null}', r"config\.json"),
    ],
)
def test_broken_configs_are_refused(folder: Path, text: str, named: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(UsageError, match=named):
        load_target(folder, "llamagen")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"config": null}'])
def test_broken_tokenizer_configs_are_refused(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files_are_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UsageError, match=name):
        load_target(folder, "llamagen")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.safetensors"])
def test_missing_tokenizer_files_are_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UsageError, match=name):
        load_tokenizer(folder)


@pytest.mark.parametrize("size", [0, 5, 300])
def test_truncated_weights_are_refused(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        load_target(folder, "llamagen")


@pytest.mark.parametrize("kind", ["missing key", "unexpected key", "shape", "non-finite"])
def test_weights_that_do_not_fit_are_refused_by_key(folder: Path, kind: str) -> None:
    path, key = folder / "model.safetensors", "layers.1.ffn_norm.weight"
    state = load_file(path)
    if kind == "missing key":
        del state[key]
    elif kind == "unexpected key":
        key = "layers.2.ffn_norm.weight"
        state[key] = torch.ones(32)
    elif kind == "shape":
        state[key] = torch.ones(31)
    else:
        state[key][3] = torch.nan
    save_file(state, path)
    with pytest.raises(UsageError, match=kind) as caught:
        load_target(folder, "llamagen")
    assert key in str(caught.value)


def test_a_compact_network_comes_back_close_and_small(tmp_path: Path) -> None:
    before = tiny_llamagen()
    for name, compact in (("plain", False), ("compact", True)):
        save_llamagen(tmp_path / name, before, tokenizer(), {}, compact)
    after, labels = load_target(tmp_path / "compact", "llamagen"), torch.tensor([0, 1])
    tokens = torch.randint(before.config.vocab, (2, 3), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gap = (before.eval()(labels, tokens) - after(labels, tokens)).abs().max()
    assert 0 < float(gap) < 0.1
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("plain", "compact")]
    assert sizes[1] < 0.75 * sizes[0]


def test_a_family_that_is_not_known_is_refused_with_all_that_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"family": "foo", "config": {}}')
    with pytest.raises(UsageError, match=r"family is 'foo' .allowed: 'llamagen', 'flow', 'mar', 'drift'"):
        load(tmp_path)
