"""Language models whose image tokens are words, read as adapter files say: SimpleAR, Lumina-mGPT 2.0, and a made-up one
with LlamaGen's VQ.

The stand-ins have the published layouts, but fewer codes and smaller pictures: each carries the shipped adapter with
those numbers changed as its bozzetto.yaml.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import ChameleonConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from bozzetto.adapters.spec import SHIPPED
from bozzetto.autoencoders.kl16 import KL16Config
from published import Published
from test_movqgan import movq_state

PROMPTS = ("a red tulip", "a small house by a lake", "a dog")
CODES, SIDE = 24, 4  # codes; codes a side
SAID = "a red tulip small house by lake dog A highly realistic image of An aerial view Generate an according to the"
WORDS = SAID.split()
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokenizer(specials: list[str], **names: str) -> PreTrainedTokenizerFast:
    words = ["<unk>", "<pad>", "<|endoftext|>", *WORDS]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    text = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", eos_token="<|endoftext|>", **names
    )
    text.add_tokens([transformers.AddedToken(word, special=True) for word in specials])
    return text


def network(kind: Any, config: Any, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config).eval()
        for weight in model.parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.25)
    return model


def write_adapter(folder: Path, shipped: str, **changes: Any) -> None:
    content = yaml.safe_load((SHIPPED / f"{shipped}.yaml").read_text())
    (folder / "bozzetto.yaml").write_text(yaml.safe_dump({**content, **changes}))


def greedy(model: Any, given: list[int], without: list[int], first: int, guidance: float, count: int) -> list[int]:
    """One pass over everything for each token; codes only."""
    drawn: list[int] = []
    for _ in range(count):
        rows = [model(torch.tensor([row + [first + code for code in drawn]])).logits[0, -1] for row in (given, without)]
        laws = [row.float().log_softmax(-1)[first : first + CODES] for row in rows]  # SimpleAR guides these
        drawn.append(int((laws[1] + guidance * (laws[0] - laws[1])).argmax()))
    return drawn


# ---- SimpleAR: wdrink/SimpleAR, Daniel0724/SimpleAR-0.5B-RL ----------------------------------------------------------


def write_simplear(folder: Path, codes: int = CODES) -> Path:
    text = tokenizer(["<|t2i|>", "<|soi|>", "<|eoi|>"])
    text.save_pretrained(folder)
    sizes = {**TEXT, "num_key_value_heads": 2, "vocab_size": len(text) + codes + 3, "max_position_embeddings": 300}
    network(transformers.Qwen2ForCausalLM, Qwen2Config(**sizes)).to(torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["SimpARForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    write_adapter(folder, "simplear", codes=codes, sizes=["64x64"])
    return folder


def simplear_greedy(folder: Path, text: str) -> list[int]:
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    poor = "overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, bad eyes, bad limbs"
    said = (f"A highly realistic image of {text}", f"An image of aerial view, {poor}, distortion")
    given, without = (words(f"<|t2i|>{part}<|soi|>").input_ids for part in said)
    with torch.no_grad():
        return greedy(model, given, without, len(words), 6.0, SIDE * SIDE)


# ---- Lumina-mGPT 2.0: Alpha-VLLM/Lumina-mGPT-2.0 ---------------------------------------------------------------------

SIZE_WORDS = ["<racm3:break>", "<eoss>", "<reserved08706>", "<reserved08799>", "<reserved08801>"]
MOVQ = KL16Config(image_size=8, token_dim=4, downsample=8, channels=32, multipliers=(1, 1, 1, 1), blocks=1)


def write_lumina(folder: Path, codes: int = CODES, first: int = 0) -> Path:
    """Without a VQ model, and with one row of the norms of queries and keys for all heads; bfloat16, in shards. first:
    the word of code 0 (0: after those of the tokenizer)."""
    text = tokenizer(SIZE_WORDS)
    text.save_pretrained(folder)
    sizes = {**TEXT, "num_key_value_heads": 2, "vocab_size": (first or len(text)) + codes}
    sizes |= {"max_position_embeddings": 128}
    vq = {"num_res_blocks": 1, "base_channels": 32, "embed_dim": 4, "latent_channels": 32, "num_embeddings": 8}
    vq |= {"channel_multiplier": [1, 1], "resolution": 8, "attn_resolutions": []}
    config = ChameleonConfig(**sizes, vq_config=vq, vocabulary_map={"<image>": 0}, model_parallel_size=1)
    model = network(transformers.ChameleonForConditionalGeneration, config).to(torch.bfloat16)
    state, draw = {}, torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        if "vqmodel" not in key:
            state[key] = value
            if "_norm." in key and "self_attn" in key:
                state[key] = torch.randn(1, value.shape[1], generator=draw).to(value)
    config.architectures = ["ChameleonForConditionalGeneration"]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    names, shards = sorted(state), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: state[name].contiguous() for name in part}, folder / file, metadata={"format": "pt"})
        shards |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    torch.save(movq_state(MOVQ, codes), folder / "movqgan_270M.ckpt")
    write_adapter(folder, "lumina-mgpt-2", codes=codes, offset=first or len(text), sizes=["32x32"])
    return folder


def lumina_greedy(folder: Path, text: str) -> list[int]:
    """transformers' network with a row of the norms for each head, one pass over everything for each token."""
    config = ChameleonConfig.from_pretrained(folder)
    model = transformers.ChameleonForConditionalGeneration(config).eval()
    state = {key: value.float() for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    for key, value in state.items():
        if "_norm." in key and "self_attn" in key:
            state[key] = value.expand(model.state_dict()[key].shape)
    assert all("vqmodel" in key for key in model.load_state_dict(state, strict=False).missing_keys)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    begin = words.convert_tokens_to_ids(["<racm3:break>", "<reserved08801>", "<reserved08801>"])
    task = f"Generate an image of 32x32 according to the following prompt:\n{text}"
    said = words.encode(task, add_special_tokens=False)
    given = [words.eos_token_id, *said, words.convert_tokens_to_ids("<reserved08706>"), *begin]
    end, first, drawn = words.convert_tokens_to_ids("<reserved08799>"), len(words), list[int]()
    with torch.no_grad():
        for at in range(SIDE * (SIDE + 1)):
            if at % (SIDE + 1) == SIDE:
                drawn.append(CODES)
                continue
            behind = [end if code == CODES else first + code for code in drawn]
            rows = [
                model.lm_head(model.model(torch.tensor([row + behind])).last_hidden_state[0, -1])
                for row in (given, begin)
            ]
            laws = [row[first : first + CODES] for row in rows]
            drawn.append(int((laws[1] + 4.0 * (laws[0] - laws[1])).argmax()))
    return drawn


# ---- any language model with LlamaGen's tokenizer --------------------------------------------------------------------

PLAIN = {
    "codes": CODES,
    "pattern": "<|img_{code:03d}|>",
    "pixels": 2,
    "sizes": ["8x8", "16x8"],
    "multiple": 4,
    "prompt": "{bos}{prompt}<boi>",
    "no_prompt": "{bos}<boi>",
    "decoder": {"kind": "llamagen", "file": "vq.pt"},
    "sampling": {"guidance": 3.0, "top_k": 20, "source": "made up"},
}


def llamagen_state(codes: int = CODES, seed: int = 0) -> dict[str, Tensor]:
    from bozzetto.autoencoders.llamagen_vq import LlamaGenVQ, LlamaGenVQConfig

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = LlamaGenVQ(LlamaGenVQConfig(codes, 8, 32, (1, 1), 1, 32, 2))
    return made.published_state()


def write_plain(folder: Path) -> Path:
    text = tokenizer(["<boi>", *(f"<|img_{i:03d}|>" for i in range(CODES))], bos_token="<|endoftext|>")
    text.save_pretrained(folder)
    sizes = {**TEXT, "num_key_value_heads": 4, "vocab_size": len(text), "max_position_embeddings": 128}
    network(transformers.LlamaForCausalLM, LlamaConfig(**sizes)).save_pretrained(folder)
    (folder / "bozzetto.json").write_text(json.dumps(PLAIN))
    torch.save({"model": llamagen_state()}, folder / "vq.pt")
    return folder


def plain_greedy(folder: Path, text: str) -> list[int]:
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    given, without = (words(f"<|endoftext|>{part}<boi>", add_special_tokens=False).input_ids for part in (text, ""))
    with torch.no_grad():
        return greedy(model, given, without, words.convert_tokens_to_ids("<|img_000|>"), 3.0, SIDE * SIDE)


FAMILIES = {
    "simplear": Published(
        write_simplear,
        PROMPTS,
        simplear_greedy,
        {"guidance": 6.0, "temperature": 1.0, "top_k": 0},
        "wdrink/SimpleAR, generate.py",
        methods=("none", "jacobi/seed-exact", "jacobi/exact"),  # there are no vectors of its codes
        pictures=False,
    ),
    "lumina-mgpt-2": Published(
        write_lumina,
        PROMPTS,
        lumina_greedy,
        {"guidance": 4.0, "temperature": 1.0, "top_k": 4096},
        "Alpha-VLLM/Lumina-mGPT-2.0, README.md",
    ),
    "adapter": Published(write_plain, PROMPTS, plain_greedy, {"guidance": 3.0, "top_k": 20}, "its adapter file"),
}
