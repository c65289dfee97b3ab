"""Memory that loading a model takes: what stays, and the most while loading, as ratios to the weights in their dtype.

    python benchmarks/memory.py --json memory.json

Makes folders with random weights in the published shapes (llamagen-l: a converted LlamaGen-L with its tokenizer VQ-16,
in float32 as published; janus-1b: Janus-Pro-1B in the Hugging Face layout, bfloat16; tiny ones for tests), and loads
each with `bozzetto.load` in a fresh process, which has loaded a tiny model of the same kind before, so that libraries
count for nothing. Figures are MiB above that:

    weights       all that the folder's files hold, the target in the dtype asked for, the decoder of tokens to pixels
                  in float32, in which it runs
    needed        those of them that drawing reads (no encoder, no tower that looks at pictures, no head for words)
    stays, peak   VmRSS after loading and, for a model of ours, after passes of eight shapes (their caches given up),
                  and the most of it meanwhile, caches included, by a thread that looks every few milliseconds
    anonymous     RssAnon of the same: without pages of files, which the kernel takes back when it needs room

It runs against any version that has `bozzetto.load(folder, dtype=, device=)`: put its `src` into PYTHONPATH.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from bozzetto.common.files import write_text
from bozzetto.evaluate.provenance import provenance
from bozzetto.targets.llamagen import LlamaGen, LlamaGenConfig, published_config

SHAPES = ("llamagen-l", "janus-1b", "llamagen-tiny", "janus-tiny")
_MIB, _BLOCK, _SHARD = 2**20, 1_000_003, 2 << 30
_WORDS = ("<pad>", "<s>", "<boi>", "<image>", "<unk>", "<eoi>", "</s>", "a", "red", "tulip")
_UNREAD = ("encoder.", "quant_conv.", "vision_model.", "aligner.", "lm_head.", "vision_tower.")
_DECODER = ("decoder.", "post_quant_conv.", "codebook", "quantize.", "vqmodel.")


def random_state(shapes: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Normal noise of deviation 0.02, one block of it over and over; vectors are ones."""
    noise = (0.02 * torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0))).to(dtype)
    made = {}
    for name, part in shapes.items():
        many = -(-part.numel() // _BLOCK)
        filled = noise.repeat(many)[: part.numel()].view(part.shape).clone() if part.ndim > 1 else None
        made[name] = torch.ones(part.shape, dtype=dtype) if filled is None else filled
    return made


def write_llamagen(folder: Path, tiny: bool) -> dict[str, int]:
    """A converted class-conditional LlamaGen -> parameters of target and tokenizer."""
    from bozzetto.autoencoders.llamagen_vq import LlamaGenVQ, LlamaGenVQConfig

    config = LlamaGenConfig(64, 2, 2, 256, 4, 8) if tiny else published_config("L")
    small = {"codes": 256, "channels": 32, "latent": 32, "image_size": 64}
    pixels = LlamaGenVQConfig(**small) if tiny else LlamaGenVQConfig()
    with torch.device("meta"):
        parts = {"model": LlamaGen(config).state_dict(), "tokenizer": LlamaGenVQ(pixels).published_state()}
    for name, shapes in parts.items():
        save_file(random_state(shapes, torch.float32), folder / f"{name}.safetensors")
    names = [str(i) for i in range(config.classes)]
    notes = {"family": "llamagen", "config": asdict(config), "name": folder.name, "class_names": names}
    (folder / "config.json").write_text(json.dumps(notes))
    (folder / "tokenizer.json").write_text(json.dumps({"kind": "vq-llamagen", "config": asdict(pixels)}))
    return counted(parts["model"], parts["tokenizer"])


def janus_config(tiny: bool) -> Any:
    """Of transformers: Janus-Pro-1B's shape, or a tiny one."""
    import transformers

    text: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24}
    text |= {"num_attention_heads": 16, "vocab_size": 102400, "max_position_embeddings": 16384, "model_type": "llama"}
    vision: dict[str, Any] = {"projection_dim": 2048, "num_image_tokens": 576}
    vq: dict[str, Any] = {"projection_dim": 2048, "image_token_embed_dim": 2048, "num_patches": 24}
    if tiny:
        text |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        text |= {"vocab_size": 24, "max_position_embeddings": 64}
        vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "projection_dim": 32}
        vision |= {"image_size": 6, "patch_size": 2, "num_image_tokens": 9}
        vq = {"num_res_blocks": 1, "base_channels": 32, "embed_dim": 4, "latent_channels": 32, "num_embeddings": 8}
        vq |= {"channel_multiplier": [1, 1], "num_patches": 3, "projection_dim": 32, "image_token_embed_dim": 32}
    config = transformers.JanusConfig(text_config=text, vision_config=vision, vq_config=vq, image_token_id=3)
    config.dtype = torch.bfloat16
    return config


def write_janus(folder: Path, tiny: bool) -> dict[str, int]:
    """A Janus in the Hugging Face layout -> parameters of target and tokenizer."""
    import transformers
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    config = janus_config(tiny)
    config.architectures = ["JanusForConditionalGeneration"]
    with torch.device("meta"):
        shapes = dict(transformers.JanusForConditionalGeneration(config).state_dict())
    config.save_pretrained(folder)
    own = {"bos_token_id": 1, "pad_token_id": 0, "generation_kwargs": {"boi_token_id": 2}, "guidance_scale": 5}
    (folder / "generation_config.json").write_text(json.dumps(own))
    transformers.JanusProcessor(JanusImageProcessorPil(), _words()).save_pretrained(folder)
    where, shard, size = {}, dict[str, Tensor](), 0
    for number, (key, part) in enumerate(shapes.items()):
        shard[key], size = part, size + 2 * part.numel()
        if size > _SHARD or number + 1 == len(shapes):
            name = f"model-{number:05d}.safetensors"
            save_file(random_state(shard, torch.bfloat16), folder / name, {"format": "pt"})
            where |= dict.fromkeys(shard, name)
            shard, size = {}, 0
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    short = {key.removeprefix("model."): part for key, part in shapes.items()}
    pixels = {key: part for key, part in short.items() if key.startswith("vqmodel.")}
    return counted({k: v for k, v in short.items() if k not in pixels}, pixels)


def _words() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, extra_special_tokens=special, **names)


def counted(target: Mapping[str, Tensor], tokenizer: Mapping[str, Tensor]) -> dict[str, int]:
    """Parameters by what becomes of them."""

    def total(state: Mapping[str, Tensor], needed: bool) -> int:
        names = [key.removeprefix("vqmodel.") for key in state]
        kept = [not (needed and name.startswith(_UNREAD)) for name in names]
        return sum(part.numel() for part, keep in zip(state.values(), kept, strict=True) if keep)

    parts = {"target": target, "decoder": tokenizer}
    return {name + end: total(part, end != "") for name, part in parts.items() for end in ("", "_needed")}


def resident() -> dict[str, float]:
    """MiB of this process, in all and without files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) / 1024 for name, key in (("all", "VmRSS"), ("anonymous", "RssAnon"))}


class Watch(threading.Thread):
    """The most of `resident` while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.over = resident(), threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.002):
            now = resident()
            self.most = {name: max(value, now[name]) for name, value in self.most.items()}


def drawn_from(pipe: Any) -> None:
    """A pass each of eight shapes of models of ours, which lay their weights out when they are first run; caches, which
    are no weights, are given up."""
    from bozzetto import GenerateSettings

    for batch in (1, 2, 4, 8) if pipe.folder is not None else ():
        for guidance in (1.0, 2.0):
            settings = GenerateSettings("jacobi", "exact", 4, guidance, batch=batch)
            next(pipe.passes([0] * batch, 0, range(batch), settings))
    pipe._schedulers.clear()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system


def loaded_here(folder: str, warm: str, dtype: str) -> None:
    """Load in this process and print the figures."""
    import bozzetto

    drawn_from(bozzetto.load(warm, dtype=dtype, device="cpu"))
    gc.collect()
    before, watch, began = resident(), Watch(), time.perf_counter()
    watch.start()
    pipe = bozzetto.load(folder, dtype=dtype, device="cpu")
    seconds = time.perf_counter() - began
    drawn_from(pipe)
    watch.over.set()
    watch.join()
    gc.collect()
    after = resident()
    figures = {"stays": after, "peak": {name: max(watch.most[name], after[name]) for name in after}}
    found = {part: {n: value - before[n] for n, value in of.items()} for part, of in figures.items()}
    print(json.dumps({**found, "seconds": seconds, "name": pipe.name}))


def measured(folder: Path, warm: Path, dtype: str, counts: Mapping[str, int]) -> dict[str, Any]:
    """A row of the table: loaded in a fresh process."""
    command = [sys.executable, __file__, "--load", str(folder), str(warm), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{folder}: loading failed: {done.stderr.strip()[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    size = getattr(torch, dtype).itemsize
    bytes_of = {end: size * counts["target" + end] + 4 * counts["decoder" + end] for end in ("", "_needed")}
    weights, needed = (bytes_of[end] / _MIB for end in ("", "_needed"))
    ratios = {
        f"{part}_{kind}": found[part][kind] / weights for part in ("stays", "peak") for kind in ("all", "anonymous")
    }
    return {"shape": folder.name, "dtype": dtype, "weights": weights, "needed": needed, **found, "ratios": ratios}


def shown(rows: list[dict[str, Any]]) -> str:
    """The table for people."""
    lines = [
        f"{'shape':<14} {'dtype':<9} {'weights':>8} {'needed':>7} {'stays':>13} {'peak':>13}   of the weights (anon)"
    ]
    for row in rows:
        r, stays, peak = row["ratios"], row["stays"], row["peak"]
        line = f"{row['shape']:<14} {row['dtype']:<9} {row['weights']:8.0f} {row['needed']:7.0f}"
        line += f" {stays['all']:6.0f} ({stays['anonymous']:4.0f}) {peak['all']:6.0f} ({peak['anonymous']:4.0f})"
        line += f"   stays {r['stays_all']:.2f} ({r['stays_anonymous']:.2f})"
        lines.append(f"{line}, peak {r['peak_all']:.2f} ({r['peak_anonymous']:.2f}), {row['seconds']:.1f} s")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llamagen-l", "janus-1b"], choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument(
        "--folder", type=Path, help="where to keep the models from run to run (else a temporary folder)"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--load", nargs=3, metavar=("MODEL", "WARM", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.load:
        loaded_here(*options.load)
        return
    rows, writers = [], {"llamagen": write_llamagen, "janus": write_janus}
    with tempfile.TemporaryDirectory() as scratch:
        root = options.folder or Path(scratch)
        for shape in tqdm(options.shapes, unit="shape", disable=None):
            kind, counts = shape.partition("-")[0], {}
            for name in dict.fromkeys((f"{kind}-tiny", shape)):
                folder = root / name
                if not (folder / "counts.json").is_file():
                    folder.mkdir(parents=True, exist_ok=True)
                    made = writers[kind](folder, name.endswith("tiny"))
                    (folder / "counts.json").write_text(json.dumps(made))
                counts = json.loads((folder / "counts.json").read_text())
            for dtype in options.dtypes:
                rows.append(measured(root / shape, root / f"{kind}-tiny", dtype, counts))
                print(shown(rows[-1:]).splitlines()[1], flush=True)
    print(shown(rows))
    if options.json is not None:
        write_text(options.json, json.dumps({**provenance(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
