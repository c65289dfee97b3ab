"""A language model with a flow-matching head decodes through the same loop as the flow models of ours."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from bozzetto.adapters.nextstep import NextStepParts, NextStepTarget, grid_positions
from bozzetto.adapters.prompted import Prompt
from bozzetto.engine.loop import Decoder
from bozzetto.engine.state import BatchResult
from bozzetto.laws.categorical import LawSettings
from bozzetto.models.flow_cache import EulerSampler
from bozzetto.path_registry import make_path_drafter, make_path_rule

GRID, D, DIM = 3, 2, 32
N = GRID * GRID
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
    body, parts = transformers.Qwen2Model(config).eval(), NextStepParts(D, DIM, 16, 2)
    for number, part in enumerate((body, parts)):
        shaken(part, number)
        part.requires_grad_(False)
    target = NextStepTarget(body, parts, GRID, GRID, sampler, grid_positions(GRID, GRID, DIM) if positions else None)
    for prompt in PROMPTS:
        target.add(prompt)
    return target


TARGET = make_target(EulerSampler(steps=4))


def plain(prompt: tuple[int, ...], tokens: Tensor) -> Tensor:
    """The body's hidden states at the inputs of tokens 0..n, without a cache: [n + 1, d]."""
    words = TARGET.body.get_input_embeddings()(torch.tensor([prompt]))
    embedded = torch.cat([words, TARGET.image_in(tokens[None])], 1)
    hidden = TARGET.body(inputs_embeds=embedded, use_cache=False).last_hidden_state[0, len(prompt) - 1 :]
    return TARGET.parts.image_out_projector(hidden + grid_positions(GRID, GRID, DIM)[: len(hidden)])


def decode(drafter: str, rule: str, images: int = 6, guidance: float = 1.0, target: Any = TARGET) -> BatchResult:
    decoder = Decoder(target, make_path_drafter(drafter, 4, target, None), make_path_rule(rule), LawSettings(guidance))
    index = torch.arange(images)
    return decoder.run(index % 3, 5, index)


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


@pytest.mark.parametrize("rule", ["reflection", "chains"])
def test_exact_rules_draw_from_the_sequential_law(rule: str) -> None:
    """Means and deviations of the last row of tokens within five standard errors, other images than sequential ones."""
    count = 3000
    slow = decode("none", "plain", count).tokens[:, -GRID:]
    result = decode("none" if rule == "reflection" else "jacobi", rule, count)
    fast = result.tokens[:, -GRID:]
    assert not torch.allclose(slow, fast, atol=1e-3)
    spread = slow.std(0)
    assert bool(((slow.mean(0) - fast.mean(0)).abs() < 5 * spread * math.sqrt(2 / count)).all())
    assert bool(((fast.std(0) / spread - 1).abs() < 5 / math.sqrt(count)).all())
