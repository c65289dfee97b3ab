"""The drafters and rules by name, with their options. Immutable tables; nothing registers itself.

A drafter or rule is written NAME or NAME:key=value:key=value, a method DRAFTER/RULE:
`eagle:tree=dynamic/lantern:k=500`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Protocol

from bozzetto.drafters.base import Drafter, DraftModel, NoDrafter
from bozzetto.drafters.jacobi import FilledJacobi, Jacobi, SecondGuess
from bozzetto.drafters.trained import TRAINED
from bozzetto.drafters.tree import Dynamic, Shape, TreeDrafter
from bozzetto.drafts.tree import SHAPES
from bozzetto.errors import UsageError, brief
from bozzetto.rules.base import Rule
from bozzetto.rules.cascade import Cascade
from bozzetto.rules.exact import Exact
from bozzetto.rules.lantern import Lantern, LanternPlusPlus
from bozzetto.rules.relaxed import Annealed, Grouped
from bozzetto.rules.seed_exact import SeedExact
from bozzetto.rules.traversal import Block, Traversal
from bozzetto.rules.tree import TreeRejection

Widen = Callable[[int], int]
MOST_NODES = 128
_LONGEST_SHAPE = 300  # characters of a tree that the cache holds


class Workshop(Protocol):
    """What a tree drafter is made from; a pipeline has it."""

    def trained(self, name: str, folder: str) -> DraftModel:
        """The trained drafter of a kind in a folder ("": the one that ships with the model)."""
        ...

    def smaller(self, folder: str) -> DraftModel:
        """A smaller target in a model folder."""
        ...


@dataclass(frozen=True)
class Plain:
    """A drafter without options."""


@dataclass(frozen=True)
class Window:
    """fill: the trained drafter (one of TRAINED) that fills the slots which enter the window, empty for a copy of the
    window's last law; fresh: drafts at the head of the window that it fills in every pass; second: the trained drafter
    that guesses a second token beside the window's at its first `places` places, empty for none, and goes on from it
    for `reach` tokens in all; folder: where that drafter lies, empty for the model's own."""

    fill: str = ""
    fresh: int = 0
    second: str = ""
    places: int = 8
    reach: int = 1
    folder: str = ""

    def __post_init__(self) -> None:
        for name in ("fill", "second"):
            if (value := getattr(self, name)) and value not in TRAINED:
                raise UsageError(f"{name} = {value!r} is not allowed: {', '.join(TRAINED)}")
        if self.fill and self.second:
            raise UsageError(f"second = {self.second!r} is not allowed with fill = {self.fill!r}: one of them")
        if not 0 <= self.fresh <= (MOST_NODES if self.fill else 0):
            most = f"a whole number from 0 to {MOST_NODES}" if self.fill else "0 without fill"
            raise UsageError(f"fresh = {self.fresh} is not allowed: {most}")
        for name in ("places", "reach"):
            if not 1 <= (value := getattr(self, name)) <= MOST_NODES:
                raise UsageError(f"{name} = {value} is not allowed: a whole number from 1 to {MOST_NODES}")
        if (nodes := self.places * self.reach) > MOST_NODES:
            raise UsageError(
                f"places = {self.places} with reach = {self.reach} is not allowed: {nodes} nodes, the cache holds "
                f"{MOST_NODES} at most"
            )

    @property
    def trained(self) -> str:
        """The trained drafter that is used, if any."""
        return self.fill or self.second


@dataclass(frozen=True)
class Trained:
    """tree: shape (see `read_shape`); folder: of the trained drafter, empty for the model's own; stop: nothing is
    drafted below a node that is reached with less than this chance (drafters/early_stop.py; 0: the whole tree)."""

    tree: str = "chain-5"
    folder: str = ""
    stop: float = 0.0

    def __post_init__(self) -> None:
        _check_stop(self.stop, read_shape(self.tree))


@dataclass(frozen=True)
class Smaller:
    """folder: a model folder of a smaller target with the same tokenizer; tree, stop: as of a trained one."""

    folder: str = field()
    tree: str = "chain-4"
    stop: float = 0.0

    def __post_init__(self) -> None:
        _check_stop(self.stop, read_shape(self.tree))


TREES = (*TRAINED, "model")
DRAFTERS: Mapping[str, type] = MappingProxyType(
    {"none": Plain, "jacobi": Window, **dict.fromkeys(TRAINED, Trained), "model": Smaller}
)
RULES: Mapping[str, type[Rule]] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            SeedExact,
            Exact,
            TreeRejection,
            Traversal,
            Block,
            Lantern,
            LanternPlusPlus,
            Grouped,
            Annealed,
            Cascade,
        )
    }
)
# Options that are not spelled like the fields, and fields that are not options.
_SPELLING = {"lambda": "lam"}
_HIDDEN = {"lantern": {"neighbours"}, "lantern++": {"neighbours", "delta"}}


def split_spec(text: str) -> tuple[str, dict[str, str]]:
    """NAME:key=value:... -> name and options, all strings. Raises UsageError for an option without a value."""
    name, *parts = text.split(":")
    options = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key or not value:
            raise UsageError(f"{text!r}: {part!r} is not allowed: options are written key=value and joined by colons")
        options[key] = value
    return name, options


def split_method(method: str) -> tuple[str, str]:
    """DRAFTER/RULE -> drafter and rule as written; a drafter alone goes with seed-exact, auto with auto."""
    if method == "auto":
        return method, method
    drafter, slash, rule = method.rpartition("/")
    if not slash:
        return method, SeedExact.name
    if not rule or not drafter:
        raise UsageError(f"unknown method {method!r} (allowed: none, or DRAFTER/RULE such as jacobi/exact)")
    return drafter, rule


def filled(kind: type, text: str, options: Mapping[str, str], hidden: frozenset[str] | set[str] = frozenset()) -> Any:
    """An options dataclass from strings. Raises UsageError naming the option and what is allowed."""
    spelled = {v: k for k, v in _SPELLING.items()}
    allowed = {spelled.get(f.name, f.name): f for f in fields(kind) if f.name not in hidden}
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in allowed:
            raise UsageError(f"{text!r}: unknown option {key!r} (allowed: {', '.join(allowed) or 'none'})")
        wanted = {"int": int, "float": float}.get(str(allowed[key].type), str)
        try:
            values[allowed[key].name] = wanted(value)
        except ValueError as error:
            number = "a whole number" if wanted is int else "a number"
            raise UsageError(f"{brief(text)}: {key} = {brief(value)} is not allowed: {number}") from error
    for name, part in allowed.items():
        if part.default is MISSING and part.name not in values:
            raise UsageError(f"{text!r}: option {name!r} is missing")
    return kind(**values)


def make_rule(spec: str) -> Rule:
    """A rule as written. Raises UsageError for an unknown name or option, or a value out of range."""
    name, options = split_spec(spec)
    if name not in RULES:
        raise UsageError(f"unknown rule {name!r} (allowed: {', '.join(RULES)})")
    return filled(RULES[name], spec, options, _HIDDEN.get(name, frozenset()))


def drafter_options(spec: str) -> tuple[str, Any]:
    """A drafter's name and options as written. Raises UsageError for an unknown name or option."""
    name, options = split_spec(spec)
    if name not in DRAFTERS:
        raise UsageError(f"unknown drafter {name!r} (allowed: {', '.join(DRAFTERS)})")
    return name, filled(DRAFTERS[name], spec, options)


def make_drafter(spec: str, window: int = 1, widen: Widen | None = None, workshop: Workshop | None = None) -> Drafter:
    """window: scored positions per pass of a window drafter, >= 1; widen: the window for a number of images, where it
    may change as images finish; workshop: where tree drafters come from. Raises UsageError for an unknown name."""
    name, options = drafter_options(spec)
    if name == "none":
        return NoDrafter()
    if name == "jacobi" and not options.trained:
        return Jacobi(window, widen)
    if workshop is None:
        raise ValueError(f"drafter {name!r} needs a workshop")
    if name == "jacobi":
        sketcher = workshop.trained(options.trained, options.folder)
        if options.second:
            return SecondGuess(window, sketcher, options.places, options.reach, widen)
        return FilledJacobi(window, sketcher, options.fresh, widen)
    sketcher = workshop.smaller(options.folder) if name == "model" else workshop.trained(name, options.folder)
    return TreeDrafter(name, sketcher, read_shape(options.tree), options.stop)


def read_shape(text: str) -> Shape | Dynamic:
    """A tree as written: a published name; `chain-L`; `AxBxC`, children per node level by level; `dynamic` or
    `dynamic-NODES-DEPTH-BEAM` (NODES counts the root, as published). Raises UsageError."""
    if text in SHAPES:
        return SHAPES[text]
    if len(text) > _LONGEST_SHAPE:
        raise UsageError(f"tree = {brief(text)} is not allowed: the cache holds {MOST_NODES} nodes at most")
    shape: Shape | Dynamic | None = None
    if found := re.fullmatch(r"chain-(\d+)", text):
        _check_nodes(text, int(found[1]))  # before a huge one is built
        shape = ((1,),) * int(found[1])
    elif re.fullmatch(r"\d+(x\d+)*", text):
        widths = list(map(int, text.split("x")))
        levels = [math.prod(widths[:depth]) for depth in range(len(widths) + 1)]
        _check_nodes(text, sum(levels[1:]))
        shape = tuple((width,) * above for width, above in zip(widths, levels[:-1], strict=True))
    elif text == "dynamic":
        shape = Dynamic()
    elif found := re.fullmatch(r"dynamic-(\d+)-(\d+)-(\d+)", text):
        shape = Dynamic(int(found[1]) - 1, int(found[2]), int(found[3]))
    if shape is None:
        names = ", ".join(SHAPES)
        raise UsageError(f"tree = {text!r} is not allowed: {names}, chain-5, 4x2x1, dynamic or dynamic-59-5-10")
    _check_shape(text, shape)
    return shape


def _check_shape(text: str, shape: Shape | Dynamic) -> None:
    if isinstance(shape, Dynamic):
        fine, nodes = min(shape.nodes, shape.depth, shape.beam) >= 1, max(shape.nodes, shape.depth * shape.beam)
    else:
        fine, nodes = bool(shape) and all(min(level, default=0) >= 0 < sum(level) for level in shape), 0
        nodes = sum(map(sum, shape))
        fine = fine and nodes >= 1
    if not fine:
        raise UsageError(f"tree = {text!r} is not allowed: every number is 1 or more")
    _check_nodes(text, nodes)


def _check_stop(stop: float, shape: Shape | Dynamic) -> None:
    if not 0 <= stop < 1:
        raise UsageError(f"stop = {stop:g} is not allowed: a number >= 0 (the whole tree) and < 1")
    if stop and isinstance(shape, Dynamic):
        raise UsageError(f"stop = {stop:g} is not allowed: a dynamic tree chooses its nodes itself (stop = 0)")


def _check_nodes(text: str, nodes: int) -> None:
    if nodes > MOST_NODES:
        raise UsageError(f"tree = {text!r} is not allowed: {nodes} nodes, the cache holds {MOST_NODES} at most")


def tree_nodes(spec: str) -> int | None:
    """Drafted nodes of a tree drafter, None for other drafters."""
    name, options = drafter_options(spec)
    if name not in TREES:
        return None
    shape = read_shape(options.tree)
    return shape.nodes if isinstance(shape, Dynamic) else sum(map(sum, shape))


def check_method(drafter: str, rule: str) -> None:
    """Raises UsageError where a drafter and a rule, as written, do not go together."""
    name, options = drafter_options(drafter)
    made = make_rule(rule)
    if name == "none":
        return
    if name == "jacobi":
        if not made.window:
            fit = ", ".join(r for r, kind in RULES.items() if kind.window)
            raise UsageError(f"rule {rule!r} does not carry a window on, which drafter 'jacobi' needs (allowed: {fit})")
        if options.second and not made.beside:
            fit = ", ".join(r for r, kind in RULES.items() if kind.beside)
            raise UsageError(f"rule {rule!r} does not judge second guesses (allowed with {drafter!r}: {fit})")
        return
    shape = read_shape(options.tree)
    chain = not isinstance(shape, Dynamic) and max(map(sum, shape)) == 1
    if not made.trees and not chain:
        raise UsageError(f"rule {rule!r} verifies chains only, tree = {options.tree!r} is not one (allowed: chain-5)")
    if options.stop and not made.trees and made.name != Block.name:
        raise UsageError(f"rule {rule!r} verifies chains of one length: stop = {options.stop:g} is not allowed (0 is)")
    if made.needs_hidden and isinstance(shape, Dynamic):
        raise UsageError(f"rule {rule!r} needs a fixed tree, tree = {options.tree!r} is dynamic")


def with_neighbours(rule: Rule, table: Callable[[int], Any]) -> Rule:
    """The rule with its table of nearest codes, if it reads one. table: from a number of columns to int [V,
    columns]."""
    if isinstance(rule, Lantern):
        return replace(rule, neighbours=table(rule.columns))
    return rule
