"""Sessions of compiled targets: batches rounded up to powers of two, passes to the widest of the session or half of it.

Sequences that only fill up are copies of the first one. Places that only fill up a chain are further ones of it, whose
slots are written again before anything sees them; those of a tree write to the last slots of a row and see slot 0, so
that every number stays finite. A pass looks at the cache columns that some image has reached, in blocks of 64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bozzetto.drafts import Layout
from bozzetto.errors import UsageError
from bozzetto.runtime.graphs import Compiler, check_mode
from bozzetto.runtime.native import in_pairs
from bozzetto.targets.base import Scores
from bozzetto.targets.compiled import CausalStep, CompiledStep, TokenEmbedding, VectorEmbedding, bucket
from bozzetto.targets.flow import FlowModel
from bozzetto.targets.flow_cache import FlowTarget
from bozzetto.targets.layers import visible, whole_blocks
from bozzetto.targets.llamagen import LlamaGen
from bozzetto.targets.llamagen_cache import CausalSession, CausalTarget, LlamaGenTarget


def compile_target(
    target: LlamaGenTarget | FlowTarget,
    network: LlamaGen | FlowModel,
    mode: str,
    report: Callable[[str], None] | None = None,
    deterministic: bool = False,
) -> None:
    """Let a target run compiled passes (a graph is compiled when its shape first turns up). network: what the target
    was made from; mode: `default` or `max`, `off` does nothing; report: is told what is being compiled; deterministic:
    passes of any width and batch agree to the last bit, which takes somewhat longer.

    Raises UsageError for another mode.
    """
    if check_mode(mode) == "off":
        return
    if target.dtype == torch.float16 and target.device.type == "cpu":
        raise UsageError(f"compile = {mode!r} is not allowed here: no kernels for float16 on a processor")
    if isinstance(network, LlamaGen):
        embed: torch.nn.Module = TokenEmbedding(network.tok_embeddings.weight, target.dtype)
        head = network.output.weight
    else:
        layer = network.token_embedding
        embed, head = VectorEmbedding(layer.weight, layer.bias, network.positions, target.dtype), None
    rope = network.rope[target.config.condition_tokens - 1 :]
    step = CausalStep(target.config, network.layers, network.norm.weight, rope, embed, head, target.dtype)
    step.steady, step.probed = deterministic, target.probed
    compiler = Compiler(mode, report)
    target.step = CompiledStep(step, target.config.condition_tokens - 1, compiler)
    target.session = CompiledSession
    if target.config.condition_tokens == 1:
        target.layers = []  # nothing runs them
    if isinstance(target, FlowTarget) and isinstance(network, FlowModel) and mode == "max":
        target.use_compiled(target.denoiser(network), compiler)


class CompiledSession(CausalSession):
    """As CausalSession, in static shapes."""

    whole = 64

    def __init__(self, target: CausalTarget, condition: Tensor, mask: Tensor | None, copies: int, max_width: int):
        self.batch = len(condition) // copies
        filled = self._fill_up(torch.arange(self.batch, device=condition.device))
        condition = condition.unflatten(0, (copies, self.batch))[:, filled].flatten(0, 1)
        super().__init__(target, condition, None if mask is None else mask[filled], copies, max_width)
        self.wide = bucket(max_width)
        self.paired = target.step.step.paired
        self.cache = [(self._by_head(keys), self._by_head(values)) for keys, values in self.cache]
        if self.paired:
            self.cache = [(keys, in_pairs(values)) for keys, values in self.cache]

    def _number_slots(self) -> None:
        super()._number_slots()
        self.sights: dict[int, Tensor] = {}

    def _fill_up(self, rows: Tensor) -> Tensor:
        """Batch rows, the first one repeated up to the next size that has a graph."""
        return torch.cat([rows, rows[:1].expand(bucket(len(rows)) - len(rows))])

    def spare(self, max_width: int) -> int:
        # One more than can be looked at: graphs take it for granted that they see a part of the cache.
        return bucket(max_width) + 1

    @torch.no_grad()
    def score(self, inputs: Tensor, start: Tensor, furthest: int | None = None, layout: Layout | None = None) -> Scores:
        batch, width = inputs.shape[:2]
        if self.rows // self.copies > batch:
            rows = self._fill_up(torch.arange(batch, device=inputs.device))
            inputs, start, layout = inputs[rows], start[rows], _rows(layout, rows)
        # Two widths only: those in between, at the end of an image, are not worth a graph each.
        more = (self.wide if 2 * width > self.wide else self.wide // 2) - width
        if more:
            inputs = F.pad(inputs, (*[0, 0] * (inputs.ndim - 2), 0, more))
        past = inputs.shape[1] if layout is None else layout.sees.shape[-1]
        reach = self.slots - 1 if furthest is None else whole_blocks(self.lead + furthest + past, self.slots - 1)
        if layout is None:
            found = self.target.step.chain(
                inputs.contiguous(), start.contiguous(), self._sight(reach), *self._tensors()
            )
        else:
            found = self.target.step.tree(inputs, *self._places(start, width, more, reach, layout), *self._tensors())
        features, logits = (self._real(part, batch, width) for part in (found[0], found[-1]))
        return Scores(None if len(found) == 1 else logits, features)

    def slot_arguments(self, width: int, furthest: int, held: list[Tensor]) -> list[Tensor]:
        """What `SlotStep` takes, for a batch of a size that has graphs."""
        reach = whole_blocks(self.lead + furthest + width, self.slots - 1)
        condition, *caches = self._tensors()
        return [self._sight(reach), condition, *held, *caches]

    def _tensors(self) -> list[Tensor]:
        """Condition and caches, as a graph takes them."""
        return [self.condition, *(part for table in self.cache for part in table)]

    def _by_head(self, part: Tensor) -> Tensor:
        """[R S, d] -> [R, heads, S, hd]: what one head reads lies together."""
        c = self.target.config
        return part.view(self.rows, self.slots, c.heads, c.head_dim).transpose(1, 2).contiguous()

    def _sight(self, reach: int) -> Tensor:
        """bool [B, reach], which cache columns may be attended to."""
        if reach not in self.sights:
            open_ = torch.ones(self.rows // self.copies, self.slots, dtype=torch.bool, device=self.columns.device)
            self.sights[reach] = (open_ if self.open is None else self.open)[:, :reach].contiguous()
        return self.sights[reach]

    def _places(self, start: Tensor, width: int, more: int, reach: int, layout: Layout) -> tuple[Tensor, ...]:
        """slot, position int64 [B, W] and seen bool [B, W, reach] of a tree's nodes, filled up."""
        slot, position = start[:, None] + layout.slot, start[:, None] + layout.depth
        seen = visible(self.columns[:reach], start, width, layout)
        if self.open is not None:
            seen = seen & self.open[:, None, :reach] | (slot[..., None] == self.columns[:reach])
        slot = slot + self.lead
        if more:
            last = torch.arange(self.slots - 1 - more, self.slots - 1, device=slot.device).expand(len(slot), -1)
            slot, position, seen = torch.cat([slot, last], 1), F.pad(position, (0, more)), F.pad(seen, (0, 0, 0, more))
            seen[:, width:, 0] = True
        return slot, position, seen

    def _real(self, part: Tensor, batch: int, width: int) -> Tensor:
        """Without what only filled up: [R', W', ...] -> [copies B, W, ...]."""
        if part.shape[0] > self.copies * batch:
            part = part.unflatten(0, (self.copies, -1))[:, :batch].flatten(0, 1)
        return part[:, :width]

    def keep(self, rows: Tensor) -> None:
        self.batch = len(rows)
        super().keep(self._fill_up(rows))

    def compact(self, path: Tensor, start: Tensor) -> None:
        if self.rows // self.copies > len(path):
            rows = self._fill_up(torch.arange(len(path), device=path.device))
            path, start = path[rows], start[rows]
        path, first = path[:, 1:].repeat(self.copies, 1), start.repeat(self.copies)[:, None] + self.lead
        row = torch.arange(self.rows, device=path.device)[:, None]
        to = first + torch.arange(1, path.shape[1] + 1, device=path.device)
        here = first + path
        for keys, values in self.cache:
            keys[row, :, to] = keys[row, :, here]
            if self.paired:
                values[row, :, to // 2, :, to % 2] = values[row, :, here // 2, :, here % 2]
            else:
                values[row, :, to] = values[row, :, here]

    def _kept(self, part: Tensor, rows: Tensor) -> Tensor:
        return part[rows]

    def _take_conditions(self, fresh: CausalSession, rows: Tensor) -> None:
        for ours, theirs in zip(self.cache, fresh.cache, strict=True):
            for mine, filled in zip(ours, theirs, strict=True):
                here, there = (part.unflatten(0, (self.copies, -1)) for part in (mine, filled))
                lead = self.lead if mine.ndim == 4 else -(-self.lead // 2)  # pairs: one slot more is written later
                here[:, rows, :, :lead] = there[:, : len(rows), :, :lead]


def _rows(layout: Layout | None, rows: Tensor) -> Layout | None:
    """A layout of more rows; one for all rows stays as it is."""
    if layout is None:
        return None
    parts = {name: getattr(layout, name) for name in ("slot", "depth", "sees")}
    return replace(layout, **{name: part[rows] if len(part) > 1 else part for name, part in parts.items()})
