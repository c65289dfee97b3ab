"""How to draft, as it is asked for: a dataclass per drafter, its options the fields, and the traits that others ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from bozzetto.common.written import NO_OPTION, Written
from bozzetto.drafters.base import Drafter
from bozzetto.drafters.drift import DriftDrafter
from bozzetto.drafters.gaussian import GaussianDrafter
from bozzetto.drafters.jacobi import FilledJacobi, Jacobi, JacobiVectors, SecondGuess
from bozzetto.drafters.trained import TRAINED
from bozzetto.drafters.tree import Dynamic, Shape, TreeDrafter
from bozzetto.drafts import VECTORS
from bozzetto.errors import UsageError, check_number, require
from bozzetto.methods.shapes import MOST_NODES, nodes_of, read_shape
from bozzetto.rules.reflection import WIDEST

Widen = Callable[[int], int]
_AHEAD = "What the model itself said of the places ahead, in the pass before, is the guess: nothing has to be trained."


@dataclass(frozen=True)
class Drafting(Written):
    """What a drafter is asked to do. folder: of the network that it needs, "": the model's own.

    Traits. drafts: at all; window: windows, of as many places as the settings say; nodes: drafted nodes of a tree
    (None: no tree); fused: may be a part of a fused step; trained: the drafter that has to be trained for the
    target ("": none); smaller: it is a smaller model; masked: masked models can use it;
    about: what it does, in a sentence.
    """

    name: str = field(default="", metadata=NO_OPTION)
    folder = ""
    drafts: ClassVar[bool] = True
    window: ClassVar[bool] = False
    nodes: ClassVar[int | None] = None
    fused: ClassVar[bool] = False
    trained: ClassVar[str] = ""
    smaller: ClassVar[bool] = False
    masked: ClassVar[bool] = False
    about: ClassVar[str] = ""

    def check(self, rule: Any, rules: Sequence[Any]) -> None:
        """Raise UsageError where it does not go with the rule. rules: all of that kind of token."""

    def make(self, window: int, widen: Widen | None, resources: Any, target: Any) -> Drafter:
        """window: scored places per pass of a window drafter, >= 1; widen: the window for a number of images, where it
        may change as images finish; resources: the model's (methods/resources.py); target: as it is sampled. Raises
        UsageError for a network that is not there."""
        raise NotImplementedError

    def _carried(self, rule: Any, rules: Sequence[Any]) -> None:
        """Raise UsageError for a rule that does not carry a window on."""
        if not rule.window:
            fit = ", ".join(other.name for other in rules if other.window)
            message = f"rule {rule.text!r} does not carry a window on, which drafter {self.name!r} needs"
            raise UsageError(f"{message} (allowed: {fit})")


@dataclass(frozen=True)
class NoDrafts(Drafting):
    """Nothing is drafted."""

    name: str = field(default="none", metadata=NO_OPTION)
    about: ClassVar[str] = "Nothing is drafted: one token, or one step of a masked model, per pass."
    drafts = False
    fused = True
    masked = True

    def make(self, window: int, widen: Widen | None, resources: Any, target: Any) -> Drafter:
        return Drafter(target.token_dim if target is not None and target.tokens == VECTORS else None)


@dataclass(frozen=True)
class CodeWindow(Drafting):
    """A window of codes. fill: the trained drafter (one of TRAINED) that fills the slots which enter the window,
    empty for a copy of the window's last law; fresh: drafts at the head of the window that it fills in every pass;
    second: the trained drafter that guesses a second token beside the window's at its first `places` places, empty for
    none, and goes on from it for `reach` tokens in all; folder: where that drafter lies, empty for the model's own."""

    name: str = field(default="jacobi", metadata=NO_OPTION)
    about: ClassVar[str] = _AHEAD
    fill: str = ""
    fresh: int = 0
    second: str = ""
    places: int = 8
    reach: int = 1
    folder: str = ""
    window = True

    def __post_init__(self) -> None:
        for name in ("fill", "second"):
            require(getattr(self, name) in ("", *TRAINED), name, getattr(self, name), ", ".join(TRAINED))
        if self.fill and self.second:
            raise UsageError(f"second = {self.second!r} is not allowed with fill = {self.fill!r}: one of them")
        most = MOST_NODES if self.fill else 0
        check_number("fresh", self.fresh, 0, most, "" if self.fill else "0 without fill", whole=True)
        for name in ("places", "reach"):
            check_number(name, getattr(self, name), 1, MOST_NODES, whole=True)
        if (nodes := self.places * self.reach) > MOST_NODES:
            raise UsageError(
                f"places = {self.places} with reach = {self.reach} is not allowed: {nodes} nodes, the cache holds "
                f"{MOST_NODES} at most"
            )

    @property
    def trained(self) -> str:  # type: ignore[override]
        """The trained drafter that is used, if any."""
        return self.fill or self.second

    @property
    def fused(self) -> bool:  # type: ignore[override]
        """Second guesses stand in trees, which fused steps have none of."""
        return not self.second and (not self.fill or TRAINED[self.fill].fused is not None)

    def check(self, rule: Any, rules: Sequence[Any]) -> None:
        self._carried(rule, rules)
        if self.second and not rule.beside:
            fit = ", ".join(other.name for other in rules if other.beside)
            raise UsageError(f"rule {rule.text!r} does not judge second guesses (allowed with {self.text!r}: {fit})")

    def make(self, window: int, widen: Widen | None, resources: Any, target: Any) -> Drafter:
        if not self.trained:
            return Jacobi(window, widen)
        model = resources.trained(self.trained, self.folder)
        if self.second:
            return SecondGuess(window, model, self.places, self.reach, widen)
        return FilledJacobi(window, model, self.fresh, widen)


@dataclass(frozen=True)
class Trained(Drafting):
    """Trees of a trained drafter, one of TRAINED. tree: shape (see `read_shape`); folder: of the trained drafter,
    empty for the model's own; stop: nothing is drafted below a node that is reached with less than this chance
    (drafters/early_stop.py; 0: the whole tree)."""

    name: str = field(default="eagle", metadata=NO_OPTION)
    about: ClassVar[str] = "A small network trained for this model guesses a chain or a tree of the next tokens."
    tree: str = "chain-5"
    folder: str = ""
    stop: float = 0.0

    def __post_init__(self) -> None:
        dynamic = isinstance(self.shape, Dynamic)
        if not 0 <= self.stop < 1:
            raise UsageError(f"stop = {self.stop:g} is not allowed: a number >= 0 (the whole tree) and < 1")
        if self.stop and dynamic:
            raise UsageError(f"stop = {self.stop:g} is not allowed: a dynamic tree chooses its nodes itself (stop = 0)")

    @cached_property
    def shape(self) -> Shape | Dynamic:
        """The tree, as read."""
        return read_shape(self.tree)

    @property
    def nodes(self) -> int:  # type: ignore[override]
        """Drafted nodes."""
        return nodes_of(self.shape)

    @property
    def trained(self) -> str:  # type: ignore[override]
        """The drafter itself."""
        return self.name

    def check(self, rule: Any, rules: Sequence[Any]) -> None:
        shape = self.shape
        dynamic = isinstance(shape, Dynamic)
        if not rule.trees and (isinstance(shape, Dynamic) or max(map(sum, shape)) > 1):
            message = f"rule {rule.text!r} verifies chains only, tree = {self.tree!r} is not one"
            raise UsageError(f"{message} (allowed: chain-5)")
        if self.stop and not (rule.trees or rule.ragged):
            raise UsageError(
                f"rule {rule.text!r} verifies chains of one length: stop = {self.stop:g} is not allowed (0 is)"
            )
        if rule.needs_hidden and dynamic:
            raise UsageError(f"rule {rule.text!r} needs a fixed tree, tree = {self.tree!r} is dynamic")

    def make(self, window: int, widen: Widen | None, resources: Any, target: Any) -> Drafter:
        return TreeDrafter(self.name, self._draft_model(resources), self.shape, self.stop)

    def _draft_model(self, resources: Any) -> Any:
        return resources.trained(self.name, self.folder)


@dataclass(frozen=True)
class Smaller(Trained):
    """The same of a smaller target. folder: of a model with the same tokenizer."""

    name: str = field(default="model", metadata=NO_OPTION)
    about: ClassVar[str] = "A smaller model of the same tokens goes ahead."
    tree: str = "chain-4"
    folder: str = field(default="", metadata={"needed": True})
    smaller = True
    trained = ""  # type: ignore[assignment]

    def _draft_model(self, resources: Any) -> Any:
        return resources.smaller(self.folder)


@dataclass(frozen=True)
class VectorWindow(Drafting):
    """A window of continuous tokens. spread: deviation of a token around what the one above it says, which first drafts
    assume."""

    name: str = field(default="jacobi", metadata=NO_OPTION)
    about: ClassVar[str] = _AHEAD
    spread: float = 1.0
    window = True

    def __post_init__(self) -> None:
        require(0 < self.spread <= WIDEST, "spread", self.spread, f"a number above 0, {WIDEST} at most")

    def check(self, rule: Any, rules: Sequence[Any]) -> None:
        self._carried(rule, rules)

    def make(self, window: int, widen: Widen | None, resources: Any, target: Any) -> Drafter:
        std, ancestry = target.schedule.std.to(target.device), target.schedule.ancestry(target.device)
        sampler = ancestry, std, self.spread, target.own
        return JacobiVectors(window, target.config.grid, target.token_dim, *sampler)


@dataclass(frozen=True)
class SmallerMasked(Drafting):
    """For a masked model. folder: a model folder of a smaller one of the same tokens ("": the one that comes with the
    model); length: autoregressive steps that are drafted at a time; prefill: share of the steps that the target does
    alone at the beginning."""

    name: str = field(default="model", metadata=NO_OPTION)
    about: ClassVar[str] = "A smaller model of the same tokens goes ahead."
    folder: str = ""
    length: int = 8
    prefill: float = 0.05
    smaller = True
    masked = True

    def __post_init__(self) -> None:
        require(self.length >= 1, "length", self.length, "a whole number >= 1")
        require(0 <= self.prefill <= 1, "prefill", self.prefill, "a number from 0 to 1")

    def make(self, window: int, widen: Widen | None, resources: Any, target: Any) -> Drafter:
        raise UsageError(f"drafter {self.text!r} is for masked models (allowed here: none, jacobi, sketch)")


@dataclass(frozen=True)
class Sketch(Drafting):
    """For a causal model of continuous tokens. folder: of the trained drafter ("": the one that comes with the model);
    length: tokens drafted per pass; stop: an image's draft ends where it is reached with less than this chance (0:
    nowhere)."""

    name: str = field(default="sketch", metadata=NO_OPTION)
    about: ClassVar[str] = "A small network trained for this model guesses the next tokens."
    folder: str = ""
    length: int = 2
    stop: float = 0.0
    trained = "sketch"

    def __post_init__(self) -> None:
        check_number("length", self.length, 1, 64, whole=True)
        if not 0 <= self.stop < 1:
            raise UsageError(f"stop = {self.stop:g} is not allowed: a number >= 0 (all of length) and < 1")

    def check(self, rule: Any, rules: Sequence[Any]) -> None:
        if self.stop and not rule.ragged:
            fit = ", ".join(other.name for other in rules if other.ragged)
            message = f"rule {rule.text!r} verifies drafts of one length: stop = {self.stop:g} is not allowed"
            raise UsageError(f"{message} (0 is; or {fit})")

    def make(self, window: int, widen: Widen | None, resources: Any, target: Any) -> Drafter:
        model = resources.trained(self.trained, self.folder)
        if target.one_step:
            return DriftDrafter(model, self.length, target, self.stop)
        std, ancestry = target.schedule.std.to(target.device), target.schedule.ancestry(target.device)
        return GaussianDrafter(model, self.length, ancestry, std, target.token_dim, self.stop)
