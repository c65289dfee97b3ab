"""The drafters and rules by name. One immutable table each; nothing registers itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from bozzetto.drafters.base import Drafter
from bozzetto.drafters.jacobi import Jacobi
from bozzetto.drafters.none import NoDrafter
from bozzetto.errors import UsageError
from bozzetto.rules.base import Rule
from bozzetto.rules.exact import Exact
from bozzetto.rules.seed_exact import SeedExact

Widen = Callable[[int], int]
DRAFTERS: Mapping[str, Callable[[int, Widen | None], Drafter]] = MappingProxyType(
    {"none": lambda window, widen: NoDrafter(), "jacobi": lambda window, widen: Jacobi(window, widen)}
)
RULES: Mapping[str, Callable[[], Rule]] = MappingProxyType({"seed-exact": SeedExact, "exact": Exact})


def make_drafter(name: str, window: int, widen: Widen | None = None) -> Drafter:
    """window: scored positions per pass, >= 1; widen: the window for a number of images, where it may change as images
    finish. Raises UsageError for an unknown name."""
    if name not in DRAFTERS:
        raise UsageError(f"unknown drafter {name!r} (allowed: {', '.join(DRAFTERS)})")
    return DRAFTERS[name](window, widen)


def make_rule(name: str) -> Rule:
    """Raises UsageError for an unknown name."""
    if name not in RULES:
        raise UsageError(f"unknown rule {name!r} (allowed: {', '.join(RULES)})")
    return RULES[name]()
