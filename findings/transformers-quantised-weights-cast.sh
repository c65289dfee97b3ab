#!/usr/bin/env bash
# transformers 5.24.0 (with torch 2.13.0): from_pretrained casts int8 and float8 weights to floats as if they were weights.
#
# Expected: a file whose matrices are int8 or float8, without a quantization_config, is refused or at least remarked on:
#   such numbers mean nothing without the scales that lie elsewhere (beside them, or in another file).
# What happens: every number is converted to the dtype that is asked for. Nothing is missing, nothing is mismatched in
#   the loading info, nothing warns; the model runs and gives finite logits that have little to do with the network's.
# Seen 2026-11-30, a two-layer Llama, per-row int8 without its scales and float8 after a division by 0.01: loading info
#   empty both times, logits finite; the likeliest word is the right one for 5 and 7 of 64 words.
# Why it matters: an image generator made of such a file draws noise and exits with success, and the copy of a checkpoint
#   that lost its quantization_config on the way looks like a model that was badly trained.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1
"$work/venv/bin/python" - <<'PY'
import sys
import warnings

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__, "Python", sys.version.split()[0])
torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).eval()
for weight in model.parameters():
    if weight.ndim == 2:
        torch.nn.init.normal_(weight, std=0.2)
words = torch.arange(64)[:, None]
with torch.no_grad():
    right = model(words).logits[:, -1].argmax(-1)
model.save_pretrained("model")
whole = load_file("model/model.safetensors")


def in_bytes(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8)


def in_float8(weight):
    return (weight / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn)


changed = False
for name, store in (("int8", in_bytes), ("float8_e4m3fn", in_float8)):
    stored = {key: store(value) if value.ndim == 2 else value for key, value in whole.items()}
    save_file(stored, "model/model.safetensors", {"format": "pt"})
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            loaded, info = LlamaForCausalLM.from_pretrained("model", dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        sys.exit(f"the behaviour has changed: {name}: {type(error).__name__}: {error}")
    with torch.no_grad():
        logits = loaded.eval()(words).logits[:, -1]
    told = [key for key, value in info.items() if value]
    agree = int((logits.argmax(-1) == right).sum())
    print(f"{name}: loading info tells {told}, {len(said)} warnings, finite {bool(logits.isfinite().all())}, "
          f"the right word for {agree} of 64")
    changed = changed or bool(told or said) or agree > 32
if changed:
    sys.exit("the behaviour has changed")
PY
