"""LANTERN's published drafters are given what they were trained on: cached drafting equals their own forward, written
out over whole sequences without a cache, from the published weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import bozzetto
import hf_toys
from bozzetto.adapters.eagle import PromptedEagle
from bozzetto.checkpoints.convert_drafter import convert_eagle, convert_lantern
from bozzetto.checkpoints.folders import load_drafter, load_target, save_drafter, target_digest
from bozzetto.cli.main import main
from bozzetto.drafters.base import Observation
from bozzetto.drafters.eagle import CachedEagle, EagleNet, eagle_config
from bozzetto.drafts import Layout, Verdict
from bozzetto.errors import UsageError
from bozzetto.targets.llamagen import left_pad
from bozzetto.targets.llamagen_cache import LlamaGenTarget
from published import chameleon_files, families
from published import llamagen as published
from test_captions import model as model  # a tiny text-conditional model

HEADS, FFN = 4, 48
both = pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])


def published_drafter(dim: int, rows: Tensor, chameleon: bool, groups: int = HEADS) -> dict[str, Tensor]:
    """A published state dict, key by key. groups: of heads that share their norms."""
    layer, ffn, size = "layers.0", FFN, dim // HEADS
    shapes = {"fc.weight": (dim, 2 * dim), "fc.bias": (dim,)}
    shapes |= {f"{layer}.self_attn.{part}_proj.weight": (dim, dim) for part in "qkvo"}
    shapes |= {f"{layer}.mlp.{part}_proj.weight": (ffn, dim) for part in ("gate", "up")}
    shapes |= {f"{layer}.mlp.down_proj.weight": (dim, ffn), f"{layer}.post_attention_layernorm.weight": (dim,)}
    if chameleon:
        shapes[f"{layer}.input_layernorm.weight"] = (dim,)
        norms = [f"{layer}.self_attn.{part}_norm.{kind}" for part in "qk" for kind in ("weight", "bias")]
        shapes |= dict.fromkeys(norms, (groups, size))
    made = torch.Generator().manual_seed(3)
    state = {key: 0.3 * torch.randn(shape, generator=made) for key, shape in shapes.items()}
    state |= {key: 1 + value for key, value in state.items() if "norm" in key and key.endswith("weight")}
    return {**state, "embed_tokens.weight": rows}


class SlowDrafter:
    """The published forward: whole sequences, one row, float64. rotation: cos and sin [n, hd/2] of the places; halves:
    whether a head's two halves are turned against each other (or its neighbours)."""

    def __init__(self, state: dict[str, Tensor], eps: float, halves: bool, heads: int = HEADS):
        self.w = {key: value.double() for key, value in state.items()}
        self.eps, self.halves, self.heads = eps, halves, heads

    def norm(self, name: str, x: Tensor) -> Tensor:
        if f"layers.0.{name}.weight" not in self.w:
            return x
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.w[f"layers.0.{name}.weight"]

    def heads_of(self, name: str, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        x = (x @ self.w[f"layers.0.self_attn.{name}_proj.weight"].t()).unflatten(-1, (self.heads, -1))  # [n, H, hd]
        if rotation is None:
            return x
        gain = self.w.get(f"layers.0.self_attn.{name}_norm.weight")
        if gain is not None:
            bias = self.w[f"layers.0.self_attn.{name}_norm.bias"]
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            times = self.heads // len(gain)
            x = x * gain.repeat_interleave(times, 0) + bias.repeat_interleave(times, 0)
        cos, sin = (part[:, None] for part in rotation)
        if self.halves:
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

    def __call__(self, features: Tensor, embedded: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """[n, d] each -> predictions [n, d]."""
        h = torch.cat([embedded, features], -1).double() @ self.w["fc.weight"].t() + self.w["fc.bias"]
        x = self.norm("input_layernorm", h)
        q, k, v = (self.heads_of(name, x, rotation if name != "v" else None) for name in "qkv")
        weight = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        weight = weight.masked_fill(~torch.ones(weight.shape[1:], dtype=torch.bool).tril(), -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", weight, v).flatten(1)
        h = h + mixed @ self.w["layers.0.self_attn.o_proj.weight"].t()
        x = self.norm("post_attention_layernorm", h)
        gate, up = (x @ self.w[f"layers.0.mlp.{name}_proj.weight"].t() for name in ("gate", "up"))
        return h + (gate * gate.sigmoid() * up) @ self.w["layers.0.mlp.down_proj.weight"].t()


def check_sketch(sketch: Any, labels: Tensor, tokens: Tensor, guided: bool, slow: Any, features: Tensor) -> None:
    """Ragged passes, and two drafted pairs behind each, against slow(row, features [n, d], tokens [n]) -> [n, d].
    features: true ones of the image's inputs, [R, N, d]."""
    batch = len(labels)
    sketch.begin(labels, guided, 8)
    start = torch.zeros(batch, dtype=torch.int64)
    for committed in (torch.tensor([1, 1, 1]), torch.tensor([2, 1, 3]), torch.tensor([1, 3, 2])):
        longest = int(committed.max())
        at = start[:, None] + torch.arange(longest)
        shown = features.gather(1, at.repeat(len(features) // batch, 1)[..., None].expand(-1, -1, features.shape[-1]))
        seen = Observation(None, Verdict(tokens.gather(1, at), committed - 1), committed, longest, start, shown)
        logits, hidden = sketch.extend(seen)
        start = start + committed
        known = [[features[row, : start[row % batch]]] for row in range(len(features))]
        for step in range(3):
            for row, parts in enumerate(known):
                b = row % batch
                wanted = slow(row, torch.cat(parts), tokens[b, : start[b] + step])[-1]
                torch.testing.assert_close(hidden[row, 0].double(), wanted, atol=1e-4, rtol=1e-4)
                parts.append(wanted[None].float())
            if step < 2:
                place = torch.tensor([[step]])
                layout = Layout(place, place, torch.ones(1, 1, step + 1, dtype=torch.bool))
                token = tokens.gather(1, (start + step)[:, None])
                logits, hidden = sketch.grow(token, torch.tensor([[step]]), step, layout)
        assert bool(torch.isfinite(logits).all())


# ---- LlamaGen, text-conditional -----------------------------------------------------------------------------------


def slow_features(slow: published.Slow, lead: Tensor, mask: Tensor, tokens: list[int]) -> Tensor:
    """LANTERN's hidden states of a whole sequence [T + n, d]: padding sees the padding before it."""
    states = slow.states(lead, mask, tokens)
    blank = int((~mask).sum())
    if blank:
        states[:blank] = slow.states(lead[:blank], torch.ones(blank, dtype=torch.bool), [])
    return states


@both
def test_drafters_of_text_conditional_llamagen_begin_with_the_caption(guided: bool, tmp_path: Path) -> None:
    folder, state = published.write(True, published.ddp, tmp_path), published.transformer(True)
    drafter = published_drafter(published.DIM, state["output.weight"], False)
    (tmp_path / "llamagen_drafter").mkdir()
    torch.save(drafter, tmp_path / "llamagen_drafter" / "pytorch_model.bin")
    (tmp_path / "llamagen_drafter" / "config.json").write_text(json.dumps({"input_type": "t2i"}))
    assert "head rows" in convert_eagle(tmp_path / "llamagen_drafter", folder, tmp_path / "eagle")
    network = load_target(folder, "llamagen")
    net = load_drafter(tmp_path / "eagle", "eagle", network.config, target_digest(folder))
    assert net.config.before == "captions" and net.config.embedding == "head"
    made = torch.Generator().manual_seed(5)
    features = torch.randn(3, published.TOKENS, published.FEATURES, generator=made)
    mask = torch.arange(published.TOKENS) < torch.tensor([[3], [published.TOKENS], [7]])
    given, real = left_pad(features, mask)
    target = LlamaGenTarget(network).with_captions(given, real)
    tokens = torch.randint(published.CODES, (3, 9), generator=made)

    slow, rows = published.Slow(state), drafter["embed_tokens.weight"].double()
    without = slow.w["cls_embedding.uncond_embedding"]
    leads = [slow.caption(part) for part in (*given, *[without] * 3)][: 6 if guided else 3]
    whole = [slow_features(slow, lead, real[i % 3], tokens[i % 3].tolist()) for i, lead in enumerate(leads)]
    first = published.TOKENS - 1
    forward = SlowDrafter(drafter, 1e-6, False, published.HEADS)
    cos, sin = slow.rotation(first)

    def own(row: int, known: Tensor, taken: Tensor) -> Tensor:
        ids = torch.cat([torch.zeros(first, dtype=torch.int64), taken])
        n = len(ids)
        return forward(torch.cat([whole[row][:first], known.double()]), rows[ids], (cos[:n], sin[:n]))

    sketch = CachedEagle(net, target.embedding, target.output, target.condition_features)
    check_sketch(sketch, torch.arange(3), tokens, guided, own, torch.stack([part[first:] for part in whole]).float())


def test_padding_is_nothing_under_a_caption(model: Path) -> None:
    target = LlamaGenTarget(load_target(model, "llamagen"))
    features, mask = left_pad(torch.randn(1, 5, 6), torch.tensor([[1, 1, 0, 0, 0]]))
    found = target.with_captions(features, mask).condition_features(torch.tensor([0]), True)
    assert found.shape == (2, 4, 32) and not found[0, :3].any() and found[1, :3].all(-1).any()


def test_what_stands_before_is_written_only_where_something_does(model: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Drafters trained here keep their files to the byte."""
    for folder, before in ((tiny_model, None), (model, "captions")):
        network = load_target(folder, "llamagen")
        net = EagleNet(eagle_config(network.config))
        torch.save(dict(net.state_dict()), tmp_path / "drafter.bin")
        convert_eagle(tmp_path / "drafter.bin", folder, tmp_path / folder.name)
        save_drafter(tmp_path / f"{folder.name}-own", net, folder, {})
        held, own = (
            json.loads((tmp_path / name / "config.json").read_text()) for name in (folder.name, f"{folder.name}-own")
        )
        assert held["config"].pop("before", None) == before and held["config"] == own["config"]
        assert set(own["config"]) == {
            "dim", "heads", "ffn", "vocab", "grid", "embedding", "rope_base", "norm_eps", "layers"
        }  # fmt: skip


# ---- Chameleon's: Anole, Lumina-mGPT ------------------------------------------------------------------------------


def write_target(folder: Path) -> Any:
    """Chameleon's weights as transformers writes them."""
    network = hf_toys.tiny_chameleon()
    network.save_pretrained(folder)
    return network


def write_published(folder: Path, rows: Tensor, groups: int = HEADS, **config: Any) -> dict[str, Tensor]:
    """A published drafter's folder. rows: of the target's vocabulary."""
    state = published_drafter(rows.shape[1], rows, True, groups)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "pytorch_model.bin")
    shape = {"hidden_size": rows.shape[1], "num_attention_heads": HEADS, "vocab_size": len(rows)}
    own = {"model_type": "chameleon", "num_hidden_layers": 1, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps({**shape, **own, "rope_scaling": None, **config}))
    return state


@both
@pytest.mark.parametrize(("family", "groups"), [("chameleon", HEADS), ("lumina", 1)])
def test_drafters_of_chameleon_begin_with_the_prompt(family: str, groups: int, guided: bool, tmp_path: Path) -> None:
    """Lumina-mGPT's norms are [model-parallel size, head size], Anole's [heads, head size]."""
    network = write_target(tmp_path / "model")
    state = write_published(tmp_path / "published", network.model.embed_tokens.weight.detach(), groups)
    told = convert_lantern(tmp_path / "published", tmp_path / "model", tmp_path / "eagle")
    assert "behind the words of its prompts" in told
    target = hf_toys.TARGETS[family]()
    net = load_drafter(tmp_path / "eagle", "eagle", target.config, "")
    labels, length = torch.tensor([2, 0, 1]), min(9, target.length)
    tokens = torch.randint(hf_toys.CODES, (3, length), generator=torch.Generator().manual_seed(7))
    prompts = target.conditions_of(labels, guided)
    words = torch.tensor(target.numbers)[tokens]
    rows, size = network.model.embed_tokens.weight, network.config.hidden_size // HEADS
    rate = 10000.0 ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    whole = []
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([[*prompt, *words[row % 3].tolist()]])
        place = torch.arange(ids.shape[1])[None]
        whole.append(target.body(inputs_embeds=rows[ids], position_ids=place).last_hidden_state[0])

    forward = SlowDrafter(state, 1e-5, True)

    def own(row: int, known: Tensor, taken: Tensor) -> Tensor:
        prompt, image = prompts[row], torch.tensor(target.numbers)[taken]
        ids = torch.cat([torch.tensor(prompt[1:], dtype=torch.int64), image])
        angle = torch.arange(len(ids))[:, None] * rate
        features = torch.cat([whole[row][: len(prompt) - 1], known])
        return forward(features, rows[ids], (angle.cos(), angle.sin()))

    features = [part[len(prompt) - 1 :][:length] for part, prompt in zip(whole, prompts, strict=True)]
    check_sketch(PromptedEagle(net, target), labels, tokens, guided, own, torch.stack(features))


@pytest.mark.parametrize(("family", "groups"), [("anole", HEADS), ("lumina", 1)])
def test_published_targets_draw_with_their_published_drafters(family: str, groups: int, tmp_path: Path) -> None:
    stand_in = families()[family]
    (tmp_path / "model").mkdir()
    folder = stand_in.write(tmp_path / "model")
    rows = chameleon_files.language(groups)["model.embed_tokens.weight"].bfloat16()
    write_published(tmp_path / "drafter", rows, groups)
    words = ["--drafter", str(tmp_path / "drafter"), "--model", str(folder), "--out", str(tmp_path / "eagle")]
    assert main(["convert", "eagle", *words]) == 0
    pipe, asked = bozzetto.load(folder, **stand_in.options), {"batch": 3, "seed": 4}
    slow = pipe.generate(stand_in.asked, drafter="none", **asked).images
    drafter = f"eagle:folder={tmp_path / 'eagle'}"
    fast = pipe.generate(stand_in.asked, drafter=drafter, rule="seed-exact", **asked).images
    assert [i.sha256 for i in fast] == [i.sha256 for i in slow]
    for rule, tree in (("block", "chain-3"), ("lantern:k=3", "dynamic-9-2-3"), ("traversal", "2x2")):
        assert pipe.generate(stand_in.asked[:1], drafter=f"{drafter}:tree={tree}", rule=rule).images
    rough = bozzetto.load(folder, dtype="bfloat16", **stand_in.options)
    assert rough.generate(stand_in.asked, drafter=f"{drafter}:tree=chain-3", rule="block", **asked).images


def test_a_text_conditional_llamagen_draws_with_its_published_drafter(tmp_path: Path) -> None:
    folder, rows = published.write(True, published.ddp, tmp_path), published.transformer(True)["output.weight"]
    torch.save(published_drafter(published.DIM, rows, False), tmp_path / "pytorch_model.bin")
    words = ["--drafter", str(tmp_path / "pytorch_model.bin"), "--model", str(folder), "--out", str(folder / "eagle")]
    assert main(["convert", "eagle", *words]) == 0
    pipe, asked = bozzetto.load(folder), {"count": 1}
    slow = pipe.generate("a red tulip", drafter="none", **asked).images
    fast = pipe.generate("a red tulip", drafter="eagle", rule="seed-exact", **asked).images
    assert [i.sha256 for i in fast] == [i.sha256 for i in slow]
    rough = bozzetto.load(folder, dtype="bfloat16")
    assert rough.generate("a red tulip", drafter="eagle:tree=2x2", rule="lantern:k=3").images


def test_drafters_that_do_not_belong_are_refused(tmp_path: Path, tiny_model: Path, model: Path) -> None:
    network = write_target(tmp_path / "model")
    state = write_published(tmp_path / "published", network.model.embed_tokens.weight.detach())
    convert_lantern(tmp_path / "published", tmp_path / "model", tmp_path / "eagle")
    with pytest.raises(UsageError, match=r"before = 'words' \(allowed: nothing, captions\)"):
        load_drafter(tmp_path / "eagle", "eagle", load_target(tiny_model, "llamagen").config, "")
    drafter = EagleNet(eagle_config(load_target(model, "llamagen").config))
    torch.save(dict(drafter.state_dict()), tmp_path / "t2i.bin")
    convert_eagle(tmp_path / "t2i.bin", model, tmp_path / "t2i")
    with pytest.raises(UsageError, match=r"before = 'captions' \(allowed: nothing, words\)"):
        load_drafter(tmp_path / "t2i", "eagle", hf_toys.chameleon().config, "")
    for change, message in (
        ({"embed_tokens.weight": torch.zeros_like(state["embed_tokens.weight"])}, "does not hold the rows of"),
        ({"fc.weight": state["fc.weight"][:, :32]}, "another target: fc.weight has shape"),
        ({"layers.0.self_attn.q_norm.weight": torch.ones(3, 8)}, "q_norm.weight' has shape"),
    ):
        torch.save({**state, **change}, tmp_path / "published" / "pytorch_model.bin")
        with pytest.raises(UsageError, match=message):
            convert_lantern(tmp_path / "published", tmp_path / "model", tmp_path / "none")
    save_file(state, tmp_path / "published" / "model.safetensors")
    (tmp_path / "published" / "config.json").write_text(json.dumps({"rope_scaling": {"type": "linear", "factor": 2.0}}))
    with pytest.raises(UsageError, match="rope_scaling ="):
        convert_lantern(tmp_path / "published" / "model.safetensors", tmp_path / "model", tmp_path / "none")
    for value in ("far", -1, [1]):
        write_published(tmp_path / "odd", state["embed_tokens.weight"], rope_theta=value)
        with pytest.raises(UsageError, match="rope_base"):
            convert_lantern(tmp_path / "odd", tmp_path / "model", tmp_path / "none")
    write_published(tmp_path / "odd", state["embed_tokens.weight"], hidden_size=None)
    with pytest.raises(UsageError, match="dim"):
        convert_lantern(tmp_path / "odd", tmp_path / "model", tmp_path / "none")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "janus"}))
    with pytest.raises(UsageError, match="model type 'janus' has no published drafters"):
        convert_lantern(tmp_path / "published", tmp_path / "other", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_drafter_in_shards_is_read_whole(tmp_path: Path, model: Path) -> None:
    state = dict(EagleNet(eagle_config(load_target(model, "llamagen").config)).state_dict())
    torch.save(state, tmp_path / "whole.bin")
    folder = tmp_path / "shards"
    folder.mkdir()
    names = sorted(state)
    files = {name: f"part-{i % 2}.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: state[name] for name in names if files[name] == file}, folder / file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    for drafter, out in ((tmp_path / "whole.bin", "a"), (folder, "b")):
        convert_eagle(drafter, model, tmp_path / out)
    assert target_digest(tmp_path / "a") == target_digest(tmp_path / "b")
    for odd, message in (({}, "weight_map is"), ({"a": "gone.bin"}, "gone.bin missing"), ({"a": "../x"}, "a file in")):
        index.write_text(json.dumps({"weight_map": odd}))
        with pytest.raises(UsageError, match=message):
            convert_eagle(folder, model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
