"""How a model is meant to be sampled: what its authors publish, taken where nothing else is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from bozzetto.common.checks import Count, config_from
from bozzetto.errors import UsageError, check_text, require
from bozzetto.laws.categorical import LawSettings

LAW = ("guidance", "temperature", "top_k", "top_p")
HEAD = ("steps", "passes", "guidance_schedule")  # of continuous tokens
SAMPLING = "sampling"  # the key in config.json
_Steps = Annotated[int, Field(ge=0, le=100_000)]
_Words = Annotated[str, Field(max_length=2000)]
# In transformers' words.
_STATED = {"guidance": "guidance_scale", "temperature": "temperature", "top_k": "top_k", "top_p": "top_p"}


@dataclass(frozen=True)
class OwnSampling:
    """What unset settings mean for a model, in the terms of GenerateSettings. suffix: words that its authors append to
    every prompt, negative_prompt: theirs (both where their quality words are asked for); source: where this was
    published. Raises UsageError for a value out of range."""

    guidance: float = 2.0
    temperature: float = 1.0
    top_k: Count = 0
    top_p: float = 1.0
    steps: _Steps = 0
    passes: _Steps = 0
    guidance_schedule: Literal["", "linear", "constant"] = ""
    negative_prompt: _Words = ""
    suffix: _Words = ""
    source: _Words = "bozzetto's usual values"

    def __post_init__(self) -> None:
        LawSettings(*(getattr(self, name) for name in LAW))
        for name in ("negative_prompt", "suffix", "source"):
            check_text(name, text := getattr(self, name))
            require(text.isprintable(), name, text, "a text of one line")

    def recorded(self) -> dict[str, Any]:
        """As config.json holds it: the law, the source, and what else is not as usual."""
        usual = asdict(OwnSampling())
        return {k: v for k, v in asdict(self).items() if k in (*LAW, "source") or v != usual[k]}


def own_from(content: Mapping[str, Any], source: Path) -> OwnSampling:
    """What the config.json `source` says under `sampling`; the usual values where it says nothing. Raises UsageError
    naming the file, the key, the value and what is allowed."""
    if SAMPLING not in content:
        return OwnSampling()
    where = f"{source}: {SAMPLING}"
    if not isinstance(said := content[SAMPLING], dict):
        raise UsageError(f"{where} must be a mapping, found {type(said).__name__}")
    own: OwnSampling = config_from(OwnSampling, {"source": source.name, **said}, where)
    return own


def with_stated(own: OwnSampling, names: tuple[str, ...], content: Mapping[str, Any], source: Path) -> OwnSampling:
    """`own` with what a generation_config.json says itself of these of the four numbers of the law. do_sample is passed
    over: nobody's pictures are published greedily, it is of text. Raises UsageError as `own_from` does."""
    said = {name: content[_STATED[name]] for name in names if content.get(_STATED[name]) is not None}
    if not said:
        return own
    known = asdict(config_from(OwnSampling, said, source))
    whose = f"{source.name}: {', '.join(_STATED[name] for name in said)}"
    return replace(own, **{name: known[name] for name in said}, source=f"{whose}; {own.source}")


def brief_law(own: OwnSampling) -> str:
    """The law, without what is as it is for most models."""
    parts = [f"guidance {own.guidance:g}"]
    parts += [f"temperature {own.temperature:g}"] * (own.temperature != 1)
    parts += [f"top-k {own.top_k}"] * bool(own.top_k) + [f"top-p {own.top_p:g}"] * (own.top_p != 1)
    return ", ".join(parts)


def sampling_line(used: Mapping[str, Any]) -> str:
    """What `Pipeline.sampling` tells, for people."""
    asked, parts = used["asked"], []

    def say(text: str, *names: str) -> None:
        parts.append(text + " (asked)" * any(name in asked for name in names))

    say(f"guidance {used['guidance']:g} {used.get('guidance_schedule', '')}".rstrip(), "guidance", "guidance_schedule")
    say(f"temperature {used['temperature']:g}", "temperature")
    if used["top_k"] or not used.get("steps"):
        say(f"top-k {used['top_k'] or 'off'}", "top_k")
    if used["top_p"] != 1:
        say(f"top-p {used['top_p']:g}", "top_p")
    for name in ("passes", "steps"):
        if used.get(name):
            say(f"{used[name]} {name}", name)
    if used["suffix"]:
        say(f"prompts end in {used['suffix']!r}", "quality_words")
    if used["negative_prompt"]:
        say(f"negative prompt {used['negative_prompt']!r}", "negative_prompt")
    whose = "" if all(name in asked for name in LAW) else f"; from {used['source']}"
    hint = "; --quality-words adds what its authors add to prompts" if used.get("quality_words") is False else ""
    return f"sampling: {', '.join(parts)}{whose}{hint}"
