"""Continuous batching: images enter and leave the slots of a batch between passes, each with settings of its own.

A lane decodes images that share a drafter (coupled Jacobi windows, or none) and a rule. An image's tokens depend on its
own class, seed, number and settings only, never on who shares the passes (in float32, but for near ties: see README).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.decoding.advance import Advance, SlotState
from bozzetto.decoding.loop import Clock
from bozzetto.decoding.trace import PassTrace
from bozzetto.laws.categorical import LawSettings
from bozzetto.laws.noise import STREAM_TOKEN, STREAM_VERIFY, fold, gumbel_rows, image_keys
from bozzetto.rules.base import Rule
from bozzetto.targets.base import Target

_AHEAD = 16  # positions whose noise is made at a time


@dataclass(frozen=True)
class ImageRequest:
    """One image to draw. label: class or caption number; seed, index: fix its noise; law: its own."""

    label: int
    seed: int
    index: int
    law: LawSettings


@dataclass
class SlotImage:
    """An image in a slot. count: committed tokens; margin: of its draws and coins so far (see DecodeState)."""

    request: ImageRequest
    count: int = 0
    passes: int = 0
    accepted: int = 0
    drafted: int = 0
    margin: float = float("inf")
    held: int = 0  # drafts that stand behind the last committed token
    noise_until: int = 0
    trace: PassTrace = field(default_factory=PassTrace)
    tokens: Tensor | None = None  # int64 [N], once it is finished
    partial: Tensor | None = None  # whatever there is before, where a batch says it
    known: Tensor | None = None  # bool [N], its places where they do not come in order
    cancelled: bool = False


Width = Callable[[int], int]
Run = Callable[[Any, int, int, list[Tensor]], Sequence[Tensor]]  # (session, places, furthest count, slot tensors)


class SlotLane:
    """Slots that are decoded together.

    width: places per pass for a number of images, at most `widest`; with a rule that is not seed-exact it has to be
    constant, because its noise depends on it. If it has a method `note`, it is told what each pass committed. guided:
    whether images may have guidance; filtered: whether they may have a top-k, a top-p or no temperature; filler: see
    `Advance`.
    """

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
        self.target, self.rule, self.slots, self.width = target, rule, slots, width
        self.widest, self.guided, self.filtered, self.filler = widest, guided, filtered, filler
        self.images: list[SlotImage | None] = []
        self.state: SlotState | None = None
        self.numbers = torch.arange(target.vocab, device=target.device)
        self.ring = 2 * widest + 2 * _AHEAD
        self.step_of: Any = getattr(target, "step", None)  # compiled passes
        self.draw_noise: Callable[[Tensor, Tensor], Tensor] = gumbel_rows
        if self.step_of is not None:
            self.draw_noise = self.step_of.noise
        self.runs: dict[int, Run] = {}
        self.clock = Clock(target.device)

    @property
    def active(self) -> int:
        """Images in slots."""
        return sum(image is not None for image in self.images)

    @property
    def free(self) -> int:
        return self.slots - self.active

    def admit(self, requests: Sequence[ImageRequest]) -> list[SlotImage]:
        """Give slots to images. Raises ValueError for more than are free, or laws that the lane is not for."""
        if len(requests) > self.free:
            raise ValueError(f"{len(requests)} images for {self.free} free slots")
        for request in requests:
            self._check(request.law)
        images = [SlotImage(request) for request in requests]
        if images:
            self._resize(self.active + len(images))
            open_slots = [i for i, image in enumerate(self.images) if image is None]
            self._place(images, open_slots[: len(images)])
        return images

    def _check(self, law: LawSettings) -> None:
        if law.guided and not self.guided:
            raise ValueError("this lane is for images without guidance")
        if not self.filtered and (law.top_k or law.top_p != 1 or not law.temperature):
            raise ValueError("this lane is for images without top-k, top-p and greedy choices")

    @torch.no_grad()
    def _resize(self, wanted: int) -> None:
        """Have a batch of at least `wanted` rows, or of few more than that: images keep their order."""
        size = 1 << max(0, wanted - 1).bit_length()
        if size == len(self.images):
            return
        going = [i for i, image in enumerate(self.images) if image is not None]
        rows = torch.tensor([*going, *[0] * (size - len(going))], dtype=torch.int64, device=self.target.device)
        if self.state is None:
            self.session = self.target.begin(torch.zeros_like(rows), self.guided, self.widest)
            self.state = self._blank(size, self.widest)
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
            copies, room = 2 if self.guided else 1, self.target.length + self.widest
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
            tokens=whole(size, self.target.length + self.widest),
            laws=torch.zeros(laws, device=device),
            kept=torch.zeros(kept, dtype=kind, device=device),
        )

    @torch.no_grad()
    def _place(self, images: Sequence[SlotImage], slots: Sequence[int]) -> None:
        s, device = self.state, self.target.device
        assert s is not None
        rows = torch.tensor(slots, dtype=torch.int64, device=device)
        asked = [image.request for image in images]
        self.session.admit(rows, torch.tensor([r.label for r in asked], dtype=torch.int64, device=device))
        for name in ("inputs", "count", "drafted", "passes", "laws"):
            getattr(s, name)[rows] = 0
        for slot, image in zip(slots, images, strict=True):
            request, law = image.request, image.request.law
            index = torch.tensor([request.index], dtype=torch.int64, device=device)
            s.keys[slot] = image_keys(request.seed, STREAM_VERIFY, index)[0]
            s.guidance[slot], s.temperature[slot] = law.guidance, law.temperature or 1.0
            s.top_k[slot], s.top_p[slot] = law.top_k if law.temperature else -1, law.top_p
            self.images[slot] = image
        self.noise_keys = self._noise_keys()

    def _noise_keys(self) -> Tensor:
        asked = [(0, 0) if image is None else (image.request.seed, image.request.index) for image in self.images]
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
            self.state.noise[row, position % self.ring] = self._draw(keys)

    def _draw(self, keys: Tensor) -> Tensor:
        """int64 [n] -> float32 [n, V]."""
        return self.draw_noise(keys, self.numbers)

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
            advance = Advance(self.rule, self.target.length, width, self.filtered, self.filler)
            made = functools.partial(_eager, advance) if self.step_of is None else self.step_of.slots(advance)
            self.runs[width] = made
        return self.runs[width]

    @torch.no_grad()
    def step(self) -> list[SlotImage]:
        """One target pass; returns the images that it finished, which leave their slots."""
        s = self.state
        if s is None or not self.active:
            return []
        self.clock.resume()
        width = min(self.width(self.active), self.widest)
        self._fit(width)
        self._fill_noise(width)
        self.clock.lap("draft")
        furthest = max(image.count for image in self.images if image is not None)
        report = s.take(
            self._run(width)(self.session, width, furthest, s.tensors())
        ).tolist()  # the one synchronisation
        self.clock.lap("target")
        done = self._note(report, width)
        self.clock.lap("draft")
        return done

    @torch.no_grad()
    def time_pass(self, size: int, width: int, rounds: int = 7) -> float:
        """Seconds of a pass of `width` places for `size` images (a power of two) halfway through, the quickest of some.
        The lane's own images are not touched."""
        middle = self.target.length // 2
        labels = torch.zeros(size, dtype=torch.int64, device=self.target.device)
        session, state = self.target.begin(labels, self.guided, self.widest), self._blank(size, width)
        run, times, clock = self._run(width), [], Clock(self.target.device)
        for _ in range(2 + rounds):
            state.count = torch.full_like(state.count, middle)
            clock.resume()
            before = clock.parts["target"]
            state.take(run(session, width, middle, state.tensors())).tolist()
            clock.lap("target")
            times.append(clock.parts["target"] - before)
        return min(times[2:])

    def _note(self, report: list[list[float]], width: int) -> list[SlotImage]:
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
            for name, value in (("committed", committed), ("accepted", accepted), ("drafted", drafted), ("spent", 0.0)):
                getattr(image.trace, name).append(value)
            if image.count == self.target.length:
                image.tokens = self.state.tokens[slot, : self.target.length].clone()
                self._leave(slot)
                done.append(image)
        if hasattr(self.width, "note"):
            self.width.note(width, report[0], [image is not None for image in held])
        return done

    def _leave(self, slot: int) -> None:
        assert self.state is not None
        self.images[slot] = None
        self.state.count[slot] = 0

    def cancel(self, image: SlotImage) -> None:
        """Free the slot of an image that is not wanted any more."""
        for slot, other in enumerate(self.images):
            if other is image:
                self._leave(slot)

    def tokens_of(self, image: SlotImage) -> Tensor:
        """What an image has so far, int64 [N], zero behind its `count` tokens."""
        if image.tokens is not None:
            return image.tokens
        assert self.state is not None
        slot = next(slot for slot, other in enumerate(self.images) if other is image)
        place = torch.arange(self.target.length, device=self.target.device)
        return torch.where(place < image.count, self.state.tokens[slot, : self.target.length], 0)

    @property
    def places(self) -> int:
        """Of the last pass."""
        return self.widest if self.state is None else self.state.inputs.shape[1]

    def clear(self) -> None:
        """Free all slots."""
        for slot, image in enumerate(self.images):
            if image is not None:
                self._leave(slot)

    def shrink(self) -> None:
        """Give up rows that nobody needs, where that makes passes of half the size or less."""
        if self.active and 2 * (1 << max(0, self.active - 1).bit_length()) <= len(self.images):
            self._resize(self.active)
            self.noise_keys = self._noise_keys()


def _eager(advance: Advance, session: Any, width: int, furthest: int, held: list[Tensor]) -> tuple[Tensor, ...]:
    """A pass and what follows it, of a target that is not compiled."""
    scores = session.score(held[0].contiguous(), held[1], furthest)
    assert scores.logits is not None
    return advance(scores.logits, scores.features, *held)
