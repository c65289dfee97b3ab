"""Feature extractors: what a quality figure (Fréchet distance, precision, recall) sees of an image.

Figures of different extractors cannot be compared, so every extractor has a name, and every figure carries it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bozzetto.errors import UsageError
from bozzetto.evaluate.efficientnet import efficientnet_lite0, image_tensor

DEFAULT = "efficientnet-lite0"
_PROBE_SIDE = 128


class FeatureExtractor(Protocol):
    """Maps images to vectors; the same image gives the same vector in any batch, up to float rounding."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        ...

    def __call__(self, images: np.ndarray) -> Tensor:
        """uint8 images [B, H, W, 3] -> features, float32 [B, dim], without gradients."""
        ...


def features_of(
    extractor: FeatureExtractor,
    images: np.ndarray,
    batch: int = 64,
    progress: bool = False,
    desc: str = "features",
) -> np.ndarray:
    """Features of uint8 images [N, H, W, 3] as float32 [N, dim], `batch` images at a time; N may be 0.

    Raises UsageError for a batch below 1, for images of another type or shape, and for features that are not finite.
    """
    if batch < 1:
        raise UsageError(f"batch must be at least 1, not {batch}")
    if images.ndim != 4:
        raise UsageError(f"images must be uint8 [N, H, W, 3], found {images.dtype} {list(images.shape)}")
    features = np.empty((len(images), extractor.dim), dtype=np.float32)
    with tqdm(total=len(images), unit="image", desc=desc, disable=not progress) as bar, torch.no_grad():
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            features[start : start + len(part)] = extractor(part).numpy()
            bar.update(len(part))
    if len(odd := np.flatnonzero(~np.isfinite(features).all(axis=1))):
        raise UsageError(f"{extractor.name}: image {odd[0]} has features that are not finite")
    return features


def make_extractor(spec: str = DEFAULT) -> FeatureExtractor:
    """An extractor by name ("efficientnet-lite0") or by the path of a TorchScript file; see TorchScriptInception.

    Raises UsageError for anything else, and when the extractor's weights are missing or broken.
    """
    if spec == DEFAULT:
        return efficientnet_lite0()
    if Path(spec).is_file():
        return TorchScriptInception(spec)
    raise UsageError(f"unknown feature extractor {spec!r} (allowed: {DEFAULT!r}, or the path of a TorchScript file)")


class TorchScriptInception:
    """A user's own TorchScript file, as the widely used inception-2015-12-05.pt; runs on the CPU.

    Called as module(uint8 [B, 3, H, W], return_features=True) -> [B, D], or as module(images) where the file's forward
    takes no `return_features`. Resizing is the file's own business. A TorchScript file is a program: use one you trust.

    Raises UsageError for a file that is missing, is not TorchScript, or gives no [B, D] numbers for 128 x 128 images.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.name = f"Inception ({self.path.name})"
        self.module = _load_script(self.path)
        takes = any(argument.name == "return_features" for argument in self.module.forward.schema.arguments)
        self.options = {"return_features": True} if takes else {}
        # Two different images: a module that ignores the batch, or returns one vector, shows itself.
        probe = torch.arange(2 * 3 * _PROBE_SIDE**2).remainder(251).to(torch.uint8)
        with torch.no_grad():
            self.dim = self._run(probe.view(2, 3, _PROBE_SIDE, _PROBE_SIDE)).shape[1]

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Tensor:
        """uint8 images [B, H, W, 3] -> features, float32 [B, dim]; UsageError for any other array."""
        pixels = image_tensor(images).contiguous()
        return self._run(pixels).float() if len(pixels) else torch.empty(0, self.dim)

    def _run(self, x: Tensor) -> Tensor:
        try:
            out = self.module(x, **self.options)
        except Exception as error:  # the file's own code: RuntimeError, torch.jit.Error, whatever it raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise UsageError(f"{self.path}: fails for uint8 images {list(x.shape)}: {reason}") from error
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(x) or not out.is_floating_point():
            found = f"{out.dtype} {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise UsageError(f"{self.path}: gives {found} for {len(x)} images, expected floats [{len(x)}, D]")
        return out


def _load_script(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"feature extractor not found: {path}")
    with warnings.catch_warnings():
        # torch discourages writing TorchScript; reading the files that the field's figures rest on is the point here.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            module = torch.jit.load(str(path), map_location="cpu")
        except (RuntimeError, ValueError) as error:
            raise UsageError(f"{path}: not a TorchScript file: {str(error).splitlines()[0]}") from error
    return module.eval()
