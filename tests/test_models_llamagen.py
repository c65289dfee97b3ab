"""LlamaGen against explicit loops, its cached decoder against the whole-sequence network, published sizes and files."""

from __future__ import annotations

import cmath
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bozzetto.checkpoints.states import read_state
from bozzetto.checkpoints.weights import load_strict
from bozzetto.errors import UsageError
from bozzetto.laws.categorical import LawSettings
from bozzetto.targets.llamagen import LlamaGen, LlamaGenConfig, left_pad, published_config
from bozzetto.targets.llamagen_cache import LlamaGenTarget
from toys import decode, sketched, tiny_llamagen

MODEL = tiny_llamagen()
C = MODEL.config


def read_published(path: Path, config: LlamaGenConfig) -> LlamaGen:
    """A published checkpoint of this config in float32."""
    state = {key: value.float() for key, value in read_state(path).items() if key != "freqs_cis"}
    model = LlamaGen(config)
    load_strict(model, state, path)
    return model.eval()


TOKENS = torch.randint(C.vocab, (4, C.length), generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 1])
Seen = Callable[[int, int], bool]


# The slow reference: one image, float64, explicit loops and complex numbers, from the published description.


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.pow(2).mean() + C.norm_eps).sqrt() * gain


def turned(vector: Tensor, cell: int) -> list[complex]:
    """Interleaved pairs as complex numbers, turned by grid row (first half) and column (second half); a condition
    token has a cell below 0, and its rotation is zero."""
    half, quarter = C.head_dim // 2, C.head_dim // 4
    row, column = divmod(cell, C.grid)
    pairs = []
    for i in range(half):
        frequency = C.rope_base ** (-2 * (i % quarter) / half)
        angle = (row if i < quarter else column) * frequency
        pairs.append(complex(vector[2 * i], vector[2 * i + 1]) * (cmath.exp(1j * angle) if cell >= 0 else 0))
    return pairs


def attend(q: list[Tensor], k: list[Tensor], v: list[Tensor], lead: int, seen: Seen) -> list[Tensor]:
    """Softmax attention of one head over a whole sequence with `lead` condition tokens."""
    queries, keys = ([turned(x, n - lead) for n, x in enumerate(part)] for part in (q, k))
    out = []
    for n, query in enumerate(queries):
        there = [m for m in range(len(keys)) if seen(n, m)]
        scores = [
            sum((a.conjugate() * b).real for a, b in zip(query, keys[m], strict=True)) / math.sqrt(C.head_dim)
            for m in there
        ]
        weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
        out.append(sum(weight * v[m] for weight, m in zip(weights, there, strict=True)))
    return out


def causal(n: int, m: int) -> bool:
    return m <= n


def slow_forward(model: LlamaGen, condition: list[Tensor], tokens: list[int], seen: Seen = causal) -> Tensor:
    """Logits at every input, condition tokens included. seen(n, m): whether input n attends to input m."""
    w = {name: value.double() for name, value in model.state_dict().items()}
    x = [*condition, *(w["tok_embeddings.weight"][t] for t in tokens)]
    lead = len(condition)
    for n in range(C.layers):
        p = f"layers.{n}."
        normed = [rms(row, w[p + "attention_norm.weight"]) for row in x]
        q, k, v = zip(*((w[p + "attention.wqkv.weight"] @ row).chunk(3) for row in normed), strict=True)
        heads = [
            attend(*([row[h * C.head_dim : (h + 1) * C.head_dim] for row in part] for part in (q, k, v)), lead, seen)
            for h in range(C.heads)
        ]
        mixed = [torch.cat(parts) for parts in zip(*heads, strict=True)]
        x = [row + w[p + "attention.wo.weight"] @ m for row, m in zip(x, mixed, strict=True)]
        for i, row in enumerate(x):
            normed_row = rms(row, w[p + "ffn_norm.weight"])
            gate, up = (w[p + f"feed_forward.{name}.weight"] @ normed_row for name in ("w1", "w3"))
            x[i] = row + w[p + "feed_forward.w2.weight"] @ (gate * torch.sigmoid(gate) * up)
    return torch.stack([w["output.weight"] @ rms(row, w["norm.weight"]) for row in x])


def test_forward_equals_the_explicit_reference() -> None:
    fast = MODEL(LABELS[:2], TOKENS[:2, :-1])
    for b in range(2):
        row = MODEL.cls_embedding.embedding_table.weight[LABELS[b]].double()
        slow = slow_forward(MODEL, [row], TOKENS[b, :-1].tolist())
        assert torch.allclose(fast[b].double(), slow, atol=1e-4)
    assert float(fast.std()) > 0.5  # the comparison is not of zeros


def test_a_fresh_network_predicts_the_uniform_law() -> None:
    assert int(LlamaGen(C)(LABELS, TOKENS[:, :3]).count_nonzero()) == 0


# The cached decoder against the whole-sequence network.


def expected(guided: bool, model: LlamaGen = MODEL) -> Tensor:
    """Logits [B, N, V] or [2B, N, V] of the true tokens."""
    logits = [model(LABELS, TOKENS[:, :-1])]
    if guided:
        logits.append(model(torch.full_like(LABELS, C.classes), TOKENS[:, :-1]))
    return torch.cat(logits)


INPUTS = torch.cat([torch.full((4, 1), 9), TOKENS[:, :-1]], 1)  # the value at input 0 is ignored
both = pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])


@both
@pytest.mark.parametrize("width", [1, 3, 16])
def test_cached_passes_equal_the_whole_sequence(width: int, guided: bool) -> None:
    session = LlamaGenTarget(MODEL).begin(LABELS, guided, width)
    starts = range(0, C.length, width)
    got = [session.score(INPUTS[:, s : s + width], torch.full((4,), s)).logits for s in starts]
    assert torch.allclose(torch.cat(got, 1), expected(guided), atol=1e-4)


@both
def test_ragged_passes_with_rejected_drafts_and_dropped_images_equal_the_whole_sequence(guided: bool) -> None:
    """Each pass carries a few right drafts and garbage behind them; finished images are dropped on the way."""
    width, wanted = 5, expected(guided).unflatten(0, (-1, 4))  # [copies, B, N, V]
    random = torch.Generator().manual_seed(0)
    session = LlamaGenTarget(MODEL).begin(LABELS, guided, width)
    rows, start, sizes = torch.arange(4), torch.zeros(4, dtype=torch.int64), set()
    while len(rows):
        sizes.add(len(rows))
        right = 1 + rows + torch.randint(2, (len(rows),), generator=random)  # image r commits r + 1 or r + 2
        right = right.minimum(C.length - start)
        position = start[:, None] + torch.arange(width)
        true = INPUTS[rows].gather(1, position.clamp_max(C.length - 1))
        garbage = torch.randint(C.vocab, true.shape, generator=random)
        use = torch.arange(width) < right[:, None]
        got = session.score(torch.where(use, true, garbage), start).logits.unflatten(0, (-1, len(rows)))
        for b, row in enumerate(rows):
            n = int(right[b])
            assert torch.allclose(got[:, b, :n], wanted[:, row, start[b] : start[b] + n], atol=1e-4)
        start = start + right
        going = (start < C.length).nonzero().flatten()
        if len(going):
            session.keep(going)
        rows, start = rows[going], start[going]
    assert sizes == {4, 3, 2, 1}


def test_guided_rows_are_conditional_then_unconditional() -> None:
    session = LlamaGenTarget(MODEL).begin(LABELS, True, 1)
    cond, uncond = session.score(INPUTS[:, :1], torch.zeros(4, dtype=torch.int64)).logits.chunk(2)
    assert torch.allclose(uncond, uncond[:1].expand_as(uncond))
    assert not torch.allclose(cond[0], cond[1], atol=1e-3)


@both
def test_bfloat16_runs_and_stays_near_float32(guided: bool) -> None:
    target = LlamaGenTarget(MODEL, torch.bfloat16)
    logits = target.begin(LABELS, guided, C.length).score(INPUTS, torch.zeros(4, dtype=torch.int64)).logits
    wanted = expected(guided)
    assert logits.dtype == torch.float32
    assert float((logits - wanted).abs().mean()) < 0.1 * float(wanted.abs().mean())
    result = decode(target, "exact", settings=LawSettings(guidance=2.0 if guided else 1.0), index=range(3), labels=0)
    assert result.tokens.shape == (3, C.length)


# Captions in place of classes: the same references, with 5 condition tokens, some of them padding.

PADDED, RAW = 5, 6
CAPTIONED = tiny_llamagen(classes=0, condition_tokens=PADDED, caption_dim=RAW)
CAPTIONED.cls_embedding.uncond_embedding.copy_(torch.randn(PADDED, RAW, generator=torch.Generator().manual_seed(2)))
RIGHT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]])
TEXT = torch.randn(4, PADDED, RAW, generator=torch.Generator().manual_seed(3))
FEATURES, MASK = left_pad(TEXT, RIGHT)


def test_left_pad_moves_the_real_tokens_to_the_end_and_clears_the_rest() -> None:
    for b in range(4):
        real = int(RIGHT[b].sum())
        assert MASK[b].tolist() == [False] * (PADDED - real) + [True] * real
        assert torch.equal(FEATURES[b, PADDED - real :], TEXT[b, :real])
        assert int(FEATURES[b, : PADDED - real].count_nonzero()) == 0


def slow_captions(features: Tensor, real: list[bool], tokens: list[int]) -> Tensor:
    """Logits of the image tokens: features projected by hand, padding out of sight, every input in its own sight."""
    w = {name: value.double() for name, value in CAPTIONED.cls_embedding.cap_proj.state_dict().items()}
    condition = []
    for feature in features.double():
        h = w["fc1.weight"] @ feature
        h = h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))) / 2
        condition.append(w["fc2.weight"] @ h)

    def seen(n: int, m: int) -> bool:
        return n == m or (m < n and (m >= PADDED or real[m]))

    return slow_forward(CAPTIONED, condition, tokens, seen)[PADDED - 1 :]


@pytest.mark.parametrize("b", range(4))
def test_captioned_forward_equals_the_explicit_reference(b: int) -> None:
    tokens, real = TOKENS[b : b + 1, :7], MASK[b].tolist()
    for features in (FEATURES[b], CAPTIONED.cls_embedding.uncond_embedding):
        fast = CAPTIONED(features[None], tokens, MASK[b : b + 1])[0]
        assert fast.shape == (8, C.vocab)
        assert torch.allclose(fast.double(), slow_captions(features, real, tokens[0].tolist()), atol=1e-4)
        assert float(fast.std()) > 0.5


def test_what_stands_in_the_padding_changes_nothing() -> None:
    other = FEATURES + 10 * torch.randn(FEATURES.shape) * ~MASK[..., None]
    assert torch.allclose(CAPTIONED(other, TOKENS[:, :5], MASK), CAPTIONED(FEATURES, TOKENS[:, :5], MASK), atol=1e-5)


def expected_captioned(guided: bool) -> Tensor:
    logits = [CAPTIONED(FEATURES, TOKENS[:, :-1], MASK)]
    if guided:  # no caption, under the mask of the caption
        none = CAPTIONED.cls_embedding.uncond_embedding.expand_as(FEATURES)
        logits.append(CAPTIONED(none, TOKENS[:, :-1], MASK))
    return torch.cat(logits)


def captioned(dtype: torch.dtype = torch.float32) -> LlamaGenTarget:
    return LlamaGenTarget(CAPTIONED, dtype).with_captions(FEATURES, MASK)


@both
@pytest.mark.parametrize("width", [1, 3, 16])
def test_cached_captioned_passes_equal_the_whole_sequence(width: int, guided: bool) -> None:
    order = torch.tensor([2, 0, 3, 1])  # labels are numbers of captions
    session = captioned().begin(order, guided, width)
    starts = range(0, C.length, width)
    got = [session.score(INPUTS[order, s : s + width], torch.full((4,), s), s).logits for s in starts]
    wanted = expected_captioned(guided).unflatten(0, (-1, 4))[:, order].flatten(0, 1)
    assert torch.allclose(torch.cat(got, 1), wanted, atol=1e-4)


@both
def test_captioned_images_that_are_left_keep_their_captions(guided: bool) -> None:
    session, rows = captioned().begin(torch.arange(4), guided, 4), torch.tensor([1, 3])
    session.score(INPUTS[:, :4], torch.zeros(4, dtype=torch.int64))
    session.keep(rows)
    got = session.score(INPUTS[rows, 4:8], torch.full((2,), 4)).logits
    wanted = expected_captioned(guided).unflatten(0, (-1, 4))[:, rows, 4:8].flatten(0, 1)
    assert torch.allclose(got, wanted, atol=1e-4)


def test_an_empty_caption_gives_finite_laws_equal_to_the_whole_sequence() -> None:
    none = torch.zeros(1, PADDED, dtype=torch.bool)
    session = LlamaGenTarget(CAPTIONED).with_captions(FEATURES[:1], none).begin(torch.tensor([0]), False, C.length)
    got = session.score(INPUTS[:1], torch.tensor([0])).logits
    assert torch.allclose(got, CAPTIONED(FEATURES[:1], TOKENS[:1, :-1], none), atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_captioned_images_are_the_same_with_and_without_drafts(guidance: float) -> None:
    settings, target = LawSettings(guidance=guidance), captioned()
    alone = decode(target, "seed-exact", "none", settings=settings, index=range(4), labels=torch.arange(4))
    ahead = decode(target, "seed-exact", "jacobi", settings=settings, index=range(4), labels=torch.arange(4))
    assert torch.equal(alone.tokens, ahead.tokens)
    greedy = LawSettings(guidance=guidance, temperature=0.0)
    alone = decode(target, "seed-exact", "none", settings=greedy, index=range(4), labels=torch.arange(4))
    tree = decode(target, "tree", sketched(target, "2x2x1"), settings=greedy, index=range(4), labels=torch.arange(4))
    assert torch.equal(alone.tokens, tree.tokens)


def test_captioned_bfloat16_stays_near_float32() -> None:
    session = captioned(torch.bfloat16).begin(torch.arange(4), True, C.length)
    logits, wanted = session.score(INPUTS, torch.zeros(4, dtype=torch.int64)).logits, expected_captioned(True)
    assert float((logits - wanted).abs().mean()) < 0.1 * float(wanted.abs().mean())


def test_captions_and_classes_are_not_confused() -> None:
    with pytest.raises(UsageError, match="with_captions"):
        LlamaGenTarget(CAPTIONED).begin(torch.tensor([0]), False, 1)
    with pytest.raises(UsageError, match="classes"):
        LlamaGenTarget(MODEL).with_captions(FEATURES, MASK)
    with pytest.raises(UsageError, match=r"\(4, 4, 6\)"):
        LlamaGenTarget(CAPTIONED).with_captions(FEATURES[:, 1:], MASK[:, 1:])


# Published sizes and checkpoints.

PUBLISHED = {
    "B": 110_888_448,
    "L": 342_910_976,
    "XL": 774_699_520,
    "XXL": 1_410_972_672,
    "3B": 3_096_659_200,
}
ROUNDED = {"XXXL": (3.893e9, 1e-3), "1B": (1.1996e9, 1e-4), "7B": (6.61e9, 1e-3)}


def on_meta(size: str) -> LlamaGen:
    with torch.device("meta"):
        return LlamaGen(published_config(size))


def parameters(size: str) -> int:
    return sum(p.numel() for p in on_meta(size).parameters())


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_have_the_published_parameter_counts(size: str) -> None:
    assert parameters(size) == PUBLISHED[size]


@pytest.mark.parametrize("size", ROUNDED)
def test_larger_sizes_have_the_published_counts_to_rounding(size: str) -> None:
    count, tolerance = ROUNDED[size]
    assert parameters(size) == pytest.approx(count, rel=tolerance)


CAPTIONED_SIZES = {"B": (112_282_368, 0), "L": (345.0e6, 2e-4), "XL": (777_678_080, 0), "XXL": (1.415e9, 1e-3)}


@pytest.mark.parametrize("size", CAPTIONED_SIZES)
def test_captioned_sizes_have_the_published_parameter_counts(size: str) -> None:
    with torch.device("meta"):
        model = LlamaGen(published_config(size, captioned=True))
    wanted, tolerance = CAPTIONED_SIZES[size]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(wanted, rel=tolerance, abs=0)
    names = {name for name in model.state_dict() if name.startswith("cls_embedding.")}
    assert names == {f"cls_embedding.{n}" for n in ("uncond_embedding", "cap_proj.fc1.weight", "cap_proj.fc2.weight")}


def test_size_b_has_the_88_published_tensors() -> None:
    per_layer = ["attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2"]
    per_layer += ["attention_norm", "ffn_norm"]
    names = {"cls_embedding.embedding_table.weight", "tok_embeddings.weight", "norm.weight", "output.weight"}
    names |= {f"layers.{n}.{name}.weight" for n in range(12) for name in per_layer}
    state = on_meta("B").state_dict()
    assert set(state) == names
    assert len(state) == 88
    assert state["cls_embedding.embedding_table.weight"].shape == (1001, 768)
    assert state["layers.0.feed_forward.w1.weight"].shape == (2048, 768)


def test_unknown_sizes_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'Q'.*XXL"):
        published_config("Q")


def state() -> dict[str, Tensor]:
    return dict(MODEL.state_dict())


@pytest.mark.parametrize("wrapper", [None, "model", "module", "state_dict"])
def test_read_published_opens_every_published_layout(tmp_path: Path, wrapper: str | None) -> None:
    content = {**state(), "freqs_cis": torch.zeros(17, 8, 2)}
    torch.save({wrapper: content, "steps": 3} if wrapper else content, tmp_path / "c2i.pt")
    model = read_published(tmp_path / "c2i.pt", C)
    assert not model.training
    assert torch.equal(model(LABELS, TOKENS[:, :5]), MODEL(LABELS, TOKENS[:, :5]))


def test_read_published_computes_half_precision_files_in_float32(tmp_path: Path) -> None:
    torch.save({"model": {k: v.bfloat16() for k, v in state().items()}}, tmp_path / "c2i.pt")
    assert read_published(tmp_path / "c2i.pt", C).output.weight.dtype == torch.float32


def broken(kind: str) -> object:
    content = state()
    if kind == "missing key":
        del content["norm.weight"]
    elif kind == "unexpected key":
        content["extra.weight"] = torch.zeros(1)
    elif kind == "wrong shape":
        content["norm.weight"] = torch.ones(7)
    elif kind == "non-finite":
        content["norm.weight"] = torch.full_like(content["norm.weight"], math.nan)
    elif kind == "not tensors":
        return {"model": {"norm.weight": 3}}
    elif kind == "not a dict":
        return [1, 2]
    return content


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("missing key", "norm.weight"),
        ("unexpected key", "extra.weight"),
        ("wrong shape", r"norm.weight.*\(7,\).*\(32,\)"),
        ("non-finite", "norm.weight"),
        ("not tensors", "norm.weight"),
        ("not a dict", "list"),
    ],
)
def test_read_published_names_what_is_wrong_with_a_file(tmp_path: Path, kind: str, named: str) -> None:
    torch.save(broken(kind), tmp_path / "bad.pt")
    with pytest.raises(UsageError, match=named) as caught:
        read_published(tmp_path / "bad.pt", C)
    assert "bad.pt" in str(caught.value)


class Unsafe:
    """Makes a folder when an unrestricted unpickler reads it."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.makedirs, (self.path,)


def test_read_published_never_executes_a_pickle(tmp_path: Path) -> None:
    torch.save({"model": Unsafe(str(tmp_path / "executed"))}, tmp_path / "evil.pt")
    with pytest.raises(UsageError, match=r"evil\.pt"):
        read_published(tmp_path / "evil.pt", C)
    assert not (tmp_path / "executed").exists()


def test_read_published_names_missing_and_truncated_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.pt"):
        read_published(tmp_path / "none.pt", C)
    torch.save(state(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:1000])
    with pytest.raises(UsageError, match=r"cut\.pt"):
        read_published(tmp_path / "cut.pt", C)


def test_leaving_out_unreached_cache_columns_changes_nothing() -> None:
    config = LlamaGenConfig(dim=32, layers=2, heads=2, vocab=11, grid=12, classes=3)  # 144 tokens: several blocks
    torch.manual_seed(1)
    model = LlamaGen(config).eval().requires_grad_(False)
    torch.nn.init.normal_(model.output.weight)
    sessions = [LlamaGenTarget(model).begin(torch.tensor([0, 2]), True, 4) for _ in range(2)]
    start = torch.zeros(2, dtype=torch.int64)
    for number in range(0, 140, 4):
        inputs = torch.randint(11, (2, 4), generator=torch.Generator().manual_seed(number))
        whole, part = sessions[0].score(inputs, start).logits, sessions[1].score(inputs, start, number).logits
        assert torch.allclose(whole, part, atol=1e-5)
        start = start + 4
