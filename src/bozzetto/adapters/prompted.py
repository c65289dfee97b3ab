"""What adapters of transformers models share: prompts as conditions, and the model's own decoder run by our loop.

No modelling code is copied: the decoder of an unmodified transformers model is called with embeddings, explicit
positions, an additive mask and a cache of ours (`SlotCache`). A sequence is its prompt and then the image tokens; the
prompt's last token is input 0, image token i - 1 is input i, so input i of row r lies in slot lead[r] + i, where
lead[r] is one less than the number of the prompt's tokens. Rows of different prompts are ragged, nothing is padded.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from bozzetto.drafts import CODES, Layout
from bozzetto.errors import UsageError
from bozzetto.targets.base import Scores
from bozzetto.targets.layers import additive, copied, visible, whole_blocks

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


class SlotCache(Cache):
    """Keys and values of all layers, [R, S, H, D] each, written where the pass says and read up to `reach` columns;
    each layer's on its own device."""

    def __init__(self, layers: int, rows: int, slots: int):
        super().__init__(layers=[])
        self.rows, self.slots = rows, slots
        self.parts: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.flat = torch.zeros(0, dtype=torch.int64)  # slots of the pass, in the flat tables [R S, H, D]
        self.reach = slots

    def __len__(self) -> int:
        return len(self.parts)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nobody needs it: positions and masks are given."""
        return 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [R, H, W, D] of a pass -> all that it may attend to, [R, H, reach, D]."""
        found = self.parts[layer_idx]
        if found is None:
            rows, heads, _, dim = key_states.shape
            blank = key_states.new_zeros(rows, self.slots, heads, dim)
            found = self.parts[layer_idx] = (blank, blank.new_zeros(*blank.shape[:3], value_states.shape[-1]))
        for table, new in zip(found, (key_states, value_states), strict=True):
            table.flatten(0, 1).index_copy_(0, self.flat.to(table.device), new.transpose(1, 2).flatten(0, 1))
        keys, values = (table[:, : self.reach].transpose(1, 2) for table in found)
        return keys, values

    def tables(self) -> list[Tensor]:
        """Every table that there is, [R, S, H, D]."""
        return [part for pair in self.parts if pair is not None for part in pair]

    def replaced(self, rows: int, slots: int, change: Any) -> SlotCache:
        """A cache whose tables are change(table)."""
        other = SlotCache(len(self.parts), rows, slots)
        other.parts = [None if pair is None else (change(pair[0]), change(pair[1])) for pair in self.parts]
        return other


def cache_argument(forward: Callable[..., Any]) -> str:
    """What a decoder's forward calls its cache: `cache` since transformers 5.24, `past_key_values` before (which 5.24
    still takes, with a FutureWarning, and 5.40 shall not)."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


class PromptedTarget:
    """A target whose conditions are prompts. What is embedded and what is read out is said below.

    body: the transformers decoder (inputs_embeds -> last_hidden_state), in evaluation mode and in the dtype to compute
    in; length: tokens of a picture. Labels are numbers of the prompts that `add` was given.
    """

    own = False
    numbers: Sequence[int] = ()  # words that stand for image tokens
    prompts: list[Prompt]

    def __init__(self, body: Any, length: int):
        if length < 1:
            raise UsageError(f"a picture of {length} image tokens is not allowed")
        self.body, self.length, self.word_rows = body, length, body.get_input_embeddings()
        self.layers, self.context = body.config.num_hidden_layers, body.config.max_position_embeddings
        self.cache_name = cache_argument(body.forward)
        some = next(body.parameters())
        self.device, self.dtype = some.device, some.dtype
        self.prompts = []

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
        return PromptedSession(self, self.conditions_of(labels, guided), 2 if guided else 1, max_width)

    def conditions_of(self, labels: Tensor, guided: bool) -> list[tuple[int, ...]]:
        """The prompts' tokens of each of R rows."""
        if not self.prompts:
            raise UsageError("this target draws prompts: give it one with target.add")
        chosen = [self.prompts[label] for label in labels.tolist()]
        return [p.given for p in chosen] + ([p.without for p in chosen] if guided else [])


class PromptedCodes(PromptedTarget):
    """A prompted target that draws codes.

    embedding: rows [V, d] that stand for them; head: a module, or rows [V, d]; numbers: their words in the model's
    vocabulary, where they have some; line: codes in a row of a picture whose rows end in a word of their own (0: none
    do); offsets: positions of inputs 0, 1, ... after that of input 0, int64 [axes, 1 + N], where the decoder's are not
    0, 1, 2, ...

    The grid decides where a row ends and not the model: that word is code V - 1, certain there and impossible
    elsewhere, so that every drafter has it for nothing. The head has no row for it.
    """

    tokens = CODES
    own = False  # passes are those of transformers

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
        if not isinstance(self.head, Tensor):
            return self.head(hidden).float().to(hidden.device)
        free = F.linear(hidden, self.head).float()
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
    condition: Tensor = field(init=False)  # [R, 1, d], input 0

    def __post_init__(self) -> None:
        t = self.target
        self.lead = torch.tensor([len(p) - 1 for p in self.prompts], device=t.device)
        longest = int(self.lead.max())
        slots = -(-(longest + t.length + self.max_width) // _WHOLE) * _WHOLE
        self.cache = SlotCache(t.layers, len(self.prompts), slots)
        last = torch.tensor([p[-1] for p in self.prompts], device=t.device)
        self.condition = t.words(last)[:, None].to(t.dtype)
        if longest:
            self._fill(longest)

    @property
    def rows(self) -> int:
        return len(self.lead)

    def _fill(self, longest: int) -> None:
        """Run all prompt tokens but the last through the layers. What shorter prompts leave behind their end is
        written over before anything can see it."""
        t = self.target
        ids = torch.tensor([[*p[:-1], *[p[-1]] * (longest + 1 - len(p))] for p in self.prompts], device=t.device)
        at = torch.arange(longest, device=t.device).expand(len(ids), -1)
        place = t.places(self.lead, at - self.lead[:, None])
        self._run(t.words(ids).to(t.dtype), at, place, at[:1, None, :] <= at[:, :, None], longest)

    def _run(self, x: Tensor, slot: Tensor, place: Tensor, seen: Tensor, reach: int) -> Tensor:
        """One call of the decoder: x [R, W, d]; slot int64 [R, W]; place: as `places` gives it; seen bool
        [R, W, reach] -> [R, W, d]."""
        first = torch.arange(self.rows, device=x.device)[:, None] * self.cache.slots
        self.cache.flat, self.cache.reach = (first + slot).flatten(), reach
        mask = additive(seen, x.dtype)[:, None]
        cache = {self.target.cache_name: self.cache}
        out = self.target.body(inputs_embeds=x, position_ids=place, attention_mask=mask, use_cache=True, **cache)
        return out.last_hidden_state.to(x.device)

    @torch.no_grad()
    def score(self, inputs: Tensor, start: Tensor, furthest: int | None = None, layout: Layout | None = None) -> Scores:
        t, width = self.target, inputs.shape[1]
        run = torch.arange(width, device=inputs.device)[None]
        hop, deep = (run, run) if layout is None else (layout.slot, layout.depth)
        hop, deep = (copied(part, self.copies) if len(part) > 1 else part for part in (hop, deep))
        begin = self.lead + start.repeat(self.copies)  # [R]
        if layout is not None and len(layout.sees) > 1:
            layout = replace(layout, sees=copied(layout.sees, self.copies))
        reach = self.cache.slots
        if furthest is not None:
            past = width if layout is None else layout.sees.shape[-1]
            reach = whole_blocks(int(self.lead.max()) + furthest + past, reach)
        seen = visible(torch.arange(reach, device=inputs.device), begin, width, layout)
        number = start.repeat(self.copies)[:, None] + deep  # of the input among the image's
        x = copied(t.embed(inputs), self.copies)
        x = torch.where(number[..., None] == 0, self.condition, x)
        hidden = self._run(x, begin[:, None] + hop, t.places(self.lead, number), seen, reach)
        return t.read_out(hidden, number)

    @torch.no_grad()
    def compact(self, path: Tensor, start: Tensor) -> None:
        """Gathers and scatters of whole rows. path int64 [B, P]."""
        path = path[:, 1:].repeat(self.copies, 1)  # the root does not move
        rows = torch.arange(self.rows, device=path.device) * self.cache.slots
        first = (rows + self.lead + start.repeat(self.copies))[:, None].expand_as(path)
        to = (first + torch.arange(1, path.shape[1] + 1, device=path.device)).flatten()
        here = (first + path).flatten()
        for table in self.cache.tables():
            flat, device = table.flatten(0, 1), table.device
            flat.index_copy_(0, to.to(device), flat.index_select(0, here.to(device)))

    def keep(self, rows: Tensor) -> None:
        rows = self._every(rows)
        self.prompts = [self.prompts[i] for i in rows.tolist()]
        self.lead, self.condition = self.lead[rows], self.condition[rows]
        self.cache = self.cache.replaced(len(rows), self.cache.slots, lambda table: table[rows.to(table.device)])

    @torch.no_grad()
    def admit(self, rows: Tensor, labels: Tensor) -> None:
        every, t = self._every(rows), self.target
        fresh = PromptedSession(t, t.conditions_of(labels, self.copies > 1), self.copies, self.max_width)
        slots, blank = max(self.cache.slots, fresh.cache.slots), not self.cache.tables()  # nothing has run here yet

        def longer(table: Tensor) -> Tensor:
            if blank:
                return table.new_zeros(self.rows, slots, *table.shape[2:])
            return F.pad(table, (0, 0, 0, 0, 0, slots - table.shape[1]))

        self.cache = (fresh if blank else self).cache.replaced(self.rows, slots, longer)
        for ours, theirs in zip(self.cache.tables(), fresh.cache.tables(), strict=False):
            ours[every.to(ours.device), : theirs.shape[1]] = theirs
        self.lead[every], self.condition[every] = fresh.lead, fresh.condition
        for row, prompt in zip(every.tolist(), fresh.prompts, strict=True):
            self.prompts[row] = prompt

    def _every(self, rows: Tensor) -> Tensor:
        """Batch rows -> rows of sequences."""
        batch = self.rows // self.copies
        return torch.cat([rows + i * batch for i in range(self.copies)])
