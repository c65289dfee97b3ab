"""The tiny autoencoder and the VQ tokenizer: shapes, ranges, strict loading, and the codebook update."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bozzetto.autoencoders.tiny import load_tiny, tiny_decoder, tiny_encoder
from bozzetto.autoencoders.vq import CodebookEMA, VQConfig, VQTokenizer
from bozzetto.errors import UsageError

CONFIG = VQConfig(codes=13, code_dim=4, width=8, pre_blocks=1, post_blocks=1, image_size=32)


@pytest.fixture(scope="module")
def tokenizer() -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(CONFIG).eval().requires_grad_(False)


@torch.no_grad()
def test_tiny_autoencoder_maps_eight_pixels_to_one_latent() -> None:
    latent = tiny_encoder()(torch.rand(2, 3, 16, 24))
    assert latent.shape == (2, 32, 2, 3)
    assert tiny_decoder()(latent).shape == (2, 3, 16, 24)


def test_tiny_autoencoder_loads_strictly(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="taef2_encoder"):
        load_tiny(tmp_path)
    encoder, decoder = tiny_encoder(), tiny_decoder()
    torch.save({k: v.half() for k, v in encoder.state_dict().items()}, tmp_path / "taef2_encoder.pth")
    state = decoder.state_dict()
    torch.save(state, tmp_path / "taef2_decoder.pth")
    assert {p.dtype for part in load_tiny(tmp_path) for p in part.parameters()} == {torch.float32}
    state.popitem()
    torch.save(state, tmp_path / "taef2_decoder.pth")
    with pytest.raises(UsageError, match="Missing"):
        load_tiny(tmp_path)


def test_encode_gives_one_code_in_range_per_latent(tokenizer: VQTokenizer) -> None:
    tokens = tokenizer.encode(torch.rand(2, 3, 32, 32))
    assert tokens.shape == (2, CONFIG.grid**2)
    assert tokens.dtype == torch.int64
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < CONFIG.codes


def test_decode_gives_an_image_in_range(tokenizer: VQTokenizer) -> None:
    images = tokenizer.decode(tokenizer.encode(torch.rand(2, 3, 32, 32)))
    assert images.shape == (2, 3, 32, 32)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1


def test_codes_are_laid_out_in_raster_order(tokenizer: VQTokenizer) -> None:
    grid = CONFIG.grid
    codes = torch.zeros(1, grid * grid, CONFIG.code_dim)
    codes[0, 1 * grid + 2] = 5.0  # row 1, column 2
    seen = []
    hook = tokenizer.post.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    latent = tokenizer.latent_of(codes)
    hook.remove()
    assert seen[0][0, 0].nonzero().tolist() == [[1, 2]]
    assert latent.shape == (1, 32, grid, grid)
    unit = tokenizer.features(torch.randn(1, 32, grid, grid))
    assert unit.shape == (1, grid * grid, CONFIG.code_dim)
    assert torch.allclose(unit.norm(dim=-1), torch.ones(1, grid * grid))


def test_nearest_is_the_code_itself_and_the_euclidean_nearest(tokenizer: VQTokenizer) -> None:
    assert torch.equal(tokenizer.nearest(tokenizer.codebook), torch.arange(CONFIG.codes))
    unit = torch.nn.functional.normalize(torch.randn(3, 7, CONFIG.code_dim), dim=-1)
    assert torch.equal(tokenizer.nearest(unit), torch.cdist(unit, tokenizer.codebook.expand(3, -1, -1)).argmin(-1))


def test_codebook_updates_keep_unit_rows_move_to_the_data_and_revive_dead_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    codebook = torch.nn.functional.normalize(torch.randn(6, 4, generator=generator), dim=-1)
    ema = CodebookEMA(codebook, decay=0.5)
    data = torch.nn.functional.normalize(torch.randn(64, 4, generator=generator), dim=-1)
    far = [float((data @ codebook.T).amax(1).mean())]
    assert ema.update(data, torch.zeros(64, dtype=torch.int64), generator) == 5  # only code 0 was used
    for _ in range(20):
        ema.update(data, (data @ codebook.T).argmax(1), generator)
        assert torch.allclose(codebook.norm(dim=1), torch.ones(6))
    far.append(float((data @ codebook.T).amax(1).mean()))
    assert far[1] > far[0]
    again = CodebookEMA(codebook.clone())
    again.load_state_dict(ema.state_dict())
    assert torch.equal(again.sum, ema.sum)
    assert torch.equal(again.count, ema.count)
