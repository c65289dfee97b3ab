"""Adapters of transformers models: their laws are the models' own, and every method draws what the model would."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import bozzetto
import hf_toys
from bozzetto.adapters.eagle import PromptedEagle
from bozzetto.adapters.pictures import HostedPictures, PictureConfig
from bozzetto.adapters.prompted import Prompt, PromptedCodes
from bozzetto.decoding.loop import EagerBatch
from bozzetto.decoding.state import DecodeState
from bozzetto.drafters.eagle import EagleConfig, EagleNet
from bozzetto.drafters.tree import TreeDrafter
from bozzetto.drafts.tree import static_tree
from bozzetto.errors import UsageError
from bozzetto.laws.categorical import LawSettings
from bozzetto.methods.shapes import read_shape
from hf_toys import GRID, IMAGE, LINED, NEGATIVE, PROMPTS
from toys import make_drafter, make_rule

pytestmark = pytest.mark.filterwarnings("error::FutureWarning")  # transformers tells so what it will drop

FAMILIES = tuple(hf_toys.TARGETS)
by_family = pytest.mark.parametrize("family", FAMILIES)


OURS: list[bool] = [False]  # whether our kernels run the decoders
UNREAD = ("glm",)  # families whose decoders they do not know


@pytest.fixture(autouse=True, params=[False, True], ids=["transformers", "ours"])
def engine(request: pytest.FixtureRequest) -> None:
    OURS[0] = request.param
    if OURS[0] and request.node.callspec.params.get("family") in UNREAD:
        pytest.skip("its decoder is not of Llama's kind")


def target_of(family: str) -> PromptedCodes:
    return _target_of(family, OURS[0] and family not in UNREAD)


@functools.cache
def _target_of(family: str, own: bool) -> PromptedCodes:
    target = hf_toys.TARGETS[family]()
    return target.owned() if own else target


@functools.cache
def model_of(family: str) -> Any:
    made = {"janus": hf_toys.tiny_janus, "emu3": hf_toys.tiny_emu3, "glm": hf_toys.tiny_glm}
    return made.get(family, hf_toys.tiny_chameleon)()


def plain_logits(family: str, prompt: tuple[int, ...], tokens: list[int]) -> Tensor:
    """The model's own logits of tokens 0..n after a prompt, without a cache: [n + 1, V]."""
    model, target = model_of(family), target_of(family)
    words = torch.tensor([prompt])
    if family == "janus":
        drawn = model.prepare_embeddings_for_image_generation(torch.tensor([tokens], dtype=torch.int64))
        embedded = torch.cat([model.get_input_embeddings()(words), drawn], 1)
        out = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return model.model.generation_head(out)[0, len(prompt) - 1 :]
    numbers = torch.tensor(target.numbers)
    whole = torch.cat([words, numbers[tokens][None]], 1)
    if family == "emu3":
        logits = model(input_ids=whole, use_cache=False).logits
    elif family == "glm":
        before, _ = model.model.get_rope_index(words, glm_grids(1))
        places = torch.cat([before, model.model._cached_decode_position_ids.transpose(0, 1)], -1)
        logits = model(input_ids=whole, position_ids=places[..., : whole.shape[1]], use_cache=False).logits
    else:
        logits = model.lm_head(model.model(input_ids=whole, use_cache=False).last_hidden_state)
    return logits[0, len(prompt) - 1 :][:, numbers]


def glm_grids(rows: int) -> Tensor:
    """What GLM-Image's processor says of the grids: the picture, then its preview."""
    return torch.tensor([[1, *grid] for grid in reversed(hf_toys.GRIDS)] * rows)


def some_tokens(family: str, count: int, seed: int = 0) -> Tensor:
    """Tokens int64 [count, N] that the family allows."""
    codes = torch.randint(0, hf_toys.CODES, (count, GRID, GRID), generator=torch.Generator().manual_seed(seed))
    if family in LINED:
        codes = torch.nn.functional.pad(codes, (0, 1), value=hf_toys.CODES)
    return codes.flatten(1)


def free(family: str, at: int) -> bool:
    """Whether the model decides what stands there."""
    return family not in LINED or at % (GRID + 1) != GRID


@by_family
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("width", [1, 4, 9])
def test_logits_of_a_whole_grid_are_the_models_own(family: str, guided: bool, width: int) -> None:
    target, tokens = target_of(family), some_tokens(family, 3)
    session = target.begin(torch.tensor([0, 1, 2]), guided, width)
    carried = torch.nn.functional.pad(tokens, (1, width))
    found = []
    for first in range(0, target.length, width):
        start = torch.full((3,), first)
        found.append(session.score(carried[:, first : first + width], start, first).logits)
    logits = torch.cat(found, 1)[:, : target.length]
    prompts = [target.prompts[i].given for i in range(3)] + [target.prompts[i].without for i in range(3)] * guided
    for row, prompt in enumerate(prompts):
        wanted = plain_logits(family, prompt, tokens[row % 3, :-1].tolist())
        for at in range(target.length):
            if free(family, at):
                given, codes = logits[row, at], hf_toys.CODES
                assert torch.allclose(given[:codes], wanted[at, :codes], atol=1e-5), (row, at)


@by_family
def test_logits_of_a_tree_are_those_of_its_paths(family: str) -> None:
    """After two committed tokens, ragged over the images; then the tree is walked and compacted."""
    target, tokens = target_of(family), some_tokens(family, 3, 1)
    session, counts = target.begin(torch.tensor([2, 0, 1]), True, 12), torch.tensor([2, 0, 1])
    for at in range(2):
        session.score(torch.nn.functional.pad(tokens, (1, 0))[:, at, None], torch.full((3,), at), at)
    shape = static_tree(read_shape("2x2"), torch.device("cpu"))
    nodes = some_tokens(family, 3, 2)[:, :6]
    last = torch.nn.functional.pad(tokens, (1, 0)).gather(1, counts[:, None])
    logits = session.score(torch.cat([last, nodes], 1), counts, 2, shape.layout()).logits
    assert logits is not None
    for row in range(6):
        image, prompt = row % 3, target.prompts[[2, 0, 1][row % 3]]
        before = tokens[image, : counts[image]].tolist()
        for node in range(7):
            way = sorted({i for i in shape.path[0, node].tolist() if i > 0})
            path = before + [int(nodes[image, i - 1]) for i in way]
            if free(family, len(path)):
                wanted = plain_logits(family, prompt.given if row < 3 else prompt.without, path)[-1]
                assert torch.allclose(logits[row, node, : hf_toys.CODES], wanted[: hf_toys.CODES], atol=1e-5)
    leaf = shape.path[:, -1:].expand(3, 1, -1)[:, 0]
    session.compact(leaf, counts)
    grown = torch.cat([nodes.gather(1, (leaf[:, 1:] - 1))], 1)
    after = session.score(grown[:, -1:], counts + 2, 4).logits
    assert after is not None
    for image in range(3):
        path = tokens[image, : counts[image]].tolist() + grown[image].tolist()
        if free(family, len(path)):
            wanted = plain_logits(family, target.prompts[[2, 0, 1][image]].given, path)[-1]
            assert torch.allclose(after[image, 0, : hf_toys.CODES], wanted[: hf_toys.CODES], atol=1e-5)


@by_family
def test_rows_that_are_kept_and_admitted_go_on_as_if_alone(family: str) -> None:
    target, tokens = target_of(family), some_tokens(family, 3, 3)
    carried = torch.nn.functional.pad(tokens, (1, 0))
    session = target.begin(torch.tensor([1, 1, 0]), True, 4)
    session.score(carried[:, :3], torch.zeros(3, dtype=torch.int64))
    session.keep(torch.tensor([2, 0]))
    session.admit(torch.tensor([1]), torch.tensor([2]))
    start = torch.tensor([3, 0])
    inputs = torch.stack([carried[2, 3:5], carried[1, :2]])
    logits = session.score(inputs, start, 3).logits
    assert logits is not None
    for row, label, first, image in ((0, 0, 3, 2), (1, 2, 0, 1)):
        wanted = plain_logits(family, target.prompts[label].given, tokens[image, : first + 1].tolist())[-2:]
        for at in range(2):
            if free(family, first + at):
                assert torch.allclose(logits[row, at, : hf_toys.CODES], wanted[at, : hf_toys.CODES], atol=1e-5)


# ---- every drafter and rule ------------------------------------------------------------------------------------------


def greedy_alone(family: str, label: int, guidance: float) -> list[int]:
    """The model's own greedy picture, where its own loop cannot be asked: one plain pass per token."""
    target, tokens = target_of(family), []
    prompt = target.prompts[label]
    for at in range(target.length):
        if not free(family, at):
            tokens.append(hf_toys.CODES)
            continue
        law = plain_logits(family, prompt.given, tokens)[-1]
        if guidance != 1:
            other = plain_logits(family, prompt.without, tokens)[-1]
            law = other + guidance * (law - other)
        tokens.append(int(law[: hf_toys.CODES].argmax()))
    return tokens


def greedy_janus(label: int, guidance: float) -> list[int]:
    out = model_of("janus").generate(
        torch.tensor([PROMPTS[label]]),
        attention_mask=torch.ones(1, len(PROMPTS[label]), dtype=torch.int64),
        generation_mode="image",
        do_sample=False,
        guidance_scale=guidance,
        max_new_tokens=GRID * GRID,
    )
    return out[0].tolist()


def greedy_emu3(label: int, guidance: float) -> list[int]:
    """transformers' generate with its guidance and a function that allows what the grid allows."""
    target = target_of("emu3")
    codes, end = target.numbers[:-1], target.numbers[-1]
    prompt = torch.tensor([PROMPTS[label]])

    def allowed(_: int, seen: Tensor) -> list[int]:
        return codes if free("emu3", len(seen) - len(PROMPTS[label])) else [end]

    options = {"guidance_scale": guidance, "negative_prompt_ids": torch.tensor([NEGATIVE])} if guidance != 1 else {}
    out = model_of("emu3").generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=target.length,
        min_new_tokens=target.length,
        do_sample=False,
        prefix_allowed_tokens_fn=allowed,
        **options,
    )
    return [target.numbers.index(token) for token in out[0, len(PROMPTS[label]) :].tolist()]


@functools.cache
def greedy_glm() -> list[list[int]]:
    """transformers' generate of all prompts at once, padded, and of each alone."""
    model, longest = model_of("glm"), max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    found = []
    for rows, real in ((ids, mask), *((torch.tensor([p]), torch.ones(1, len(p), dtype=torch.int64)) for p in PROMPTS)):
        grids = {"image_grid_thw": glm_grids(len(rows)), "images_per_sample": torch.tensor([2] * len(rows))}
        out = model.generate(rows, attention_mask=real, **grids, do_sample=False, max_new_tokens=9)
        found.append(out[:, rows.shape[1] :])
    assert found[0].tolist() == torch.cat(found[1:]).tolist()
    return found[0].tolist()


@functools.cache
def greedy(family: str, label: int, guidance: float) -> list[int]:
    """What the model draws by itself."""
    if family == "janus" and guidance != 1:  # its image loop always has guidance
        return greedy_janus(label, guidance)
    if family == "glm" and guidance == 1:  # transformers' guidance knows no grids
        return greedy_glm()[label]
    return greedy_emu3(label, guidance) if family == "emu3" else greedy_alone(family, label, guidance)


def table_of(target: PromptedCodes, columns: int) -> Tensor:
    """Any table of neighbours in which an end of line has none but itself."""
    near = (torch.arange(target.vocab)[:, None] + torch.arange(1, columns + 1)) % hf_toys.CODES
    near[hf_toys.CODES :] = hf_toys.CODES
    return near.int()


def decoder_of(family: str, drafter: str, rule: str, law: LawSettings) -> EagerBatch:
    target = target_of(family)
    if drafter == "eagle":
        with torch.random.fork_rng():
            torch.manual_seed(5)
            shape = target.config
            net = EagleNet(EagleConfig(shape.dim, 4, 48, shape.vocab, shape.grid)).eval()
        made: Any = TreeDrafter("eagle", PromptedEagle(net, target), read_shape("chain-3"))
    else:
        made = make_drafter(drafter, 4)
    judge = make_rule(rule)
    return EagerBatch(target, made, judge, law, neighbours=table_of(target, judge.columns))


METHODS = [
    (drafter, rule)
    for drafter in ("none", "jacobi", "eagle")
    for rule in ("seed-exact", "exact", "lantern:k=3:delta=0", "grouped")
    if drafter != "jacobi" or make_rule(rule).window
]


@by_family
@pytest.mark.parametrize(("drafter", "rule"), [m for m in METHODS if m[1] != "grouped"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_every_method_draws_the_models_own_greedy_picture(
    family: str, drafter: str, rule: str, batch: int, guidance: float
) -> None:
    decoder = decoder_of(family, drafter, rule, LawSettings(guidance, 0.0))
    result = decoder.run(torch.arange(batch), 0, torch.arange(batch))
    for label in range(batch):
        assert result.tokens[label].tolist() == greedy(family, label, guidance)


@functools.cache
def sequential(family: str, guidance: float) -> DecodeState:
    law, index = LawSettings(guidance, 1.0, top_k=6), torch.arange(6)
    return decoder_of(family, "none", "seed-exact", law).run(index % 3, 7, index)


@by_family
@pytest.mark.parametrize("drafter", ["jacobi", "eagle"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_seed_exact_images_are_the_sequential_ones(family: str, drafter: str, guidance: float, batch: int) -> None:
    index, alone = torch.arange(6), sequential(family, guidance)
    decoder = decoder_of(family, drafter, "seed-exact", LawSettings(guidance, 1.0, top_k=6))
    parts = [decoder.run(part % 3, 7, part) for part in index.split(batch)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), alone.tokens)
    assert sum(int(part.passes.sum()) for part in parts) < int(alone.passes.sum())


@pytest.mark.parametrize(("drafter", "rule"), [(d, r.replace("k=3:delta=0", "k=8:delta=0.9")) for d, r in METHODS])
@pytest.mark.parametrize("family", LINED)
def test_lines_end_where_the_grid_says_and_nowhere_else(family: str, drafter: str, rule: str) -> None:
    decoder = decoder_of(family, drafter, rule, LawSettings(2.0, 3.0))
    tokens = decoder.run(torch.arange(60) % 3, 1, torch.arange(60)).tokens
    lines = tokens.unflatten(1, (GRID, GRID + 1))
    assert bool((lines[..., -1] == hf_toys.CODES).all()) and bool((lines[..., :-1] < hf_toys.CODES).all())
    pictures = HostedPictures(PictureConfig(GRID, GRID, 1), torch.zeros(0, 1), lined=True)
    assert torch.equal(pictures.codes(tokens), lines[..., :-1])


# ---- inside transformers' generate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("drafter", ["none", "jacobi"])
def test_generate_with_our_loop_is_generate(guidance: float, drafter: str) -> None:
    """A padded batch of prompts, and what is added behind the picture."""
    loop = bozzetto.generate_fn(GRID, GRID, drafter=drafter, ending=(5, 6))
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    options = {"guidance_scale": guidance, "negative_prompt_ids": torch.tensor([NEGATIVE] * 3)} if guidance != 1 else {}
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    out = model_of("emu3").generate(ids, attention_mask=mask, max_new_tokens=14, custom_generate=loop, **options)
    target = target_of("emu3")
    for label, row in enumerate(out.tolist()):
        assert row[:longest] == ids[label].tolist() and row[-2:] == [5, 6]
        assert row[longest:-2] == [target.numbers[token] for token in greedy("emu3", label, guidance)]


def test_generate_with_our_loop_samples_the_image_of_its_seed() -> None:
    ids, law = torch.tensor([PROMPTS[0]] * 2), {"do_sample": True, "top_k": 5, "temperature": 1.3}
    given: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 9, **law}
    model = model_of("chameleon")
    slow, fast = (
        model.generate(ids, custom_generate=bozzetto.generate_fn(GRID, GRID, drafter=name, seed=4), **given)
        for name in ("none", "jacobi")
    )
    assert torch.equal(slow, fast) and not torch.equal(slow[0], slow[1])
    target = target_of("chameleon")
    wanted = decoder_of("chameleon", "none", "seed-exact", LawSettings(1.0, 1.3, 5)).run(
        torch.tensor([0, 0]), 4, torch.tensor([0, 1])
    )
    assert slow[:, len(PROMPTS[0]) :].tolist() == torch.tensor(target.numbers)[wanted.tokens].tolist()


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    target = hf_toys.chameleon()
    with pytest.raises(UsageError, match="at most 55 fit"):
        target.add(Prompt((1,) * 56, (IMAGE,)))


def test_equal_prompts_have_equal_labels() -> None:
    target = hf_toys.chameleon()
    assert [target.add(prompt) for prompt in target.prompts] == [0, 1, 2]
