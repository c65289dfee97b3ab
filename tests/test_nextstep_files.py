"""NextStep-1's files: variants of the layout against the slow reference, and errors that name the fix."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import bozzetto
from bozzetto.cli.main import main
from bozzetto.errors import UsageError
from published import nextstep
from published.nextstep import BOI, GRID, OWN, PIXELS, Slow

TEXT, NEGATIVE = "a red tulip", "ugly"
# The names that the first models have: no genloss_*, num_channels, patch_size; a bias more; a table of places.
FIRST: dict[str, Any] = {name: None for name in nextstep.CONFIG if name.startswith("genloss")}
FIRST |= {"num_channels": None, "patch_size": None, "image_size": None, "create_kwargs": None}
FIRST |= {"latent_channels": 16, "latent_patch_size": 2, "latent_size": 8, "fm_head_dim": 32, "fm_head_layers": 2}
FIRST |= {"o_attention_bias": True, "use_gen_pos_embed": True, "base_image_grid_size": 32}


def first(folder: Path) -> Path:
    nextstep.write(folder, **FIRST)
    config = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp("nextstep") / name for name in ("1.1", "first")}
    for folder in made.values():
        folder.mkdir()
    nextstep.write(made["1.1"])
    first(made["first"])
    return made


def shifted(end: float, steps: int, shift: float) -> Tensor:
    u = torch.linspace(0, end, steps + 1)
    return u / (shift - (shift - 1) * u)


def test_the_first_models_names_biases_and_places(folders: dict[str, Path]) -> None:
    """Llama's decoder where the output has a bias too; their size is 8 latents a side, their words of praise known."""
    pipe = bozzetto.load(folders["first"])
    assert type(pipe.target.body).__name__ == "LlamaModel" and pipe.size == (64, 64)
    assert pipe.own.suffix == " masterpiece, film grained, best quality." and pipe.own.steps == 28
    made = pipe.generate(TEXT, drafter="none", steps=6, guidance=3.0, negative_prompt=NEGATIVE).images[0].tokens
    slow = Slow(folders["first"]).draw(TEXT, NEGATIVE, torch.linspace(0, 1, 7), 3.0)
    torch.testing.assert_close(made, slow, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.2])
def test_the_first_repositorys_sampler_is_one_of_ours(folders: dict[str, Path], shift: float) -> None:
    """A norm, a jump of 0.04 at the end, shifted times: README of the first release (50 steps there)."""
    pipe = bozzetto.load(folders["1.1"], image_size=PIXELS, sampler=f"euler:steps=8:last=0.04:norm=1:shift={shift}")
    assert (pipe.own.steps, pipe.sampling()["steps"]) == (8, 8)
    made = pipe.generate(TEXT, guidance=7.5, rule="plain", negative_prompt=NEGATIVE).images[0].tokens
    slow = Slow(folders["1.1"], norm=True).draw(TEXT, NEGATIVE, shifted(0.96, 7, shift), jump=0.04)
    torch.testing.assert_close(made, slow, atol=1e-4, rtol=0)
    assert pipe.resolve(bozzetto.GenerateSettings()).rule.text == "coupled"
    with pytest.raises(UsageError, match="last step adds no noise"):
        pipe.generate(TEXT, rule="reflection")
    same: dict[str, Any] = {"drafter": "jacobi", "rule": "pathwise:epsilon=1e-6", "window": 4}
    near = pipe.generate(TEXT, negative_prompt=NEGATIVE, **same).images[0].tokens
    torch.testing.assert_close(near, made, atol=1e-3, rtol=0)


def test_the_training_repositorys_sampler_is_another_law(folders: dict[str, Path]) -> None:
    pipes = [bozzetto.load(folders["1.1"], image_size=PIXELS, sampler=s) for s in ("", "flow-sde:steps=8")]
    one, other = (pipe.generate(TEXT, drafter="none", steps=8).images[0].tokens for pipe in pipes)
    assert not torch.allclose(one, other, atol=1e-2)
    assert pipes[0].fingerprint() != pipes[1].fingerprint()
    assert pipes[1].sampling()["source"].startswith("flow-sde:steps=8; ")


def test_seeds_are_kept_by_pathwise_drafts_and_laws_by_chains(folders: dict[str, Path]) -> None:
    pipe = bozzetto.load(folders["1.1"], image_size=PIXELS)
    asked: dict[str, Any] = {"seed": 2, "steps": 6, "guidance": 2.0}
    slow = pipe.generate([TEXT, "a dog"], drafter="none", batch=2, **asked).images
    near = pipe.generate([TEXT, "a dog"], drafter="jacobi", rule="pathwise:epsilon=1e-6", window=4, **asked).images
    for one, other in zip(slow, near, strict=True):
        torch.testing.assert_close(one.tokens, other.tokens, atol=1e-3, rtol=0)
    fast = pipe.generate([TEXT], drafter="jacobi", rule="chains", window=4, **asked).images[0]
    assert fast.target_passes < GRID * GRID and not torch.allclose(fast.tokens, slow[0].tokens)


def test_pictures_are_drawn_in_other_sizes_with_the_same_weights(folders: dict[str, Path]) -> None:
    pipe = bozzetto.load(folders["1.1"], image_size="64x32")
    image = pipe.generate(TEXT, drafter="none", steps=2).images[0]
    assert image.image.size == (64, 32) and len(image.tokens) == 8
    other: Any = pipe.in_size((32, 64))  # type: ignore[attr-defined]
    assert other.target.body is pipe.target.body and other.size == (32, 64)
    prompt = other.target.prompts[0].given
    assert prompt[-1] == BOI and bytes(prompt[-4:-1]) == b"4*2"  # rows * columns
    assert bozzetto.load(folders["1.1"], image_size=PIXELS).sizes[0] == (64, 64)


def test_negative_prompts_and_quality_words_are_the_model_pages(folders: dict[str, Path]) -> None:
    pipe = bozzetto.load(folders["1.1"], image_size=PIXELS)
    label = pipe.labels([TEXT], bozzetto.GenerateSettings(quality_words=True))[0]
    known = pipe.target.prompts[label]
    assert bytes(known.given[: len(TEXT)]).decode() == TEXT
    assert bytes(known.without[: len(OWN["negative_prompt"])]).decode() == OWN["negative_prompt"]


def test_a_begin_of_text_stands_in_front_and_the_size_loses_its_first_token(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """What the published pipeline does with a tokenizer that has one (it takes for granted that it is added)."""
    folder = shutil.copytree(folders["1.1"], tmp_path / "begun")
    said = json.loads((folder / "tokenizer_config.json").read_text()) | {"bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    pipe = bozzetto.load(folder, image_size=PIXELS)
    given = pipe.target.prompts[pipe.labels([TEXT])[0]].given
    assert given == (256, *TEXT.encode(), *b"4*4", BOI)


def test_the_autoencoder_may_lie_elsewhere_and_counts_for_the_fingerprint(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["1.1"], tmp_path / "bare")
    shutil.move(folder / "vae", tmp_path / "tokenizer")
    with pytest.raises(UsageError, match=r"vae/checkpoint\.pt does not exist.*--vae FOLDER"):
        bozzetto.load(folder, image_size=PIXELS)
    pipe = bozzetto.load(folder, image_size=PIXELS, vae=str(tmp_path / "tokenizer"))
    before = pipe.fingerprint()
    state = torch.load(tmp_path / "tokenizer" / "checkpoint.pt", weights_only=True)
    torch.save({k: v * 1.5 for k, v in state.items()}, tmp_path / "tokenizer" / "checkpoint.pt")
    assert bozzetto.load(folder, image_size=PIXELS, vae=str(tmp_path / "tokenizer")).fingerprint() != before


def changed(folder: Path, **said: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | said
    (folder / "config.json").write_text(json.dumps(config))


def shard(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = sorted(folder.glob("model-*.safetensors"))[0]
    state = load_file(file)
    change(state)
    save_file(state, file)


def vae(folder: Path, change: Callable[[Tensor], Tensor]) -> None:
    path = folder / "vae" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "decoder.conv_out.weight": change(state["decoder.conv_out.weight"])}, path)


class Bomb:
    """What runs code when it is unpickled carelessly."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("boom",))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a patch": (lambda f: changed(f, patch_size=4), "64 numbers, the autoencoder's 16 channels in patches of 4 x 4"),
    "no begin of image": (lambda f: changed(f, boi=None), r"config\.json: boi = None"),
    "a begin of image": (lambda f: changed(f, boi=9999), r"config\.json: boi = 9999"),
    "a size": (lambda f: changed(f, patch_size="2"), r"config\.json: .*patch_size = '2'"),
    "a bias alone": (lambda f: changed(f, attention_bias=False, o_attention_bias=True), "o_attention_bias without"),
    "biases that are not there": (lambda f: changed(f, o_attention_bias=None), "missing in its weights"),
    "biases that nobody asked for": (lambda f: changed(f, attention_bias=False), "of an unknown network"),
    "a width": (lambda f: changed(f, hidden_size=64, head_dim=16), "misshapen in its weights"),
    "a weight less": (
        lambda f: shard(f, lambda s: s.pop("embed_tokens.weight")),
        "missing in its weights: embed_tokens",
    ),
    "a number that is none": (lambda f: shard(f, lambda s: s["embed_tokens.weight"].fill_(math.nan)), "non-finite"),
    "a weight more": (
        lambda f: shard(f, lambda s: s.update(extra=torch.zeros(1))),
        "unknown network in its weights: ex",
    ),
    "a shard less": (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "missing"),
    "no tokenizer": (lambda f: [(f / n).unlink() for n in ("vocab.json", "tokenizer_config.json")], "its tokenizer"),
    "a pickle with code": (lambda f: (f / "vae" / "checkpoint.pt").write_bytes(pickle.dumps(Bomb())), "read safely"),
    "a pickle of something": (
        lambda f: torch.save({"a": 3}, f / "vae" / "checkpoint.pt"),
        "'a' is not a tensor but int",
    ),
    "a decoder that is not finite": (lambda f: vae(f, lambda v: v * math.nan), r"checkpoint\.pt: .*non-finite"),
    "a decoder of bytes": (lambda f: vae(f, lambda v: v.to(torch.int8)), r"checkpoint\.pt: .*of type int8"),
    "another autoencoder": (lambda f: torch.save({}, f / "vae" / "checkpoint.pt"), "missing or misshapen: decoder"),
    "levels": (lambda f: (f / "vae" / "config.json").write_text('{"ch_mult": 3}'), r"vae/config\.json: multipliers"),
    "a scale": (lambda f: (f / "vae" / "config.json").write_text('{"scaling_factor": 0}'), "scaling_factor = 0"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_files_are_named(folders: dict[str, Path], tmp_path: Path, broken: str, capfd: Any) -> None:
    folder = shutil.copytree(folders["1.1"], tmp_path / "broken")
    change, named = BROKEN[broken]
    change(folder)
    with pytest.raises(UsageError, match=named):
        bozzetto.load(folder, image_size=PIXELS)
    assert "boom" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"image_size": 40}, "image_size = 40x40 is not allowed: multiples of 16"),
        ({"image_size": 1024}, "4096 image tokens, the model's context is 512"),
        ({"sampler": "heun"}, "unknown sampler 'heun' (allowed: euler, flow-sde)"),
        ({"sampler": "euler:steps=0"}, "steps = 0"),
        ({"sampler": "euler:norm=2"}, "norm = 2 is not allowed: 0, 1"),
        ({"sampler": "flow-sde:last=0.1"}, "unknown option 'last'"),
        ({"device_map": "auto"}, "device_map = 'auto' is not allowed"),
    ],
)
def test_options_out_of_range_are_named(folders: dict[str, Path], options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        bozzetto.load(folders["1.1"], **{"image_size": PIXELS, **options})
    assert named in str(caught.value)


@pytest.mark.parametrize("option", ["--sampler=euler", "--vae=somewhere"])
def test_its_options_are_for_no_other_model(capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert main(["generate", "tulip", "--model", "flowers-flow", option]) == 2
    assert "it is for NextStep-1" in capsys.readouterr().err


def test_from_the_command_line(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "generate",
        TEXT,
        "--model",
        str(folders["1.1"]),
        "--vae",
        str(folders["1.1"] / "vae"),
        "--image-size",
        "32",
    ]
    options = ["--sampler", "euler:steps=3:norm=1", "--out", str(tmp_path / "out")]
    assert main([*asked, *options]) == 0
    assert "guidance 7.5" in (said := capsys.readouterr().out) and "3 steps" in said
    assert len(list((tmp_path / "out").glob("*.png"))) >= 1
