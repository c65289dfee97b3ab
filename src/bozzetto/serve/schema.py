"""What requests may say: the OpenAI Images API and one object of ours.

A null is a field that is left out: OpenAI's own client sends what is None. Values that ask for what is done anyway are
taken; whatever would be ignored although it matters is refused, unknown fields too.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

MOST_IMAGES, MOST_PARTIALS, PROMPT_CHARACTERS = 10, 3, 1000
_NAME = re.compile(r"[a-z]+(?:[+-][a-z]*)*")
_OPTION = re.compile(r"[a-z_]+=[A-Za-z0-9.x+-]+")
_PATHS = ("folder",)  # options that name a place on the server
WINDOWS = (0, 1, 2, 4, 8, 16, 32)


def _method(text: str) -> str:
    """A drafter or rule with options that are numbers or words, never paths."""
    name, *options = text.split(":")
    if not _NAME.fullmatch(name):
        raise ValueError("a name such as jacobi, with options such as :k=10 behind it")
    for option in options:
        if not _OPTION.fullmatch(option) or option.partition("=")[0] in _PATHS:
            raise ValueError(f"option {option[:40]!r} is not allowed in a request")
    return text


def _window(number: int) -> int:
    if number not in WINDOWS:
        raise ValueError(f"one of {', '.join(map(str, WINDOWS))} is allowed")
    return number


def _temperature(number: float) -> float:
    if 0 < number < 1e-4:
        raise ValueError("0, or a number from 0.0001 to 10000")
    return number


Temperature = Annotated[float, Field(ge=0, le=1e4), AfterValidator(_temperature)]
Method = Annotated[str, Field(max_length=120), AfterValidator(_method)]


class Strict(BaseModel):
    """No unknown fields, no text for numbers, no infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given


class Speculation(Strict):
    """How tokens are drafted and verified; what is left out suits the model. Exact unless a lossy rule is asked for."""

    drafter: Method = Field("auto", description="auto, jacobi, none, or a trained one of the model, such as eagle")
    rule: Method = Field("auto", description="auto, seed-exact, exact, lantern:k=10:delta=0.1, ...")
    window: Annotated[int, AfterValidator(_window)] = Field(0, description="positions per pass, 0: what pays")
    tv_budget: Annotated[float, Field(ge=0, le=1e6)] | None = Field(
        None, description="most bias (total variation over all tokens) that a lossy rule may spend"
    )


class Drawing(Strict):
    """One prompt and how it is drawn."""

    prompt: str = Field(min_length=1, max_length=PROMPT_CHARACTERS, description="a class name, or any text")
    model: str | None = Field(None, max_length=200, description="left out: the first one served")
    seed: int | None = Field(None, ge=0, lt=2**63, description="left out: a random one, which the answer names")
    guidance_scale: float | None = Field(
        None, ge=1, le=100, description="classifier-free guidance, 1: off; left out: the model's own"
    )
    temperature: Temperature | None = Field(None, description="0: greedy; left out: the model's own")
    top_k: int | None = Field(None, ge=0, lt=2**31, description="likeliest tokens that stay, 0: all; left out: own")
    top_p: float | None = Field(None, gt=0, le=1, description="probability that stays, 1: all; left out: own")
    negative_prompt: str | None = Field(
        None, max_length=PROMPT_CHARACTERS, description="what guidance leads away from, where the model takes it"
    )
    quality_words: bool = Field(False, description="add what the model's authors append to prompts, where they do")
    speculation: Speculation = Field(default_factory=Speculation)  # type: ignore[arg-type]


class Watched(Drawing):
    """Body of POST /v1/draw."""

    pictures: bool = Field(True, description="pictures on the way, which cost time of their own")


class ImageGeneration(Drawing):
    """Body of POST /v1/images/generations. Image i is image i of `bozzetto generate PROMPT --seed SEED`."""

    n: int = Field(1, ge=1, le=MOST_IMAGES)
    size: str = Field("auto", max_length=20, description="auto, or one that the model draws, or with --resize any")
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="url: a data URL, nothing is stored; left out: b64_json, for names that begin with dall-e url"
    )
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(
        None, ge=0, le=100, description="quality of jpeg and webp; 100 for webp and png: lossless"
    )
    quality: Literal["auto", "standard"] = Field("auto", description="there is one")
    background: Literal["auto", "opaque"] = Field("auto", description="always opaque")
    moderation: Literal["auto", "low"] = Field("auto", description="taken: nothing is filtered")
    style: Literal["vivid"] = Field("vivid", description="taken: there is one")
    user: str | None = Field(None, max_length=200, description="taken, and neither used nor kept")
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=MOST_PARTIALS, description="with stream: pictures on the way")

    @field_validator("partial_images")
    @classmethod
    def _on_the_way(cls, value: int, info: ValidationInfo) -> int:
        if value and info.data.get("stream") is False:
            raise ValueError(f"{value} pictures on the way need stream: true")
        return value
