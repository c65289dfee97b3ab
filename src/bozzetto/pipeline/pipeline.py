"""The Python API: generate images with a loaded model, or stream them pass by pass. `loading.load` makes pipelines."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from bozzetto.checkpoints.folders import CONFIG, PIPELINE, convert_note, read_config
from bozzetto.checkpoints.load_settings import DTYPES as DTYPES
from bozzetto.checkpoints.load_settings import written
from bozzetto.checkpoints.own_sampling import HEAD, LAW, OwnSampling
from bozzetto.common.files import digest
from bozzetto.common.hub import on_hub
from bozzetto.common.images import Origin, one_core, to_picture
from bozzetto.common.shipped import INSTALL, missing_models, shipped_folders
from bozzetto.decoding.batch import Batch
from bozzetto.decoding.images import ImageRequest
from bozzetto.decoding.meter import Meter
from bozzetto.decoding.scheduler import Scheduler
from bozzetto.errors import UsageError, brief
from bozzetto.methods.options import Drafting
from bozzetto.pipeline.conditions import Classes
from bozzetto.pipeline.kinds import TokenKind
from bozzetto.pipeline.results import ROUNDING as ROUNDING
from bozzetto.pipeline.results import GeneratedImage, GenerateResult, StreamEvent, plan_batches, settings_of
from bozzetto.pipeline.runner import Runner
from bozzetto.settings import GenerateSettings

_GREY = 0.5  # of what is not drawn yet
_WAVES = 64  # of images that follow each other into slots, before pictures are made of them


class Pipeline:
    """A model that draws images. Make one with bozzetto.load. kind: what is particular to its kind of token;
    conditions: what images are drawn of; runner: who runs its network; own: how its authors sample it.

    target: has length and device; tokenizer: has decode and config, with its shape and size; resources: the target's
    drafters; undecoded: why its tokens cannot become pictures here ("": they can); folder: None for a model of another
    library.
    """

    def __init__(self, kind: TokenKind, conditions: Classes, runner: Runner, own: OwnSampling):
        self.kind, self.conditions, self.runner, self.own = kind, conditions, runner, own
        self.name, self.target, self.tokenizer = runner.name, runner.target, runner.pictures
        self.classes, self.dtype, self.undecoded = conditions.names, kind.dtype, runner.undecoded
        self.resources, self.default_methods = kind.resources, kind.default_methods
        self.folder = next(iter(runner.folders), None)
        self._known = ""
        self._schedulers: dict[int, Scheduler] = {}  # of nobody, by images together

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the codes of a picture."""
        return self.tokenizer.config.shape

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a picture in pixels."""
        return self.tokenizer.config.size

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Sizes (width, height) that the model can be asked for, its own first."""
        return self.runner.sizes

    def in_size(self, size: tuple[int, int]) -> Pipeline:
        """The same model, with the same weights, for pictures of another size. Raises UsageError for one that it does
        not draw."""
        made: Pipeline | None = self if size == self.size else self.runner.in_size(size)
        if made is None:
            draws = f"{self.name} draws {written(self.size)} pixels"
            raise UsageError(f"image_size = {written(size)} is not allowed: {draws}")
        return made

    def need_pictures(self) -> None:
        """Raise UsageError where there are tokens only."""
        if self.undecoded:
            raise UsageError(
                f"{self.name} draws tokens and no pictures here: {self.undecoded} (bozzetto generate writes its tokens)"
            )

    def make_batch(self, settings: GenerateSettings, closed: bool = True) -> Batch:
        """A batch of `settings.batch` images. closed: see Scheduler."""
        return self.kind.make_batch(self.resolve(settings), closed)

    def resolve(self, settings: GenerateSettings) -> GenerateSettings:
        """With `auto` replaced, and with the model's own values where nothing is asked for. Raises UsageError for a
        method or an option of the other kind of token."""
        if settings.quality_words and not (self.own.suffix or self.own.negative_prompt):
            raise UsageError(f"quality_words is not allowed here: none are published for {self.name}")
        settings = settings.with_own(self.own)
        if settings.negative_prompt and not self.conditions.takes_negative:
            raise UsageError(f"negative_prompt is not allowed here: {self.name} has a condition of its own for none")
        return self.kind.resolve(settings)

    def sampling(self, settings: GenerateSettings | None = None) -> dict[str, Any]:
        """How images of these settings (None: those that say nothing) are sampled, ready for JSON: the law, the head's
        steps, the words around prompts; asked: what is not the model's own; source: where that was published."""
        given = GenerateSettings() if settings is None else settings
        used, unset = self.resolve(given), GenerateSettings()
        shown: dict[str, Any] = {name: getattr(used, name) for name in LAW} | self.kind.head_sampling(used)
        words: dict[str, Any] = {
            "suffix": self.own.suffix * used.quality_words,
            "negative_prompt": used.negative_prompt,
        }
        words |= {"quality_words": used.quality_words} if self.own.suffix or self.own.negative_prompt else {}
        names = (*LAW, *HEAD, "negative_prompt", "quality_words")
        asked = [name for name in names if getattr(given, name) != getattr(unset, name)]
        return {**shown, **words, "asked": asked, "source": self.own.source}

    def labels(self, asked: str | int | Sequence[str | int], settings: GenerateSettings | None = None) -> list[int]:
        """Labels of class names or numbers (one, or a list); none given: all in turn. Raises UsageError for one that is
        unknown, or that does not say which of several classes is meant."""
        words = (settings or GenerateSettings()).with_own(self.own)
        suffix = self.own.suffix if words.quality_words else ""
        return self.conditions.labels(asked, words.negative_prompt or "", suffix)

    def prompt_of(self, label: int) -> str:
        """What the model is asked for a label."""
        return self.conditions.prompt_of(label)

    @property
    def takes_prompts(self) -> bool:
        """Whether it takes any text, not only the names of classes."""
        return self.conditions.takes_prompts

    def remember(self, prompts: int, busy: Callable[[], set[int]] = set) -> None:
        """Keep what belongs to so many prompts, asked for last, and to `busy` labels (a server would only grow)."""
        self.conditions.remember(prompts, busy)

    def target_in(self, mode: str) -> Any:
        """The target with its passes run as asked. Raises UsageError where they cannot be."""
        return self.runner.target_in(mode)

    def rounding(self, settings: GenerateSettings) -> float:
        """How close two candidates may be (in perturbed log-probability) that swap when a pass has another shape; with
        our kernels rows have the same bits in any."""
        return 0.0 if self.target_in(settings.compile).own else ROUNDING[self.dtype]

    def fuses(self, settings: GenerateSettings, closed: bool = True) -> bool:
        """Whether images of resolved settings may enter a batch while others are decoded. closed: see Scheduler."""
        return self.kind.fuses(settings, closed)

    def batch_key(self, settings: GenerateSettings, seed: int, closed: bool = True) -> Hashable:
        """Equal for images of resolved settings that can be decoded in one batch."""
        return self.kind.batch_key(settings, seed, closed)

    def window(self, settings: GenerateSettings) -> int:
        """Places of a pass, at most, of images that are decoded `settings.batch` at a time."""
        return self.make_batch(settings).window

    def alone(self, settings: GenerateSettings) -> GenerateSettings:
        """Settings as they are for one image drawn alone: resolved, batch 1, and with the window of that where the
        rule's noise depends on the window."""
        settings = replace(self.resolve(settings), batch=1)
        if settings.window == 0 and settings.follows_window:
            settings = replace(settings, window=self.window(settings))
        return settings

    def bare_passes(self, labels: Tensor, settings: GenerateSettings) -> Iterator[object]:
        """The target passes of sequential decoding of labels int64 [B] and nothing else: constant tokens, results
        thrown away. What any decoding is measured against."""
        return self.kind.bare_passes(labels, settings.with_own(self.own))

    def fingerprint(self) -> str:
        """A digest of the model's files, so that samples of two states of one model are not mixed up; taken once, for
        large files take seconds."""
        if not self._known:
            self._known = "-".join(filter(None, (self.runner.fingerprint(), self.conditions.fingerprint())))
        return self._known

    def drafter_weights(self, drafter: Drafting) -> str | None:
        """Digest of a trained drafter's weights, None for drafters without."""
        path = self.resources.weights(drafter)
        return None if path is None else digest(path)

    def stream(
        self,
        classes: str | int | Sequence[str | int] = (),
        *,
        seed: int = 0,
        count: int | None = None,
        first_index: int = 0,
        settings: GenerateSettings | None = None,
        **options: object,
    ) -> Iterator[StreamEvent]:
        """Yield one event per target pass, batch after batch; arguments as in `generate`.

        A partial picture of an event is `pipe.preview(event.tokens[i], int(event.count[i]))`.
        """
        settings = self.resolve(settings_of(GenerateSettings, settings, options))
        asked = self.labels(classes, settings)
        for indices, labels in plan_batches(asked, count, seed, first_index, settings.batch)[1]:
            names, seconds = [self.classes[label] for label in labels], 0.0
            for images, batch in self.passes(labels, seed, indices, settings):
                yield StreamEvent.of(images, batch, names, batch.meter.total - seconds)
                seconds = batch.meter.total

    def passes(
        self, labels: Sequence[int], seed: int, indices: Sequence[int], settings: GenerateSettings
    ) -> Iterator[tuple[list[ImageRequest], Batch]]:
        """Decode images of a seed, `settings.batch` at a time; yields them after every target pass, in the order given,
        with their batch, whose `meter` counts what all of it takes. Raises what a pass fails with."""
        settings = self.resolve(settings)
        settings = replace(settings, batch=min(len(indices), settings.batch))
        images = [ImageRequest(*pair, settings.law) for pair in zip(labels, repeat(seed), indices)]
        scheduler = self._schedulers.pop(settings.batch, None) or Scheduler(self, settings.batch, closed=True)
        try:
            batch = scheduler.add(images, settings)
            batch.meter = Meter(self.target.device)
            while scheduler.busy:
                scheduler.step()
                if scheduler.broken is not None:
                    raise scheduler.broken
                yield images, batch
        finally:
            scheduler.clear()
            self._schedulers[settings.batch] = scheduler  # with what was laid out and measured for it

    def decoded(
        self, labels: Sequence[int], seed: int, indices: Sequence[int], settings: GenerateSettings
    ) -> tuple[list[ImageRequest], Batch]:
        """The same to the end, arguments as in `passes`."""
        (last,) = deque(self.passes(labels, seed, indices, settings), 1)
        return last

    def generate(
        self,
        classes: str | int | Sequence[str | int] = (),
        *,
        seed: int = 0,
        count: int | None = None,
        first_index: int = 0,
        indices: Sequence[int] | None = None,
        settings: GenerateSettings | None = None,
        progress: bool = False,
        take: Callable[[GeneratedImage], object] | None = None,
        **options: object,
    ) -> GenerateResult:
        """Generate `count` images (default: one per class given), cycling through `classes` (none given: all).

        Image `index` of `seed` is the same in any batch. indices: these images, in place of `count` from `first_index`;
        take: called with every image as soon as its batch is drawn, and the result then keeps none of them.
        `options` are fields of GenerateSettings.
        Raises UsageError for an unknown class or a setting out of range.
        """
        settings = self.resolve(settings_of(GenerateSettings, settings, options))
        together = settings.batch * (_WAVES if self.fuses(settings) else 1)  # a fused one takes more than it holds
        labels = self.labels(classes, settings)
        images, plan = plan_batches(labels, count, seed, first_index, together, indices)
        result = GenerateResult([], settings, [], dict.fromkeys(("total", "draft", "target", "decode"), 0.0))
        began, handed = time.perf_counter(), 0.0
        with tqdm(total=images * self.target.length, unit="token", disable=not progress) as bar:
            for image in self._images(plan, seed, result, bar):
                start = time.perf_counter()
                result.add(image)
                (result.images.append if take is None else take)(image)
                handed += time.perf_counter() - start
        result.seconds["total"] = time.perf_counter() - began - handed
        return result

    def _images(
        self, plan: Iterable[tuple[list[int], list[int]]], seed: int, result: GenerateResult, bar: Any
    ) -> Iterator[GeneratedImage]:
        """Draw the batches in turn and note in the result what they took."""
        settings, together = result.settings, max(result.settings.batch, torch.get_num_threads())
        for indices, labels in plan:
            before = bar.n
            for drawn in self.passes(labels, seed, indices, settings):
                bar.update(before + sum(image.count for image in drawn[0]) - bar.n)
            images, batch = drawn
            result.note(batch)
            for first in range(0, len(images), together):
                start = time.perf_counter()
                some = images[first : first + together]
                origins = [Origin(self.prompt_of(image.label), seed, image.index) for image in some]
                pictures = self.pictures([image.result for image in some], origins)
                result.seconds["decode"] += time.perf_counter() - start
                for image, picture in zip(some, pictures, strict=True):
                    yield GeneratedImage.of(self, image, picture)

    def decode(self, tokens: Tensor) -> Image.Image:
        """Tokens int64 [N] -> RGB picture. Equal tokens, equal bytes: see `pictures`."""
        return self.pictures([tokens])[0]

    def pictures(self, tokens: Sequence[Tensor], origins: Sequence[Origin] = ()) -> list[Image.Image]:
        """Tokens int64 [N] of several images -> RGB pictures. Each alone, in float32 and on one thread: sums are then
        added in one order, whatever the batch, the threads and the processes. Images are spread over the threads."""
        images = [(row, origins[i] if origins else None) for i, row in enumerate(tokens)]
        if self.target.device.type != "cpu":
            return [self.decode_here(*image) for image in images]
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(min(threads, len(tokens)), initializer=one_core) as pool:
            made = list(pool.map(lambda image: self.decode_here(*image), images))
        torch.set_num_threads(threads)  # the workers' setting would be that of threads made later
        return made

    @torch.no_grad()
    def decode_here(self, tokens: Tensor, origin: Origin | None = None) -> Image.Image:
        """Tokens int64 [N] -> RGB picture, in the calling thread. The bytes are those of `decode` where that thread has
        one core (`one_core`). origin: what it was drawn for, where that is known."""
        return self.runner.picture(tokens.to(self.target.device), origin)

    @torch.no_grad()
    def preview(self, tokens: Tensor, count: int, known: Tensor | None = None) -> Image.Image:
        """A picture of the first `count` tokens int64 [N], or of those that are `known`, bool [N]; the rest is grey."""
        pixels = self.tokenizer.decode(tokens[None].to(self.target.device))[0]
        rows, columns = self.grid
        first = torch.arange(rows * columns, device=pixels.device) < self.runner.codes_drawn(count)
        drawn = (first if known is None else known.to(pixels.device)).view(1, rows, columns).float()
        drawn = drawn.repeat_interleave(pixels.shape[1] // rows, 1).repeat_interleave(pixels.shape[2] // columns, 2)
        return to_picture(pixels * drawn + _GREY * (1 - drawn))


def shipped_models() -> list[str]:
    """Names of the shipped models that are installed."""
    return sorted(shipped_folders())


def model_folder(name_or_folder: str | Path) -> Path:
    """Folder of a shipped model or of a path. Raises UsageError naming what is shipped."""
    if (shipped := shipped_folders().get(str(name_or_folder))) is not None:
        return shipped
    folder = Path(name_or_folder)
    if os.path.isdir(folder):  # False, not an error, for a name that no file could have
        return folder
    is_file = os.path.isfile(folder)
    what, note = ("not a folder but a file:", convert_note(folder)) if is_file else ("unknown model", "")
    if str(name_or_folder) in missing_models():
        raise UsageError(f"model {brief(str(folder))} is not installed: {INSTALL}")
    known = f"shipped: {', '.join(shipped_models()) or 'none'}; or a folder with a config.json, or ORGANISATION/NAME"
    raise UsageError(f"{what} {brief(str(folder), 300)} ({known}){note}")


def is_hosted(name_or_folder: str | Path) -> bool:
    """In the Hugging Face layout: config.json has a model type, not a family; a pipeline of diffusers; or
    ORGANISATION/NAME as the hub writes it, where neither that nor a folder called ORGANISATION is here. `runs`, `out`
    and `checkpoints` are folders, here or not."""
    folder = Path(name_or_folder)
    if os.path.isfile(folder / PIPELINE):
        return True
    if os.path.isfile(folder / CONFIG):
        content = read_config(folder)
        return "model_type" in content and "family" not in content
    return on_hub(name_or_folder)
