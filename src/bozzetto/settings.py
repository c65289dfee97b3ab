"""How to generate: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bozzetto.checkpoints.own_sampling import HEAD, LAW, OwnSampling
from bozzetto.common.options import LawOptions, MethodOptions
from bozzetto.common.written import Written
from bozzetto.drafts import CODES
from bozzetto.errors import UsageError, check_number, check_text, require
from bozzetto.laws.categorical import LawSettings
from bozzetto.methods.table import AUTO, read_method
from bozzetto.rules.seed_exact import SeedExact
from bozzetto.runtime.graphs import COMPILED, check_mode
from bozzetto.runtime.native import cheap_rows

SCHEDULES = ("", "linear", "constant")
_MOST, _MOST_BATCH = 100_000, 65_536  # of a window, of steps and of passes; of images decoded together
_HUGE = sys.float_info.max


@dataclass(frozen=True)
class GenerateSettings(LawOptions, MethodOptions):
    """How to generate. drafter, rule: given as text, NAME or NAME:key=value:... (see methods/), or as objects, which
    they are afterwards (methods/options.py, rules/); `auto`: what suits the model and the other of the two, without
    bias; what is None, 0 or "": as the model says. Raises UsageError for a value out of range."""

    drafter: Any = AUTO
    rule: Any = AUTO

    def __post_init__(self) -> None:
        if self.tv_budget is not None:
            check_number("tv_budget", self.tv_budget, 0, _HUGE, "a number >= 0")
        check_number("window", self.window, 0, _MOST, "a whole number >= 1, or 0 to choose it", whole=True)
        check_number("batch", self.batch, 1, _MOST_BATCH, f"a whole number >= 1, at most {_MOST_BATCH}", whole=True)
        for name in ("steps", "last_steps", "passes"):
            allowed = f"a whole number >= 1, at most {_MOST}, or 0: the model's"
            check_number(name, getattr(self, name), 0, _MOST, allowed, whole=True)
        for name in ("drafter", "rule", "negative_prompt", "guidance_schedule", "compile"):
            if not isinstance(value := getattr(self, name), Written):
                check_text(name, value or "")
        known = self.guidance_schedule in SCHEDULES
        require(known, "guidance_schedule", self.guidance_schedule, ", ".join(s for s in SCHEDULES if s))
        if check_mode(self.compile) == "off" and self.deterministic:
            raise UsageError("deterministic is not allowed with compile = 'off': auto, default, max")
        vars(self).update(zip(("drafter", "rule"), read_method(self.drafter, self.rule), strict=True))
        LawSettings(**{name: value for name, value in self._numbers().items() if value is not None})

    def plain(self) -> dict[str, Any]:
        """All of it, ready for JSON: drafter and rule as they were written."""
        return {**vars(self), "drafter": self.drafter.text, "rule": self.rule.text}

    def with_method(self, drafter: str, rules: Mapping[str, str]) -> GenerateSettings:
        """With `auto` replaced. drafter: the model's default; rules: the default rule by the drafter's name. Raises
        UsageError for what does not go together."""
        chosen = self.drafter
        if chosen is AUTO:
            chosen = "none" if self.rule is not AUTO and self.rule.alone else drafter
        name = chosen if isinstance(chosen, str) else chosen.name
        rule = rules.get(name, rules[drafter]) if self.rule is AUTO else self.rule
        return replace(self, drafter=chosen, rule=rule)

    @property
    def sequential(self) -> bool:
        """Whether this is the sequential sampler: no drafts, and no speculation inside a token."""
        return not self.drafter.drafts and self.rule is not AUTO and self.rule.sequential

    @property
    def verifier(self) -> Any:
        """The rule that decides. Without drafts every rule of codes is the sequential sampler; the seed-exact one also
        records its margins."""
        return SeedExact() if not self.drafter.drafts and self.rule.tokens == CODES else self.rule

    @property
    def follows_window(self) -> bool:
        """Whether images depend on the window, which then must not depend on the images drawn beside them."""
        return self.drafter.window and not self.rule.seed_exact

    @property
    def any_window(self) -> bool:
        """Whether the window may change from pass to pass: none is asked for, and tokens do not depend on it."""
        return self.window == 0 and self.drafter.drafts and self.rule.seed_exact

    @property
    def method(self) -> str:
        """DRAFTER/RULE, as written."""
        return f"{self.drafter.text}/{self.rule.text}"

    def with_own(self, own: OwnSampling) -> GenerateSettings:
        """With the model's own values in place of what is not set."""
        known: dict[str, Any] = {k: getattr(own, k) for k, v in self._numbers().items() if v is None}
        known |= {k: getattr(self, k) or getattr(own, k) for k in HEAD}
        if self.negative_prompt is None:
            known["negative_prompt"] = own.negative_prompt if self.quality_words else ""
        return replace(self, **known)

    def _numbers(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in LAW}

    @property
    def law(self) -> LawSettings:
        """Of settings in which nothing is left to the model (`Pipeline.resolve`). Raises ValueError for others."""
        numbers = self._numbers()
        if unset := [name for name, value in numbers.items() if value is None]:
            raise ValueError(f"{', '.join(unset)}: not set, and only the model knows its own (Pipeline.resolve)")
        return LawSettings(**numbers)

    def window_for(self, batch: int, length: int, dtype: str, widest: int = 16) -> int:
        """Places scored in a pass for a batch of this size; widest: the most that are chosen for a batch of one."""
        if not self.drafter.drafts:
            return 1
        if self.drafter.nodes is not None:
            return self.drafter.nodes + 1
        sequences = batch * (2 if self.law.guided else 1)
        return min(self.window or default_window(sequences, dtype, widest, self.compile in COMPILED), length)


# Rows of a pass that pay, by those that are cheap on the machine: compiled, eager in bfloat16, eager in float32.
_ROWS = {32: (32, 128, 64), 16: (8, 64, 32), 8: (8, 16, 32)}


def default_window(sequences: int, dtype: str, widest: int = 16, compiled: bool = False) -> int:
    """A window that pays on a two-core CPU: wide for few images, narrow for many (docs/log.md has the measurements).

    sequences: rows in a pass, images times two under guidance; compiled: a sequential pass costs so much less that rows
    have to be fewer. Without a matrix unit for bfloat16 every row costs, and large batches draw one place at a time.
    """
    cheap = cheap_rows()
    fused, short, full = _ROWS[cheap]
    rows = fused if compiled else short if dtype != "float32" else full
    if cheap == max(_ROWS):
        return max(2, min(widest, rows // sequences))
    return max(1, min(8 if compiled else widest, widest, rows // sequences))
