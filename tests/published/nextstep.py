"""NextStep-1.1 as it lies on the hub (stepfun-ai/NextStep-1.1): shards of a Qwen2-shaped decoder and parts, vae/."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from bozzetto.autoencoders.kl16 import KL16Config, kl16_autoencoder, to_published
from bozzetto.checkpoints.published import published as known
from bozzetto.laws.noise import NormalField
from published import VECTORS, Published

HIDDEN, HEADS, GROUPS, HEAD_DIM, LAYERS, D, WIDTH, DEPTH = 32, 4, 2, 8, 2, 64, 32, 2
LETTERS, PIXELS, STEPS, GUIDANCE = 256, 64, 28, 7.5
GRID = PIXELS // 16
SPECIAL = ["<|endoftext|>", "[PAD]", "<|image_area|>", "<|begin_of_image|>", "<|end_of_image|>"]
SPECIAL += ["<|image_placeholder|>"]
BOI = LETTERS + 3
# config.json of NextStep-1.1, with small numbers; other files call some of it latent_* and fm_head_*.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "auto_map": {"AutoConfig": "models/config.NextStepConfig", "AutoModel": "models/nextstep_model.NextStep"},
    "attention_bias": True,
    "attention_dropout": 0.0,
    "base_image_grid_size": 64,
    "boi": BOI,
    "bos_token_id": LETTERS,
    "create_kwargs": {"snr_type": "lognorm"},
    "eoi": BOI + 1,
    "eos_token_id": LETTERS,
    "genloss_depth": DEPTH,
    "genloss_net_arch": "mlp",
    "genloss_type": "transport",
    "genloss_width": WIDTH,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "image_placeholder_id": BOI + 2,
    "image_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "max_window_layers": 48,
    "mlp_bias": False,
    "model_type": "nextstep",
    "num_attention_heads": HEADS,
    "num_channels": 16,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": GROUPS,
    "o_attention_bias": False,
    "patch_size": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vae_name_or_path": "vae/",
    "vocab_size": LETTERS + len(SPECIAL),
}


def shapes(out_bias: bool = False) -> dict[str, tuple[int, ...]]:
    """The published keys."""
    inner, group = HEADS * HEAD_DIM, GROUPS * HEAD_DIM
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, of: int, to: int, bias: bool = True) -> None:
        found[f"{name}.weight"] = (to, of)
        if bias:
            found[f"{name}.bias"] = (to,)

    for layer in (f"layers.{i}." for i in range(LAYERS)):
        for name, to in (("q", inner), ("k", group), ("v", group)):
            linear(f"{layer}self_attn.{name}_proj", HIDDEN, to)
        linear(f"{layer}self_attn.o_proj", inner, HIDDEN, out_bias)
        for name in ("gate", "up"):
            linear(f"{layer}mlp.{name}_proj", HIDDEN, 48, False)
        linear(f"{layer}mlp.down_proj", 48, HIDDEN, False)
        found |= {f"{layer}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    vocabulary = CONFIG["vocab_size"]
    found |= {"embed_tokens.weight": (vocabulary, HIDDEN), "lm_head.weight": (vocabulary, HIDDEN)}
    found["norm.weight"] = (HIDDEN,)
    linear("image_in_projector", D, HIDDEN)
    linear("image_out_projector", HIDDEN, HIDDEN)
    net = "image_head.net."
    for name, of in (("time_embed.mlp.0", 256), ("time_embed.mlp.2", WIDTH), ("cond_embed", HIDDEN), ("input_proj", D)):
        linear(net + name, of, WIDTH)
    for block in (f"{net}res_blocks.{i}." for i in range(DEPTH)):
        found |= {f"{block}in_ln.weight": (WIDTH,), f"{block}in_ln.bias": (WIDTH,)}
        for name, to in (("mlp.0", WIDTH), ("mlp.2", WIDTH), ("adaLN_modulation.1", 3 * WIDTH)):
            linear(block + name, WIDTH, to)
    linear(f"{net}final_layer.linear", WIDTH, D)
    linear(f"{net}final_layer.adaLN_modulation.1", WIDTH, 2 * WIDTH)
    return found


def write(folder: Path, **changed: Any) -> Path:
    """changed: of config.json."""
    config, made = CONFIG | changed, torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes(bool(config["o_attention_bias"])).items():
        noise = torch.randn(shape, generator=made)
        # A head that multiplies rounding errors little: guidance does so already.
        calm = 0.2 if name.startswith("image_head.net.final") else 1.0
        size = calm / math.sqrt(shape[-1]) if len(shape) > 1 else 0.1
        state[name] = (noise * size + (1.0 if "norm" in name or "in_ln.weight" in name else 0.0)).bfloat16()
    _write_shards(folder, state)
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(folder)
    _write_autoencoder(folder / "vae")
    return folder


def _write_shards(folder: Path, state: Mapping[str, Tensor]) -> None:
    names = sorted(state)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    places = {}
    for number, half in enumerate(halves, 1):
        file = f"model-{number:05d}-of-{len(halves):05d}.safetensors"
        save_file({name: state[name] for name in half}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(half, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _write_tokenizer(folder: Path) -> None:
    """Qwen2's, with one word per byte."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
    letters = {b: chr(b) for b in seen} | {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*seen}))}
    (folder / "vocab.json").write_text(json.dumps({letters[b]: b for b in range(LETTERS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    numbers = {word: LETTERS + i for i, word in enumerate(SPECIAL)}
    (folder / "added_tokens.json").write_text(json.dumps(numbers))
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    content = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(number): {"content": word, **plain} for word, number in numbers.items()},
        "additional_special_tokens": SPECIAL[2:],
        "bos_token": None,
        "eos_token": SPECIAL[0],
        "model_max_length": 131072,
        "pad_token": SPECIAL[1],
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def _write_autoencoder(folder: Path) -> None:
    """The network of NextStep-1-f8ch16-Tokenizer, whole, in a pickle."""
    folder.mkdir()
    levels = [1, 2, 4, 4]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = kl16_autoencoder(KL16Config(64, 16, 8, 32, tuple(levels), 1))
    state = {k: v for k, v in to_published(whole.state_dict(), 4).items() if "quant_conv" not in k}
    torch.save(state, folder / "checkpoint.pt")
    said = {"resolution": 256, "in_channels": 3, "ch": 32, "out_ch": 3, "ch_mult": levels, "num_res_blocks": 1}
    said |= {"z_channels": 16, "scaling_factor": 1.0, "shift_factor": 0.0, "deterministic": True, "encoder_norm": True}
    (folder / "config.json").write_text(json.dumps({**said, "psz": 2}))


class Slow:
    """The published model, written out: whole sequences, no cache, float32. norm: of the tokens; shift: of times."""

    def __init__(self, folder: Path, norm: bool = False):
        self.w: dict[str, Tensor] = {}
        for file in sorted(folder.glob("model-*.safetensors")):
            self.w |= {name: value.float() for name, value in load_file(file).items()}
        self.config = json.loads((folder / "config.json").read_text())
        self.tokenizer, self.norm = AutoTokenizer.from_pretrained(folder, trust_remote_code=False), norm

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def rms(self, name: str, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.w[f"{name}.weight"]

    def hidden(self, x: Tensor) -> Tensor:
        """Embeddings [L, d] -> the last hidden state [d]."""
        for i in range(LAYERS):
            layer, length = f"layers.{i}.", len(x)
            h = self.rms(f"{layer}input_layernorm", x)
            q, k, v = (
                self.linear(f"{layer}self_attn.{name}_proj", h).view(length, -1, HEAD_DIM).transpose(0, 1)
                for name in "qkv"
            )
            k, v = (part.repeat_interleave(HEADS // GROUPS, 0) for part in (k, v))
            scores = self.turned(q) @ self.turned(k).transpose(1, 2) / math.sqrt(HEAD_DIM)
            seen = torch.ones(length, length, dtype=torch.bool).tril()
            mixed = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
            x = x + self.linear(f"{layer}self_attn.o_proj", mixed.transpose(0, 1).flatten(1))
            h = self.rms(f"{layer}post_attention_layernorm", x)
            wide = F.silu(self.linear(f"{layer}mlp.gate_proj", h)) * self.linear(f"{layer}mlp.up_proj", h)
            x = x + self.linear(f"{layer}mlp.down_proj", wide)
        return self.rms("norm", x)[-1]

    def turned(self, x: Tensor) -> Tensor:
        """Rotary positions: halves of a head's numbers turn together."""
        rates = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angle = torch.arange(x.shape[1])[:, None] * rates
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def velocity(self, x: Tensor, t: float, condition: Tensor) -> Tensor:
        """The head: x [D] at time t under a projected hidden state [d]."""
        net = "image_head.net."
        angle = t * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        told = self.linear(f"{net}time_embed.mlp.0", torch.cat([angle.cos(), angle.sin()]))
        y = F.silu(self.linear(f"{net}time_embed.mlp.2", F.silu(told)) + self.linear(f"{net}cond_embed", condition))
        x = self.linear(f"{net}input_proj", x)
        for i in range(DEPTH):
            block = f"{net}res_blocks.{i}."
            shift, scale, gate = self.linear(f"{block}adaLN_modulation.1", y).chunk(3)
            h = F.layer_norm(x, (WIDTH,), self.w[f"{block}in_ln.weight"], self.w[f"{block}in_ln.bias"], 1e-6)
            h = h * (1 + scale) + shift
            x = x + gate * self.linear(f"{block}mlp.2", F.silu(self.linear(f"{block}mlp.0", h)))
        shift, scale = self.linear(f"{net}final_layer.adaLN_modulation.1", y).chunk(2)
        return self.linear(f"{net}final_layer.linear", F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift)

    def token(self, both: list[Tensor], guidance: float, noise: Tensor, times: Tensor, jump: float) -> Tensor:
        """Euler and Maruyama's sampler at times [T + 1] (T of them, and a jump, where there is one) with noise [T + 1,
        D]: score from velocity, drift from both."""
        given, without = (self.linear("image_out_projector", c) for c in both)

        def guided(x: Tensor, t: float) -> Tensor:
            other = self.velocity(x, t, without)
            return other + guidance * (self.velocity(x, t, given) - other)

        x = noise[0]
        for k, (t, s) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
            v = guided(x, t)
            score = (t * v - x) / ((1 - t) ** 2 + t * (1 - t))
            x = x + (v + (1 - t) * score) * (s - t) + math.sqrt(2 * (1 - t) * (s - t)) * noise[k + 1]
        return x + jump * guided(x, float(times[-1])) if jump else x

    def prompt(self, text: str) -> list[int]:
        area = self.tokenizer(f"<|image_area|>{GRID}*{GRID}")["input_ids"]
        return [*self.tokenizer(text)["input_ids"], *area, BOI]

    def draw(self, text: str, negative: str, times: Tensor, guidance: float = GUIDANCE, jump: float = 0.0) -> Tensor:
        """The tokens of image 0 of seed 0 as they leave the chain, [N, D]."""
        steps, count = len(times) - 1 + bool(jump), GRID * GRID
        field = NormalField(0, torch.tensor([0]), count, steps, D)
        field.fill(count)
        noise = field.rows(torch.arange(count)[None])[0]
        rows, made = [self.w["embed_tokens.weight"][self.prompt(said)] for said in (text, negative)], []
        for n in range(count):
            both = [self.hidden(x) + self.place(n) for x in rows]
            made.append(self.token(both, guidance, noise[n], times, jump))
            fed = F.layer_norm(made[-1], (D,), eps=1e-6) if self.norm else made[-1]
            rows = [torch.cat([x, self.linear("image_in_projector", fed)[None]]) for x in rows]
        return torch.stack(made)

    def place(self, n: int) -> Tensor | float:
        """What `use_gen_pos_embed` adds to the hidden state that token n is drawn from."""
        if not self.config.get("use_gen_pos_embed"):
            return 0.0
        rates = 10000.0 ** (-torch.arange(HIDDEN // 4) / (HIDDEN // 4))
        row, column = divmod(n, GRID)
        return torch.cat([f(at * rates) for at in (column, row) for f in (torch.sin, torch.cos)])


def drawn(folder: Path, text: str) -> Tensor:
    """As the model page calls it."""
    return Slow(folder).draw(text, OWN["negative_prompt"], torch.linspace(0, 1, STEPS + 1))


OWN = {"guidance": GUIDANCE, "steps": STEPS, "negative_prompt": known("nextstep-1.1").negative_prompt, "suffix": ""}
FAMILIES = {
    "nextstep-1.1": Published(
        write,
        ("a red tulip", "a small house by a lake", "a dog"),
        drawn,
        OWN,
        "the model page's call of generate_image",
        {"image_size": PIXELS},
        VECTORS,
        1.0,
    ),
}
