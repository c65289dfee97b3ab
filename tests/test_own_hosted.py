"""Decoders of transformers run by our kernels against the same decoders run by transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import hf_toys
from bozzetto.adapters.layers import why_not
from bozzetto.adapters.prompted import Prompt, PromptedCodes
from bozzetto.drafts import Layout
from bozzetto.drafts.tree import static_tree
from bozzetto.errors import UsageError
from bozzetto.methods.shapes import read_shape
from bozzetto.targets.base import Scores

LENGTH, CODES = 12, 20
SHAPE = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
MODELS: dict[str, Any] = {
    "llama": (transformers.LlamaModel, transformers.LlamaConfig, {"num_key_value_heads": 2, "rope_parameters": YARN}),
    "biased": (transformers.LlamaModel, transformers.LlamaConfig, {"attention_bias": True, "head_dim": 18}),
    "qwen2": (transformers.Qwen2Model, transformers.Qwen2Config, {"num_key_value_heads": 1}),
    "emu3": (transformers.Emu3TextModel, transformers.Emu3TextConfig, {"num_key_value_heads": 2, "pad_token_id": 0}),
    "chameleon": (transformers.ChameleonForConditionalGeneration, transformers.ChameleonConfig, {}),
}


def body_of(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A decoder whose norms and biases are not those of a fresh one."""
    kind, config, given = MODELS[name]
    if name == "chameleon":
        given = {"num_key_value_heads": 2, "vocabulary_map": {"<image>": 3}, "vq_config": hf_toys._VQ}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = kind(config(**SHAPE, **{"vocab_size": 64, "max_position_embeddings": 96, **given, **more})).eval()
        for weight in model.parameters():
            spread = 1.0 + 0.2 * torch.randn_like(weight) if weight.ndim == 1 else 0.2 * torch.randn_like(weight)
            weight.data = spread
    return (model.model if name == "chameleon" else model).to(dtype).requires_grad_(False)


def target_of(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> PromptedCodes:
    body = body_of(name, dtype, **more)
    rows = body.get_input_embeddings().weight.detach().clone()
    target = PromptedCodes(body, rows[:CODES], rows[20 : 20 + CODES], LENGTH)
    for words in ((1, 5, 9, 2), (2,), (1, *range(3, 60), 2)):  # the last: more slots than a session of the others
        target.add(Prompt(words, (7, 8)))
    return target


def walk(target: PromptedCodes, labels: list[int], guided: bool) -> list[Tensor]:
    """What a session gives: a ragged chain, a tree, after its compaction, and after rows left and came."""
    draw, batch, found = torch.Generator().manual_seed(1), len(labels), []

    def score(session: Any, width: int, start: list[int], known: bool, layout: Layout | None = None) -> None:
        tokens = torch.randint(0, CODES, (len(start), width), generator=draw)
        scores: Scores = session.score(tokens, torch.tensor(start), max(start) if known else None, layout)
        assert scores.logits is not None and scores.features is not None
        found.extend((scores.logits, scores.features.float()))

    session, tree = target.begin(torch.tensor(labels), guided, 8), static_tree(read_shape("2x2"), torch.device("cpu"))
    score(session, 4, [0] * batch, True)
    start = [2, 4, 1][:batch]
    score(session, 7, start, False, tree.layout())
    session.compact(tree.path[:, -1].expand(batch, -1), torch.tensor(start))
    score(session, 1, [s + 3 for s in start], True)
    session.keep(torch.tensor([batch - 1, 0]))
    session.admit(torch.tensor([1]), torch.tensor([2]))  # a prompt longer than those before
    score(session, 3, [start[-1] + 4, 0], True)
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("labels", [[1], [1, 0, 1]])
@pytest.mark.parametrize("guided", [False, True])
def test_passes_are_the_models_own(name: str, labels: list[int], guided: bool) -> None:
    theirs, twin = walk(target_of(name), labels, guided), target_of(name)
    own = twin.owned()
    for found, wanted in zip(walk(own, labels, guided), theirs, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)
    assert all(not len(layer.mlp.up_proj.weight) for layer in twin.body.layers)
    back = walk(twin, labels, guided)  # the model takes its weights back
    assert all(torch.equal(found, wanted) for found, wanted in zip(back, theirs, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_passes_in_bfloat16_are_near(name: str) -> None:
    theirs = walk(target_of(name, torch.bfloat16), [1, 0, 1], True)
    exact = walk(target_of(name), [1, 0, 1], True)
    twin = walk(target_of(name, torch.bfloat16).owned(), [1, 0, 1], True)
    for found, rounded, wanted in zip(twin, theirs, exact, strict=True):
        off, usual = (float((part - wanted).norm() / wanted.norm()) for part in (found, rounded))
        assert off < 1.2 * usual + 2e-3, (off, usual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_have_the_same_bits_in_any_batch_and_width(dtype: torch.dtype) -> None:
    target, tokens = target_of("chameleon", dtype).owned(), torch.randint(0, CODES, (3, 8))
    whole = target.begin(torch.tensor([0, 1, 2]), True, 8).score(tokens, torch.zeros(3, dtype=torch.int64), 0)
    assert whole.logits is not None
    for row in range(3):
        session = target.begin(torch.tensor([row]), True, 8)
        for at in range(8):
            one = session.score(tokens[row : row + 1, at : at + 1], torch.tensor([at]), at)
            assert one.logits is not None and torch.equal(one.logits[:, 0], whole.logits[[row, 3 + row], at])


def test_targets_of_one_decoder_share_its_weights() -> None:
    one = target_of("qwen2")
    other = PromptedCodes(one.body, one.embedding, one.head, 2 * LENGTH)
    assert one.owned().decoder is other.owned().decoder


def hooked() -> Any:
    body = body_of("llama")
    body.layers[1].register_forward_hook(lambda *_: None)
    return body


def replaced() -> Any:
    body = body_of("llama")
    body.layers[1].mlp.up_proj = torch.nn.Sequential(body.layers[1].mlp.up_proj)
    return body


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (hooked, "it has hooks"),
        (replaced, "linear layers of its own"),
        (lambda: body_of("llama", hidden_act="gelu"), "its activation is gelu"),
        (lambda: body_of("llama", mlp_bias=True), "feed-forward layers have biases"),
        (lambda: body_of("chameleon", swin_norm=True), "layers of ChameleonModel are not known"),
        (lambda: body_of("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=0), "has a window"),
        (lambda: body_of("llama", rope_parameters={**YARN, "rope_type": "dynamic"}), r"not turned .* \(dynamic\)"),
        (lambda: hf_toys.tiny_glm().model.language_model, "layers of GlmImageTextModel are not known"),
    ],
)
def test_what_is_not_known_is_run_by_transformers_and_says_why(make: Any, why: str) -> None:
    body = make()
    rows = body.get_input_embeddings().weight[:CODES]
    target = PromptedCodes(body, rows, rows, LENGTH)
    with pytest.raises(UsageError, match=f"run by transformers.*{why}"):
        target.owned()
    assert why_not(body) == target.why_not() != ""
