"""How to load a model: one frozen dataclass that every verb, the server and `bozzetto.load` fill."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from bozzetto.common.options import LoadOptions
from bozzetto.errors import UsageError, brief, check_text, require

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"
MAPS = ("", "auto", "balanced", "sequential")


@dataclass(frozen=True)
class LoadSettings(LoadOptions):
    """How to load a model; device `auto` becomes the device here. Raises UsageError for an unknown dtype or map, for a
    device that is not there, and for what is no size."""

    def __post_init__(self) -> None:
        if self.dtype not in (AUTO, *DTYPES):
            raise UsageError(f"unknown dtype {brief(self.dtype)} (allowed: {', '.join((AUTO, *DTYPES))})")
        require(self.device_map in MAPS, "device_map", self.device_map, ", ".join(name for name in MAPS if name))
        size_of(self.image_size)
        check_text("device", self.device)
        if self.device == AUTO:
            object.__setattr__(self, "device", best_device())
        _check_device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of settings that `for_weights` gave."""
        return DTYPES[self.dtype]

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height that are asked for, in pixels; None: the model's usual ones."""
        return size_of(self.image_size)

    @property
    def on_cpu(self) -> bool:
        """Whether the passes run on a processor only."""
        return torch.device(self.device).type == "cpu" and not (self.device_map and torch.cuda.is_available())

    def refuse(self, why: str, *names: str) -> None:
        """Raise UsageError where one of these options is given, which means nothing to a model."""
        for name in names:
            require(not getattr(self, name), name, str(getattr(self, name)), why)

    def for_weights(self, stored: Callable[[], str], here: Callable[[], str] = lambda: "float32") -> LoadSettings:
        """With dtype `auto` replaced. stored, here: tell the type of the weights in their files, and the one that is
        taken on a processor."""
        if self.dtype != AUTO:
            return self
        own = here() if self.on_cpu else stored()
        return replace(self, dtype=own if own in DTYPES else "float32")


def gpus_of(loading: LoadSettings) -> int:
    """GPUs that one worker of Ray needs, which shows it those and no others. Raises UsageError for one of several by
    number, since which ones a worker gets is Ray's to say."""
    device = torch.device(loading.device)
    if device.type != "cuda":
        return 0
    if device.index is not None or loading.device_map:
        asked = "device_map" if loading.device_map else f"device = {loading.device!r}"
        raise UsageError(f"{asked} is not allowed with Ray, which gives each worker a GPU of its own: cuda")
    return 1


def check_gpus(wanted: int, asked: str, there: Mapping[str, float]) -> None:
    """Raise UsageError where a Ray cluster has fewer GPUs than are wanted: it would wait for them forever."""
    have = int(there.get("GPU", 0))
    if wanted > have:
        raise UsageError(f"{asked} is not allowed: {wanted} GPUs are needed, one each, and the cluster has {have}")


def best_device() -> str:
    """What `auto` means here."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return "cuda" if count else "cpu"
    rank = os.environ.get("LOCAL_RANK", "")
    return f"cuda:{int(rank) % count}" if rank.isdecimal() else "cuda"


def _check_device(name: str) -> None:
    try:  # seeds are drawn in float64, which not every device computes with (mps)
        torch.zeros(1, dtype=torch.float64, device=name).item()  # meta has no numbers
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        here = ", ".join((AUTO, "cpu", *(f"cuda:{i}" for i in range(count))))
        raise UsageError(f"device {brief(name)} is not available here (there is: {here}): {reason}") from error


def size_of(asked: int | str) -> tuple[int, int] | None:
    """(width, height) of `512` or `512x768`; None for 0. Raises UsageError for anything else."""
    found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", str(asked), re.ASCII)
    if not found or (found[2] and not (int(found[1]) and int(found[2]))):
        raise UsageError(f"image_size = {brief(asked)} is not allowed: pixels per side, or WIDTHxHEIGHT")
    width = int(found[1])
    return (width, int(found[2] or width)) if width else None


def written(size: tuple[int, int]) -> str:
    """WIDTHxHEIGHT, as sizes are asked for."""
    return f"{size[0]}x{size[1]}"


def refuse_flow_options(wanted: LoadSettings, name: str) -> None:
    """Raise UsageError where what is for NextStep-1 alone was asked of another model."""
    for option in ("vae", "sampler"):
        if value := getattr(wanted, option):
            raise UsageError(f"{option} = {value!r} is not allowed here: it is for NextStep-1, {name} is another model")
