"""What adapters of transformers models share: prompts as conditions, and the model's own decoder run by our loop.

No modelling code is copied: the decoder of an unmodified transformers model is called with embeddings, explicit
positions, an additive mask and a cache of ours (`SlotCache`). A sequence is its prompt and then the image tokens; the
prompt's last token is input 0, image token i - 1 is input i, so input i of row r lies in slot lead[r] + i, where
lead[r] is one less than the number of the prompt's tokens. Rows of different prompts are ragged, nothing is padded.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.adapters import layers
from bozzetto.adapters.layers import SlotCache, cache_argument
from bozzetto.drafts import CODES, Layout
from bozzetto.errors import UsageError
from bozzetto.runtime.engine import LinearMap
from bozzetto.runtime.native import need_kernels
from bozzetto.targets.base import Scores
from bozzetto.targets.decoder import Inputs, OwnDecoder, Places, let_in
from bozzetto.targets.layers import additive, copied, stacked, visible, whole_blocks

_WHOLE = 8  # slots of a row are a multiple of this
_NEVER = -1e9  # a logit that no temperature makes possible; finite, so that guidance can subtract two of them


@dataclass(frozen=True)
class Prompt:
    """Token numbers of a prompt up to the one before the first image token, and of what stands for no prompt."""

    given: tuple[int, ...]
    without: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.given or not self.without:
            raise UsageError("a prompt has one token or more")


@dataclass(frozen=True)
class Shape:
    """What drafters ask of a target's config. vocab: V; length: N; dim: of hidden states and token embeddings; columns:
    tokens in a row of the picture (0: not said)."""

    vocab: int
    length: int
    dim: int
    columns: int = 0

    @property
    def grid(self) -> int:
        """Tokens in a row, else the side of the smallest square that holds all tokens."""
        return self.columns or math.isqrt(self.length - 1) + 1


class PromptedTarget:
    """A target whose conditions are prompts. What is embedded and what is read out is said below.

    body: the transformers decoder (inputs_embeds -> last_hidden_state), in evaluation mode and in the dtype to compute
    in; length: tokens of a picture. Labels are numbers of the prompts that `add` was given.
    """

    own = False  # whether our kernels run the decoder, else transformers does
    numbers: Sequence[int] = ()  # words that stand for image tokens
    prompts: list[Prompt]
    decoder: OwnDecoder  # with turns float32 [positions, hd/2, 2], where our kernels run it
    turns: Tensor

    def __init__(self, body: Any, length: int):
        if length < 1:
            raise UsageError(f"a picture of {length} image tokens is not allowed")
        self.body, self.length, self.word_rows = body, length, body.get_input_embeddings()
        self.layers, self.context = body.config.num_hidden_layers, body.config.max_position_embeddings
        self.cache_name = cache_argument(body.forward)
        some = next(body.parameters())
        self.device, self.dtype = some.device, some.dtype
        self.prompts = []

    def why_not(self) -> str:
        """Why our kernels cannot run it; "": they can, where they compute at all."""
        return layers.why_not(self.body)

    @torch.no_grad()
    def owned(self, network: Any = None) -> Any:
        """The same target with passes of our kernels, that of the same prompts; weights are laid out once for all
        targets of this decoder, which gives up its own. Raises UsageError where there are no kernels for it."""
        if why := self.why_not():
            raise UsageError(f"compile is not allowed here: it is run by transformers (off): {why}")
        need_kernels(self.dtype, self.device)
        other = copy.copy(self)
        other.own = True
        other.decoder, other.turns = layers.own_decoder(self.body)
        return other

    def cache(self, rows: int, slots: int) -> Any:
        """For R sequences."""
        if self.own:
            return self.decoder.cache(Places(rows, 1, slots, 0, self.turns))
        return SlotCache(self.layers, rows, slots)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [B, W, d] of image tokens [B, W, ...]."""
        raise NotImplementedError

    def read_out(self, hidden: Tensor, number: Tensor) -> Scores:
        """What a pass gives, from hidden states [R, W, d] at inputs `number` int64 [R, W] of the image."""
        raise NotImplementedError

    def words(self, tokens: Tensor) -> Tensor:
        """Embeddings [..., d] of a prompt's tokens int64 [...]."""
        return self.word_rows(tokens)

    def places(self, lead: Tensor, number: Tensor) -> Tensor:
        """Positions that the decoder is told of inputs `number` int64 [R, W] of the image (below 0: of the prompt), in
        rows with lead int64 [R] slots before input 0: [R, W], or whatever the decoder takes for several axes."""
        return lead[:, None] + number

    def add(self, prompt: Prompt, label: int | None = None) -> int:
        """A label for a prompt, or another prompt for a label; equal prompts have equal labels, unless one is the next
        number. Raises UsageError for one that does not fit."""
        if label is None and prompt in self.prompts:
            return self.prompts.index(prompt)
        most, words = self.context - self.length, self.word_rows.num_embeddings
        for tokens in (prompt.given, prompt.without):
            if not 0 <= min(tokens) <= max(tokens) < words:
                raise UsageError(
                    f"token {max(tokens)} of a prompt is not allowed: the model has {words} words, so that "
                    "this tokenizer is another model's"
                )
            if len(tokens) > most:
                raise UsageError(
                    f"prompt of {len(tokens)} tokens is not allowed: at most {most} fit beside {self.length} image "
                    f"tokens (the model's context is {self.context}); say it in fewer words"
                )
        if label is None or label == len(self.prompts):
            self.prompts.append(prompt)
            return len(self.prompts) - 1
        self.prompts[label] = prompt
        return label

    @torch.no_grad()
    def begin(self, labels: Tensor, guided: bool, max_width: int) -> PromptedSession:
        """labels int64 [B]: numbers of prompts."""
        session = PromptedSession(self, self.conditions_of(labels, guided), 2 if guided else 1, max_width)
        session.fill()
        return session

    def conditions_of(self, labels: Tensor, guided: bool) -> list[tuple[int, ...]]:
        """The prompts' tokens of each of R rows."""
        if not self.prompts:
            raise UsageError("this target draws prompts: give it one with target.add")
        chosen = [self.prompts[label] for label in labels.tolist()]
        return [p.given for p in chosen] + ([p.without for p in chosen] if guided else [])


class PromptedCodes(PromptedTarget):
    """A prompted target that draws codes.

    embedding: rows [V, d] that stand for them; head: a function, or rows [V, d]; numbers: their words in the model's
    vocabulary, where they have some; line: codes in a row of a picture whose rows end in a word of their own (0: none
    do); offsets: positions of inputs 0, 1, ... after that of input 0, int64 [axes, 1 + N], where the decoder's are not
    0, 1, 2, ...

    The grid decides where a row ends and not the model: that word is code V - 1, certain there and impossible
    elsewhere, so that every drafter has it for nothing. The head has no row for it.
    """

    tokens = CODES

    @torch.no_grad()
    def __init__(
        self,
        body: Any,
        embedding: Tensor,
        head: Any,
        length: int,
        numbers: Sequence[int] = (),
        line: int = 0,
        offsets: Tensor | None = None,
    ):
        super().__init__(body, length)
        self.embedding, self.head, self.numbers, self.line = embedding, head, list(numbers), line
        self.vocab, self.offsets = len(embedding), None if offsets is None else offsets.to(self.device)
        self.config = Shape(self.vocab, length, body.config.hidden_size)

    def gather_here(self) -> None:
        """Bring the rows that are looked up and read out to where tokens are, from wherever a device map put them."""
        self.embedding = self.embedding.to(self.device)
        if isinstance(self.head, Tensor):
            self.head = self.head.to(self.device)

    def why_not(self) -> str:
        return super().why_not() if self.offsets is None else "its positions have several axes"

    def owned(self, network: Any = None) -> Any:
        other = super().owned(network)
        whole = isinstance(self.head, Tensor)
        other.head = LinearMap(self.head, None, self.dtype).exact if whole else layers.by_kernels(self.head, self.dtype)
        return other

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embedding[tokens]

    def places(self, lead: Tensor, number: Tensor) -> Tensor:
        if self.offsets is None:
            return super().places(lead, number)
        at = number.clamp(0, self.length)  # of slots past the end of the picture nothing is read
        return lead[:, None] + torch.where(number > 0, self.offsets[:, at], number)

    def read_out(self, hidden: Tensor, number: Tensor) -> Scores:
        return Scores(self.logits(hidden, number), hidden)

    def logits(self, hidden: Tensor, position: Tensor) -> Tensor:
        """float32 [R, W, V] from hidden states [R, W, d] at inputs `position` int64 [R, W]."""
        free = F.linear(hidden, self.head) if isinstance(self.head, Tensor) else self.head(hidden).to(hidden.device)
        free = free.float()
        if not self.line:
            return free
        ends = (position % (self.line + 1) == self.line)[..., None]  # the law of token i is at input i
        last = torch.where(ends, 0.0, _NEVER).to(free.dtype)
        return torch.cat([free.masked_fill(ends, _NEVER), last], -1)


def words_target(
    body: Any, head: Tensor, codes: Sequence[int], rows: int, columns: int, end: int | None = None
) -> PromptedCodes:
    """A target whose image tokens are words. head: rows of the vocabulary; codes: the words, in the order of the
    codebook; rows, columns: of the picture in codes; end: the word that ends a row, where one does."""
    numbers, line = [*codes], 0
    if end is not None:
        numbers, line = [*codes, end], columns
    embedding, length = gathered(numbers, body.get_input_embeddings().weight), rows * (columns + bool(line))
    return PromptedCodes(body, embedding, gathered(codes, head), length, numbers, line)


def codes_of(model: Any) -> list[int]:
    """Words of the image tokens of a model of transformers that maps them, in the order of the codebook."""
    codes = model.model.vocabulary_mapping.img2bpe
    return [codes[i] for i in range(len(codes))]


def gathered(numbers: Sequence[int], table: Tensor) -> Tensor:
    """The rows of a table [W, d] that stand for image tokens, [V, d]."""
    return table.detach()[torch.tensor(numbers, device=table.device)]


@dataclass
class PromptedSession:
    """Cache and conditions of R = copies * B sequences (targets/base.py)."""

    target: PromptedTarget
    prompts: list[tuple[int, ...]]
    copies: int
    max_width: int
    lead: Tensor = field(init=False)  # int64 [R], slots before that of input 0
    cache: Any = field(init=False)  # SlotCache, or one of ours
    condition: Tensor = field(init=False)  # [R, 1, d], input 0

    def __post_init__(self) -> None:
        t = self.target
        self.lead = torch.tensor([len(p) - 1 for p in self.prompts], device=t.device)
        slots = -(-(int(self.lead.max()) + t.length + self.max_width) // _WHOLE) * _WHOLE
        self.cache = t.cache(len(self.prompts), slots)
        last = torch.tensor([p[-1] for p in self.prompts], device=t.device)
        self.condition = t.words(last)[:, None].to(t.dtype)

    def fill(self) -> Tensor | None:
        """Run all prompt tokens but the last through the layers; their states [R, n, d] after the last norm, or None
        where there are none. What shorter prompts leave behind their end is written over before anything can see it."""
        t, longest = self.target, int(self.lead.max())
        if not longest:
            return None
        ids = torch.tensor([[*p[:-1], *[p[-1]] * (longest + 1 - len(p))] for p in self.prompts], device=t.device)
        return self._run(t.words(ids).to(t.dtype), -self.lead, 0)

    def _run(self, x: Tensor, start: Tensor, furthest: int | None, layout: Layout | None = None) -> Tensor:
        """One pass of the decoder over inputs x [R, W, d] from number `start` int64 [R] on, to states [R, W, d] after
        the last norm. furthest: the last slot that one begins in, where the host knows it."""
        t, width, begin = self.target, x.shape[1], self.lead + start
        if t.own:
            return self.cache.run(Inputs(x), width, begin, furthest, layout)[0]
        reach, past = self.cache.slots, width if layout is None else layout.sees.shape[-1]
        if furthest is not None:
            reach = whole_blocks(furthest + past, reach) if furthest else past
        run = torch.arange(width, device=x.device)[None]
        hop, deep = (run, run) if layout is None else (layout.slot, layout.depth)
        first = torch.arange(len(x), device=x.device)[:, None] * self.cache.slots
        self.cache.flat, self.cache.reach = (first + begin[:, None] + hop).flatten(), reach
        mask = additive(visible(torch.arange(reach, device=x.device), begin, width, layout), x.dtype)[:, None]
        given = {"position_ids": t.places(self.lead, start[:, None] + deep), t.cache_name: self.cache}
        out = t.body(inputs_embeds=x, attention_mask=mask, use_cache=True, **given)
        return out.last_hidden_state.to(x.device)

    @torch.no_grad()
    def score(self, inputs: Tensor, start: Tensor, furthest: int | None = None, layout: Layout | None = None) -> Scores:
        t, width, start = self.target, inputs.shape[1], start.repeat(self.copies)
        layout = layout and layout.copied(self.copies)
        deep = torch.arange(width, device=inputs.device)[None] if layout is None else layout.depth
        number = start[:, None] + deep  # of the input among the image's
        x = torch.where(number[..., None] == 0, self.condition, copied(t.embed(inputs), self.copies))
        last = None if furthest is None else int(self.lead.max()) + furthest
        return t.read_out(self._run(x, start, last, layout), number)

    @torch.no_grad()
    def compact(self, path: Tensor, start: Tensor) -> None:
        self.cache.compact(copied(path, self.copies), self.lead + start.repeat(self.copies))

    def keep(self, rows: Tensor) -> None:
        rows = self._every(rows)
        self.prompts = [self.prompts[i] for i in rows.tolist()]
        self.lead, self.condition = self.lead[rows], self.condition[rows]
        self.cache.keep(rows)

    def join(self, other: PromptedSession) -> None:
        let_in(self.cache, other.cache, self.copies)
        mine, theirs = (len(session.prompts) // self.copies for session in (self, other))
        both = [(self.prompts[i * mine :][:mine], other.prompts[i * theirs :][:theirs]) for i in range(self.copies)]
        self.prompts = [prompt for pair in both for part in pair for prompt in part]
        self.lead = stacked(self.lead, other.lead, self.copies)
        self.condition = stacked(self.condition, other.condition, self.copies)

    @torch.no_grad()
    def admit(self, rows: Tensor, labels: Tensor) -> None:
        every, t = self._every(rows), self.target
        fresh = t.begin(labels, self.copies > 1, self.max_width)
        self.cache.take(fresh.cache, every)
        self.lead[every], self.condition[every] = fresh.lead, fresh.condition
        for row, prompt in zip(every.tolist(), fresh.prompts, strict=True):
            self.prompts[row] = prompt

    def _every(self, rows: Tensor) -> Tensor:
        """Batch rows -> rows of sequences."""
        batch = len(self.lead) // self.copies
        return torch.cat([rows + i * batch for i in range(self.copies)])
