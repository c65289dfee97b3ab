"""A language model with a flow-matching head decodes through the same loop as the flow models of ours."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import path_toys
from bozzetto.adapters.nextstep import NextStepTarget, grid_positions, next_step_parts, next_step_pictures
from bozzetto.adapters.prompted import Prompt
from bozzetto.decoding.loop import EagerBatch
from bozzetto.decoding.state import DecodeState
from bozzetto.drafts import VECTORS
from bozzetto.laws.categorical import LawSettings
from bozzetto.methods.table import read_drafter
from bozzetto.rules.base import Rule
from bozzetto.rules.chains import Chains
from bozzetto.rules.joint import Joint
from bozzetto.rules.path_block import PathBlock
from bozzetto.targets.flow_cache import EulerSampler, FlowSdeSampler
from bozzetto.targets.heads import FlowLaw, PackedDenoiser
from path_toys import compare, sequential
from toys import make_rule

GRID, D, DIM = 3, 4, 32
N = GRID * GRID
IMAGES, FEW, ACCEPTABLE = 1500, 8_000, 1e-3
SAMPLERS: dict[str, Any] = {
    "euler": EulerSampler(steps=4),
    "flow-sde": FlowSdeSampler(steps=4, shift=1.5),
    "norm": EulerSampler(steps=4, norm=1),
    "still": EulerSampler(steps=4, last=0.1, norm=1),
}
PROMPTS = (Prompt((1, 5, 9, 2), (1, 2)), Prompt((1, 7, 2), (1, 2)), Prompt((1, 11, 12, 13, 2), (1, 2)))


def shaken(module: nn.Module, seed: int, scale: float = 1.0) -> None:
    """Weights large enough for every part to matter."""
    made = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=made)
        if weight.ndim > 1:
            weight.data = scale * noise / math.sqrt(weight.shape[1])
        else:
            weight.data = 1 + 0.1 * noise if "norm" in name or "in_ln.weight" in name else 0.2 * noise


def make_target(sampler: Any, positions: bool = True) -> NextStepTarget:
    config = transformers.Qwen2Config(
        hidden_size=DIM,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=16,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    body, parts = transformers.Qwen2Model(config).eval(), next_step_parts(D, DIM, 16, 2)
    for number, part in enumerate((body, parts)):
        shaken(part, number)
        part.requires_grad_(False)
    target = NextStepTarget(body, parts, GRID, GRID, sampler, grid_positions(GRID, GRID, DIM) if positions else None)
    for prompt in PROMPTS:
        target.add(prompt)
    return target


TARGET = make_target(SAMPLERS["euler"])


def plain(prompt: tuple[int, ...], tokens: Tensor) -> Tensor:
    """The body's hidden states at the inputs of tokens 0..n, without a cache: [n + 1, d]."""
    words = TARGET.body.get_input_embeddings()(torch.tensor([prompt]))
    embedded = torch.cat([words, TARGET.image_in(tokens[None])], 1)
    hidden = TARGET.body(inputs_embeds=embedded, use_cache=False).last_hidden_state[0, len(prompt) - 1 :]
    return TARGET.parts.image_out_projector(hidden + grid_positions(GRID, GRID, DIM)[: len(hidden)])


def decode(
    drafter: str,
    rule: str,
    images: int = 6,
    guidance: float = 1.0,
    target: Any = TARGET,
    seed: int = 5,
    first: int = 0,
) -> DecodeState:
    decoder = EagerBatch(
        target,
        read_drafter(drafter, VECTORS).make(4, None, None, target),
        make_rule(rule, VECTORS),
        LawSettings(guidance),
    )
    index = torch.arange(first, first + images)
    return decoder.run(index % 3, seed, index)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("width", [1, 4, 9])
def test_hidden_states_of_a_whole_grid_are_the_bodys_own(guided: bool, width: int) -> None:
    tokens = torch.randn(3, N, D, generator=torch.Generator().manual_seed(1))
    carried = torch.nn.functional.pad(tokens, (0, 0, 1, width))
    session, found = TARGET.begin(torch.tensor([0, 1, 2]), guided, width), []
    for first in range(0, N, width):
        found.append(session.score(carried[:, first : first + width], torch.full((3,), first), first).features)
    features = torch.cat(found, 1)[:, :N]  # type: ignore[arg-type]
    prompts = [p.given for p in PROMPTS] + [p.without for p in PROMPTS] * guided
    for row, prompt in enumerate(prompts):
        assert torch.allclose(features[row], plain(prompt, tokens[row % 3, :-1]), atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_vanishing_epsilon_gives_the_sequential_tokens(guidance: float) -> None:
    slow, fast = (
        decode("none", "plain", guidance=guidance),
        decode("jacobi", "pathwise:epsilon=1e-5", guidance=guidance),
    )
    assert torch.allclose(slow.tokens, fast.tokens, atol=1e-3)
    near = decode("jacobi", "pathwise:epsilon=0.5", guidance=guidance)
    assert int(near.passes.sum()) < int(slow.passes.sum())


@functools.cache
def target(sampler: str) -> NextStepTarget:
    return make_target(SAMPLERS[sampler])


@functools.cache
def drawn(sampler: str, guidance: float, drafter: str, rule: str, seed: int = 5) -> Tensor:
    return decode(drafter, rule, IMAGES, guidance, target(sampler), seed).tokens


@pytest.mark.parametrize(("sampler", "guidance"), [("euler", 1.0), ("flow-sde", 1.0), ("norm", 2.0)])
@pytest.mark.parametrize("method", ["none/reflection", "none/coupled", "jacobi/chains"])
def test_pictures_have_the_sequential_law(sampler: str, guidance: float, method: str) -> None:
    """All tokens of a picture together, of other images than the sequential ones."""
    got = compare(drawn(sampler, guidance, *method.split("/")), drawn(sampler, guidance, "none", "plain", 6))
    assert got.p_value > ACCEPTABLE


def test_samplers_norm_and_guidance_are_laws_of_their_own() -> None:
    law = drawn("euler", 1.0, "none", "plain")
    for sampler, guidance in (("flow-sde", 1.0), ("norm", 1.0), ("still", 1.0), ("euler", 2.0)):
        assert compare(law, drawn(sampler, guidance, "none", "plain", 6)).p_value < 1e-9


@pytest.mark.parametrize("method", ["none/coupled", "jacobi/chains"])
def test_a_last_step_without_noise_changes_no_law_but_keeps_few_drafts(method: str) -> None:
    """Chains keep a draft where the two tokens, which come nearer from pass to pass, are the same numbers at last."""
    found = decode(*method.split("/"), IMAGES, 1.0, target("still"))
    assert compare(found.tokens, drawn("still", 1.0, "none", "plain", 6)).p_value > ACCEPTABLE
    assert int(found.accepted.sum()) < IMAGES * N // 20


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("method", ["none/plain", "none/coupled", "jacobi/chains", "jacobi/pathwise:epsilon=0.2"])
def test_an_image_does_not_depend_on_its_batch(sampler: str, method: str) -> None:
    whole = decode(*method.split("/"), 4, 2.0, target(sampler)).tokens
    for image in range(3):
        alone = decode(*method.split("/"), 1, 2.0, target(sampler), first=image).tokens
        torch.testing.assert_close(alone[0], whole[image], atol=1e-4, rtol=0)


def test_a_norm_stands_between_a_token_and_what_follows() -> None:
    """Tokens that the norm makes equal are fed back alike, and stand for equal pixels."""
    other, tokens = target("norm"), torch.randn(1, N, D, generator=torch.Generator().manual_seed(3))
    twin = 2.5 * tokens - 0.7
    torch.testing.assert_close(other.embed(tokens), other.embed(twin), atol=1e-4, rtol=0)
    torch.testing.assert_close(other.embed(tokens), other.image_in(other.settled(tokens)))
    pictures = [next_step_pictures(other, lambda latents: latents, 2, 8).decode(part) for part in (tokens, twin)]
    torch.testing.assert_close(*pictures, atol=1e-4, rtol=0)
    assert not torch.allclose(target("euler").embed(tokens), target("euler").embed(twin))


def test_tokens_are_patches_of_latents() -> None:
    rows, columns, channels, patch = 2, 3, 3, 2
    wide = NextStepTarget(TARGET.body, next_step_parts(channels * patch**2, DIM, 16, 1), rows, columns, EulerSampler())
    pictures = next_step_pictures(wide, lambda latents: latents, patch, 8, scale=2.0, shift=0.25)
    assert pictures.config.size == (16 * columns, 16 * rows)
    tokens = torch.arange(rows * columns * channels * patch**2).float().view(1, rows * columns, -1)
    found = 2 * pictures.decoder(tokens.unflatten(1, (rows, columns))) - 1  # an identity in place of a decoder
    for r, c, channel, y, x in itertools.product(*map(range, (rows, columns, channels, patch, patch))):
        number = tokens[0, r * columns + c, channel * patch**2 + y * patch + x]
        assert found[0, channel, r * patch + y, c * patch + x] == number / 2 + 0.25


# The laws of the head alone, against a draft that is another head: rules that need a draft's law too.


@dataclass(frozen=True)
class HeadModel:
    """A head of DIM numbers of condition, as toy targets are asked (path_toys.py): a token's law depends on the token
    before it, through the norm where there is one, and on its position. wrong: how far its weights are off."""

    sampler: Any
    guidance: float
    wrong: float = 0.0

    def law(self, context: Tensor, position: Tensor) -> FlowLaw:
        shape = (position.shape[0], position.shape[1])
        fed = F.layer_norm(context, (D,), eps=1e-6) if self.sampler.norm else context
        told = torch.sin(torch.cat([fed, fed.roll(1, -1), fed + position[..., None]], -1) @ FROM).flatten(0, 1)
        told = told if self.guidance == 1 else torch.cat([told, torch.cos(position.flatten()[:, None] + FROM[0])])
        return FlowLaw(self.sampler.schedule, _head(self.sampler, self.wrong), told, shape, self.guidance, 1.0)

    def draft(self, wrong: float) -> HeadModel:
        return replace(self, wrong=wrong)


FROM = torch.randn(3 * D, DIM, generator=torch.Generator().manual_seed(4)) / math.sqrt(3 * D)


@functools.cache
def _head(sampler: Any, wrong: float) -> PackedDenoiser:
    net = next_step_parts(D, DIM, 16, 1)["image_head"]["net"].requires_grad_(False)
    shaken(net, 7)
    for weight in net.parameters():
        weight.mul_(1 + wrong)
    return PackedDenoiser(net, sampler.schedule.time, torch.float32)


MODELS = {
    "euler": HeadModel(EulerSampler(path_toys.STEPS, norm=1), 2.0),
    "flow-sde": HeadModel(FlowSdeSampler(path_toys.STEPS), 1.0),
    "still": HeadModel(EulerSampler(path_toys.STEPS, last=0.1), 1.0),
}
RULES: dict[str, Rule] = {rule.name: rule for rule in (Joint(tries=1), PathBlock(), Chains())}


@functools.cache
def one_by_one(model: str, seed: int) -> Tensor:
    return sequential(MODELS[model], range(FEW), 2, seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rule", RULES)
def test_rules_that_verify_drafts_keep_the_law_of_the_head(model: str, rule: str) -> None:
    law: Any = MODELS[model]
    out = path_toys.decode(RULES[rule], law, law.draft(0.05), range(FEW), length=2, drafts=2)
    assert compare(out.tokens, one_by_one(model, 1)).p_value > ACCEPTABLE
    assert compare(one_by_one(model, 1), one_by_one(model, 2)).p_value > ACCEPTABLE
    assert (out.accepted > FEW // 20) == (model != "still")
    assert out.accepted < out.offered


@pytest.mark.parametrize("model", MODELS)
def test_the_wrong_head_draws_from_another_law(model: str) -> None:
    law: Any = MODELS[model]
    assert compare(sequential(law.draft(0.3), range(FEW), 2, 3), one_by_one(model, 1)).p_value < 1e-9


@pytest.mark.parametrize("rule", RULES)
def test_a_head_that_says_nothing_gives_gaussian_tokens(rule: str) -> None:
    """v = 0 makes every step x -> (1 - dt) x + noise: the variance runs by a recursion, whatever is drafted."""
    silent: Any = HeadModel(EulerSampler(path_toys.STEPS), 1.0, -1.0)
    tokens = path_toys.decode(RULES[rule], silent, silent.draft(0.0), range(FEW), length=2, drafts=2).tokens.double()
    variance, schedule = 1.0, silent.sampler.schedule
    for of_state, std in zip(schedule.of_state.tolist(), schedule.std.tolist(), strict=True):
        variance = of_state**2 * variance + std**2
    assert float(tokens.mean(0).abs().max()) < 5 * math.sqrt(variance / FEW)
    assert float((tokens.var(0) / variance - 1).abs().max()) < 5 * math.sqrt(2 / FEW)
    assert float((tokens**4).mean()) == pytest.approx(3 * variance**2, rel=0.05)
