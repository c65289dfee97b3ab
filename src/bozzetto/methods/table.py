"""The drafters and rules of both kinds of token, by kind and name. Immutable tables; nothing registers itself.

A drafter or rule is written NAME or NAME:key=value:key=value, a method DRAFTER/RULE:
`eagle:tree=dynamic/lantern:k=500`. Text is read here once; everybody else asks the objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from bozzetto.common.written import Written, filled, split_spec
from bozzetto.drafters.trained import TRAINED
from bozzetto.drafts import CODES, VECTORS
from bozzetto.errors import UsageError
from bozzetto.methods.options import (
    CodeWindow,
    Drafting,
    NoDrafts,
    Sketch,
    Smaller,
    SmallerMasked,
    Trained,
    VectorWindow,
)
from bozzetto.rules.base import Rule
from bozzetto.rules.cascade import Cascade
from bozzetto.rules.chains import Chains
from bozzetto.rules.cspd import Cspd
from bozzetto.rules.exact import Exact
from bozzetto.rules.joint import Joint
from bozzetto.rules.lantern import Lantern, LanternPlusPlus
from bozzetto.rules.path_block import PathBlock
from bozzetto.rules.pathwise import Pathwise
from bozzetto.rules.reflection import Coupled, PlainSteps, Reflection
from bozzetto.rules.relaxed import Annealed, Grouped
from bozzetto.rules.seed_exact import SeedExact
from bozzetto.rules.traversal import BlockVerification, Traversal
from bozzetto.rules.tree import TreeRejection
from bozzetto.targets.flow_cache import EulerSampler, FlowSdeSampler

P = TypeVar("P")
_SAID = {CODES: "", VECTORS: " for continuous tokens"}


def _keyed(rows: Mapping[str, tuple[Any, ...]]) -> Mapping[tuple[str, str], Any]:
    return MappingProxyType({(tokens, row.name): row for tokens, kind in rows.items() for row in kind})


# Of each its usual options, by (kind of token, name).
DRAFTERS: Mapping[tuple[str, str], Drafting] = _keyed(
    {
        CODES: (NoDrafts(), CodeWindow(), *map(Trained, TRAINED), Smaller()),
        VECTORS: (NoDrafts(), SmallerMasked(), VectorWindow(), Sketch()),
    }
)
RULES: Mapping[tuple[str, str], Rule] = _keyed(
    {
        CODES: (
            *(SeedExact(), Exact(), TreeRejection(), Traversal(), BlockVerification()),
            *(Lantern(), LanternPlusPlus(), Grouped(), Annealed(), Cascade()),
        ),
        VECTORS: (PlainSteps(), Reflection(), Coupled(), Chains(), Joint(), PathBlock(), Pathwise(), Cspd()),
    }
)
SAMPLERS: Mapping[str, Any] = MappingProxyType({"euler": EulerSampler(), "flow-sde": FlowSdeSampler()})


# What suits the model and the other of the two, drafter or rule: known when the model is (`Pipeline.resolve`).
AUTO: Any = Drafting("auto")


def named(table: Mapping[tuple[str, str], P], tokens: str) -> dict[str, P]:
    """Rows of one kind of token, by name."""
    return {name: row for (kind, name), row in table.items() if kind == tokens}


# The rule of codes that goes with a drafter where none is asked for.
USUAL_RULES: Mapping[str, str] = MappingProxyType(
    {name: "block" if row.nodes else "seed-exact" for name, row in named(DRAFTERS, CODES).items()}
)


def _read(table: Mapping[tuple[str, str], P], what: str, tokens: str, text: str) -> P:
    name, options = split_spec(text)
    if (tokens, name) not in table:
        allowed = ", ".join(named(table, tokens))
        raise UsageError(f"unknown {what} {name!r}{_SAID[tokens]} (allowed: {allowed})")
    return filled(table[tokens, name], text, options)


def read_drafter(text: str, tokens: str = CODES) -> Drafting:
    """A drafter as written. Raises UsageError for an unknown name or option, or a value out of range."""
    return _read(DRAFTERS, "drafter", tokens, text)


def make_sampler(text: str) -> Any:
    """A sampler of a flow head as written. Raises UsageError as `read_drafter`."""
    name, options = split_spec(text)
    if name not in SAMPLERS:
        raise UsageError(f"unknown sampler {name!r} (allowed: {', '.join(SAMPLERS)})")
    return filled(SAMPLERS[name], text, options)


def split_method(method: str) -> tuple[str, str]:
    """DRAFTER/RULE -> drafter and rule as written; a drafter alone goes with seed-exact, auto with auto."""
    if method == AUTO.name:
        return method, method
    drafter, slash, rule = method.rpartition("/")
    if not slash:
        return method, SeedExact.name
    if not rule or not drafter:
        raise UsageError(f"unknown method {method!r} (allowed: none, or DRAFTER/RULE such as jacobi/exact)")
    return drafter, rule


def read_method(drafter: str | Drafting, rule: str | Written) -> tuple[Drafting, Any]:
    """A drafter and a rule, each as text or as read before, as those of one kind of token; `auto` stays. Raises
    UsageError for what does not exist, or does not go together."""
    names = []
    for what, part, table in (("drafter", drafter, DRAFTERS), ("rule", rule, RULES)):
        name = part.name if isinstance(part, Written) else split_spec(part)[0]  # type: ignore[attr-defined]
        if name != AUTO.name and not {(CODES, name), (VECTORS, name)} & table.keys():  # type: ignore[attr-defined]
            allowed = "; ".join(
                f"for {kind} {', '.join(named(table, tokens))}"  # type: ignore[misc]
                for tokens, kind in ((CODES, "codes"), (VECTORS, "continuous tokens"))
            )
            raise UsageError(f"unknown {what} {name!r} (allowed: {AUTO.name}; {allowed})")
        names.append(name)
    tokens = _tokens_of(*names)
    made: Any = _of_kind(DRAFTERS, "drafter", tokens, drafter), _of_kind(RULES, "rule", tokens, rule)
    if AUTO not in made:
        _check(*made)
    return made


def _tokens_of(drafter: str, rule: str) -> str:
    """The kind of token that names are for. (Both kinds have a rule `block`: there the drafter tells.)"""
    codes = drafter == AUTO.name or (CODES, drafter) in DRAFTERS
    if rule == AUTO.name:
        return CODES if codes else VECTORS
    return VECTORS if (VECTORS, rule) in RULES and not (codes and (CODES, rule) in RULES) else CODES


def _of_kind(table: Mapping[tuple[str, str], Any], what: str, tokens: str, part: Any) -> Any:
    """As it is, if it has been read as one of this kind; else from its text."""
    if part in (AUTO, AUTO.name):
        return AUTO
    if isinstance(part, Written):
        if type(table.get((tokens, part.name))) is type(part):  # type: ignore[attr-defined]
            return part
        part = part.text
    return _read(table, what, tokens, part)


def _check(drafter: Drafting, rule: Any) -> None:
    """Raises UsageError where a drafter and a rule of one kind of token do not go together."""
    rules = list(named(RULES, rule.tokens).values())
    if rule.tokens == VECTORS and not drafter.drafts and not rule.alone:
        alone = ", ".join(other.name for other in rules if other.alone)
        raise UsageError(f"rule {rule.text!r} verifies drafts, drafter 'none' makes none (allowed: {alone})")
    if drafter.drafts and rule.alone:
        raise UsageError(f"rule {rule.text!r} needs no drafter: drafter {drafter.text!r} is not allowed, 'none' is")
    drafter.check(rule, rules)
