"""What loading takes: one copy of the weights in the type that runs, a layer at a time on the way there."""

from __future__ import annotations

import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bozzetto
from bozzetto.autoencoders.llamagen_vq import LlamaGenVQ, LlamaGenVQConfig
from bozzetto.checkpoints.folders import load_target, load_tokenizer, save_llamagen
from bozzetto.checkpoints.weights import Streamed, finite, read_weights
from bozzetto.errors import UsageError
from bozzetto.runtime.dense import Dense
from bozzetto.targets.llamagen import LlamaGen, LlamaGenConfig
from bozzetto.targets.llamagen_cache import LlamaGenTarget

CONFIG = LlamaGenConfig(dim=256, layers=4, heads=4, vocab=512, grid=4, classes=3)
PIXELS = LlamaGenVQConfig(codes=512, channels=32, multipliers=(1, 1, 1, 1, 2), blocks=1, latent=16, image_size=64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("memory") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, pixels = LlamaGen(CONFIG), LlamaGenVQ(PIXELS)
        torch.nn.init.normal_(network.output.weight, std=0.2)
    save_llamagen(made, network, pixels, {"name": "made", "class_names": ["a", "b", "c"]})
    return made


def held() -> int:
    """Bytes of all plain tensors that there are, shared ones once; tracing leaves others behind, which hold nothing."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter) and not t.is_meta]
    storages = {}
    for tensor in tensors:
        part = tensor.to_dense() if tensor.layout == torch._mkldnn else tensor  # type: ignore[attr-defined]
        storage = part.untyped_storage()
        storages[id(tensor) if part is not tensor else storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_loaded_model_is_its_weights_in_the_type_that_runs_and_little_more(folder: Path, dtype: torch.dtype) -> None:
    weights = sum(part.numel() for part in read_weights(folder / "model.safetensors").values()) * dtype.itemsize
    decoder = LlamaGenVQ(PIXELS)
    decoder.forget_encoder()
    weights += sum(part.numel() for part in decoder.state_dict().values()) * 4
    del decoder
    before = held()
    pipe = bozzetto.load(folder, dtype=str(dtype).removeprefix("torch."), device="cpu")
    pipe.generate(["a"], drafter="none", compile="off")
    pipe._schedulers.clear()  # caches are no weights
    assert held() - before < 1.15 * weights
    assert pipe.target.dtype == dtype


@pytest.mark.parametrize("mode", ["off", "max"])
def test_weights_are_held_once_whatever_shapes_are_asked_for(folder: Path, mode: str) -> None:
    """And in one form, as long as nobody asks for the other."""
    before, pipe = held(), bozzetto.load(folder, dtype="float32", device="cpu")
    weights = sum(part.numel() for part in read_weights(folder / "model.safetensors").values()) * 4
    pixels = sum(part.numel() for part in pipe.tokenizer.state_dict().values()) * 4
    assert held() - before < pixels + 0.2 * weights  # nothing is laid out yet
    for batch in (1, 2, 4, 8):
        for guidance in (1.0, 2.0):
            pipe.generate(["a"], count=batch, batch=batch, guidance=guidance, rule="exact", window=3, compile=mode)
    pipe._schedulers.clear()
    assert held() - before < pixels + 1.3 * weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_one_layer_lies_in_memory_before_it_is_laid_out(folder: Path, dtype: torch.dtype) -> None:
    network = load_target(folder, "llamagen", dtype=dtype)
    assert isinstance(network.layers, Streamed) and not [n for n, _ in network.named_parameters() if "layers" in n]
    gone: list[Any] = []
    for layer in network.layers:
        assert not [old for old in gone if old() is not None]
        assert layer.attention.wqkv.weight.dtype == dtype
        gone.append(weakref.ref(layer.attention))
        del layer
    assert len(gone) == len(network.layers) == CONFIG.layers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_target_as_from_the_whole_network(folder: Path, dtype: torch.dtype) -> None:
    ours, whole = (
        LlamaGenTarget(load_target(folder, "llamagen", dtype=dtype), dtype),
        LlamaGenTarget(load_target(folder, "llamagen"), dtype),
    )
    labels, inputs = torch.tensor([0, 2]), torch.tensor([[1, 2, 3], [4, 5, 6]])
    found = [t.begin(labels, True, 3).score(inputs, torch.tensor([0, 0])).logits for t in (ours, whole)]
    assert found[0] is not None and torch.equal(*found)
    assert torch.equal(ours.head, load_target(folder, "llamagen").output.weight.to(dtype))


def test_rows_of_a_map_come_back_from_the_processors_own_layout() -> None:
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(Dense(weight, None, dtype).rows(), weight.to(dtype)) for dtype in DTYPES)


def test_samplers_of_a_masked_model_share_its_weights(tiny_mar: Path) -> None:
    pipe = bozzetto.load(tiny_mar, dtype="bfloat16", device="cpu")
    settings = pipe.resolve(bozzetto.GenerateSettings(passes=5, steps=4, compile="off"))
    before = held()
    other = pipe.make_batch(settings).target
    assert other is not pipe.target and other.encoder is pipe.target.encoder and held() - before < 10_000


def test_a_published_tokenizer_is_read_without_the_half_that_encodes(folder: Path) -> None:
    whole, half = load_tokenizer(folder), load_tokenizer(folder, encoder=False)
    tokens = torch.arange(PIXELS.grid**2)[None]
    assert torch.equal(whole.decode(tokens), half.decode(tokens))
    assert not [name for name in half.state_dict() if name.startswith(("encoder", "quant_conv"))]


def test_what_compiles_reads_the_network_again(folder: Path) -> None:
    pipe = bozzetto.load(folder, device="cpu")
    plain, compiled = (pipe.generate(["a"], drafter="none", compile=mode).images[0] for mode in ("off", "default"))
    assert plain.sha256 == compiled.sha256 or plain.near_tie


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_are_not_finite_are_found(bad: float, dtype: torch.dtype) -> None:
    value = torch.ones(7, 5, dtype=dtype)
    assert finite(value) and finite(torch.ones(0)) and finite(torch.ones(2, dtype=torch.int64))
    value[3, 4] = bad
    assert not finite(value)


def test_weights_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"big": torch.tensor([1e6])}, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="'big' has non-finite values in float16"):
        read_weights(tmp_path / "w.safetensors", dtype=torch.float16)
