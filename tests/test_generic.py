"""Adapter files: read strictly, and a model that they do not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml

import bozzetto
from bozzetto.adapters.spec import SHIPPED, AdapterSpec, DecoderSpec, known_by, read_spec, shipped
from bozzetto.cli.main import main
from bozzetto.errors import UsageError
from published.generic import (
    CODES,
    PLAIN,
    PROMPTS,
    TEXT,
    llamagen_state,
    network,
    tokenizer,
    write_lumina,
    write_plain,
    write_simplear,
)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    folder = tmp_path / "plain"
    folder.mkdir()
    return write_plain(folder)


def changed(folder: Path, **changes: Any) -> Path:
    """The folder's adapter with other values; None takes a key away."""
    content = {key: value for key, value in {**PLAIN, **changes}.items() if value is not None}
    (folder / "bozzetto.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"colour": 3}, "unknown config key 'colour'"),
        ({"codes": "many"}, "codes = 'many' is not allowed"),
        ({"codes": 0}, "codes = 0 is not allowed"),
        ({"pixels": None}, "missing config key 'pixels'"),
        ({"offset": 3}, "one of offset, pattern and words"),
        ({"pattern": None}, "one of offset, pattern and words"),
        ({"pattern": None, "offset": "nowhere"}, "offset.* = 'nowhere' is not allowed"),
        ({"pattern": None, "words": [1, 1]}, "24 different numbers"),
        ({"pattern": "<{row}>"}, r"pattern: \{row\} is not allowed"),
        ({"pattern": "<{code:zz}>"}, "is not allowed: "),
        ({"pattern": "<{code:1000000000d}>"}, "'1000000000d'"),
        ({"size_word": "{number:.999999999f}"}, "'.999999999f'"),
        ({"no_prompt": ""}, r"bozzetto\.json: a prompt has one token"),
        ({"pattern": "<|other_{code}|>"}, "has no word '<|other_0|>'"),
        ({"pattern": None, "offset": 1000}, "word 1023 of code 23 is not there"),
        ({"line_end": "<eol>"}, "has no word '<eol>'"),
        ({"prompt": "{prompt.__class__}"}, "is not allowed"),
        ({"prompt": "hello"}, r"prompt has to hold \{prompt\}"),
        ({"no_prompt": "{prompt}"}, r"no_prompt: \{prompt\} is not allowed"),
        ({"sizes": []}, "sizes has to list"),
        ({"sizes": ["8x8"] * 257}, "sizes = .* is not allowed"),
        ({"sizes": [["8x8"]]}, "sizes: a list is not allowed: texts and numbers"),
        ({"sampling": {"steps": 5}}, r"bozzetto\.json: sampling: steps is not allowed"),
        ({"sizes": ["big"]}, "image_size = 'big' is not allowed"),
        ({"sizes": ["7x8"]}, "7x8 is not allowed: multiples of 2"),
        ({"sampling": {"guidance": 0.5}}, "guidance = 0.5"),
        ({"sampling": {"cfg": 3}}, "unknown config key 'cfg'"),
        ({"decoder": {"kind": "diffusion"}}, "kind = 'diffusion' is not allowed"),
        ({"decoder": {"kind": "vqgan"}}, "file = '' is not allowed with kind 'vqgan'"),
        ({"decoder": {"kind": "vqgan", "file": "../vq.pt"}}, "file = '../vq.pt' is not allowed"),
        ({"decoder": {"kind": "vqgan", "file": "/vq.pt"}}, "file = '/vq.pt' is not allowed"),
        ({"decoder": {"kind": "vqgan", "file": "vq.pt", "hub": "https://x"}}, "hub = 'https://x' is not allowed"),
        ({"decoder": {"kind": "vqgan", "file": "gone.pt"}}, "decoder gone.pt is neither beside it nor in"),
        ({"decoder": {"kind": "vqgan", "file": "vq.pt"}}, "not a tokenizer of kind vqgan"),
        ({"decoder": {"kind": "movqgan", "file": "vq.pt"}}, "not a MoVQGAN tokenizer"),
        ({"pixels": 4}, "pixels = 4, but the decoder in .* has 2"),
        ({"body": "clip"}, "model type 'clip' is no language model"),
    ],
)
def test_what_an_adapter_may_not_say(plain: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        bozzetto.load(changed(plain, **changes))


@pytest.mark.parametrize(
    "odd", ["sizes: &s ['8x8', *s]", "codes: 2001-01-01", "codes: !!binary aGVsbG8=", "sizes: !!set {8x8: null}"]
)
def test_what_yaml_has_and_adapters_have_not_is_named(tmp_path: Path, odd: str) -> None:
    (tmp_path / "adapter.yaml").write_text(f"pixels: 2\n{odd}\n")
    with pytest.raises(UsageError, match=rf"adapter\.yaml: {odd.partition(':')[0]}: a .* is not allowed"):
        read_spec(tmp_path / "adapter.yaml")


def test_the_command_line_says_it_in_one_line(plain: Path, tmp_path: Path, capsys: Any) -> None:
    changed(plain, colour=3)
    assert main(["generate", "a dog", "--model", str(plain), "--out", str(tmp_path / "out")]) == 2
    assert "bozzetto.json: unknown config key 'colour'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_adapter_is_a_file_a_name_or_in_the_folder(plain: Path, tmp_path: Path) -> None:
    own = bozzetto.load(plain).generate(["a dog"]).images[0]
    elsewhere = tmp_path / "mine.yaml"
    elsewhere.write_text(yaml.safe_dump({**PLAIN, "prompt": "{bos}an old {prompt}<boi>"}))
    assert bozzetto.load(plain, adapter=elsewhere).generate(["a dog"]).images[0].sha256 != own.sha256
    elsewhere.write_text(yaml.safe_dump(PLAIN))
    (plain / "bozzetto.json").unlink()
    assert bozzetto.load(plain, adapter=str(elsewhere)).generate(["a dog"]).images[0].sha256 == own.sha256
    with pytest.raises(UsageError, match=r"model type 'llama' does not draw .* --adapter"):
        bozzetto.load(plain)
    with pytest.raises(UsageError, match="adapter 'nobody' is not allowed: a file, or one of lumina-mgpt-2, simplear"):
        bozzetto.load(plain, adapter="nobody")
    with pytest.raises(UsageError, match=r"missing in its weights: .*q_proj.bias"):
        bozzetto.load(plain, adapter="simplear")
    with pytest.raises(UsageError, match=r"adapter = 'simplear' is not allowed: .* is no model of transformers"):
        bozzetto.load("flowers", adapter="simplear")


def test_shipped_adapters_hold_what_is_published() -> None:
    assert shipped() == ["lumina-mgpt-2", "simplear"]
    simple, lumina = (read_spec(SHIPPED / f"{name}.yaml") for name in ("simplear", "lumina-mgpt-2"))
    assert (simple.codes, simple.offset, simple.pixels, simple.body) == (64000, "tokenizer", 16, "qwen2")
    assert (simple.sampling.guidance, simple.sampling.temperature, simple.decoder.kind) == (6.0, 1.0, "none")
    assert simple.grid((1024, 1024)) == (64, 64) and "TorchScript" in simple.decoder.why
    assert (lumina.codes, lumina.offset, lumina.line_end) == (16384, 155000, "<reserved08799>")
    assert (lumina.sampling.guidance, lumina.sampling.top_k) == (4.0, 4096) and lumina.grid((768, 512)) == (64, 96)
    assert lumina.decoder == DecoderSpec("movqgan", "movqgan_270M.ckpt", "ai-forever/MoVQGAN")
    said = lumina.said(lumina.prompt, (768, 512), "<|endoftext|>", "a {dog}")
    begin = "<|endoftext|>Generate an image of 768x512 according to the following prompt:\n"
    assert said == begin + "a {dog}<reserved08706><racm3:break><reserved08816><reserved08824>"  # height, then width
    assert known_by({"architectures": ["SimpARForCausalLM"]}) == SHIPPED / "simplear.yaml"
    assert known_by({"model_type": "chameleon", "vocab_size": 171400}) == SHIPPED / "lumina-mgpt-2.yaml"
    assert known_by({"model_type": "chameleon", "vocab_size": 65536}) is None


@pytest.mark.parametrize("name", ["simplear", "lumina-mgpt-2"])
def test_shipped_adapters_are_found_for_models_of_the_published_numbers(name: str, tmp_path: Path) -> None:
    """64,000 codes after the tokenizer's words, 16,384 from word 155,000 on; nothing beside the published files."""
    if name == "simplear":
        write_simplear(tmp_path, codes=64000)
    else:
        write_lumina(tmp_path, codes=16384, first=155000)
    (tmp_path / "bozzetto.yaml").unlink()
    pipe = bozzetto.load(tmp_path, image_size={"simplear": 256, "lumina-mgpt-2": 32}[name])
    assert pipe.own == read_spec(SHIPPED / f"{name}.yaml").sampling and bool(pipe.undecoded) == (name == "simplear")
    assert pipe.target.vocab == {"simplear": 64000, "lumina-mgpt-2": 16385}[name] and pipe.dtype == "float32"
    if name != "simplear":  # 256 tokens of 64,000 kinds take seconds
        assert pipe.generate(["a dog"]).images[0].image.size == (32, 32)


def test_words_one_by_one_are_the_same_as_by_name(plain: Path) -> None:
    wanted = bozzetto.load(plain).generate(["a dog"]).images[0]
    words = transformers.AutoTokenizer.from_pretrained(plain)
    numbers = [words.convert_tokens_to_ids(f"<|img_{code:03d}|>") for code in range(CODES)]
    for changes in ({"words": numbers}, {"offset": numbers[0]}):
        changed(plain, pattern=None, **changes)
        assert bozzetto.load(plain).generate(["a dog"]).images[0].sha256 == wanted.sha256


def test_sizes_are_the_listed_ones_and_multiples(plain: Path) -> None:
    pipe = bozzetto.load(plain)
    assert pipe.sizes == ((8, 8), (16, 8)) and pipe.size == (8, 8)
    assert bozzetto.load(plain, image_size="16x8").generate(["a dog"]).images[0].image.size == (16, 8)
    assert pipe.in_size((4, 12)).grid == (6, 2)
    with pytest.raises(UsageError, match="image_size = 10x8 is not allowed: 8x8, 16x8, or multiples of 4"):
        pipe.in_size((10, 8))


def test_a_picture_is_its_decoders(plain: Path) -> None:
    """LlamaGen's own decoder on the codes, row by row; the same with an end of line after each."""
    from bozzetto.autoencoders.llamagen_vq import LlamaGenVQ, from_published, infer_config

    vq = LlamaGenVQ(infer_config(llamagen_state(), 8)).eval()
    vq.load_state_dict(from_published(llamagen_state()))
    pipe = bozzetto.load(plain)
    image = pipe.generate(["a dog"]).images[0]
    with torch.no_grad():
        wanted = vq.decode(image.tokens[None])[0].permute(1, 2, 0)
    assert np.allclose(np.asarray(image.image) / 255, wanted.numpy(), atol=1 / 255)
    changed(plain, line_end="<unk>", sizes=["8x8"])
    lined = bozzetto.load(plain)
    drawn = lined.generate(["a dog"], drafter="none", temperature=0.0).images[0]
    assert len(drawn.tokens) == 20 and drawn.tokens.view(4, 5)[:, -1].tolist() == [CODES] * 4
    assert lined.runner.codes_drawn(7) == 6 and drawn.image.size == (8, 8)


def test_a_model_whose_logits_are_more_than_its_head_is_refused(tmp_path: Path) -> None:
    """Cohere's logits are scaled after the head; layers that see a window only are refused before."""
    text = tokenizer(["<boi>", *(f"<|img_{i:03d}|>" for i in range(CODES))], bos_token="<|endoftext|>")
    text.save_pretrained(tmp_path)
    sizes = {**TEXT, "num_key_value_heads": 4, "vocab_size": len(text), "max_position_embeddings": 128}
    config = transformers.CohereConfig(**sizes, logit_scale=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    network(transformers.CohereForCausalLM, config).save_pretrained(tmp_path)
    torch.save({"model": llamagen_state()}, tmp_path / "vq.pt")
    with pytest.raises(UsageError, match="not its last hidden states times its head"):
        bozzetto.load(changed(tmp_path))
    windows = transformers.Qwen2Config(**sizes, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    network(transformers.Qwen2ForCausalLM, windows).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="layers of type sliding_attention are not allowed"):
        bozzetto.load(changed(tmp_path))


def test_tokens_without_a_decoder_are_written_and_have_no_neighbours(tmp_path: Path, capsys: Any) -> None:
    model, out = tmp_path / "simplear", tmp_path / "out"
    model.mkdir()
    write_simplear(model)
    assert main(["generate", *PROMPTS, "--model", str(model), "--out", str(out)]) == 0
    assert "maps of tokens and no pictures (its tokenizer, Cosmos" in capsys.readouterr().out
    told = json.loads((out / "manifest.json").read_text())
    with np.load(out / "tokens.npz") as arrays:
        for entry in told["images"]:
            assert arrays[entry["file"]].flatten().tolist() == entry["tokens"]
    with pytest.raises(UsageError, match="reads the codes' vectors, which come with a decoder"):
        bozzetto.load(model).generate(["a dog"], rule="lantern:k=3")


def test_decoder_tokenizer_and_adapter_may_lie_elsewhere_and_are_part_of_the_fingerprint(
    plain: Path, tmp_path: Path
) -> None:
    pipe = bozzetto.load(plain)
    wanted, known = pipe.generate(["a dog"]).images[0], {pipe.fingerprint()}
    away = tmp_path / "away"
    away.mkdir()
    for name in ("vq.pt", "tokenizer.json", "tokenizer_config.json"):
        (plain / name).rename(away / name)
    there = {"vqgan": away / "vq.pt", "tokenizer": str(away)}
    moved = bozzetto.load(plain, **there)
    assert moved.generate(["a dog"]).images[0].sha256 == wanted.sha256
    known.add(moved.fingerprint())
    torch.save({"model": llamagen_state(seed=1)}, away / "vq.pt")
    other = bozzetto.load(plain, **there)
    assert other.generate(["a dog"]).images[0].sha256 != wanted.sha256
    known.add(other.fingerprint())
    changed(plain, prompt="an old {prompt}<boi>")
    known.add(bozzetto.load(plain, **there).fingerprint())
    known.add(bozzetto.load(plain, **there, image_size="16x8").fingerprint())
    assert len(known) == 4  # a size is no other model
    with pytest.raises(UsageError, match=r"vqgan = .* is not allowed"):
        changed(plain, decoder={"kind": "none"})
        bozzetto.load(plain, **there)


def test_a_spec_is_plain() -> None:
    spec = AdapterSpec(8, 2, ("4x4",), "{prompt}", "", offset=3)
    assert spec.said("{width} {height} {columns} {rows}{wide}", (4, 4), "") == "4 4 2 2"
