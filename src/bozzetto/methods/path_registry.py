"""The drafters and rules of continuous tokens by name; written as those of codes are (registry.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from bozzetto.drafters.base import Drafter, NoDrafter
from bozzetto.drafters.drift import DriftDrafter
from bozzetto.drafters.gaussian import GaussianDrafter
from bozzetto.drafters.jacobi import JacobiVectors
from bozzetto.drafters.masked_window import DraftWindow
from bozzetto.errors import UsageError
from bozzetto.methods.registry import DRAFTERS, RULES, filled, split_spec
from bozzetto.methods.registry import Plain as NoOptions
from bozzetto.rules.base import Rule
from bozzetto.rules.chains import Chains
from bozzetto.rules.cspd import Cspd
from bozzetto.rules.joint import Joint
from bozzetto.rules.path_block import PathBlock
from bozzetto.rules.pathwise import Pathwise
from bozzetto.rules.reflection import WIDEST, Coupled, Plain, Reflection
from bozzetto.targets.drift import DriftTarget
from bozzetto.targets.flow_cache import EulerSampler, FlowSdeSampler, FlowTarget


@dataclass(frozen=True)
class Window:
    """spread: deviation of a token around what the one above it says, which first drafts assume."""

    spread: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.spread <= WIDEST:
            raise UsageError(f"spread = {self.spread} is not allowed: a number above 0, {WIDEST} at most")


@dataclass(frozen=True)
class SmallerMasked:
    """For a masked model. folder: a model folder of a smaller one of the same tokens ("": the one that comes with the
    model); length: autoregressive steps that are drafted at a time; prefill: share of the steps that the target does
    alone at the beginning."""

    folder: str = ""
    length: int = 8
    prefill: float = 0.05

    def __post_init__(self) -> None:
        DraftWindow(self.length, self.prefill)  # raises UsageError


@dataclass(frozen=True)
class Sketch:
    """For a causal model. folder: of the trained drafter ("": the one that comes with the model); length: tokens
    drafted per pass; stop: an image's draft ends where it is reached with less than this chance (0: nowhere)."""

    folder: str = ""
    length: int = 2
    stop: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.length <= 64:
            raise UsageError(f"length = {self.length} is not allowed: a whole number from 1 to 64")
        if not 0 <= self.stop < 1:
            raise UsageError(f"stop = {self.stop:g} is not allowed: a number >= 0 (all of length) and < 1")


PATH_DRAFTERS: Mapping[str, type] = MappingProxyType(
    {"none": NoOptions, "model": SmallerMasked, "jacobi": Window, "sketch": Sketch}
)
PATH_RULES: Mapping[str, type[Rule]] = MappingProxyType(
    {rule.name: rule for rule in (Plain, Reflection, Coupled, Chains, Joint, PathBlock, Pathwise, Cspd)}
)
SAMPLERS: Mapping[str, type] = MappingProxyType({"euler": EulerSampler, "flow-sde": FlowSdeSampler})
ALONE = tuple(name for name, rule in PATH_RULES.items() if rule.alone)  # rules that need no drafter


def make_path_rule(spec: str) -> Rule:
    """A rule as written. Raises UsageError for an unknown name or option, or a value out of range."""
    name, options = split_spec(spec)
    if name not in PATH_RULES:
        raise UsageError(f"unknown rule {name!r} for continuous tokens (allowed: {', '.join(PATH_RULES)})")
    return filled(PATH_RULES[name], spec, options)


def make_sampler(spec: str) -> Any:
    """A sampler of a flow head as written. Raises UsageError as `make_path_rule`."""
    name, options = split_spec(spec)
    if name not in SAMPLERS:
        raise UsageError(f"unknown sampler {name!r} (allowed: {', '.join(SAMPLERS)})")
    return filled(SAMPLERS[name], spec, options)


def path_drafter_options(spec: str) -> tuple[str, Any]:
    """A drafter's name and options as written. Raises UsageError for an unknown name or option."""
    name, options = split_spec(spec)
    if name not in PATH_DRAFTERS:
        raise UsageError(f"unknown drafter {name!r} for continuous tokens (allowed: {', '.join(PATH_DRAFTERS)})")
    return name, filled(PATH_DRAFTERS[name], spec, options)


def make_path_drafter(
    spec: str, window: int, target: FlowTarget, sketcher: Callable[[str], Any] | None = None
) -> Drafter:
    """window: scored places per pass of a window drafter, >= 1; sketcher: loads the trained drafter of a folder ("":
    the target's own). Raises UsageError for an unknown name, and for a trained drafter where there is none."""
    name, options = path_drafter_options(spec)
    if name == "none":
        return NoDrafter(target.token_dim)
    schedule, device = target.schedule, target.device
    std = schedule.std.float().to(device)
    ancestry = schedule.ancestry(device)
    if name == "sketch":
        if sketcher is None:
            raise UsageError("drafter 'sketch' is not allowed here: no folder to load it from")
        if isinstance(target, DriftTarget):
            return DriftDrafter(sketcher(options.folder), options.length, target, options.stop)
        return GaussianDrafter(sketcher(options.folder), options.length, ancestry, std, target.token_dim, options.stop)
    if name != "jacobi":
        raise UsageError(f"drafter {spec!r} is for masked models (allowed here: none, jacobi, sketch)")
    return JacobiVectors(window, target.config.grid, target.token_dim, ancestry, std, options.spread)


def is_path_method(drafter: str, rule: str) -> bool:
    """Whether a method as written is one for continuous tokens. (`block` is a rule of both kinds: there the drafter
    tells.)"""
    name = split_spec(rule)[0]
    return name in PATH_RULES and not (name in RULES and split_spec(drafter)[0] in DRAFTERS)


def check_path_method(drafter: str, rule: str) -> None:
    """Raises UsageError where a drafter and a rule for continuous tokens, as written, do not go together."""
    name, options = path_drafter_options(drafter)
    made = make_path_rule(rule)
    if name == "none" and made.name not in ALONE:
        raise UsageError(f"rule {rule!r} verifies drafts, drafter 'none' makes none (allowed: {', '.join(ALONE)})")
    if name != "none" and made.name in ALONE:
        raise UsageError(f"rule {rule!r} needs no drafter: drafter {drafter!r} is not allowed, 'none' is")
    if name == "sketch" and options.stop and not (made.fixed_noise and not made.needs_law):
        fit = ", ".join(r for r, kind in PATH_RULES.items() if kind.fixed_noise and not kind.needs_law)
        raise UsageError(
            f"rule {rule!r} verifies drafts of one length: stop = {options.stop:g} is not allowed (0 is; or {fit})"
        )
    if name == "jacobi" and not made.window:
        fit = ", ".join(r for r, kind in PATH_RULES.items() if kind.window)
        raise UsageError(f"rule {rule!r} does not carry a window on, which drafter 'jacobi' needs (allowed: {fit})")
