"""Growing a draft level by level with any draft model: chains, static trees, dynamic trees.

Static trees: the children of a node are drawn without replacement from its law (EAGLE, arXiv 2401.15077), by
Gumbel-top-k, which is the same thing. Dynamic trees: the likeliest children, the likeliest nodes expanded, and of all
of them those of largest joint draft probability kept (EAGLE-2, arXiv 2406.16858); such drafts are certain, not drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bozzetto.drafters.base import Drafter, DraftModel, Observation, Start
from bozzetto.drafters.early_stop import flatness_of
from bozzetto.drafters.own import sketch_dynamic, sketch_static
from bozzetto.drafts import Draft, Layout, Tree
from bozzetto.drafts.tree import make_tree, static_tree
from bozzetto.errors import UsageError
from bozzetto.laws.categorical import LawSettings
from bozzetto.laws.noise import fold, gumbel
from bozzetto.runtime.laws import own_gumbel_rows

Shape = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Dynamic:
    """EAGLE-2: nodes in all (without the root); depth; children per node and nodes expanded per level."""

    nodes: int = 58
    depth: int = 5
    beam: int = 10


class TreeDrafter(Drafter):
    """Drafts trees of one static shape, or dynamic ones, from a draft model. stop: see drafters/early_stop.py; a static
    tree goes on below a node only where that is likely enough to be reached."""

    def __init__(self, name: str, model: DraftModel, shape: Shape | Dynamic, stop: float = 0.0):
        self.name, self.model, self.shape, self.stop = name, model, shape, stop

    @property
    def max_nodes(self) -> int:
        return self.shape.nodes if isinstance(self.shape, Dynamic) else sum(map(sum, self.shape))

    @property
    def max_depth(self) -> int:
        return self.shape.depth if isinstance(self.shape, Dynamic) else len(self.shape)

    @property
    def grown(self) -> int:
        return self.shape.depth * self.shape.beam if isinstance(self.shape, Dynamic) else self.max_nodes

    @property
    def _branches(self) -> bool:
        return isinstance(self.shape, Dynamic) or max(map(max, self.shape)) > 1

    def begin(self, start: Start) -> None:
        if isinstance(self.shape, Dynamic) and start.with_hidden:
            raise UsageError(f"drafter {self.name!r}: hidden states of every node are known for fixed trees only")
        super().begin(start)

    def propose(self, batch: int, limit: int) -> Draft:
        self.passes = self.passes + 1
        if self.seen is None or limit < 1:  # nothing is known before the first pass
            if self.early is not None:
                self.early.begin(0)
            return self.nothing(batch)
        by_level = self.early is not None or (self.start.with_hidden and self._branches)
        parts = None if by_level else self.model.whole(self.seen)
        if parts is not None:
            return self._in_one_call(parts, self.seen)
        logits, hidden = self.model.extend(self.seen)
        self.next = self.seen.start + self.seen.committed  # the position that the root's children stand at
        if isinstance(self.shape, Dynamic):
            return self._dynamic(self.shape, logits)
        return self._static(static_tree(self.shape, self.keys.device), logits, hidden)

    def _in_one_call(self, parts: dict[str, Any], seen: Observation) -> Draft:
        """The same by our kernels."""
        settings, fixed, shape = self.start.settings, self.start.fixed_noise, self.shape
        given = parts, seen, settings, self.model.copies, self.model.config.vocab
        if isinstance(shape, Dynamic):
            beam = min(shape.beam, given[-1])
            tokens, laws, mothers, margin = sketch_dynamic(given, shape.depth, beam)
        else:
            noise = self.start.noise.table if fixed else None
            tokens, laws, margin = sketch_static(given, shape, fold(self.keys, self.passes), noise)
        if fixed:  # a rule that compares tokens does not mind how near other draws were
            margin = torch.full_like(margin, torch.inf)
        if isinstance(shape, Dynamic):
            return _best(shape.nodes, beam, tokens, laws, mothers, margin)
        tree, greedy = static_tree(shape, self.keys.device), settings.temperature == 0
        hung = tree if self._branches else None
        return Draft(tokens[:, 1:], None if greedy else laws, hung, certain=greedy, margin=margin)

    def _law(self, logits: Tensor) -> Tensor:
        """The law; for greedy decoding the plain one, which can be ranked."""
        settings = self.start.settings
        return self.model.law(logits, settings if settings.temperature else LawSettings(guidance=settings.guidance))

    def _noise(self, tree: Tree, vocab: int) -> Tensor:
        """Gumbel noise [B, I, V] of the draws from every law of a tree, in the order of the laws."""
        if self.start.fixed_noise:
            depth = torch.cat([torch.full_like(family[0], d) for d, family in enumerate(tree.families)])
            return self.start.noise.rows(self.next[:, None] + depth)
        number = torch.arange(sum(family.shape[1] for family in tree.families), device=self.keys.device)
        keys = fold(fold(self.keys, self.passes)[:, None], number)
        if self.model.own:
            return own_gumbel_rows(keys.flatten(), vocab).unflatten(0, keys.shape)
        return gumbel(fold(keys[..., None], torch.arange(vocab, device=keys.device)))

    def _nearer(self, margin: Tensor, scores: Tensor, count: int) -> Tensor:
        """margin [B], or less: the smallest gap between one of the `count` best of scores [B, I, V] and the next, which
        may change places by rounding. A rule that compares tokens does not mind."""
        if self.start.fixed_noise or scores.shape[-1] == 1:
            return margin
        values = scores.topk(min(count + 1, scores.shape[-1]), -1).values
        gaps = (values[..., :-1] - values[..., 1:]).nan_to_num(nan=torch.inf, posinf=torch.inf)  # nan: both impossible
        return torch.minimum(margin, gaps.flatten(1).amin(1))

    def _static(self, tree: Tree, logits: Tensor, hidden: Tensor) -> Draft:
        """Level by level: laws of the mothers, draws of their children, hidden states of those that go on."""
        device, greedy, all_grow = self.keys.device, self.start.settings.temperature == 0, self.start.with_hidden
        tokens = torch.zeros(len(self.keys), tree.nodes + 1, dtype=torch.int64, device=device)
        grown = torch.zeros(1, dtype=torch.int64, device=device)  # scored indices in the order of growing, root first
        level, laws, states, row = grown, [], [hidden[: len(self.keys)]], 0
        goes: Tensor | None = None
        margin = torch.full((len(self.keys),), torch.inf, device=device)
        noise = None if greedy else self._noise(tree, logits.shape[-1])
        if self.early is not None:
            self.early.begin(tree.nodes)
        for depth, width in enumerate(tree.widths):
            mothers = tree.families[depth][0]
            log_q = self._law(logits)
            if len(mothers) < len(level):
                log_q = log_q[:, torch.searchsorted(level, mothers)]
            laws.append(log_q)
            scores = log_q if noise is None else log_q + noise[:, row : row + len(mothers)]
            drawn = scores.topk(width, -1).indices  # [B, I, C], in the order of the draws
            closer = self._nearer(margin, scores, width)
            margin = closer if goes is None else torch.where(goes, closer, margin)
            kids = tree.child[0, mothers, :width].flatten()
            tokens[:, kids] = drawn.flatten(1)  # absent children land on the root, which no one reads
            row += len(mothers)
            family = kids.view(len(mothers), width)
            more = self.early is None or self.early.go_on(mothers, family, flatness_of(log_q))
            if self.early is not None:  # a draw that only others need does not count
                goes = self.early.open[:, kids[kids > 0]].any(1)
            if (depth + 1 == tree.max_depth or not more) and not all_grow:
                break
            level = kids[kids > 0] if all_grow else tree.families[depth + 1][0]
            first = len(grown) - 1
            parent = torch.searchsorted(grown, tree.parent[0, level - 1])[None]
            grown = torch.cat([grown, level])
            at = torch.arange(first, first + len(level), device=device)[None]
            sees = tree.sees[:, level][:, :, grown[1:]]
            logits, hidden = self.model.grow(
                tokens[:, level], parent, first, Layout(at, torch.full_like(at, depth), sees)
            )
            states.append(hidden[: len(self.keys)])  # the conditional rows
            if not more:
                break
        if len(laws) < tree.max_depth:
            tree = static_tree(self.shape[: len(laws)], device)  # type: ignore[index]
        chain = max(tree.widths) == 1
        if self.early is not None and not (chain and len(self.keys) == 1):  # a lone chain is whole
            tree, chain = tree.pruned(self.early.present[:, : tree.nodes + 1]), False
        return Draft(
            tokens[:, 1 : tree.nodes + 1],
            None if greedy else torch.cat(laws, 1),
            None if chain else tree,
            certain=greedy,
            hidden=torch.cat(states, 1) if all_grow else None,
            margin=margin,
        )

    def _dynamic(self, shape: Dynamic, logits: Tensor) -> Draft:
        batch, device, beam = len(self.keys), self.keys.device, min(shape.beam, logits.shape[-1])
        # All candidates, level by level, `beam` to each expanded node. Their numbers count from 1; 0 is the root.
        tokens: list[Tensor] = []
        scores: list[Tensor] = []
        mothers: list[Tensor] = []
        joint = torch.zeros(batch, 1, device=device)  # log-probability of the path to each expanded node
        expanded = torch.zeros(batch, 1, dtype=torch.int64, device=device)  # their numbers among the candidates
        sees = torch.zeros(batch, 0, 0, dtype=torch.bool, device=device)  # among the grown nodes
        number, before = expanded, 1  # number: of the expanded nodes among the grown ones (0: the root)
        margin = torch.full((batch,), torch.inf, device=device)
        for depth in range(shape.depth):
            laws = self._law(logits)
            likely, likeliest = laws.topk(beam, -1)  # [B, n, beam]
            level = (joint[..., None] + likely).flatten(1)
            tokens.append(likeliest.flatten(1))
            scores.append(level)
            mothers.append(expanded)
            margin = self._nearer(margin, laws, beam)
            if depth + 1 == shape.depth:
                break
            chosen = level.topk(min(beam, level.shape[1]), -1).indices  # [B, n']
            margin = self._nearer(margin, level[:, None], chosen.shape[1])
            joint, expanded, before = level.gather(1, chosen), before + chosen, before + level.shape[1]
            parent, first = number.gather(1, chosen // beam), sees.shape[1]
            sees = _with_children(sees, parent)
            number = torch.arange(first + 1, sees.shape[1] + 1, device=device).expand(batch, -1)
            at = number[:1] - 1
            layout = Layout(at, torch.full_like(at, depth), sees[:, first:])
            logits, _ = self.model.grow(tokens[-1].gather(1, chosen), parent, first, layout)
        return _best(shape.nodes, beam, torch.cat(tokens, 1), torch.cat(scores, 1), mothers, margin)


def _best(most: int, beam: int, tokens: Tensor, scores: Tensor, mothers: list[Tensor], margin: Tensor) -> Draft:
    """The at most `most` candidates of largest joint probability: tokens, scores [B, P], `beam` to each of the expanded
    nodes `mothers`, int64 [B, n] by level. Ancestors are at least as likely as their descendants and come earlier, and
    the sort is stable, so the chosen nodes hang together; of siblings a leading run is chosen."""
    (batch, pool), device = scores.shape, scores.device
    nodes = min(most, pool)
    ranked, order = scores.sort(dim=1, descending=True, stable=True)
    chosen = order[:, :nodes].sort(1).values  # [B, M]
    if nodes < pool:
        margin = torch.minimum(margin, ranked[:, nodes - 1] - ranked[:, nodes])
    # New numbers of the candidates; those left out go to a spare number that nothing asks for.
    number = torch.zeros(batch, pool + 1, dtype=torch.int64, device=device)
    number.scatter_(1, chosen + 1, torch.arange(1, nodes + 1, device=device).expand(batch, -1))
    parent = number.gather(1, torch.cat(mothers, 1).gather(1, chosen // beam))
    families = [number.gather(1, level) for level in mothers]
    families = [torch.where((new == 0) & (old > 0), nodes + 1, new) for new, old in zip(families, mothers, strict=True)]
    row = torch.zeros(batch, nodes + 1, dtype=torch.int64, device=device)
    tree = make_tree(parent, chosen % beam, row, families, [beam] * len(mothers))
    return Draft(tokens.gather(1, chosen), None, tree, certain=True, margin=margin)


def _with_children(sees: Tensor, parent: Tensor) -> Tensor:
    """bool [B, E, E] with the children of grown nodes parent [B, n] (0: the root) added: [B, E + n, E + n]."""
    (batch, n), old = parent.shape, sees.shape[1]
    own = torch.eye(n, dtype=torch.bool, device=parent.device).expand(batch, n, n)
    root = torch.zeros(batch, 1, old, dtype=torch.bool, device=parent.device)
    inherited = torch.cat([root, sees], 1).gather(1, parent[..., None].expand(-1, -1, old))
    above = torch.cat([sees, torch.zeros(batch, old, n, dtype=torch.bool, device=parent.device)], 2)
    return torch.cat([above, torch.cat([inherited, own], 2)], 1)
