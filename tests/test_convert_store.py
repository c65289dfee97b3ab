"""What converting keeps of a checkpoint's numbers: all, in their own types, unless another type is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bozzetto.autoencoders.llamagen_vq import LlamaGenVQConfig
from bozzetto.autoencoders.vq import VQConfig, VQTokenizer
from bozzetto.checkpoints.convert import convert_llamagen
from bozzetto.checkpoints.convert_drafter import convert_eagle
from bozzetto.checkpoints.convert_mar import convert_mar
from bozzetto.checkpoints.folders import load_target, load_tokenizer, save_llamagen
from bozzetto.cli.main import main
from bozzetto.errors import UsageError
from bozzetto.targets import llamagen, mar
from bozzetto.targets.llamagen import LlamaGenConfig
from test_convert import PIXELS, SHAPE, network
from test_convert_mar import MODEL as MAR_NET
from test_convert_mar import PIXELS as KL_PIXELS
from test_convert_mar import TINY as MAR_CONFIG
from test_convert_mar import TOKENS, SlowMAR
from test_eagle import tiny_eagle
from test_kl16 import published_state as kl16_state
from test_llamagen_vq import published_state as vq_state
from toys import tiny_llamagen

TYPES = [torch.float16, torch.bfloat16, torch.float32]
State = dict[str, Tensor]
types = pytest.mark.parametrize("dtype", TYPES, ids=["float16", "bfloat16", "float32"])


@pytest.fixture(autouse=True)
def sizes_t(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(llamagen.SHAPES, "T", SHAPE)
    shape = (MAR_CONFIG.dim, MAR_CONFIG.depth, MAR_CONFIG.heads, MAR_CONFIG.head_width, MAR_CONFIG.head_depth)
    monkeypatch.setitem(mar.SHAPES, "T", shape)


def cast(state: State, dtype: torch.dtype) -> State:
    return {key: value.to(dtype, copy=True) for key, value in state.items()}


def wide(state: State, dtype: torch.dtype) -> State:
    """With numbers at the ends of the type's range."""
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    state = cast(state, dtype)
    for value in state.values():
        value.flatten()[:2] = torch.tensor([-largest, smallest], dtype=dtype)[: value.numel()]
    return state


# All converters: a checkpoint of one type -> (the folder, file -> what of the checkpoint must be in it).

Change = Callable[[State], State]
Made = Callable[[Path, Change, str], dict[str, State]]


def made_llamagen(folder: Path, change: Change, store: str) -> dict[str, State]:
    gpt, vq = change(dict(network().state_dict())), change(vq_state(PIXELS))
    torch.save({"model": gpt}, folder / "gpt.pt")
    torch.save({"model": vq}, folder / "vq.pt")
    convert_llamagen(folder / "gpt.pt", folder / "vq.pt", folder / "out", store=store)
    vq.pop("quantize.codebook_used", None)
    return {"model": gpt, "tokenizer": vq}


def made_mar(folder: Path, change: Change, store: str) -> dict[str, State]:
    net, vae = change(dict(MAR_NET.state_dict())), change(kl16_state(KL_PIXELS))
    torch.save({"model_ema": net}, folder / "mar.pt")
    torch.save({"model": vae}, folder / "vae.pt")
    convert_mar(folder / "mar.pt", folder / "vae.pt", folder / "out", store=store)
    names = {"decoder.post_quant_conv.weight": "post_quant_conv.weight", "decoder.decoder.conv_in.bias": ""}
    return {"model": net, "tokenizer": {here: vae[there or "decoder.conv_in.bias"] for here, there in names.items()}}


def made_eagle(folder: Path, change: Change, store: str) -> dict[str, State]:
    pixels = VQTokenizer(VQConfig(codes=11, width=16, pre_blocks=1, post_blocks=1, image_size=32))
    save_llamagen(folder / "target", tiny_llamagen(), pixels, {"name": "tiny"})
    state = change(dict(tiny_eagle().state_dict()))
    torch.save(state, folder / "eagle.bin")
    convert_eagle(folder / "eagle.bin", folder / "target", folder / "out", store)
    return {"model": state}


CONVERTERS: dict[str, Made] = {"llamagen": made_llamagen, "mar": made_mar, "eagle": made_eagle}
converters = pytest.mark.parametrize("kind", CONVERTERS)


@types
@converters
def test_every_weight_keeps_its_type_and_its_bits(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    for name, wanted in CONVERTERS[kind](tmp_path, lambda state: wide(state, dtype), "own").items():
        stored = load_file(tmp_path / "out" / f"{name}.safetensors")
        for key, value in wanted.items():
            assert stored[key].dtype == dtype and torch.equal(stored[key], value), key


@pytest.mark.parametrize("store", ["float16", "bfloat16", "float32"])
@converters
def test_another_type_can_be_asked_for(tmp_path: Path, kind: str, store: str) -> None:
    dtype = getattr(torch, store)
    for name, wanted in CONVERTERS[kind](tmp_path, lambda state: cast(state, torch.float32), store).items():
        stored = load_file(tmp_path / "out" / f"{name}.safetensors")
        assert {value.dtype for value in stored.values()} == {dtype}
        for key, value in wanted.items():
            assert torch.equal(stored[key], value.to(dtype)), key


@converters
def test_numbers_that_the_wanted_type_cannot_hold_are_refused_only_then(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UsageError, match=r"\.(pt|bin): weight '.*' has values that float16 cannot hold .*--store"):
        CONVERTERS[kind](tmp_path, lambda state: wide(state, torch.bfloat16), "float16")
    assert not (tmp_path / "out").exists()


def test_tied_weights_are_kept_apart(tmp_path: Path) -> None:
    """A torch pickle of tied weights holds them once; safetensors 0.8 refuses to write tensors that share memory."""

    def tie(state: State) -> State:
        return state | {key: state["tok_embeddings.weight"] for key in ("output.weight",) if key in state}

    made = made_llamagen(tmp_path, tie, "own")["model"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["output.weight"], made["tok_embeddings.weight"])


def test_a_file_of_several_types_keeps_each(tmp_path: Path) -> None:
    """float64 becomes float32, which is what everything here computes in at most."""
    state = dict(network().state_dict())
    kinds = [*TYPES, torch.float64]
    mixed = {key: value.to(kinds[n % 4]) for n, (key, value) in enumerate(state.items())}
    torch.save(mixed, tmp_path / "gpt.pt")
    torch.save(vq_state(PIXELS), tmp_path / "vq.pt")
    told = convert_llamagen(tmp_path / "gpt.pt", tmp_path / "vq.pt", tmp_path / "out")
    assert "weights as bfloat16 and float16 and float32" in told
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for key, value in mixed.items():
        kind = torch.float32 if value.dtype == torch.float64 else value.dtype
        assert stored[key].dtype == kind and torch.equal(stored[key], value.to(kind)), key


def test_the_command_line_takes_the_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(dict(network().state_dict()), tmp_path / "gpt.pt")
    torch.save(vq_state(PIXELS), tmp_path / "vq.pt")
    for store in ("own", "bfloat16"):
        out = tmp_path / store
        words = ["convert", "llamagen", "--gpt", tmp_path / "gpt.pt", "--vq", tmp_path / "vq.pt", "--out", out]
        assert main([*map(str, words), "--store", store]) == 0
        assert f"weights as {'float32' if store == 'own' else store}: {out}" in capsys.readouterr().out
        assert load_tokenizer(out).codebook.dtype == torch.float32


def test_a_full_disk_is_no_traceback_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """safetensors 0.8 raises its own SafetensorError for a full disk."""

    def full(*given: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    torch.save(dict(network().state_dict()), tmp_path / "gpt.pt")
    torch.save(vq_state(PIXELS), tmp_path / "vq.pt")
    monkeypatch.setattr("bozzetto.checkpoints.weights.save_file", full)
    words = ["convert", "llamagen", "--gpt", tmp_path / "gpt.pt", "--vq", tmp_path / "vq.pt", "--out", tmp_path / "out"]
    assert main([str(word) for word in words]) == 2
    assert "No space left" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"gpt.pt", "vq.pt"}


# Against the published description, written out anew: whole sequences, numbers with an imaginary part.


def described(state: State, config: LlamaGenConfig, label: int, tokens: Tensor) -> Tensor:
    """Logits [N + 1, V] of a class-conditional LlamaGen, by float64. tokens: int64 [N]."""
    w = {key: value.double() for key, value in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]

    size, grid = config.dim // config.heads, config.grid
    rates = 10000.0 ** (-torch.arange(size // 4, dtype=torch.float64) * 4 / size)
    cell = torch.arange(len(tokens))
    angles = torch.cat([(cell // grid)[:, None] * rates, (cell % grid)[:, None] * rates], 1)  # [N, size/2]
    turn = torch.cat([torch.zeros(1, size // 2), torch.polar(torch.ones_like(angles), angles)])[:, None]

    def turned(x: Tensor) -> Tensor:
        return torch.view_as_complex(x.unflatten(-1, (config.heads, size // 2, 2)).contiguous()) * turn

    x = torch.cat([w["cls_embedding.embedding_table.weight"][label][None], w["tok_embeddings.weight"][tokens]])
    later = torch.ones(len(x), len(x)).triu(1).bool()
    for n in range(config.layers):
        q, k, v = (norm(x, f"layers.{n}.attention_norm") @ w[f"layers.{n}.attention.wqkv.weight"].t()).chunk(3, -1)
        scores = torch.einsum("qhc,khc->hqk", turned(q), turned(k).conj()).real / math.sqrt(size)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khc->qhc", weights, v.unflatten(-1, (config.heads, size))).flatten(1)
        x = x + mixed @ w[f"layers.{n}.attention.wo.weight"].t()
        h = norm(x, f"layers.{n}.ffn_norm")
        gate, up = (h @ w[f"layers.{n}.feed_forward.{name}.weight"].t() for name in ("w1", "w3"))
        x = x + (gate * gate.sigmoid() * up) @ w[f"layers.{n}.feed_forward.w2.weight"].t()
    return norm(x, "norm") @ w["output.weight"].t()


def random_state(config: LlamaGenConfig) -> State:
    """float32, as large as training leaves them."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in llamagen.LlamaGen(config).state_dict().items()}
    draw = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return {key: 1 + 0.1 * x if x.ndim == 1 else x / math.sqrt(config.dim) for key, x in draw.items()}


@pytest.mark.parametrize("size", ["T", "B"])
def test_a_float32_checkpoint_gives_the_described_logits_to_1e_5(tmp_path: Path, size: str) -> None:
    """Rounded to float16 they are off by 1e-3 and more."""
    classes, codes = (1000, 16384) if size == "B" else (3, 11)
    dim, layers, heads = llamagen.SHAPES[size][:3]
    config = LlamaGenConfig(dim, layers, heads, vocab=codes, grid=16, classes=classes)
    state, pixels = random_state(config), LlamaGenVQConfig(**{**vars(PIXELS), "codes": codes})
    torch.save({"model": state}, tmp_path / "gpt.pt")
    torch.save({"model": vq_state(pixels)}, tmp_path / "vq.pt")
    convert_llamagen(tmp_path / "gpt.pt", tmp_path / "vq.pt", tmp_path / "out")
    net = load_target(tmp_path / "out", "llamagen")
    assert net.config == config
    tokens = torch.randint(codes, (20,), generator=torch.Generator().manual_seed(1))  # more than a row of the grid
    wanted = described(state, config, 2, tokens)
    found = net(torch.tensor([2]), tokens[None])[0].double()
    assert float((found - wanted).abs().max()) < 1e-5
    assert 0.5 < float(wanted.std()) < 3


def test_a_float32_mar_gives_the_described_conditions_to_1e_5(tmp_path: Path) -> None:
    torch.save(dict(MAR_NET.state_dict()), tmp_path / "mar.pt")
    torch.save(kl16_state(KL_PIXELS), tmp_path / "vae.pt")
    convert_mar(tmp_path / "mar.pt", tmp_path / "vae.pt", tmp_path / "out")
    net, known = load_target(tmp_path / "out", "flow", "mar"), [4, 0, 7]
    found = net.features(torch.tensor([1]), TOKENS[:1], torch.tensor([known]))[0].double()
    assert float((found - SlowMAR(MAR_NET).features(1, TOKENS[0], known)).abs().max()) < 1e-5
