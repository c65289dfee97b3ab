"""LlamaGen's captions: cleaned, encoded by the encoder half of T5 as published, kept, and asked for in every verb."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

import bozzetto
from bozzetto.adapters.load import checkpoint_digest
from bozzetto.adapters.t5 import T5Encoder, encoder_digest
from bozzetto.autoencoders.vq import VQConfig, VQTokenizer
from bozzetto.checkpoints.captions import write_captions
from bozzetto.checkpoints.convert import convert_llamagen
from bozzetto.checkpoints.folders import save_llamagen
from bozzetto.cli.main import main
from bozzetto.errors import UsageError
from bozzetto.evaluate.shards import read_run
from bozzetto.runtime.kept import cache_folder, thin_out
from bozzetto.targets.caption_text import clean_caption
from bozzetto.targets.llamagen import LlamaGen, LlamaGenConfig, left_pad
from published import llamagen as published

T, C = published.TOKENS, 24


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.write_t5(tmp_path_factory.mktemp("t5") / "flan")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, t5: Path) -> Path:
    """A tiny text-conditional model, whose config.json names its encoder."""
    folder = tmp_path_factory.mktemp("text") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = LlamaGen(LlamaGenConfig(32, 2, 2, 16, 4, 0, condition_tokens=T, caption_dim=C))
        torch.nn.init.normal_(network.output.weight, std=0.5)
        tokenizer = VQTokenizer(VQConfig(codes=16, width=16, pre_blocks=1, post_blocks=1, image_size=32))
    save_llamagen(folder, network, tokenizer, {"name": "text", "class_names": [], "encoder": str(t5)})
    return folder


@pytest.fixture
def encoder(t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> T5Encoder:
    monkeypatch.setenv("BOZZETTO_CACHE", str(tmp_path / "kept"))
    return T5Encoder(t5, T, C, torch.float32, "cpu")


def test_features_are_those_of_the_published_code(encoder: T5Encoder, t5: Path) -> None:
    texts = ["A Red tulip", "a small house by the lake https://example.com/a", "###"]
    for text, features, mask in zip(texts, *left_pad(*encoder(texts)), strict=True):
        wanted, real = published.caption_features(t5, text)
        assert torch.equal(mask, real) and torch.allclose(features, wanted, atol=1e-6)
    assert encoder(["###"])[1].sum() == 1  # its end alone


def test_only_the_encoder_of_t5_is_loaded(encoder: T5Encoder) -> None:
    encoder(["a dog"])
    assert not [name for name, _ in encoder._network.named_parameters() if "decoder" in name or "lm_head" in name]


def test_features_are_kept_by_the_files_of_the_encoder_and_the_text(
    encoder: T5Encoder, t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = encoder._encoded
    monkeypatch.setattr(encoder, "_encoded", lambda text: asked.append(text) or real(text))
    first = encoder(["A dog"])[0]
    assert torch.equal(encoder(["a  dog"])[0], first) and asked == ["a dog"]  # the cleaned text counts
    encoder(["a red dog"])
    before, path = encoder_digest(str(t5)), next(t5.glob("*.safetensors"))
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    assert encoder_digest(str(t5)) != before
    encoder(["a dog"])
    assert asked == ["a dog", "a red dog", "a dog"]


def test_features_that_cannot_be_kept_are_made_again(t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BOZZETTO_CACHE", str(tmp_path / "file"))
    encoder = T5Encoder(t5, T, C, torch.float32, "cpu")
    assert encoder(["a dog"])[1].sum() == encoder(["a dog"])[1].sum() == 3


def test_what_is_kept_has_a_limit(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"caption-{i}.safetensors").write_bytes(b"x" * 10)
        os.utime(tmp_path / f"caption-{i}.safetensors", (i, i))
    thin_out(tmp_path, "caption-*.safetensors", 25, tmp_path / "caption-0.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"caption-{i}.safetensors" for i in (0, 2, 3)]


def test_an_encoder_of_the_hub_is_known_by_its_commit(
    t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache as huggingface_hub 1.x lays it out; nothing is asked of the network."""
    commit, repository = "a" * 40, tmp_path / "hub" / "models--some--t5"
    shutil.copytree(t5, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert encoder_digest("some/t5").endswith(commit) and encoder_digest("some/t5@v1").endswith(commit)
    assert checkpoint_digest("some/t5@v1") == checkpoint_digest("some/t5") == checkpoint_digest(t5)
    asked: list[Any] = []
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *given, **named: asked.append((given, named)))
    with pytest.raises(UsageError, match="None with features of None numbers"):
        T5Encoder("some/t5@v1", T, C, torch.float32, "cpu")
    assert asked == [(("some/t5",), {"trust_remote_code": False, "revision": "v1"})]


def test_a_long_caption_is_cut_as_published_and_said(encoder: T5Encoder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "bozzetto"):
        assert encoder(["red " * 200])[1].all()
    assert "a prompt is cut to 120 tokens" in caplog.text


def test_the_encoder_is_there_only_while_prompts_are_read(model: Path) -> None:
    pipe: Any = bozzetto.load(model)
    pipe.labels(["a white dog"])
    assert pipe.conditions.encoder._network is None
    pipe.remember(8)  # as a server does
    folder = cache_folder()
    kept = folder and sorted(folder.glob("caption-*"))
    pipe.labels(["a white house"])
    assert pipe.conditions.encoder._network is not None
    assert folder and kept and kept == sorted(folder.glob("caption-*"))  # clients' words stay in memory
    again: Any = bozzetto.load(model)
    again.labels(["a white dog"])  # kept: nothing is loaded
    assert again.conditions.encoder._network is None and again.conditions.encoder._tokenizer is None


def test_a_prompt_is_drawn_alike_alone_and_among_others(model: Path) -> None:
    many = bozzetto.load(model).generate(["a dog", "a red tulip"], batch=2).images
    alone = bozzetto.load(model).generate(["a red tulip"], first_index=1).images
    assert many[1].sha256 == alone[0].sha256 and many[0].sha256 != many[1].sha256


def features_file(path: Path) -> Path:
    features = torch.randn(2, T, C, generator=torch.Generator().manual_seed(1))
    names = {"captions": json.dumps(["a rose", "a tulip"])}
    save_file({"features": features, "mask": (torch.arange(T) < torch.tensor([[4], [9]])).long()}, path, names)
    return path


@pytest.mark.parametrize("given", ["prompts", "captions"])
def test_every_verb_takes_prompts_and_captions(given: str, model: Path, tmp_path: Path) -> None:
    captions = ["--captions", str(features_file(tmp_path / "c.safetensors"))] if given == "captions" else []
    text = "a tulip" if captions else "a red tulip"
    base = ["--model", str(model), *captions]
    assert main(["generate", text, *base, "--out", str(tmp_path / "one")]) == 0
    assert json.loads((tmp_path / "one" / "manifest.json").read_text())["images"][0]["class"] == text
    words = ["--method", "jacobi/exact", "--count", "3", "--out", str(tmp_path / "many")]
    assert main(["sample", text, *base, *words]) == 0
    assert read_run(tmp_path / "many")
    words = ["--methods", "none,jacobi/exact", "--count", "1", "--rounds", "1"]
    assert main(["bench", *base, *words]) == 0
    assert captions or main(["profile", *base, "--seconds", "0.01"]) == 0


def test_features_written_to_a_file_draw_what_the_prompts_draw(encoder: T5Encoder, model: Path, tmp_path: Path) -> None:
    texts = ["a dog", "a red tulip"]
    write_captions(tmp_path / "c.safetensors", texts, *encoder(texts))
    given = bozzetto.load(model, captions=tmp_path / "c.safetensors").generate(texts, batch=2).images
    assert [i.sha256 for i in given] == [i.sha256 for i in bozzetto.load(model).generate(texts, batch=2).images]


def refused(match: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(UsageError, match=match):
        bozzetto.load(*arguments, **options)


def test_encoders_that_do_not_fit_are_refused(model: Path, tiny_model: Path, t5: Path, tmp_path: Path) -> None:
    other = published.write_t5(tmp_path / "other", 30)
    refused("t5 with features of 30 numbers, this model takes t5 with 24", model, text_encoder=other)
    refused("config.json of the text encoder .* could not be read", model, text_encoder=tmp_path / "nowhere")
    refused("draws classes: --text-encoder is for text-conditional models", tiny_model, text_encoder=t5)
    refused("give either --captions", model, text_encoder=t5, captions=features_file(tmp_path / "c.safetensors"))
    (other / "model.safetensors.index.json").unlink()
    encoder = T5Encoder(other, T, 30, torch.float32, "cpu")
    with pytest.raises(UsageError, match="weights of the text encoder"):
        encoder(["never read before"])
    shown = bozzetto.pipeline.pipeline.shipped_models()
    if "emoji" in shown:
        refused("comes with its own, all-MiniLM-L6-v2", "emoji", text_encoder=t5)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("A blue Porsche 356, parked", "a blue porsche 356, parked"),
        ("see https://example.com/a?b=1 now @me #12 <b>bold</b>", "see ?b=1 now bold"),
        ("“Hi” — there...", '"hi" - there'),
        ("one_two-three_four-five", "one two three four five"),
        ("狗 a dog (***SALE***) jc6640 free shipping", "a dog sale"),
        ("800x600 photo.jpg of ﬁre &lt;b&gt; &amp; smoke", "of fire smoke"),
        ("100% cotton+wool", "100% cotton wool"),
        ("<person> & <!-- no --> a <script>x</script>dog", "person a dog"),
        ("'quoted'", "quoted"),
        ("", ""),
    ],
)
def test_captions_are_cleaned_as_published(text: str, wanted: str) -> None:
    """Equal to the published function (beautifulsoup4 4.15, ftfy 6.3) on 30,000 random captions of such parts."""
    assert clean_caption(text) == wanted


def test_the_layout_of_llama_gives_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published.write(True, published.ddp, tmp_path)
    monkeypatch.setitem(published.llamagen.SHAPES, "XL", (published.DIM, published.LAYERS, published.HEADS))
    folder, vq = published.write_llama(tmp_path / "LlamaGen-T2I", published.transformer(True)), tmp_path / "vq_ds16.pt"
    for number, gpt in enumerate((folder, folder / "model.safetensors")):
        out = tmp_path / f"out-{number}"
        assert "LlamaGen-XL (t2i, 120 text tokens) with VQ-16, 256 x 256" in convert_llamagen(gpt, vq, out)
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "converted" / "model.safetensors").read_bytes()
    content = json.loads((folder / "config.json").read_text()) | {"block_size": 1024}
    (folder / "config.json").write_text(json.dumps(content))
    assert "512 x 512 pixels" in convert_llamagen(folder, vq, tmp_path / "large")


def test_a_llamagen_that_is_not_converted_is_told_how(tmp_path: Path) -> None:
    folder = published.write_llama(tmp_path / "LlamaGen-T2I", published.transformer(True))
    refused("a LlamaGen checkpoint is converted first: bozzetto convert llamagen --gpt", folder)


def test_a_language_model_is_no_llamagen(tmp_path: Path) -> None:
    state = published.llama_layout(published.transformer(False))
    save_file({k: v for k, v in state.items() if "cls_embedding" not in k}, tmp_path / "model.safetensors")
    torch.save({"model": published.published_state(published.PIXELS)}, tmp_path / "vq.pt")
    for gpt in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(UsageError, match="this is a language model in Llama's layout"):
            convert_llamagen(gpt, tmp_path / "vq.pt", tmp_path / "out")


def test_nothing_of_tests_is_kept_beside_the_users_files() -> None:
    assert "graphs" in str(cache_folder())
