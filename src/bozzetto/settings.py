"""How to generate: one frozen dataclass, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass

from bozzetto.errors import UsageError
from bozzetto.laws.categorical import LawSettings
from bozzetto.registry import check_method, tree_nodes


@dataclass(frozen=True)
class GenerateSettings:
    """How to generate.

    drafter, rule: NAME or NAME:key=value:... (see registry.py); window: scored positions per pass of drafter jacobi (0:
    chosen for the batch); guidance, temperature, top_k, top_p: the law (see LawSettings); batch: images decoded
    together; tv_budget: most bias per image that a relaxed rule may spend (None: no limit).
    """

    drafter: str = "jacobi"
    rule: str = "seed-exact"
    window: int = 0
    guidance: float = 2.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    batch: int = 1
    tv_budget: float | None = None

    def __post_init__(self) -> None:
        if self.tv_budget is not None and not 0 <= self.tv_budget < float("inf"):
            raise UsageError(f"tv_budget = {self.tv_budget} is not allowed: a number >= 0")
        if self.window < 0:
            raise UsageError(f"window = {self.window} is not allowed: a whole number >= 1, or 0 to choose it")
        if self.batch < 1:
            raise UsageError(f"batch = {self.batch} is not allowed: a whole number >= 1")
        check_method(self.drafter, self.rule)
        self.law  # noqa: B018  (validates its own numbers)

    @property
    def law(self) -> LawSettings:
        return LawSettings(self.guidance, self.temperature, self.top_k, self.top_p)

    def window_for(self, batch: int, length: int, dtype: str) -> int:
        """Places scored in a pass for a batch of this size."""
        if self.drafter == "none":
            return 1
        nodes = tree_nodes(self.drafter)
        if nodes is not None:
            return nodes + 1
        return min(self.window or default_window(batch * (2 if self.law.guided else 1), dtype), length)


def default_window(sequences: int, dtype: str) -> int:
    """A window that pays on a two-core CPU: wide for few images, narrow for many (docs/log.md has the measurements).

    sequences: rows in a pass, images times two under guidance.
    """
    rows = 128 if dtype == "bfloat16" else 64
    return max(2, min(16, rows // sequences))
