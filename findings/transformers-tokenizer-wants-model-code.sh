#!/usr/bin/env bash
# transformers 5.24.0 (with torch 2.13.0): AutoTokenizer asks whether to run the model's code for a tokenizer that needs none.
#
# Expected: tokenizer_config.json names Qwen2Tokenizer, a class of the library, so that AutoTokenizer reads the files and
#   nothing of the model's code is spoken of.
# What happens: where the same folder's config.json has a model type of its own and an auto_map (as NextStep-1's has), the
#   call says that the folder "contains custom code which must be executed to correctly load the model" and asks on the
#   terminal, for 15 seconds. It need not be: answered n, or without a terminal, the very tokenizer comes back.
#   trust_remote_code=False says and asks nothing, and gives it too; so does passing any config=.
# Seen 2026-11-30: left out and answered n: asked, Qwen2Tokenizer; False: Qwen2Tokenizer, not asked; config=Qwen2Config():
#   Qwen2Tokenizer, not asked.
# Why it matters: a yes runs whatever code the folder brings, for a tokenizer that works without; and a job whose standard
#   input is an open pipe stands still for 15 seconds in every process.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1
cat > "$work/try.py" <<'PY'
import contextlib
import io
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, Qwen2Config, Qwen2Tokenizer

print("transformers", transformers.__version__, "torch", torch.__version__, "Python", sys.version.split()[0])
folder = Path("model")
letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
Qwen2Tokenizer(vocab={c: i for i, c in enumerate([*letters, "Ġ", "<|endoftext|>"])}, merges=[]).save_pretrained(folder)
own = {"model_type": "a-model-of-its-own", "auto_map": {"AutoConfig": "own_code.OwnConfig"}}
(folder / "config.json").write_text(json.dumps(own))
(folder / "own_code.py").write_text("from transformers import Qwen2Config as OwnConfig\n")
named = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
print("tokenizer_config.json names", named)


def loaded(name, **options):
    """The tokenizer's class, and whether something was asked."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        found = type(AutoTokenizer.from_pretrained(folder, **options)).__name__
    asked = "Do you wish to run the custom code" in said.getvalue()
    print(f"{name}: {found}, {'asked' if asked else 'not asked'}")
    return found, asked


left_out = loaded("trust_remote_code left out, answered n")
strict = loaded("trust_remote_code=False", trust_remote_code=False)
given = loaded("config=Qwen2Config()", config=Qwen2Config())
if (left_out, strict, given) != ((named, True), (named, False), (named, False)):
    sys.exit("the behaviour has changed")
PY
"$work/venv/bin/python" "$work/try.py" <<< n
