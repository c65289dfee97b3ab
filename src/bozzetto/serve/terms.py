"""From what a request says to an order of the thread that decodes: models by name, methods that are there, sizes."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bozzetto.checkpoints.load_settings import written
from bozzetto.errors import UsageError
from bozzetto.methods.options import Drafting
from bozzetto.pipeline.pipeline import Pipeline
from bozzetto.serve.methods import lossy, own_sampling, said_of
from bozzetto.serve.orders import Order
from bozzetto.serve.problems import ApiError
from bozzetto.serve.schema import Drawing, ImageGeneration
from bozzetto.serve.worker import Worker
from bozzetto.settings import GenerateSettings

SMALLEST, LARGEST = 16, 1024  # sides of a picture that is scaled
_LISTED = 200  # examples of a model with many
_SAID = ("temperature", "top_k", "top_p", "negative_prompt", "quality_words")
_OURS = "dall-e"  # such a model's pictures are links at OpenAI, where nothing else is said


def refused(message: str, param: str) -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param, code="invalid_value")


def _check_words(pipe: Pipeline, asked: Drawing) -> None:
    """Raises ApiError for words around the prompt that the model has no use for."""
    for name in ("negative_prompt", "quality_words"):
        try:
            only = GenerateSettings(**{name: getattr(asked, name)})
            pipe.resolve(only)
        except UsageError as error:
            raise refused(str(error), name) from error


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

    def order(self, asked: Drawing, watched: bool = False) -> Order:
        """The order of a request. Raises ApiError for what can be told at once not to be served; the rest is found
        before the first pass (Worker)."""
        name, worker = self.model(asked.model), self.worker
        try:
            worker.pipes[name].need_pictures()
        except UsageError as error:
            raise refused(str(error), "model") from error
        images = asked if isinstance(asked, ImageGeneration) else None
        count, partials = (images.n, images.partial_images * images.stream) if images else (1, 0)
        if count > worker.slots + worker.queue:
            raise refused(f"n = {count} is not allowed: this server holds {worker.slots + worker.queue} images", "n")
        spoken = asked.speculation
        try:
            settings = replace(
                worker.base,
                guidance=asked.guidance_scale,
                **{name: getattr(asked, name) for name in _SAID},
                drafter=spoken.drafter,
                rule=spoken.rule,
                window=spoken.window,
                tv_budget=spoken.tv_budget,
            )
        except UsageError as error:
            raise refused(str(error), "speculation") from error
        self._check_drafter(name, settings.drafter)
        pipe = worker.pipes[name]
        _check_words(pipe, asked)
        form = {} if images is None else self._form(pipe, images)
        seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
        return Order(name, asked.prompt, settings.with_own(pipe.own), seed, count, partials, watched, **form)

    def _check_drafter(self, name: str, asked: Drafting) -> None:
        """Raises ApiError for a trained drafter that the model comes without."""
        there = ["auto", *self.worker.rules[name]]
        for wanted in filter(None, (asked.name, asked.trained)):
            if wanted not in there:
                message = f"drafter {wanted!r} is not allowed for {name} (allowed: {', '.join(there)})"
                raise refused(message, "speculation.drafter")

    def _form(self, pipe: Pipeline, asked: ImageGeneration) -> dict[str, Any]:
        """How an order has its pictures drawn and sent. Raises ApiError for a size or a compression that they cannot
        have."""
        kind, strength = asked.output_format, asked.output_compression
        if kind == "png" and strength not in (None, 100):
            raise refused(f"output_compression = {strength} is not allowed for png: 100", "output_compression")
        link = asked.response_format == "url"
        if asked.response_format is None:
            link = (asked.model or "").startswith(_OURS)
        drawn, wanted = self._size(asked.size, pipe)
        sizes = {"size": None if drawn == pipe.size else drawn, "pixels": wanted, "scaled": wanted != drawn}
        return {**sizes, "kind": kind, "link": link, "strength": strength}

    def _size(self, size: str, pipe: Pipeline) -> tuple[tuple[int, int], tuple[int, int]]:
        """Width and height that are drawn for the size that is asked for, and those that it is."""
        if size == "auto":
            return pipe.size, pipe.size
        there = {written(drawn): drawn for drawn in pipe.sizes}
        if size in there:
            return there[size], there[size]
        if not self.resize:
            raise refused(f"size {size!r} is not allowed: auto or {', '.join(there)}", "size")
        found = re.fullmatch(r"([1-9][0-9]{1,3})x([1-9][0-9]{1,3})", size)
        wanted = (int(found[1]), int(found[2])) if found else (0, 0)
        # Another shape would distort the picture.
        same = next((drawn for drawn in pipe.sizes if wanted[0] * drawn[1] == wanted[1] * drawn[0]), None)
        if same is None or not min(wanted) >= SMALLEST or not max(wanted) <= LARGEST:
            what = (
                "a square"
                if len(there) == 1 and pipe.size[0] == pipe.size[1]
                else f"of the shape of {', '.join(there)}"
            )
            allowed = f"auto, or {what} from {SMALLEST}x{SMALLEST} to {LARGEST}x{LARGEST}"
            raise refused(f"size {size!r} is not allowed: {allowed}", "size")
        return same, wanted

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
            "size": written(pipe.size),
            "sizes": [written(size) for size in pipe.sizes],
            "sampling": own_sampling(pipe),
            "grid": rows,
            "columns": columns,
            "tokens": pipe.target.length,
            "takes_prompts": pipe.takes_prompts,
            "takes_negative_prompt": pipe.conditions.takes_negative,
            "prompts": list(self.worker.examples[name][:_LISTED]),
            "rules": rules,
            "lossy": lossy(rules),
            "about": said_of(pipe),
            "in_order": pipe.kind.in_order,
        }
        return told if asked == name else {**told, "alias_of": name}
