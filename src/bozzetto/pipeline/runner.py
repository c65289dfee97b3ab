"""Who runs a model's network: we do (here), or another library (hosted.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from bozzetto.checkpoints.folders import CONFIG, TOKENIZER_CONFIG, TOKENIZER_WEIGHTS, read_config, tokenizer_weights
from bozzetto.checkpoints.weights import WEIGHTS
from bozzetto.common.files import digest
from bozzetto.common.images import Origin, to_picture
from bozzetto.runtime.graphs import AUTO
from bozzetto.runtime.native import kernels_compute


class Runner:
    """A network of ours, run by our kernels where that is asked for. name: the model's; target: has tokens,
    length, dtype and device; pictures: its tokenizer, with decode, config and encodes; folders: the model's, and others
    that say what it draws, as do `files`; network: reads what `target` was made from again;
    undecoded: why its tokens cannot become pictures here ("": they can)."""

    undecoded = ""

    def __init__(
        self,
        name: str,
        target: Any,
        pictures: Any,
        folders: Sequence[Path] = (),
        files: Sequence[Path] = (),
        network: Callable[[], Any] | None = None,
    ):
        self.name, self.target, self.pictures, self.network = name, target, pictures, network
        self.folders, self.files = folders, files
        self.own: Any = None  # the target run by our kernels, once that is asked for

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """See Pipeline.sizes."""
        return (self.pictures.config.size,)

    def in_size(self, size: tuple[int, int]) -> Any:
        """A pipeline of the same model for another size, None where there is none."""
        return None

    def mode(self, asked: str) -> str:
        """How passes are run, with `auto` replaced: by our kernels (max) where they compute, else by torch (off)."""
        if asked != AUTO:
            return asked
        ours = self.network is not None and kernels_compute(self.target.dtype, self.target.device)
        return "max" if ours else "off"

    def target_in(self, mode: str) -> Any:
        """The target with its passes run as asked."""
        if self.network is None:
            return self.target
        if self.mode(mode) == "off":
            _ = self.target.decoder  # laid out, so that copies with other samplers share it
            return self.target
        if self.own is None:
            self.own = self.target.owned(self.network())
        return self.own

    def targets(self) -> tuple[Any, ...]:
        """The target and its twins that are run otherwise."""
        return (self.target,) if self.own is None else (self.target, self.own)

    def fingerprint(self) -> str:
        """A digest of the model's files."""
        return digest(*(file for folder in self.folders for file in model_files(folder)), *self.files)

    def picture(self, tokens: Tensor, origin: Origin | None) -> Image.Image:
        """Tokens int64 [N] of an image -> its picture. origin: what it was drawn for, where that is known."""
        return to_picture(self.pictures.decode(tokens[None])[0])

    def codes_drawn(self, count: int) -> int:
        """How many cells of the grid the first `count` tokens fill."""
        return count


def model_files(folder: Path) -> list[Path]:
    """The files that say what a model draws; some models have the weights of their tokenizer from a folder beside."""
    names = (CONFIG, WEIGHTS, TOKENIZER_CONFIG, TOKENIZER_WEIGHTS)
    own = [folder / name for name in names if name in (CONFIG, WEIGHTS) or (folder / name).is_file()]
    pixels = tokenizer_weights(folder, read_config(folder, TOKENIZER_CONFIG)) if own[2:] else own[-1]
    return own if pixels in own else [*own, pixels]
