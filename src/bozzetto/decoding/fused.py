"""Continuous batching: images enter and leave the slots of a batch between passes, each with settings of its own.

A batch decodes images that share a drafter (coupled Jacobi windows, or none) and a rule. An image's tokens depend on
its own class, seed, number and settings only, never on who shares the passes (in float32, but for near ties: README).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.common.written import spelled
from bozzetto.decoding.advance import Advance, SlotState
from bozzetto.decoding.batch import Batch
from bozzetto.decoding.images import CANCELLED, ImageRequest
from bozzetto.decoding.meter import now
from bozzetto.decoding.widths import MeasuredWidth, kept_seconds
from bozzetto.laws.categorical import LawSettings
from bozzetto.laws.noise import STREAM_TOKEN, STREAM_VERIFY, fold, gumbel_rows, image_keys
from bozzetto.rules.base import Rule
from bozzetto.runtime.graphs import digest_of
from bozzetto.runtime.kept import cache_folder
from bozzetto.runtime.laws import own_gumbel_rows
from bozzetto.settings import GenerateSettings
from bozzetto.targets.base import Target

_AHEAD = 16  # positions whose noise is made at a time


Width = Callable[[int], int]
Run = Callable[[Any, int, int, list[Tensor]], Sequence[Tensor]]  # (session, places, furthest count, SlotState's)


class FusedBatch(Batch):
    """Slots that are decoded together.

    width: places per pass for a number of images, at most `widest`; with a rule that is not seed-exact it has to be
    constant, because its noise depends on it. A MeasuredWidth is told what each pass committed. guided: whether images
    may have guidance; filtered: whether they may have a top-k, a top-p or no temperature; filler: see `Advance`.
    """

    prepared = True

    def __init__(
        self,
        target: Target,
        rule: Rule,
        slots: int,
        width: Width,
        widest: int,
        guided: bool,
        filtered: bool,
        filler: Any = None,
    ):
        super().__init__(target, slots, widest)
        self.rule, self.width = rule, width
        self.guided, self.filtered, self.filler = guided, filtered, filler
        self.images: list[ImageRequest | None] = []
        self.state: SlotState | None = None
        self.numbers = torch.arange(target.vocab, device=target.device)
        self.ring = 2 * widest + 2 * _AHEAD
        self.runs: dict[int, Run] = {}

    @property
    def active(self) -> int:
        return sum(image is not None for image in self.images)

    @property
    def free(self) -> int:
        return self.slots - self.active

    def admit(self, images: Sequence[ImageRequest]) -> None:
        """Give slots to images. Raises ValueError for more than are free, or laws that the batch is not for."""
        if len(images) > self.free:
            raise ValueError(f"{len(images)} images for {self.free} free slots")
        for image in images:
            self._check(image.law)
        if images:
            self._resize(self.active + len(images))
            open_slots = [i for i, image in enumerate(self.images) if image is None]
            self._place(images, open_slots[: len(images)])

    def _check(self, law: LawSettings) -> None:
        if law.guided and not self.guided:
            raise ValueError("this batch is for images without guidance")
        if not self.filtered and law.filtered:
            raise ValueError("this batch is for images without top-k, top-p and greedy choices")

    @torch.no_grad()
    def _resize(self, wanted: int) -> None:
        """Have a batch of at least `wanted` rows, or of few more than that: images keep their order."""
        size = 1 << max(0, wanted - 1).bit_length()
        if size == len(self.images):
            return
        going = [i for i, image in enumerate(self.images) if image is not None]
        rows = torch.tensor([*going, *[0] * (size - len(going))], dtype=torch.int64, device=self.target.device)
        if self.state is None:
            self.session = self.target.begin(torch.zeros_like(rows), self.guided, self.window)
            self.state = self._blank(size, self.window)
        else:
            self.session.keep(rows)
            self.state = SlotState(*(part[rows] for part in self.state.tensors()))
        self.images = [*(self.images[i] for i in going), *[None] * (size - len(going))]

    def _blank(self, size: int, places: int) -> SlotState:
        device, vocab = self.target.device, self.target.vocab
        whole = functools.partial(torch.zeros, dtype=torch.int64, device=device)
        ones = torch.ones(size, device=device)
        laws = (size, places - 1, vocab) if self.rule.needs_law and places > 1 else (size, 1, 1)
        kept, kind = (size, 1, 1, 1), torch.float32
        if self.filler is not None:
            copies, room = 2 if self.guided else 1, self.target.length + self.window
            kept, kind = (size, copies, room, self.filler.narrow), self.filler.of_token.dtype
        return SlotState(
            inputs=whole(size, places),
            count=whole(size),
            drafted=whole(size),
            guidance=ones,
            temperature=ones.clone(),
            top_k=whole(size),
            top_p=ones.clone(),
            keys=whole(size),
            passes=whole(size),
            noise=torch.zeros(size, self.ring, vocab, device=device),
            tokens=whole(size, self.target.length + self.window),
            laws=torch.zeros(laws, device=device),
            kept=torch.zeros(kept, dtype=kind, device=device),
        )

    @torch.no_grad()
    def _place(self, images: Sequence[ImageRequest], slots: Sequence[int]) -> None:
        s, device = self.state, self.target.device
        assert s is not None
        rows = torch.tensor(slots, dtype=torch.int64, device=device)
        self.session.admit(rows, torch.tensor([i.label for i in images], dtype=torch.int64, device=device))
        for name in ("inputs", "count", "drafted", "passes", "laws"):
            getattr(s, name)[rows] = 0
        for slot, image in zip(slots, images, strict=True):
            law, index = image.law, torch.tensor([image.index], dtype=torch.int64, device=device)
            s.keys[slot] = image_keys(image.seed, STREAM_VERIFY, index)[0]
            s.guidance[slot], s.temperature[slot] = law.guidance, law.temperature or 1.0
            s.top_k[slot], s.top_p[slot] = law.top_k if law.temperature else -1, law.top_p
            self.images[slot] = image
        self.noise_keys = self._noise_keys()

    def _noise_keys(self) -> Tensor:
        asked = [(0, 0) if image is None else (image.seed, image.index) for image in self.images]
        keys = [image_keys(seed, STREAM_TOKEN, torch.tensor([i], device=self.target.device)) for seed, i in asked]
        return torch.cat(keys)

    def _fill_noise(self, width: int) -> None:
        """Make the noise that this pass and its next drafts can ask for."""
        rows: list[int] = []
        positions: list[int] = []
        for slot, image in enumerate(self.images):
            if image is None:
                continue
            needed = min(image.count + 2 * width, self.target.length + _AHEAD)
            while image.noise_until < needed:
                rows += [slot] * _AHEAD
                positions += range(image.noise_until, image.noise_until + _AHEAD)
                image.noise_until += _AHEAD
        if rows:
            assert self.state is not None
            row, position = torch.tensor([rows, positions], dtype=torch.int64, device=self.target.device)
            keys = fold(self.noise_keys[row], position)
            own = self.target.own
            fresh = own_gumbel_rows(keys, self.target.vocab) if own else gumbel_rows(keys, self.numbers)
            self.state.noise[row, position % self.ring] = fresh

    def _fit(self, width: int) -> None:
        """Have inputs of `width` places. Drafts beyond are dropped; places without one only fill up."""
        s = self.state
        assert s is not None
        more = width - s.inputs.shape[1]
        if not more:
            return
        s.inputs = F.pad(s.inputs, (0, more)).contiguous()
        s.drafted = s.drafted.clamp_max(width - 1)
        if self.rule.needs_law and width > 1:
            s.laws = F.pad(s.laws, (0, 0, 0, more)).contiguous()
        for image in self.images:
            if image is not None:
                image.held = min(image.held, width - 1)

    def _run(self, width: int) -> Run:
        """What runs passes of `width` places and what follows them."""
        if width not in self.runs:
            advance = Advance(self.rule, self.target.length, width, self.filtered, self.filler, self.target.own)
            self.runs[width] = functools.partial(_run, advance)
        return self.runs[width]

    @torch.no_grad()
    def step(self) -> list[ImageRequest]:
        s = self.state
        if s is None or not self.active:
            return []
        self.meter.resume()
        width = min(self.width(self.active), self.window)
        self._fit(width)
        self._fill_noise(width)
        self.meter.lap("draft")
        furthest = max(image.count for image in self.images if image is not None)
        report = s.take(
            self._run(width)(self.session, width, furthest, s.tensors())
        ).tolist()  # the one synchronisation
        seconds = self.meter.lap("target")
        self.places, self.meter.passes = width, self.meter.passes + 1
        done = self._note(report, width, seconds)
        self.meter.lap("draft")
        return done

    @torch.no_grad()
    def time_pass(self, size: int, width: int, rounds: int = 7) -> float:
        """Seconds of a pass of `width` places for `size` images (a power of two) halfway through, the quickest of some.
        The batch's own images are not touched."""
        middle = self.target.length // 2
        labels = torch.zeros(size, dtype=torch.int64, device=self.target.device)
        session, state = self.target.begin(labels, self.guided, self.window), self._blank(size, width)
        run, times, device = self._run(width), [], self.target.device
        for _ in range(2 + rounds):
            state.count = torch.full_like(state.count, middle)
            began = now(device)
            state.take(run(session, width, middle, state.tensors())).tolist()
            times.append(now(device) - began)
        return min(times[2:])

    def _note(self, report: list[list[float]], width: int, seconds: float) -> list[ImageRequest]:
        """Bookkeeping of a pass; finished images leave."""
        done, held = [], list(self.images)
        assert self.state is not None
        for slot, image in enumerate(self.images):
            if image is None:
                continue
            committed, accepted, margin = int(report[0][slot]), int(report[1][slot]), report[2][slot]
            drafted, image.held = min(image.held, self.target.length - image.count), width - 1
            image.count, image.passes = image.count + committed, image.passes + 1
            image.accepted, image.drafted = image.accepted + accepted, image.drafted + drafted
            image.margin = min(image.margin, margin)
            for part, value in zip(vars(image.trace).values(), (committed, accepted, drafted, 0.0), strict=True):
                part.append(value)
            if image.count == self.target.length:
                image.tokens = self.state.tokens[slot, : self.target.length].clone()
                self._leave(slot)
                done.append(image)
        if isinstance(self.width, MeasuredWidth):
            self.width.note(width, report[0], [image is not None for image in held], seconds)
        return done

    def _leave(self, slot: int) -> None:
        assert self.state is not None
        self.images[slot] = None
        self.state.count[slot] = 0

    def cancel(self, image: ImageRequest) -> None:
        """Its slot is free at once."""
        image.status = CANCELLED
        for slot, other in enumerate(self.images):
            if other is image:
                self._leave(slot)

    def tokens_of(self, image: ImageRequest) -> Tensor:
        if image.tokens is not None:
            return image.tokens
        assert self.state is not None
        slot = next(slot for slot, other in enumerate(self.images) if other is image)
        place = torch.arange(self.target.length, device=self.target.device)
        return torch.where(place < image.count, self.state.tokens[slot, : self.target.length], 0)

    def clear(self) -> None:
        for slot, image in enumerate(self.images):
            if image is not None:
                self._leave(slot)

    def shrink(self) -> None:
        """Give up rows that nobody needs, where that makes passes of half the size or less."""
        if self.active and 2 * (1 << max(0, self.active - 1).bit_length()) <= len(self.images):
            self._resize(self.active)
            self.noise_keys = self._noise_keys()


def _run(advance: Advance, session: Any, width: int, furthest: int, state: list[Tensor]) -> tuple[Tensor, ...]:
    """A pass and what follows it. state: the tensors of SlotState."""
    s = SlotState(*state)
    scores = session.score(s.inputs.contiguous(), s.count, furthest)
    assert scores.logits is not None
    return advance(scores.logits, scores.features, *state)


def fuses(settings: GenerateSettings) -> bool:
    """Whether a fused batch can do what resolved settings ask for."""
    return settings.tv_budget is None and settings.drafter.fused and settings.verifier.fused


def fused_key(settings: GenerateSettings, length: int, dtype: str) -> tuple[Any, ...]:
    """What images that share a fused batch have in common. length: tokens of an image; dtype: of passes."""
    kind = settings.compile, settings.deterministic, spelled(settings.drafter), settings.verifier
    return *kind, _widest(settings, length, dtype), settings.any_window, settings.law.guided, settings.law.filtered


def _widest(settings: GenerateSettings, length: int, dtype: str) -> int:
    """Places at most. Without a window of their own the tokens of a seed-exact image do not depend on it: it may follow
    the load, up to what suits one image."""
    return settings.window_for(1 if settings.any_window else settings.batch, length, dtype)


def make_fused(settings: GenerateSettings, target: Any, dtype: str, filler: Any) -> FusedBatch:
    """The batch of resolved settings. dtype: of the target's passes; filler: of their drafter, for this target."""
    law, window = settings.law, _widest(settings, target.length, dtype)
    batch = FusedBatch(
        target, settings.verifier, settings.batch, lambda images: window, window, law.guided, law.filtered, filler
    )
    if settings.any_window:
        # Where the seconds of passes are kept, if anywhere; they depend on shapes, not on weights.
        key, folder = fused_key(settings, target.length, dtype), cache_folder()
        name = f"times-{digest_of(target.config, dtype, str(target.device), key)}.json"
        seconds = kept_seconds(None if folder is None else folder / name, batch.time_pass)
        batch.width = MeasuredWidth(seconds, window, 2 if law.guided else 1)
    return batch
