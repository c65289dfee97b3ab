#!/usr/bin/env bash
# transformers 5.24.0 (with torch 2.13.0): JanusVQVAE looks codes up in two different codebooks.
#
# Expected: the quantiser gives a vector that IS the entry of code i (as decoding uses it) the code i back: distance
#   zero. In the autoencoder that Janus comes with (VQ-16, l2-normalised codes) rows are normalised in both directions.
# What happens: get_codebook_entry, used for decoding, scales rows to length one; forward, used for encoding,
#   measures distances to the rows as stored. With rows of different lengths most entries get other codes: the short
#   rows win. Only stored rows of one length are safe. Shapes and losses look right, nothing warns.
# Seen 2026-11-30, 256 rows of 8 numbers, share of codes that come back: rows as initialised 52% (136 codes used),
#   rows drawn from a normal distribution 17% (44 used), the same rows normalised before 100%.
# Why it matters: tokenising pictures with a checkpoint whose rows are not normalised (one's own training, a
#   conversion) gives wrong tokens for fine-tuning and editing, while drawing pictures still works.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1
"$work/venv/bin/python" - <<'PY'
import sys

import torch
import transformers
from torch.nn.functional import normalize
from transformers import JanusVQVAE, JanusVQVAEConfig

print("transformers", transformers.__version__, "torch", torch.__version__, "Python", sys.version.split()[0])
torch.manual_seed(0)
model = JanusVQVAE(
    JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=256,
        latent_channels=16,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
        num_patches=16,
    )
)
rows = model.quantize.embedding.weight.data
codes = torch.arange(256)


@torch.no_grad()
def come_back(name):
    """Share of codes whose entry is encoded as that code: by the model, and by lengths one on both sides."""
    entries = model.quantize.get_codebook_entry(codes[None])  # [1, 8, 16, 16]
    _, _, found = model.quantize(entries)
    flat = entries[0].flatten(1).T
    intended = (flat @ normalize(rows, dim=-1).T).argmax(-1)
    shares = [(c == codes).double().mean().item() for c in (found, intended)]
    print(f"{name}: {shares[0]:.0%} by the model ({len(found.unique())} codes used), {shares[1]:.0%} as intended")
    return shares


initial = come_back("rows as initialised")
rows.copy_(torch.randn(256, 8))
drawn = come_back("rows of a normal distribution")
rows.copy_(normalize(rows, dim=-1))
unit = come_back("the same, normalised")
same = initial[0] < 0.8 and drawn[0] < 0.4 and unit[0] == 1 and initial[1] == drawn[1] == unit[1] == 1
sys.exit(0 if same else "not the recorded behaviour any more")
PY
