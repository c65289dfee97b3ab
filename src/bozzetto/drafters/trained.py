"""The trained draft models of codes by name. A new one is its file in this room, a row here and one in
train/families.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from bozzetto.drafters.base import DraftModel
from bozzetto.drafters.eagle import CachedEagle, EagleConfig, EagleNet
from bozzetto.drafters.glance import CachedGlance, GlanceConfig, GlanceFill, GlanceNet
from bozzetto.drafters.parallel import BlockConfig, BlockNet, CachedBlock, CachedPlane, PlaneConfig, PlaneNet


class TrainedKind(NamedTuple):
    """config: of a network; net: what is trained; cached: the draft model of a network and a target; shape: fields of
    the config that are the target's own; fused: the same as a part of a fused step (None: it cannot be one)."""

    config: type
    net: type[nn.Module]
    cached: Callable[[Any, Any], DraftModel]
    shape: tuple[str, ...]
    fused: Any = None


_TOKENS, _LAYER = ("dim", "vocab", "grid"), ("dim", "heads", "ffn", "vocab", "grid", "rope_base")
TRAINED: Mapping[str, TrainedKind] = MappingProxyType(
    {
        "eagle": TrainedKind(EagleConfig, EagleNet, CachedEagle.of, _LAYER),
        "plane": TrainedKind(PlaneConfig, PlaneNet, CachedPlane.of, _TOKENS),
        "block": TrainedKind(BlockConfig, BlockNet, CachedBlock.of, _LAYER),
        "glance": TrainedKind(GlanceConfig, GlanceNet, CachedGlance.of, _TOKENS, GlanceFill),
    }
)


def new_net(name: str, target: Any, options: Mapping[str, Any]) -> Any:
    """An untrained network for a target's config. options: by name, of which it takes those that it has."""
    kind = TRAINED[name]
    shape = {field: getattr(target, field) for field in kind.shape}
    own = {field.name for field in fields(kind.config)} - set(shape)
    return kind.net(kind.config(**shape, **{key: value for key, value in options.items() if key in own}))


def family_of(net: nn.Module) -> str:
    """The name of a network's kind."""
    return next(name for name, kind in TRAINED.items() if isinstance(net, kind.net))
