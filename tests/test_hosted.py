"""Checkpoints in the Hugging Face layout: prompts in, pictures out, and errors that name the fix."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    ChameleonProcessor,
    Emu3ImageProcessor,
    Emu3Processor,
    JanusProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

import bozzetto
import hf_toys
from bozzetto.adapters.chameleon import lumina_sizes
from bozzetto.autoencoders.kl16 import KL16Config, kl16_decoder, to_published
from bozzetto.cli.main import main
from bozzetto.errors import UsageError
from bozzetto.evaluate.report.figures import offset_colours, overlay
from bozzetto.evaluate.report.runs import read_any
from hf_toys import GRID, IMAGE

pytestmark = pytest.mark.filterwarnings("error::FutureWarning")  # transformers tells so what it will drop

SPECIAL = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
TEXT = ["<pad>", "<s>", "<boi>", "<image>", "<unk>", "<eoi>", "<sep>", "<wrap>", "<eof>", "</s>"]
TEXT += ["a", "red", "tulip", "small", "house", "by", "lake", "in", "3", "*", "dog", "white", "ugly", "old"]
EMU3_SIZE = 8 * GRID


# Lumina-mGPT's names of some words: a separator, an end of line, a picture of 32 pixels
LUMINA = {"<wrap>": "<reserved08706>", "<eof>": "<reserved08799>", "3": "<reserved08801>", "*": "<racm3:break>"}


def tokenizer(words: list[str] = TEXT, **more: str) -> PreTrainedTokenizerFast:
    assert len(TEXT) == hf_toys.WORDS and TEXT.index("<boi>") == IMAGE
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "sep_token": "<sep>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, extra_special_tokens={**SPECIAL, **more}, **names)


def write_janus(folder: Path) -> None:
    hf_toys.tiny_janus().save_pretrained(folder)
    JanusProcessor(JanusImageProcessorPil(), tokenizer()).save_pretrained(folder)


def write_emu3(folder: Path) -> None:
    hf_toys.tiny_emu3().save_pretrained(folder)
    text = tokenizer(image_wrapper_token="<wrap>", eof_token="<eof>")
    Emu3Processor(Emu3ImageProcessor(), text).save_pretrained(folder)


def write_chameleon(folder: Path, codes: torch.Tensor | None = None, words: list[str] = TEXT) -> None:
    network = hf_toys.tiny_chameleon()
    network.save_pretrained(folder)
    text, images = tokenizer(words), ChameleonImageProcessorPil()
    ChameleonProcessor(images, text, image_seq_length=GRID * GRID).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = kl16_decoder(KL16Config(2 * GRID, 4, 2, 32, (1, 1), 1))
    own = network.model.vqmodel.quantize.embedding.weight
    state = {**to_published(decoder.state_dict(), 2), "quantize.embedding.weight": own if codes is None else codes}
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "vqgan.safetensors")


def write_lumina(folder: Path) -> None:
    """Chameleon's network and processor under the name of Lumina-mGPT's class, with its words."""
    write_chameleon(folder, words=[LUMINA.get(word, word) for word in TEXT])
    set_class(folder)


def set_class(folder: Path) -> None:
    """As Lumina-mGPT's checkpoints call theirs."""
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["ChameleonXLLMXForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(config))


WRITERS = {"janus": write_janus, "emu3": write_emu3, "chameleon": write_chameleon, "lumina": write_lumina}
SIZES = {"emu3": EMU3_SIZE, "lumina": 32}  # pixels per side, where a family has a choice


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp("hosted") / family for family in WRITERS}
    for family, folder in folders.items():
        WRITERS[family](folder)
    return folders


def load(checkpoints: dict[str, Path], family: str) -> Any:
    return bozzetto.load(checkpoints[family], image_size=SIZES.get(family, 0))


@pytest.mark.parametrize("family", WRITERS)
def test_prompts_draw_the_same_pictures_with_and_without_drafts(checkpoints: dict[str, Path], family: str) -> None:
    pipe = load(checkpoints, family)
    asked: dict[str, Any] = {"seed": 3, "count": 4, "guidance": 2.0, "batch": 3}
    prompts = ["a red tulip", "a small house by a lake"]
    slow = pipe.generate(prompts, drafter="none", **asked)
    fast = pipe.generate(prompts, drafter="jacobi", window=4, **asked)
    assert [a.sha256 for a in fast.images] == [b.sha256 for b in slow.images]
    assert [a.class_name for a in fast.images] == [*prompts, *prompts]
    side = 4 if family == "lumina" else 2 * GRID
    assert fast.tokens_per_pass > 1 and fast.images[0].image.size == (side, side)
    assert pipe.preview(fast.images[0].tokens, 5).size == (side, side)


def test_a_text_is_one_prompt_and_not_a_list_of_letters(checkpoints: dict[str, Path]) -> None:
    pipe = load(checkpoints, "janus")
    assert [image.class_name for image in pipe.generate("a dog").images] == ["a dog"]
    assert next(pipe.stream("a dog")).class_names == ["a dog"]


@pytest.mark.parametrize("family", WRITERS)
def test_every_rule_reads_a_hosted_model(checkpoints: dict[str, Path], family: str) -> None:
    pipe = load(checkpoints, family)
    for drafter, rule in (("jacobi", "exact"), ("none", "lantern:k=3")):
        pipe.generate(["a dog"], rule=rule, drafter=drafter)
    assert pipe.resources.neighbours(3).shape == (pipe.target.vocab, 3)


@pytest.mark.parametrize("family", hf_toys.LINED)
def test_an_end_of_line_is_nobodys_neighbour_but_its_own(checkpoints: dict[str, Path], family: str) -> None:
    near = load(checkpoints, family).resources.neighbours(7)
    assert bool((near[: hf_toys.CODES] < hf_toys.CODES).all()) and bool((near[hf_toys.CODES :] == hf_toys.CODES).all())


@pytest.mark.parametrize("family", WRITERS)
def test_a_negative_prompt_changes_guided_pictures_only(checkpoints: dict[str, Path], family: str) -> None:
    pipe = load(checkpoints, family)

    def tokens(guidance: float, negative: str) -> list[list[int]]:
        made = pipe.generate(["a dog"], count=6, guidance=guidance, negative_prompt=negative)
        return [image.tokens.tolist() for image in made.images]

    assert tokens(4.0, "") != tokens(4.0, "ugly")
    assert tokens(1.0, "") == tokens(1.0, "ugly")


def test_prompts_are_what_the_processor_makes_of_them(checkpoints: dict[str, Path]) -> None:
    janus, emu3, chameleon = (load(checkpoints, family) for family in ("janus", "emu3", "chameleon"))
    words = [TEXT.index(word) for word in ("a", "dog")]
    for pipe in (janus, emu3, chameleon):
        pipe.labels(["a dog"])
    assert janus.target.prompts[-1].given == (*words, IMAGE)
    assert janus.target.prompts[-1].without == (0, 0, IMAGE)
    size = [TEXT.index(word) for word in ("<boi>", "3", "*", "3", "<wrap>")]
    assert emu3.target.prompts[-1].given == (1, *words, *size)
    assert emu3.target.prompts[-1].without == (1, *size)
    assert chameleon.target.prompts[-1].given == (*words, TEXT.index("<sep>"), IMAGE)
    assert chameleon.target.prompts[-1].without == (1, IMAGE)


def test_lumina_is_told_the_task_and_the_size_in_its_own_words(checkpoints: dict[str, Path]) -> None:
    pipe = load(checkpoints, "lumina")
    pipe.labels(["a dog"])
    known = [LUMINA.get(word, word) for word in TEXT]
    begin = tuple(map(known.index, ("<racm3:break>", "<reserved08801>", "<reserved08801>")))
    prompt = pipe.target.prompts[-1]
    assert prompt.without == begin and prompt.given[-4:] == (known.index("<reserved08706>"), *begin)
    assert prompt.given[0] == 1 and prompt.given[-6:-4] == (known.index("a"), known.index("dog"))
    assert pipe.target.length == 2 * 3 and pipe.runner.codes_drawn(4) == 3


WIDE = "32x16"  # to Emu3's grammar two rows of four codes, of which the tiny one's decoder makes 8 x 4 pixels


def test_one_loaded_model_draws_pictures_of_several_sizes(checkpoints: dict[str, Path]) -> None:
    pipe = load(checkpoints, "emu3")
    wide = pipe.in_size((32, 16))
    assert wide.target.body is pipe.target.body and (wide.grid, wide.size) == ((2, 4), (8, 4))
    assert pipe.sizes[1] == (720, 720) and (832, 624) in pipe.sizes and (624, 832) in pipe.sizes
    made, own = wide.generate(["a dog"]), bozzetto.load(checkpoints["emu3"], image_size=WIDE).generate(["a dog"])
    assert made.images[0].sha256 == own.images[0].sha256 and made.images[0].image.size == (8, 4)
    with pytest.raises(UsageError, match=r"image_size = 7x7 is not allowed: .*draws 6x6"):
        load(checkpoints, "janus").in_size((7, 7))


def test_lumina_is_told_height_before_width(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Its repository's loader reads the word of the height first, and says the size as width x height in words."""
    folder = tmp_path / "lumina"
    folder.mkdir()
    words = ["<reserved08802>" if word == "dog" else LUMINA.get(word, word) for word in TEXT]
    write_chameleon(folder, words=words)
    set_class(folder)
    pipe = bozzetto.load(folder, image_size="64x32")
    pipe.labels(["a house"])
    assert pipe.target.prompts[-1].without == tuple(
        map(words.index, ("<racm3:break>", "<reserved08801>", "<reserved08802>"))
    )
    assert (pipe.grid, pipe.size, pipe.target.length) == ((2, 4), (8, 4), 2 * 5)


@pytest.mark.parametrize("side", [512, 768, 1024])
def test_lumina_offers_the_sizes_that_it_was_trained_on(side: int) -> None:
    """As its repository lists them: a walk along the largest pictures."""
    most, wanted = (side // 32) ** 2, set()
    width, height = most, 1
    while width:
        if max(width, height) <= 4 * min(width, height):
            wanted.add((32 * width, 32 * height))
        width, height = (width, height + 1) if (height + 1) * width <= most else (width - 1, height)
    found = lumina_sizes(side)
    assert found[0] == (side, side) and set(found) == wanted and len(found) == len(wanted)


def test_pictures_of_another_shape_go_through_every_verb(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = ["--model", str(checkpoints["emu3"]), "--image-size", WIDE]
    assert main(["generate", "a red tulip", *model, "--out", str(tmp_path / "drawn")]) == 0
    assert main(["sample", *model, "--count", "3", "--method", "jacobi", "--npz", "--out", str(tmp_path / "many")]) == 0
    picture = next((tmp_path / "drawn").glob("000000*.png"))
    assert Image.open(picture).size == (8, 4)
    for folder in ("drawn", "many"):
        (drawn,) = read_any(tmp_path / folder)[0].drawn
        assert drawn.grid == (2, 4) and drawn.load(0).shape == (4, 8, 3)
        assert overlay(drawn.traces[0], drawn.grid, offset_colours(4)).shape == (2, 4, 4)
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "drawn"), str(tmp_path / "many"), "--out", str(page)]) == 0
    assert "4 \u00d7 2 tokens each" in page.read_text()
    pipe = bozzetto.load(checkpoints["emu3"], image_size=WIDE)
    drawn = pipe.generate(["a dog"]).images[0]
    half = np.asarray(pipe.preview(drawn.tokens, 3))
    assert half.shape == (4, 8, 3) and (half[2:] == 128).all() and (half[:2, 6:] == 128).all()
    assert not (half[:2, :6] == 128).all()


def test_the_command_line_draws_prompts(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["generate", "a red tulip", "--model", str(checkpoints["janus"]), "--out", str(out)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["images"][0]["class"] == "a red tulip"


def test_prompts_of_any_length_are_drawn_and_kept(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Those of unknown words are the same tokens to the model, and called what they are for all that."""
    prompts, out = ["a red dog " * 16, "字" * 90, "w" * 300, "w" * 301], tmp_path / "out"
    assert main(["generate", *prompts, "--model", str(checkpoints["janus"]), "--out", str(out)]) == 0
    images = json.loads((out / "manifest.json").read_text())["images"]
    assert [image["class"] for image in images] == [" ".join(prompt.split()) for prompt in prompts]
    assert sorted(p.name for p in out.iterdir()) == sorted([*(i["file"] for i in images), "manifest.json", "sheet.png"])


# ---- errors ----------------------------------------------------------------------------------------------------------


def copied(checkpoints: dict[str, Path], family: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints[family], tmp_path / family))


def refused(model: str | Path, match: str, **options: Any) -> None:
    with pytest.raises(UsageError, match=match):
        bozzetto.load(model, **options)


def test_a_missing_tokenizer_is_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(checkpoints, "janus", tmp_path)
    for path in [*folder.glob("tokenizer*"), *folder.glob("special_tokens*")]:
        path.unlink()
    refused(folder, "tokenizer")


def test_a_text_model_is_refused(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path / "text")
    refused(tmp_path / "text", "model type 'bert' does not draw images by tokens here.*janus, .*emu3, chameleon")


def test_missing_and_broken_weights_are_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(checkpoints, "janus", tmp_path)
    path = folder / "model.safetensors"
    whole = load_file(path)
    name = next(key for key in whole if "generation_head" in key and key.endswith("weight"))
    save_file({key: value for key, value in whole.items() if key != name}, path, {"format": "pt"})
    refused(folder, "missing in its weights")
    save_file({**whole, name: whole[name] * float("nan")}, path, {"format": "pt"})
    refused(folder, "non-finite")
    save_file({**whole, name: whole[name][:1].clone()}, path, {"format": "pt"})
    refused(folder, "weights")


def test_a_chameleon_needs_the_decoder_of_its_codes(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(checkpoints, "chameleon", tmp_path)
    (folder / "vqgan.safetensors").unlink()
    refused(
        folder,
        "give the published tokenizer checkpoint .of Meta.s Chameleon. with --vqgan, or put it into .* or vqgan.ckpt",
    )
    write_chameleon(folder, torch.ones(hf_toys.CODES, 4))
    refused(folder, "its codes are not those of")
    save_file({"a": torch.ones(1)}, folder / "vqgan.safetensors")
    refused(folder, "not a VQGAN tokenizer")


def test_an_over_long_prompt_and_an_empty_one_are_refused(checkpoints: dict[str, Path]) -> None:
    pipe = load(checkpoints, "chameleon")
    with pytest.raises(UsageError, match="say it in fewer words"):
        pipe.generate(["red " * 80])
    with pytest.raises(UsageError, match="say what to draw"):
        pipe.generate(["  "])


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize("text", ["a <image> dog", "<boi>", "a dog </s>", "<pad>"])
def test_special_tokens_in_a_prompt_are_refused(checkpoints: dict[str, Path], family: str, text: str) -> None:
    """Processors of transformers 5.24 read them as such: <image> is a picture that was not given, </s> an end."""
    pipe = load(checkpoints, family)
    for asked, negative in ((text, ""), ("a dog", text)):
        with pytest.raises(UsageError, match="in it is a special token of the model"):
            pipe.generate(asked, negative_prompt=negative)
    pipe.labels("a zebra")  # a word that the tokenizer does not know is a word


def test_a_text_that_cannot_be_written_is_refused(checkpoints: dict[str, Path], tmp_path: Path, capsys) -> None:
    """A byte of the command line that is not UTF-8 arrives as half a letter."""
    for arguments in (["a\udcff dog"], ["a dog", "--negative-prompt", "\udcff"]):
        arguments = ["generate", *arguments, "--model", str(checkpoints["janus"]), "--out", str(tmp_path / "out")]
        assert main(arguments) == 2
        assert "is not allowed: a text (UTF-8)" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_transformers_runs_is_not_profiled(checkpoints: dict[str, Path], capsys) -> None:
    assert main(["profile", "--model", str(checkpoints["janus"])]) == 2
    assert "its passes are those of transformers (causal models of ours; `bench` is for all)" in capsys.readouterr().err
    arguments = ["bench", "--model", str(checkpoints["janus"]), "--count", "1", "--rounds", "1", "--methods", "none"]
    assert main(arguments) == 0


def test_sizes_that_do_not_fit_are_refused(checkpoints: dict[str, Path]) -> None:
    refused(checkpoints["emu3"], "image_size = 720x720 .*the model's context is 64", image_size=720)
    refused(checkpoints["emu3"], "image_size = 21x21 is not allowed: multiples of 8", image_size=21)
    refused(checkpoints["emu3"], "image_size = 24x20 is not allowed: multiples of 8", image_size="24x20")
    refused(checkpoints["janus"], "image_size = 7x7 is not allowed: .*draws 6x6 pixels", image_size=7)
    refused(checkpoints["chameleon"], "image_size = 6x8 is not allowed", image_size="6x8")
    refused(checkpoints["lumina"], "image_size = 40x40 is not allowed: multiples of 32", image_size=40)
    for odd in (-32, "32x", "0x32", "x", "32X32", " 32", 10**6):
        refused(checkpoints["lumina"], "is not allowed: pixels per side, or WIDTHxHEIGHT", image_size=odd)
    refused(checkpoints["lumina"], "no word '<reserved08824>'", image_size=768)


def test_what_hosted_models_have_not_is_refused(checkpoints: dict[str, Path]) -> None:
    pipe = load(checkpoints, "janus")
    for options, match in (
        ({"drafter": "model:folder=x", "rule": "block"}, "drafter 'model' is not allowed here"),
        ({"drafter": "eagle", "rule": "block"}, "without a trained drafter"),
    ):
        with pytest.raises(UsageError, match=match):
            pipe.generate(["a dog"], **options)


def test_a_name_on_the_hub_is_not_fetched_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("nobody/nothing-of-this-name", "could not be read from the hub")
