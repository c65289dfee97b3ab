"""Make the package importable from a checkout that is not installed; a model with random weights for every test."""

import importlib.util
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("bozzetto") is None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "src"))


def write_tiny_model(folder: Path) -> Path:
    """A model folder with random weights: 16 codes, 4 x 4 tokens, 32-pixel images, classes daisy, rose, tulip."""
    import torch

    from bozzetto.autoencoders.vq import VQConfig, VQTokenizer
    from bozzetto.models.llamagen import LlamaGen, LlamaGenConfig
    from bozzetto.models.store import save_llamagen

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = LlamaGen(LlamaGenConfig(dim=32, layers=2, heads=2, vocab=16, grid=4, classes=3))
        torch.nn.init.normal_(network.output.weight, std=0.5)
        tokenizer = VQTokenizer(VQConfig(codes=16, width=16, pre_blocks=1, post_blocks=1, image_size=32))
    save_llamagen(folder, network, tokenizer, {"name": "tiny", "class_names": ["daisy", "rose", "tulip"]})
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See write_tiny_model; shared by all tests, so copy it before changing it."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
