"""The EAGLE drafter: cached drafting equals the written-out roll-out, trees are paths, targets score trees as paths."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bozzetto.checkpoints.convert_drafter import convert_eagle
from bozzetto.checkpoints.folders import load_drafter, load_target, save_drafter, target_digest
from bozzetto.decoding.loop import EagerBatch
from bozzetto.drafters.base import Observation
from bozzetto.drafters.eagle import CachedEagle, EagleNet, eagle_config
from bozzetto.drafters.small_target import SmallTarget
from bozzetto.drafters.tree import TreeDrafter
from bozzetto.drafts import CODES, Layout, Verdict
from bozzetto.drafts.tree import static_tree
from bozzetto.errors import UsageError
from bozzetto.laws.categorical import LawSettings
from bozzetto.methods.shapes import read_shape
from bozzetto.methods.table import RULES
from bozzetto.rules.neighbours import nearest_codes
from bozzetto.targets.llamagen_cache import LlamaGenTarget
from toys import PLAIN, decode, make_rule, tiny_llamagen

MODEL = tiny_llamagen()
C = MODEL.config
TOKENS = torch.randint(C.vocab, (3, C.length), generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2])
GUIDED = LawSettings(guidance=2.0)
TARGET = LlamaGenTarget(MODEL)
both = pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])


def tiny_eagle(seed: int = 0, layers: int = 1) -> EagleNet:
    net = EagleNet(eagle_config(C, layers=layers))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in net.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = 1 + 0.2 * noise if "norm" in name else 0.2 * noise
    return net.eval().requires_grad_(False)


NET = tiny_eagle()


def sketcher(net: EagleNet = NET) -> CachedEagle:
    return CachedEagle(net, TARGET.embedding, TARGET.output)


def drafter(tree: str) -> TreeDrafter:
    return TreeDrafter("eagle", sketcher(), read_shape(tree))


def true_features(guided: bool, tokens: Tensor = TOKENS) -> Tensor:
    """[R, N, d]."""
    rows = [MODEL.features(LABELS, tokens[:, :-1])]
    if guided:
        rows.append(MODEL.features(torch.full_like(LABELS, C.classes), tokens[:, :-1]))
    return torch.cat(rows)


def seen(start: Tensor, committed: Tensor, features: Tensor, tokens: Tensor = TOKENS) -> Observation:
    """What a pass would have taught that committed so many of TOKENS from `start`."""
    longest = int(committed.max())
    at = (start[:, None] + torch.arange(longest)).clamp_max(C.length - 1)
    taken = tokens.gather(1, at)
    rows = at.repeat(len(features) // len(at), 1)[..., None].expand(-1, -1, C.dim)
    log_p = torch.zeros(len(start), longest, C.vocab)
    return Observation(log_p, Verdict(taken, committed - 1), committed, longest, start, features.gather(1, rows))


@both
@pytest.mark.parametrize("layers", [1, 2])
def test_cached_drafting_over_ragged_passes_equals_the_roll_out(layers: int, guided: bool) -> None:
    net = tiny_eagle(layers=layers)
    features, sketch = true_features(guided), sketcher(net)
    embedded = MODEL.tok_embeddings(TOKENS).repeat(2 if guided else 1, 1, 1)
    slow = net.roll_out(features, embedded, 3)
    sketch.begin(LABELS, guided, 8)
    start = torch.zeros(3, dtype=torch.int64)
    for committed in (torch.tensor([1, 1, 1]), torch.tensor([3, 1, 2]), torch.tensor([2, 4, 1])):
        _, root = sketch.extend(seen(start, committed, features))
        start = start + committed
        pair = (start - 1).repeat(2 if guided else 1)
        rows = torch.arange(len(features))
        assert torch.allclose(root[:, 0], slow[0][rows, pair], atol=1e-4)
        for step in (1, 2):  # then two drafted pairs, on its own predictions
            token = TOKENS.gather(1, (start + step - 1)[:, None])
            at = torch.tensor([[step - 1]])
            layout = Layout(at, at, torch.ones(1, 1, step, dtype=torch.bool))
            logits, hidden = sketch.grow(token, torch.tensor([[step - 1]]), step - 1, layout)
            assert torch.allclose(hidden[:, 0], slow[step][rows, pair + step], atol=1e-4)
            assert torch.allclose(logits, hidden @ MODEL.output.weight.t(), atol=1e-4)


def test_a_layer_that_is_added_begins_as_the_identity() -> None:
    deeper = EagleNet(eagle_config(C, layers=3))
    deeper.load_state_dict({**deeper.state_dict(), **NET.state_dict()})
    features, embedded = true_features(False), MODEL.tok_embeddings(TOKENS)
    for one, two in zip(*(net.roll_out(features, embedded, 2) for net in (NET, deeper)), strict=True):
        assert torch.equal(one, two)


def grown_along(path: list[int], features: Tensor) -> Tensor:
    """Hidden state after drafting one chain of tokens behind two committed ones."""
    sketch = sketcher()
    sketch.begin(LABELS, True, 8)
    _, hidden = sketch.extend(seen(torch.zeros(3).long(), torch.full((3,), 2), features))
    for step, token in enumerate(path):
        at = torch.tensor([[step]])
        layout = Layout(at, at, torch.ones(1, 1, step + 1, dtype=torch.bool))
        _, hidden = sketch.grow(torch.full((3, 1), token), torch.tensor([[step]]), step, layout)
    return hidden


def test_a_node_of_a_grown_tree_is_the_end_of_its_path() -> None:
    features, sketch = true_features(True), sketcher()
    sketch.begin(LABELS, True, 8)
    sketch.extend(seen(torch.zeros(3).long(), torch.full((3,), 2), features))
    tree = static_tree(((2,), (1, 2)), torch.device("cpu"))
    tokens = torch.tensor([[5, 6, 7, 8, 9]]).expand(3, -1)
    first = Layout(torch.tensor([[0, 1]]), torch.zeros(1, 2).long(), tree.sees[:, 1:3, 1:3])
    sketch.grow(tokens[:, :2], torch.tensor([[0, 0]]), 0, first)
    second = Layout(torch.tensor([[2, 3, 4]]), torch.ones(1, 3).long(), tree.sees[:, 3:, 1:])
    _, hidden = sketch.grow(tokens[:, 2:], torch.tensor([[1, 2, 2]]), 2, second)
    for node, path in enumerate(([5, 7], [6, 8], [6, 9])):
        assert torch.allclose(hidden[:, node : node + 1], grown_along(path, features), atol=1e-4)


@both
def test_the_target_scores_a_tree_as_its_paths_and_goes_on_from_the_accepted_one(guided: bool) -> None:
    """Ragged starts, then compaction along another path per image, then a plain pass."""
    tree = static_tree(((2,), (2, 1), (1,)), torch.device("cpu"))
    random = torch.Generator().manual_seed(3)
    drafted = torch.randint(C.vocab, (3, tree.nodes), generator=random)
    session = TARGET.begin(LABELS, guided, 1 + tree.nodes)
    prefix = TOKENS[:, :6]
    session.score(torch.cat([torch.zeros(3, 1).long(), prefix], 1), torch.zeros(3).long())
    start = torch.tensor([4, 2, 5])
    last = prefix.gather(1, start[:, None] - 1)
    scores = session.score(torch.cat([last, drafted], 1), start, 5, tree.layout())
    scored = torch.cat([last, drafted], 1)

    def whole(image: int, path: list[int], more: list[int]) -> Tensor:
        tokens = [*prefix[image, : int(start[image]) - 1].tolist(), *scored[image, path].tolist(), *more]
        sequence = torch.tensor([tokens])
        labels = [LABELS[image : image + 1]] + ([torch.tensor([C.classes])] if guided else [])
        return torch.cat([MODEL(label, sequence) for label in labels])

    for image in range(3):
        for node in range(tree.nodes + 1):
            path = tree.path[0, node, : int(tree.depth[0, node]) + 1].tolist()
            got = scores.logits.unflatten(0, (-1, 3))[:, image, node]
            assert torch.allclose(got, whole(image, path, [])[:, -1], atol=1e-4)
    ends = torch.tensor([6, 3, 5])  # a leaf of depth 3, an inner node, a leaf of depth 2
    session.compact(tree.path.expand(3, -1, -1)[torch.arange(3), ends], start)
    after = start + tree.depth[0, ends] + 1
    nxt = torch.tensor([[1], [2], [3]])
    got = session.score(nxt, after).logits.unflatten(0, (-1, 3))
    for image in range(3):
        path = tree.path[0, ends[image], : int(tree.depth[0, ends[image]]) + 1].tolist()
        assert torch.allclose(got[:, image, 0], whole(image, path, [int(nxt[image])])[:, -1], atol=1e-4)


TREES = ["chain-4", "3x2", "mc-sim-25", "dynamic-12-3-4"]


@both
@pytest.mark.parametrize("tree", TREES)
def test_seed_exact_trees_give_the_sequential_tokens(tree: str, guided: bool) -> None:
    settings = GUIDED if guided else PLAIN
    plain = decode(TARGET, "seed-exact", "none", settings=settings, index=range(5), labels=1).tokens
    for batch in (1, 3, 5):
        for index in torch.arange(5).split(batch):
            result = decode(TARGET, "seed-exact", drafter(tree), settings=settings, index=index, labels=1)
            assert torch.equal(result.tokens, plain[index])


METHODS = [
    (rule, tree)
    for (tokens, rule), kind in RULES.items()
    for tree in ("chain-4", "mc-sim-25", "dynamic-12-3-4")
    if tokens == CODES and (kind.trees or tree == "chain-4") and not (kind.needs_hidden and tree.startswith("dynamic"))
]


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize(("rule", "tree"), METHODS)
def test_every_rule_decodes_with_the_drafter(rule: str, tree: str, temperature: float) -> None:
    kind = RULES[CODES, rule]
    codebook = torch.randn(C.vocab, 4, generator=torch.Generator().manual_seed(2))
    options = ":k=4" if "lantern" in rule else ""
    made, near = make_rule(rule + options), nearest_codes(codebook, 4)
    settings = LawSettings(guidance=2.0, temperature=temperature, top_k=6)
    whole = EagerBatch(TARGET, drafter(tree), made, settings, neighbours=near).run(LABELS, 0, torch.arange(3))
    alone = EagerBatch(TARGET, drafter(tree), made, settings, neighbours=near).run(LABELS[1:2], 0, torch.tensor([1]))
    assert bool(((whole.tokens >= 0) & (whole.tokens < C.vocab)).all())
    assert torch.equal(whole.tokens[1:2], alone.tokens)
    assert bool((whole.passes <= C.length).all())
    if kind.exact and not temperature:
        plain = decode(TARGET, "seed-exact", "none", settings=settings, index=range(3), labels=LABELS).tokens
        assert torch.equal(whole.tokens, plain)


def test_the_target_as_its_own_smaller_target_is_always_right() -> None:
    result = decode(
        TARGET, "tree", TreeDrafter("model", SmallTarget(TARGET), read_shape("chain-3")), settings=GUIDED, labels=1
    )
    assert int(result.accepted.sum()) >= 0.99 * int(result.drafted.sum())
    assert int(result.passes.max()) == 1 + -(-(C.length - 1) // 4)


# Files.


def with_drafter(tiny_model: Path, folder: Path) -> Path:
    """A copy of the tiny model with a random drafter."""
    shutil.copytree(tiny_model, folder)
    target = load_target(folder, "llamagen")
    torch.manual_seed(0)
    save_drafter(folder / "eagle", EagleNet(eagle_config(target.config)), folder, {"target_name": "tiny"})
    return folder


def test_a_saved_drafter_is_read_again(tiny_model: Path, tmp_path: Path) -> None:
    folder = with_drafter(tiny_model, tmp_path / "m")
    target = load_target(folder, "llamagen")
    net = load_drafter(folder / "eagle", "eagle", target.config, target_digest(folder))
    torch.manual_seed(0)
    fresh = EagleNet(eagle_config(target.config))
    assert torch.allclose(net.fc.weight, fresh.fc.weight, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_weights": "0123"}, "another target"),
        ({"family": "llamagen"}, "allowed: 'eagle'"),
        ({"config": {"dim": 64, "heads": 2, "ffn": 8, "vocab": 16, "grid": 4}}, "dim = 64, the target has 32"),
        ({"config": {"dim": 32, "heads": 2, "ffn": 8, "vocab": 16, "grid": 4}}, "checkpoint does not fit"),
        ({"config": {"dim": 32, "odd": 1}}, "unknown config key 'odd'"),
    ],
)
def test_a_drafter_that_does_not_fit_is_refused(
    tiny_model: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    folder = with_drafter(tiny_model, tmp_path / "m")
    path = folder / "eagle" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError, match=message):
        load_drafter(folder / "eagle", "eagle", load_target(folder, "llamagen").config, target_digest(folder))


@pytest.mark.parametrize("rows", ["head", "tokens"])
def test_published_drafters_load_with_the_rows_they_were_trained_with(
    tiny_model: Path, tmp_path: Path, rows: str
) -> None:
    target = load_target(tiny_model, "llamagen")
    net = EagleNet(eagle_config(target.config))
    own = target.output.weight if rows == "head" else target.tok_embeddings.weight
    torch.save({**net.state_dict(), "embed_tokens.weight": own.half()}, tmp_path / "drafter.bin")
    convert_eagle(tmp_path / "drafter.bin", tiny_model, tmp_path / "out")
    made = load_drafter(tmp_path / "out", "eagle", target.config, target_digest(tiny_model))
    assert made.config.embedding == rows
    assert torch.allclose(made.layers[0].mlp.up_proj.weight, net.layers[0].mlp.up_proj.weight, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"tok_embeddings.weight": s["fc.weight"]}, "not an EAGLE drafter"),
        (lambda s: {**s, "fc.weight": s["fc.weight"][:16]}, "another target: fc.weight has shape"),
        (lambda s: {**s, "embed_tokens.weight": torch.randn(16, 32)}, "neither its head's nor its token rows"),
        (lambda s: {k: v for k, v in s.items() if k != "fc.bias"}, "missing key 'fc.bias'"),
        (lambda s: {**s, "fc.bias": s["fc.bias"] * float("nan")}, "non-finite"),
    ],
)
def test_a_published_file_of_the_wrong_kind_is_refused(tiny_model: Path, tmp_path: Path, change, message: str) -> None:
    net = EagleNet(eagle_config(load_target(tiny_model, "llamagen").config))
    torch.save(change(net.state_dict()), tmp_path / "drafter.bin")
    with pytest.raises(UsageError, match=message):
        convert_eagle(tmp_path / "drafter.bin", tiny_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
