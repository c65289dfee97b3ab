"""Converting published LlamaGen checkpoints: every layout, size and condition; what does not fit leaves nothing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bozzetto import load
from bozzetto.autoencoders.llamagen_vq import LlamaGenVQConfig
from bozzetto.checkpoints.convert import check_out, convert_llamagen, recognise
from bozzetto.checkpoints.folders import load_target, load_tokenizer
from bozzetto.checkpoints.states import family_of
from bozzetto.errors import UsageError
from bozzetto.targets import llamagen
from bozzetto.targets.layers import rope_table
from bozzetto.targets.llamagen import LlamaGen, LlamaGenConfig, published_config
from test_llamagen_vq import published_shapes, published_state
from toys import tiny_llamagen

SHAPE = (32, 2, 2)  # a size of our own beside the published ones
PIXELS = LlamaGenVQConfig(codes=11, channels=32, multipliers=(1, 1, 1, 1, 2), blocks=1, latent=16)  # VQ-16
TALL = LlamaGenVQConfig(codes=11, channels=32, multipliers=(1, 1, 1, 1), blocks=1, latent=16)  # VQ-8


@pytest.fixture(autouse=True)
def size_t(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(llamagen.SHAPES, "T", SHAPE)


def network(captioned: bool = False, classes: int = 3) -> LlamaGen:
    extra = {"classes": 0, "condition_tokens": 5, "caption_dim": 6} if captioned else {"classes": classes}
    return tiny_llamagen(ffn_multiple=256, grid=16, **extra)


def positions(grid: int, condition_tokens: int = 1) -> Tensor:
    return rope_table(grid, LlamaGenConfig(*SHAPE).head_dim, lead=condition_tokens)


@pytest.fixture
def vq(tmp_path: Path) -> Path:
    torch.save({"model": published_state(PIXELS)}, tmp_path / "vq.pt")
    return tmp_path / "vq.pt"


def saved(path: Path, state: dict, wrapper: str | None = "model") -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({wrapper: state, "steps": 3, "args": argparse.Namespace(lr=1e-4)} if wrapper else state, path)
    return path


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


LAYOUTS = [
    ("model", "c2i.pt"),
    ("module", "c2i.pt"),
    ("state_dict", "c2i.pt"),
    (None, "c2i.pt"),
    (None, "c2i.safetensors"),
]


@pytest.mark.parametrize("ending", ["", ".done"])
def test_what_a_killed_conversion_left_is_swept_or_finished(ending: str, tmp_path: Path) -> None:
    left = tmp_path / f".bozzetto-0123abcd{ending}"
    left.mkdir()
    check_out(tmp_path)
    assert not left.exists()
    left.mkdir()
    (left / "config.json").write_text("{}")
    if ending:  # all was written: it is a model now, and not to be written over
        with pytest.raises(UsageError, match="not an empty folder"):
            check_out(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    else:
        check_out(tmp_path)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("wrapper", "name"), LAYOUTS)
def test_every_layout_gives_the_network(tmp_path: Path, vq: Path, wrapper: str | None, name: str) -> None:
    model = network()
    gpt = saved(tmp_path / name, dict(model.state_dict()), wrapper)
    told = convert_llamagen(gpt, vq, tmp_path / "out")
    folder = tmp_path / "out"
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.safetensors",
    }
    assert "LlamaGen-T (c2i, 3 classes) with VQ-16, 256 x 256 pixels (assumed; --image-size changes it)" in told
    assert config_of(folder)["class_names"] == ["0", "1", "2"]
    assert config_of(folder)["converted"] == {"size": "T", "condition": "c2i", "gpt": name, "vq": "vq.pt"}
    after = load_target(folder, "llamagen")
    assert after.config == LlamaGenConfig(*SHAPE, vocab=11, classes=3)
    for key, value in model.state_dict().items():
        assert torch.equal(after.state_dict()[key], value), key


def test_a_converted_model_draws_pictures(tmp_path: Path, vq: Path) -> None:
    gpt = saved(tmp_path / "c2i.pt", dict(network().state_dict()))
    (tmp_path / "names.txt").write_text("Daisy\nrose\ntulip\n")
    convert_llamagen(gpt, vq, tmp_path / "out", class_names=tmp_path / "names.txt")
    pipe = load(tmp_path / "out")
    assert pipe.classes == ["Daisy", "rose", "tulip"] and pipe.labels(["daisy"]) == [0]
    images = pipe.generate(["rose"], count=1).images
    assert images[0].image.size == (256, 256)
    assert images[0].tokens.shape == (256,)


def test_the_tokenizer_comes_back_with_unit_codes(tmp_path: Path, vq: Path) -> None:
    convert_llamagen(saved(tmp_path / "c2i.pt", dict(network().state_dict())), vq, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert content["kind"] == "vq-llamagen"
    stored = load_file(tmp_path / "out" / "tokenizer.safetensors")
    assert set(stored) == set(published_shapes(PIXELS)) - {"quantize.codebook_used"}
    tokenizer, state = load_tokenizer(tmp_path / "out"), published_state(PIXELS)
    assert tokenizer.config == PIXELS
    assert not tokenizer.training
    assert torch.allclose(tokenizer.codebook.norm(dim=1), torch.ones(11))
    for key, value in tokenizer.published_state().items():
        if key != "quantize.embedding.weight":
            assert torch.equal(value, state[key]), key


@pytest.mark.parametrize(
    ("name", "asked", "stored", "size", "how"),
    [
        ("c2i.pt", None, None, 256, "assumed"),
        ("c2i_B_384.pt", None, None, 384, "name"),
        ("t2i_XL_stage2_512.pt", None, None, 512, "name"),
        ("c2i_B_384.pt", 512, None, 512, "asked"),
        ("c2i_B_384.pt", None, 32, 512, "stored"),
        ("c2i.pt", 384, 24, 384, "stored"),
        ("run_2560.pt", None, None, 256, "assumed"),
    ],
)
def test_the_picture_size_is_stored_asked_or_named_and_said(
    tmp_path: Path, vq: Path, name: str, asked: int | None, stored: int | None, size: int, how: str
) -> None:
    state = dict(network().state_dict())
    if stored:
        state["freqs_cis"] = positions(stored)
    told = convert_llamagen(saved(tmp_path / name, state), vq, tmp_path / "out", asked)
    assert f"{size} x {size} pixels" in told
    assert how in told
    assert load_target(tmp_path / "out", "llamagen").config.grid == size // 16
    assert load_tokenizer(tmp_path / "out").config.image_size == size


def test_vq_8_gives_twice_the_grid(tmp_path: Path) -> None:
    vq = saved(tmp_path / "vq8.pt", published_state(TALL))
    told = convert_llamagen(saved(tmp_path / "c2i.pt", dict(network().state_dict())), vq, tmp_path / "out")
    assert "VQ-8" in told
    assert load_target(tmp_path / "out", "llamagen").config.grid == load_tokenizer(tmp_path / "out").config.grid == 32


def test_a_text_conditional_checkpoint_gives_a_captioned_network(tmp_path: Path, vq: Path) -> None:
    model = network(captioned=True)
    state = {**model.state_dict(), "freqs_cis": positions(24, condition_tokens=5)}
    told = convert_llamagen(saved(tmp_path / "t2i.pt", state, "module"), vq, tmp_path / "out")
    assert "LlamaGen-T (t2i, 5 text tokens)" in told
    after = load_target(tmp_path / "out", "llamagen")
    wanted = LlamaGenConfig(*SHAPE, vocab=11, grid=24, classes=0, condition_tokens=5, caption_dim=6)
    assert after.config == wanted
    assert config_of(tmp_path / "out")["class_names"] == []
    assert torch.equal(after.cls_embedding.uncond_embedding, model.cls_embedding.uncond_embedding)


# What does not fit: named, and nothing is written.

KEY = "layers.1.ffn_norm.weight"


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    state = {**network().state_dict(), **changes}
    return {key: value for key, value in state.items() if value is not None}


def a_gain(value: float) -> Tensor:
    return torch.full((32,), value)


BROKEN_GPT: dict[str, tuple[Callable[[], dict], str]] = {
    "a tokenizer": (
        lambda: published_state(PIXELS),
        r"--gpt must be a LlamaGen transformer.*VQ tokenizer; give .*--vq",
    ),
    "a drafter": (
        lambda: {"fc.weight": torch.zeros(2, 4), "layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)},
        "a drafter",
    ),
    "something else": (lambda: {"conv1.weight": torch.zeros(3)}, r"unknown network \(with 'conv1.weight'\)"),
    "nothing": (dict, "empty"),
    "a missing key": (lambda: changed(**{KEY: None}), f"missing key '{KEY}'"),
    "an unexpected key": (lambda: changed(**{"layers.1.bias": torch.zeros(1)}), "unexpected key 'layers.1.bias'"),
    "a wrong shape": (lambda: changed(**{KEY: torch.ones(31)}), rf"'{KEY}' has shape \(31,\), expected \(32,\)"),
    "a NaN": (lambda: changed(**{KEY: a_gain(torch.nan)}), f"'{KEY}' has non-finite"),
    "an infinity": (lambda: changed(**{KEY: a_gain(-torch.inf)}), f"'{KEY}' has non-finite"),
    "whole numbers": (lambda: changed(**{KEY: a_gain(1).long()}), f"'{KEY}' is of type int64"),
    "numbers of 8 bits": (lambda: changed(**{KEY: a_gain(1).to(torch.float8_e4m3fn)}), f"'{KEY}' is of type float8"),
    "complex numbers": (lambda: changed(**{KEY: a_gain(1).cfloat()}), f"'{KEY}' is of type complex64"),
    "a number too large": (
        lambda: changed(**{KEY: torch.full((32,), 1e39, dtype=torch.float64)}),
        f"'{KEY}'.*float32 cannot hold",
    ),
    "no matrix": (lambda: changed(**{"tok_embeddings.weight": torch.ones(11)}), "'tok_embeddings.weight' is no matrix"),
    "no table of classes": (
        lambda: changed(**{"cls_embedding.embedding_table.weight": torch.tensor(1.0)}),
        r"embedding_table.weight' has shape \(\)",
    ),
    "positions without a length": (
        lambda: changed(**{"freqs_cis": torch.tensor(1.0), KEY: None}),
        f"missing key '{KEY}'",
    ),
    "a sparse tensor": (lambda: changed(**{KEY: a_gain(1).to_sparse()}), f"'{KEY}' is no plain tensor"),
    "numbers without end": (
        lambda: changed(**{"tok_embeddings.weight": torch.ones(1).expand(2**40, 32)}),
        "'tok_embeddings.weight' has shape .* no room",
    ),
    "no tensors": (lambda: {"tok_embeddings.weight": 3}, "tok_embeddings.weight.*int"),
    "no condition": (lambda: changed(**{"cls_embedding.embedding_table.weight": None}), "cls_embedding"),
    "an unknown size": (
        lambda: dict(tiny_llamagen(layers=3).state_dict()),
        "no published size has 32 dim.* x 3 layers",
    ),
    "another vocabulary": (lambda: dict(tiny_llamagen(vocab=12, ffn_multiple=256).state_dict()), "12 tokens.*11 codes"),
}


@pytest.mark.parametrize("kind", BROKEN_GPT)
def test_a_transformer_that_does_not_fit_is_named_and_leaves_nothing(tmp_path: Path, vq: Path, kind: str) -> None:
    make, named = BROKEN_GPT[kind]
    gpt, before = saved(tmp_path / "gpt.pt", make()), {"gpt.pt", "vq.pt"}
    with pytest.raises(UsageError, match=named) as caught:
        convert_llamagen(gpt, vq, tmp_path / "deep" / "out")
    assert "gpt.pt" in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == before


def tokenizer_without(name: str, **changes: Tensor) -> dict[str, Tensor]:
    state = {**published_state(PIXELS), **changes}
    return {key: value for key, value in state.items() if not key.startswith(name)}


BROKEN_VQ: dict[str, tuple[Callable[[], dict], str]] = {
    "a transformer": (lambda: dict(network().state_dict()), r"--vq must be.*LlamaGen transformer; give it as --gpt"),
    "a tokenizer of another kind": (
        lambda: {f"{n}weight": torch.zeros(1) for n in ("pre.0.", "post.0.")} | {"codebook": torch.zeros(1)},
        "bozzetto tokenizer",
    ),
    "no encoder": (lambda: tokenizer_without("encoder."), "encoder"),
    "a missing key": (lambda: tokenizer_without("decoder.mid.1.q.bias"), "missing key 'decoder.mid.1.q.bias'"),
    "a NaN": (lambda: tokenizer_without("-", **{"post_quant_conv.bias": torch.full((16,), torch.nan)}), "non-finite"),
    "a number where a kernel belongs": (
        lambda: tokenizer_without("-", **{"encoder.conv_in.weight": torch.tensor(1.0)}),
        "missing or misshapen key",
    ),
    "no channels": (
        lambda: tokenizer_without("-", **{"encoder.conv_in.weight": torch.ones(0, 3, 3, 3)}),
        "missing or misshapen key",
    ),
}


@pytest.mark.parametrize("kind", BROKEN_VQ)
def test_a_tokenizer_that_does_not_fit_is_named_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    make, named = BROKEN_VQ[kind]
    gpt, vq = saved(tmp_path / "gpt.pt", dict(network().state_dict())), saved(tmp_path / "vq.pt", make())
    with pytest.raises(UsageError, match=named) as caught:
        convert_llamagen(gpt, vq, tmp_path / "out")
    assert "vq.pt" in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {"gpt.pt", "vq.pt"}


FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "an archive without its index": lambda data: data[:-200],
    "a pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
    "a page": lambda data: b"<!DOCTYPE html><html>not found</html>",
}


@pytest.mark.parametrize("name", ["c2i.pt", "c2i.safetensors"])
@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_is_named(tmp_path: Path, vq: Path, kind: str, name: str) -> None:
    gpt = saved(tmp_path / name, dict(network().state_dict()))
    gpt.write_bytes(FILES[kind](gpt.read_bytes()))
    with pytest.raises(UsageError, match=rf"{name}: not a checkpoint that can be read safely: [^\n]+$"):
        convert_llamagen(gpt, vq, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_is_found_where_the_file_has_checksums(tmp_path: Path, vq: Path) -> None:
    """torch 2.13 loads such a file without a word. Saved without checksums, a file has none to be wrong."""
    gpt = saved(tmp_path / "c2i.pt", {**network().state_dict(), "output.weight": torch.full((11, 32), 1.5)}, None)
    data = bytearray(gpt.read_bytes())
    data[data.index(torch.full((11, 32), 1.5).numpy().tobytes()) + 2] ^= 1
    gpt.write_bytes(data)
    assert not bool((torch.load(gpt, weights_only=True)["output.weight"] == 1.5).all())
    with pytest.raises(UsageError, match=r"c2i\.pt: not a checkpoint .* Bad CRC-32"):
        convert_llamagen(gpt, vq, tmp_path / "out")
    torch.serialization.set_crc32_options(False)
    try:
        saved(gpt, dict(network().state_dict()))
    finally:
        torch.serialization.set_crc32_options(True)
    convert_llamagen(gpt, vq, tmp_path / "out")


@pytest.mark.parametrize("content", [[1, 2], 3, {"model": [1]}, {"model": {"a": "b"}}, {3: torch.zeros(1)}])
def test_a_pickle_that_is_no_state_dict_is_named(tmp_path: Path, vq: Path, content: object) -> None:
    torch.save(content, tmp_path / "c2i.pt")
    with pytest.raises(UsageError, match=r"c2i\.pt: "):
        convert_llamagen(tmp_path / "c2i.pt", vq, tmp_path / "out")


def test_requests_that_cannot_be_met_are_refused(tmp_path: Path, vq: Path) -> None:
    gpt = saved(tmp_path / "c2i.pt", {**network().state_dict(), "freqs_cis": positions(24)})
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"image_size = 300.*256, 384, 512"):
        convert_llamagen(gpt, vq, out, 300)
    with pytest.raises(UsageError, match=r"image_size = 256.*384"):
        convert_llamagen(gpt, vq, out, 256)
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with pytest.raises(UsageError, match=r"names\.txt: 2 class names.*3 classes"):
        convert_llamagen(gpt, vq, out, class_names=tmp_path / "names.txt")
    with pytest.raises(UsageError, match=r"none\.pt"):
        convert_llamagen(tmp_path / "none.pt", vq, out)
    assert not out.exists()


def test_only_a_missing_or_empty_folder_is_written(tmp_path: Path, vq: Path) -> None:
    gpt, out = saved(tmp_path / "c2i.pt", dict(network().state_dict())), tmp_path / "out"
    out.mkdir()
    convert_llamagen(gpt, vq, out)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert len(before) == 4
    with pytest.raises(UsageError, match="not an empty folder"):
        convert_llamagen(gpt, vq, out)
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, vq: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*rest: object) -> None:
        raise OSError(28, "No space left on device")

    gpt = saved(tmp_path / "c2i.pt", dict(network().state_dict()))
    monkeypatch.setattr("bozzetto.checkpoints.convert.write_tokenizer", full)
    for out in (tmp_path / "new", tmp_path / "empty"):
        if out.name == "empty":
            out.mkdir()
        with pytest.raises(OSError, match="No space"):
            convert_llamagen(gpt, vq, out)
    assert {p.name for p in tmp_path.iterdir()} == {"c2i.pt", "vq.pt", "empty"}
    assert not list((tmp_path / "empty").iterdir())


# Published sizes.


@pytest.mark.parametrize("captioned", [False, True], ids=["c2i", "t2i"])
@pytest.mark.parametrize("size", [name for name in llamagen.SHAPES if name != "T"])
def test_every_published_size_is_recognised_by_its_shapes(size: str, captioned: bool) -> None:
    wanted = published_config(size, 24, captioned)
    with torch.device("meta"):
        state = LlamaGen(wanted).state_dict()
    assert family_of(state) == "a LlamaGen transformer"
    assert recognise(state, Path("x.pt"), 24) == (size, wanted)


def test_published_sizes_have_shapes_of_their_own() -> None:
    assert len({shape[:2] for shape in llamagen.SHAPES.values()}) == len(llamagen.SHAPES)


def test_a_checkpoint_of_full_shape_converts(tmp_path: Path) -> None:
    """Size B and VQ-16, 88 and 344 tensors, as they are published."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in LlamaGen(published_config("B")).state_dict().items()}
    assert len(shapes) == 88
    gpt = {key: torch.full(shape, n / 128, dtype=torch.bfloat16) for n, (key, shape) in enumerate(shapes.items())}
    pixels = {key: torch.ones(1).expand(shape) for key, shape in published_shapes(LlamaGenVQConfig()).items()}
    assert len(pixels) == 344
    paths = saved(tmp_path / "c2i_B_256.pt", gpt), saved(tmp_path / "vq_ds16_c2i.pt", pixels)
    told = convert_llamagen(*paths, tmp_path / "out")
    assert "LlamaGen-B (c2i, 1000 classes) with VQ-16, 256 x 256 pixels (by the file's name), 256 tokens" in told
    assert config_of(tmp_path / "out")["class_names"] == [str(n) for n in range(1000)]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(value.numel() for value in stored.values()) == 110_888_448
    for n, value in enumerate(stored[key] for key in gpt):
        assert value.shape == list(gpt.values())[n].shape
        assert float(value.flatten()[-1]) == n / 128
    tokenizer = load_tokenizer(tmp_path / "out")
    assert sum(value.numel() for value in tokenizer.state_dict().values()) == 71_883_403
    assert tokenizer.config == LlamaGenVQConfig()
