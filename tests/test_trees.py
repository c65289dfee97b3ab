"""Drafted trees: published shapes, ancestors, paths, post-order; drawn children; dynamic trees against a slow twin."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bozzetto.drafters.base import Observation, Start
from bozzetto.drafters.tree import TreeDrafter
from bozzetto.drafts import Draft, Tree, Verdict
from bozzetto.drafts.tree import SHAPES, chain_tree, make_tree, static_tree
from bozzetto.errors import UsageError
from bozzetto.laws.categorical import LawSettings
from bozzetto.laws.noise import STREAM_DRAFT, GumbelField, image_keys
from tabular import TabularTarget
from toys import PLAIN, cells, fit_p_value, sketched

CPU = torch.device("cpu")
PUBLISHED = {
    "mc-sim-25": [4, 8, 8, 3, 2],
    "extend-57": [5, 13, 16, 14, 9],
    "medusa-63": [10, 23, 23, 7],
    "balanced-25": [3, 8, 9, 3, 2],
    "reverse-25": [3, 4, 6, 5, 7],
}


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_have_their_published_nodes_per_depth(name: str) -> None:
    tree = static_tree(SHAPES[name], CPU)
    assert torch.bincount(tree.depth[0]).tolist() == [1, *PUBLISHED[name]]
    assert tree.nodes == sum(PUBLISHED[name])


def check(tree: Tree, row: int, parents: list[int], ranks: list[int]) -> None:
    """One image's tree against explicit loops."""
    up = [0, *parents]
    kids: dict[int, list[int]] = {}
    for node in sorted(range(1, len(up)), key=lambda n: ranks[n - 1]):
        kids.setdefault(up[node], []).append(node)

    def way(node: int) -> list[int]:
        return [0] if node == 0 else [*way(up[node]), node]

    def visited(node: int) -> list[int]:
        return [n for kid in kids.get(node, []) for n in visited(kid)] + [node]

    for node in range(len(up)):
        path = way(node)
        assert int(tree.depth[row, node]) == len(path) - 1
        assert tree.sees[row, node].nonzero().flatten().tolist() == sorted(path)
        assert tree.path[row, node].tolist() == path + [node] * (tree.max_depth + 1 - len(path))
        children = [c for c in tree.child[row, node].tolist() if c]
        assert children == kids.get(node, [])
        assert [ranks[c - 1] for c in children] == list(range(len(children)))
    assert tree.order[row].argsort().tolist() == visited(0)
    assert not tree.child[row, -1].any()


@pytest.mark.parametrize("shape", [*SHAPES.values(), ((1,),) * 6, ((3,), (2, 0, 1), (1, 2))])
def test_fixed_trees_agree_with_explicit_loops(shape: tuple[tuple[int, ...], ...]) -> None:
    tree = static_tree(shape, CPU)
    ranks = [int((tree.child[0, int(p)] == n + 1).nonzero()) for n, p in enumerate(tree.parent[0])]
    check(tree, 0, tree.parent[0].tolist(), ranks)
    # Every mother has one row of laws, in the order of the families.
    mothers = [n for family in tree.families for n in family[0].tolist()]
    assert mothers == [n for n in range(tree.nodes + 1) if bool(tree.child[0, n].any())]
    assert tree.row[0, mothers].tolist() == list(range(len(mothers)))
    for depth, family in enumerate(tree.families):
        assert (tree.depth[0, family[0]] == depth).all()
        assert tree.widths[depth] == max(int((tree.child[0, n] > 0).sum()) for n in family[0].tolist())


def test_trees_that_differ_from_image_to_image_agree_with_explicit_loops() -> None:
    random = torch.Generator().manual_seed(0)
    parents, ranks = [], []
    for _ in range(20):
        up, count, depth = [0], [0], [0]
        rank = []
        while len(up) < 10:
            mother = int(torch.randint(len(up), (), generator=random))
            if count[mother] < 3 and depth[mother] < 4:
                up.append(mother)
                rank.append(count[mother])
                count[mother] += 1
                count.append(0)
                depth.append(depth[mother] + 1)
        parents.append(up[1:])
        ranks.append(rank)
    row = torch.zeros(20, 10, dtype=torch.int64)
    tree = make_tree(torch.tensor(parents), torch.tensor(ranks), row, [], [3] * 4)
    for i in range(20):
        check(tree, i, parents[i], ranks[i])


def test_a_tree_too_deep_for_its_numbers_is_refused() -> None:
    assert chain_tree(40, CPU).nodes == 40
    with pytest.raises(UsageError, match="too large"):
        static_tree(((10,), *((1,),) * 30), CPU)


V, N = 5, 6
SKETCH = TabularTarget(V, N, seed=7)


def draft(tree: str, images: int, settings: LawSettings = PLAIN) -> tuple[TreeDrafter, Draft]:
    """The draft after a first pass that committed token 2."""
    drafter, index = sketched(SKETCH, tree), torch.arange(images)
    noise = GumbelField(0, index, N, V)
    labels = torch.ones(images, dtype=torch.int64)
    drafter.begin(Start(labels, N, settings, noise, image_keys(0, STREAM_DRAFT, index), with_laws=True))
    two, zero = torch.full((images, 1), 2), torch.zeros(images, dtype=torch.int64)
    drafter.observe(Observation(torch.zeros(images, 1, V), Verdict(two, zero), zero + 1, 1, zero))
    return drafter, drafter.propose(images, N - 1)


def law_after(*tokens: int) -> Tensor:
    return SKETCH.logits(torch.tensor([1]), torch.tensor([[2, *tokens]]))[0].log_softmax(-1)


def test_children_are_draws_without_replacement_in_the_order_of_their_ranks() -> None:
    _, drawn = draft("2x2", 20_000)
    pairs = drawn.tokens[:, :2]
    assert bool((pairs[:, 0] != pairs[:, 1]).all())
    q = law_after().exp()
    law = torch.zeros(V, V)
    for a, b in itertools.permutations(range(V), 2):
        law[a, b] = q[a] * q[b] / (1 - q[a])
    assert fit_p_value(torch.bincount(cells(pairs, V), minlength=V * V), law.flatten()) > 1e-3
    assert drawn.log_q is not None
    assert torch.allclose(drawn.log_q[:, 0], law_after().expand(20_000, -1), atol=1e-5)
    # The laws of the second level are those after each drafted child.
    for image in range(50):
        for child in range(2):
            wanted = law_after(int(drawn.tokens[image, child]))
            assert torch.allclose(drawn.log_q[image, 1 + child], wanted, atol=1e-5)


def slow_dynamic(nodes: int, depth: int, beam: int) -> set[tuple[int, ...]]:
    """EAGLE-2 by explicit loops: paths of the chosen nodes."""
    level: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    pool = []
    for _ in range(depth):
        children = []
        for path, score in level:
            law = law_after(*path)
            for token in law.argsort(descending=True)[:beam].tolist():
                children.append(((*path, token), score + float(law[token])))
        pool += children
        level = sorted(children, key=lambda c: -c[1])[:beam]
    return {path for path, _ in sorted(pool, key=lambda c: -c[1])[:nodes]}


@pytest.mark.parametrize(("nodes", "depth", "beam"), [(3, 2, 2), (8, 3, 3), (12, 4, 4), (40, 2, 5)])
def test_dynamic_trees_are_what_explicit_loops_find(nodes: int, depth: int, beam: int) -> None:
    _, found = draft(f"dynamic-{nodes + 1}-{depth}-{beam}", 2)
    tree = found.shape()
    assert found.certain and found.log_q is None
    paths = {
        tuple(found.tokens[0, n - 1].item() for n in tree.path[0, node, 1 : int(tree.depth[0, node]) + 1].tolist())
        for node in range(1, tree.nodes + 1)
    }
    assert paths == slow_dynamic(nodes, depth, beam)
    mothers = sorted(n for family in tree.families for n in family[0].tolist() if n <= tree.nodes)
    assert set(mothers) >= {n for n in range(tree.nodes + 1) if bool(tree.child[0, n].any())}
    assert len(mothers) == len(set(mothers))
    ranks = [int((tree.child[0, int(p)] == n + 1).nonzero()) for n, p in enumerate(tree.parent[0])]
    check(tree, 0, tree.parent[0].tolist(), ranks)


def test_greedy_trees_hold_the_likeliest_children() -> None:
    _, found = draft("2x1", 1, LawSettings(temperature=0))
    assert found.certain
    best = law_after().argsort(descending=True)[:2].tolist()
    assert found.tokens[0, :2].tolist() == best
    assert found.tokens[0, 2:].tolist() == [int(law_after(b).argmax()) for b in best]
