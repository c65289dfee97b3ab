"""Make the package importable from a checkout that is not installed; a model with random weights for every test."""

import contextlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Models this small gain nothing from a second thread, which burns a processor waiting; other workers need it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if importlib.util.find_spec("bozzetto") is None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "src"))


@pytest.fixture(scope="session", autouse=True)
def compiled_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests compile is not kept beside what the user compiled; all workers of pytest-xdist share it. The kernels
    are there from the beginning, so that no test's output depends on which one came first."""
    from bozzetto.errors import UsageError
    from bozzetto.runtime.kept import cache_folder
    from bozzetto.runtime.native import load_kernels

    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "graphs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BOZZETTO_CACHE", str(folder))
        with contextlib.suppress(UsageError):  # a machine without a compiler
            load_kernels(cache_folder())
        yield


@pytest.fixture
def small_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sheets of samples in training hold one picture of each class: drawing them is most of a tiny run's time."""
    from bozzetto.train.fit import sample_sheet

    monkeypatch.setattr(sample_sheet, "__defaults__", (1, *sample_sheet.__defaults__[1:]))


def write_tiny_model(folder: Path) -> Path:
    """A model folder with random weights: 16 codes, 4 x 4 tokens, 32-pixel images, classes daisy, rose, tulip."""
    import torch

    from bozzetto.autoencoders.vq import VQConfig, VQTokenizer
    from bozzetto.checkpoints.folders import save_llamagen
    from bozzetto.targets.llamagen import LlamaGen, LlamaGenConfig

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


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of five coloured gradients each."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("blue", "red"):
        (folder / name).mkdir()
        for i in range(5):
            ramp = np.linspace(0, 255, 40)[None, :, None] * rng.random((40, 1, 3))
            Image.fromarray(ramp.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def blooms(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures under names of the tiny models' classes, daisy and rose."""
    folder = tmp_path_factory.mktemp("blooms")
    for ours, theirs in (("blue", "daisy"), ("red", "rose")):
        shutil.copytree(pictures / ours, folder / theirs)
    return folder


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tiny autoencoder of random weights."""
    import torch

    from bozzetto.autoencoders.tiny import tiny_decoder, tiny_encoder

    folder = tmp_path_factory.mktemp("tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(tiny_encoder().state_dict(), folder / "taef2_encoder.pth")
        torch.save(tiny_decoder().state_dict(), folder / "taef2_decoder.pth")
    return folder


def write_tiny_vectors(folder: Path, family: str) -> Path:
    """A model folder of family flow or mar with random weights: 4 x 4 tokens of 32 numbers, 32-pixel images, classes
    daisy, rose, tulip; 6 denoising steps, for mar 16 passes."""
    import dataclasses

    import torch

    from bozzetto.autoencoders.latents import TINY, tiny_latents
    from bozzetto.checkpoints.folders import write_model, write_tokenizer
    from bozzetto.targets.flow import FlowConfig, FlowModel
    from bozzetto.targets.flow_cache import FlowSampler
    from bozzetto.targets.mar import MAR, MARConfig
    from bozzetto.targets.mar_target import MARSampler

    shape = {"grid": 4, "classes": 3, "head_width": 32, "head_depth": 2, "token_dim": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "flow":
            network, sampler = FlowModel(FlowConfig(32, 2, 2, ffn_multiple=16, **shape)), FlowSampler(steps=6)
        else:
            network = MAR(MARConfig(dim=32, depth=2, heads=2, buffer=4, **shape))
            sampler = MARSampler(steps=6, passes=16, noisiest=970)
        for name, weight in network.named_parameters():
            if weight.ndim > 1 and "pos" not in name:
                torch.nn.init.normal_(weight, std=0.2 if family == "flow" else 0.05)
        latents = tiny_latents(32)
    notes = {
        "name": f"tiny-{family}",
        "class_names": ["daisy", "rose", "tulip"],
        "sampler": dataclasses.asdict(sampler),
    }
    write_model(folder, family, network.config, network.state_dict(), notes)
    write_tokenizer(folder, TINY, latents.config, latents.state_dict(), {})
    return folder


@pytest.fixture(scope="session")
def tiny_flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See write_tiny_vectors; shared by all tests."""
    return write_tiny_vectors(tmp_path_factory.mktemp("models") / "tiny-flow", "flow")


@pytest.fixture(scope="session")
def tiny_mar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See write_tiny_vectors; shared by all tests."""
    return write_tiny_vectors(tmp_path_factory.mktemp("models") / "tiny-mar", "mar")
