"""From what a request says to an order of the thread that decodes: models by name, methods that are there, sizes."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bozzetto.errors import UsageError
from bozzetto.serve.answers import Form
from bozzetto.serve.methods import lossy
from bozzetto.serve.orders import Order
from bozzetto.serve.problems import ApiError
from bozzetto.serve.schema import Drawing, ImageGeneration, Speculation
from bozzetto.serve.worker import Worker

SMALLEST, LARGEST = 16, 1024  # sides of a picture that is scaled
_LISTED = 200  # examples of a model with many
_OURS = "dall-e"  # such a model's pictures are links at OpenAI, where nothing else is said


def refused(message: str, param: str) -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param, code="invalid_value")


@dataclass(frozen=True)
class Terms:
    """What a server agrees to draw. aliases: further names of models; resize: whether pictures are scaled to the size
    that is asked for."""

    worker: Worker
    aliases: Mapping[str, str] = field(default_factory=dict)
    resize: bool = False

    def model(self, name: str | None) -> str:
        """The model of a name or an alias; None: the first one. Raises ApiError for one that is not served."""
        served = self.worker.pipes
        found = next(iter(served)) if name is None else self.aliases.get(name, name)
        if found not in served:
            allowed = ", ".join([*served, *self.aliases])
            message = f"model {name!r} is not served here (allowed: {allowed})"
            raise ApiError(404, message, param="model", code="model_not_found")
        return found

    def order(self, asked: Drawing, watched: bool = False) -> tuple[Order, Form]:
        """The order of a request, and how its pictures are sent. Raises ApiError for what can be told at once not to be
        served; the rest is found before the first pass (Worker)."""
        name, worker = self.model(asked.model), self.worker
        if why := worker.pipes[name].undecoded:
            raise refused(f"{name} draws tokens and no pictures here: {why} (bozzetto generate writes them)", "model")
        images = asked if isinstance(asked, ImageGeneration) else None
        count, partials = (images.n, images.partial_images * images.stream) if images else (1, 0)
        if count > worker.slots + worker.queue:
            raise refused(f"n = {count} is not allowed: this server holds {worker.slots + worker.queue} images", "n")
        spoken = asked.speculation
        try:
            settings = replace(
                worker.base,
                guidance=asked.guidance_scale,
                drafter=spoken.drafter,
                rule=spoken.rule,
                window=spoken.window,
                tv_budget=spoken.tv_budget,
            )
        except UsageError as error:
            raise refused(str(error), "speculation") from error
        self._check_drafter(name, spoken)
        seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
        return Order(name, asked.prompt, settings, seed, count, partials, watched), self._form(name, images)

    def _check_drafter(self, name: str, spoken: Speculation) -> None:
        """Raises ApiError for a trained drafter that the model comes without."""
        drafter, *options = spoken.drafter.split(":")
        pairs = dict(option.split("=", 1) for option in options)
        there = ["auto", *self.worker.rules[name]]
        for wanted in (drafter, *(pairs[key] for key in ("fill", "second") if key in pairs)):
            if wanted not in there:
                message = f"drafter {wanted!r} is not allowed for {name} (allowed: {', '.join(there)})"
                raise refused(message, "speculation.drafter")

    def _form(self, name: str, asked: ImageGeneration | None) -> Form:
        """How pictures are sent. Raises ApiError for a size or a compression that they cannot have."""
        drawn = self.worker.pipes[name].size
        if asked is None:
            return Form(drawn)
        kind, strength = asked.output_format, asked.output_compression
        if kind == "png" and strength not in (None, 100):
            raise refused(f"output_compression = {strength} is not allowed for png: 100", "output_compression")
        link = asked.response_format == "url"
        if asked.response_format is None:
            link = (asked.model or "").startswith(_OURS)
        wanted = self._size(asked.size, drawn)
        return Form(wanted, wanted != drawn, kind, link, strength)

    def _size(self, size: str, drawn: tuple[int, int]) -> tuple[int, int]:
        """Width and height that are asked for."""
        own = f"{drawn[0]}x{drawn[1]}"
        if size in ("auto", own):
            return drawn
        if not self.resize:
            raise refused(f"size {size!r} is not allowed: auto or {own}", "size")
        found = re.fullmatch(r"([1-9][0-9]{1,3})x([1-9][0-9]{1,3})", size)
        wanted = (int(found[1]), int(found[2])) if found else (0, 0)
        same = wanted[0] * drawn[1] == wanted[1] * drawn[0]  # another shape would distort the picture
        if not same or not min(wanted) >= SMALLEST or not max(wanted) <= LARGEST:
            what = "a square" if drawn[0] == drawn[1] else f"a picture of the shape of {own}"
            allowed = f"auto, or {what} from {SMALLEST}x{SMALLEST} to {LARGEST}x{LARGEST}"
            raise refused(f"size {size!r} is not allowed: {allowed}", "size")
        return wanted

    def listed(self) -> list[dict[str, Any]]:
        """What is served, by every name."""
        return [self.described(name) for name in (*self.worker.pipes, *self.aliases)]

    def described(self, asked: str) -> dict[str, Any]:
        """One model. Raises ApiError for one that is not served."""
        name = self.model(asked)
        pipe, rules = self.worker.pipes[name], self.worker.rules[name]
        rows, columns = pipe.grid
        told = {
            "id": asked,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "bozzetto",
            "size": f"{pipe.size[0]}x{pipe.size[1]}",
            "grid": rows,
            "columns": columns,
            "tokens": pipe.target.length,
            "takes_prompts": self.worker.pipes[name].takes_prompts,
            "prompts": list(self.worker.examples[name][:_LISTED]),
            "rules": rules,
            "lossy": lossy(rules),
        }
        return told if asked == name else {**told, "alias_of": name}
