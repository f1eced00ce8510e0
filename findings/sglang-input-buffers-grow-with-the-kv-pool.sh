#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SGLang keeps input buffers for batches outside CUDA graphs with a row for every token slot of the KV
# pool, 48 bytes each, though chunked prefill bounds a batch to some thousand tokens. Beside a large
# model's keys and values that is little. Who has more slots in the same memory (quantized, compressed
# or small KV) pays it for each of them, in memory that no KV budget holds.
# Needs uv and Python 3.11; runs on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
uv venv --quiet --python 3.11 "$work/env"
VIRTUAL_ENV=$work/env uv pip install --quiet sglang==0.5.23 torch==2.14.1
cat >"$work/show.py" <<'PYTHON'
import inspect
from importlib.metadata import version

import torch
from sglang.srt.model_executor.cuda_graph_buffer_registry import build_decode_registry
from sglang.srt.model_executor.runner.eager_runner import EagerRunner

print("sglang", version("sglang"), "torch", version("torch"))


def buffer_bytes(tokens: int) -> int:
    registry = build_decode_registry(
        device=torch.device("cpu"),
        max_bs=8,
        max_num_token=tokens,
        seq_len_fill_value=0,
        cache_loc_dtype=torch.int64,
        register_global_num_tokens=False,
        share_pool=False,
    )
    return sum(slot.buffer.nbytes for slot in registry._slots.values())


per_token = (buffer_bytes(200_000) - buffer_bytes(100_000)) / 100_000
print(f"input buffers: {per_token:g} bytes per token that a batch may have")
source = inspect.getsource(EagerRunner.__init__)
rule = next(line.strip() for line in source.splitlines() if "max_total_num_tokens" in line)
print(f"how many tokens EagerRunner makes them for: {rule}")
assert per_token == 48, "the bytes per token have changed"
assert rule.startswith("prefill_ceiling = max(mr.max_total_num_tokens"), "the rule has changed"
print("so they grow with the KV pool, whatever --chunked-prefill-size allows a batch to be")
PYTHON
"$work/env/bin/python" -P "$work/show.py" 2>&1 | grep -v -i warn
